"""The reference of all YAML keys, made from the models of moveimg.config."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel

from moveimg.config import TokenizerTrainConfig, TrainConfig
from moveimg.tables import markdown_table

COMMANDS: dict[str, type[BaseModel]] = {
    "moveimg train": TrainConfig,
    "moveimg train-tokenizer": TokenizerTrainConfig,
}
HEADER = """\
# All keys of the configs

Made by `moveimg config-reference` from moveimg/config/. A key of a nested group is written
`group.key` on the command line: `--set optimizer.lr=1e-3`. A file may name another file or a recipe
(`moveimg configs`) as its `base:`; its own keys win. `model.size` (B, L, XL, XXL, 3B, digits) sets
`n_layer`, `n_head` and `width`. A group with a `kind` takes the keys of that kind."""
LIMITS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}


def config_reference() -> str:
    """Markdown tables of every key: its type, default and meaning."""
    sections, seen = [HEADER], set()
    for command, cls in COMMANDS.items():
        schema = cls.model_json_schema()
        sections.append(_section(f"`{command}`", "##", schema, schema.get("$defs", {})))
        for name, group in schema.get("$defs", {}).items():
            if name not in seen and "properties" in group:
                sections.append(_section(name, "###", group, schema["$defs"]))
                seen.add(name)
    return "\n\n".join(sections)


def _section(title: str, level: str, schema: dict[str, Any], groups: dict[str, Any]) -> str:
    required = schema.get("required", [])
    rows = [
        {
            "key": f"`{key}`",
            "type": _type(field),
            "default": "required" if key in required else _default(field),
            "meaning": " ".join(field.get("description", "").split()).replace("|", "\\|"),
        }
        for key, field in schema["properties"].items()
    ]
    about = " ".join(schema.get("description", "").split("\n\n")[0].split())
    table = markdown_table(rows)
    return f"{level} {title}\n\n{about}\n\n{table}" if about else f"{level} {title}\n\n{table}"


def _default(field: dict[str, Any]) -> str:
    default = field.get("default")
    if default is None:
        return "left out"
    return "see there" if isinstance(default, dict) else f"`{json.dumps(default)}`"


def _type(field: dict[str, Any]) -> str:
    """The type of a key in words, with its range; a group is a link to its section."""
    if "$ref" in field:
        name = field["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    for key in ("anyOf", "oneOf"):
        if key in field:
            kinds = [_type(part) for part in field[key] if part.get("type") != "null"]
            return " or ".join(kinds)
    kind = field.get("type", "any")
    if kind == "array":
        items = field.get("items") or (field.get("prefixItems") or [{}])[0]
        length = f" of {field['maxItems']}" if "maxItems" in field else ""
        return f"list{length}: {_type(items)}"
    limits = [f"{words} {field[limit]:g}" for limit, words in LIMITS.items() if limit in field]
    return ", ".join([kind, *limits])
