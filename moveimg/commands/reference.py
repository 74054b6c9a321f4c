"""The reference of all YAML keys, from the pydantic models of moveimg.config."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel

from moveimg.config import TokenizerTrainConfig, TrainConfig
from moveimg.tables import markdown_table

HEADER = """\
# All keys of the configs

Made by `moveimg config-reference` from moveimg/config/. A key of a nested group is written
`group.key` on the command line: `--set optimizer.lr=1e-3`. A file may name another file or a recipe
(`moveimg configs`) as its `base:`; its own keys win. `model.size` (B, L, XL, XXL, 3B, digits) sets
`n_layer`, `n_head` and `width`. A group with a `kind` takes the keys of that kind."""
LIMITS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most",
          "exclusiveMaximum": "below", "multipleOf": "a multiple of"}  # fmt: skip


def config_reference() -> str:
    """Markdown tables of every key: its type, default and meaning."""
    sections = {}
    runs: dict[str, type[BaseModel]] = {
        "train": TrainConfig,
        "train-tokenizer": TokenizerTrainConfig,
    }
    for name, run in runs.items():
        schema = run.model_json_schema()
        sections[name] = f"## `moveimg {name}`\n\n{_table(schema)}"
        for group, described in schema["$defs"].items():
            sections.setdefault(group, f"### {group}\n\n{_table(described)}")
    return "\n\n".join([HEADER, *sections.values()])


def _table(schema: dict[str, Any]) -> str:
    """The description of a group and its keys, from a JSON schema."""
    rows = []
    for key, field in schema["properties"].items():
        default = field.get("default")
        shown = "see there" if isinstance(default, dict) else f"`{json.dumps(default)}`"
        required = key in schema.get("required", [])
        rows.append({
            "key": f"`{key}`",
            "type": _type(field),
            "default": "required" if required else shown,
            "meaning": field.get("description", "").replace("|", "\\|"),
        })  # fmt: skip
    return f"{schema['description']}\n\n{markdown_table(rows)}"


def _type(field: dict[str, Any]) -> str:
    """The type of a key in words, with its range; a group is a link to its section."""
    if "$ref" in field:
        name = field["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    if values := field.get("enum", [field["const"]] if "const" in field else []):
        return ", ".join(f"`{value}`" for value in values)
    if choices := field.get("anyOf") or field.get("oneOf"):
        return " or ".join(_type(choice) for choice in choices if choice.get("type") != "null")
    if field.get("type") == "array":
        length = f" of {field['maxItems']}" if "maxItems" in field else ""
        return f"list{length}: {_type(field.get('items') or field['prefixItems'][0])}"
    limits = [f"{words} {field[limit]:g}" for limit, words in LIMITS.items() if limit in field]
    return ", ".join([field.get("type", "any"), *limits])
