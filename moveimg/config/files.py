"""Settings from YAML files and recipes as plain data, with base files and overrides.

A file may name another, or a recipe, as its `base:`; its own keys win. On the command line
`--set model.memory.slots=6` overrides a key by its dotted path. The name of a recipe is a file of
configs/, or another recipe's and one more part (FORMS).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from moveimg import files
from moveimg.config.model import MLAConfig, ModelConfig
from moveimg.errors import shorten, validate

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" if (ROOT / "configs").is_dir() else ROOT.parent / "configs"  # a checkout
SUFFIXES = (".yaml", ".yml")
MODELS = {"digits": "digits-move", "fashion": "fashion-move"}  # the bundled models' recipes
FORMS = {
    "imagenet-{b,l,xl,xxl,3b}-{256,384}": "A size of LlamaGen's at 256 or 384 pixels; add to it:",
    "...-mla": "latent attention;",
    "...-standard": "no value memory;",
    "...-lave-{x1,x2}": "LaVE, a table on every second layer or on all;",
    "...-move-{x1,x2,x4,...}": "MoVE, n_layer / 2 slots times the number.",
}


def read_yaml(source: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The settings of a file or recipe over its bases, then the `key.path=value` overrides.

    Raises FileNotFoundError for a missing file, ValueError for one without keys and values.
    """
    return override(_read(str(source), Path()), overrides)


def override(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Settings with `key.path=value` overrides, whose values are YAML."""
    for text in overrides:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise ValueError(f"--set {text[:60]}: expected KEY=VALUE")
        nested: Any = files.parse_yaml(value, f"--set {text[:60]}")
        for part in reversed(key.split(".")):
            nested = {part: nested}
        data = _merge(data, nested)
    return data


def list_recipes() -> dict[str, str]:
    """The recipes' names with a line about each: files by their first line, then the forms."""
    models = {name: f"The bundled model {name}: {recipe}." for name, recipe in MODELS.items()}
    paths = sorted(CONFIGS.glob("*.yaml"))
    return models | {path.stem: path.open().readline()[2:].rstrip() for path in paths} | FORMS


def yaml_of(name: str) -> str:
    """A recipe as YAML: its file, or for a name put together from parts all its settings.

    Raises FileNotFoundError for an unknown name.
    """
    if path := _find_recipe(name):
        return path.read_text(encoding="utf-8")
    return yaml.safe_dump(read_yaml(name), sort_keys=False, default_flow_style=None)


def _find_recipe(name: str) -> Path | None:
    path = CONFIGS / f"{name}.yaml"
    return path if re.fullmatch("[a-z0-9-]{1,100}", name) and path.is_file() else None


def _read(source: str, folder: Path, depth: int = 0) -> dict[str, Any]:
    """The settings of a file, its path relative to `folder`, or of a recipe."""
    path = folder / source
    if not (path.is_file() or source.endswith(SUFFIXES)):
        path = _find_recipe(source) or Path(source)
    is_file = path.is_file() or source.endswith(SUFFIXES)
    data = files.read_yaml(path) if is_file else _compose(source)
    base = data.pop("base", None) if isinstance(data, dict) else data
    if not isinstance(data, dict) or not isinstance(base, str | None):
        raise ValueError(f"{path}: expected keys and values, `base` a file or recipe (got {base})")
    if depth > 20:
        raise ValueError(f"{path}: `base` leads back to itself")
    return data if base is None else _merge(_read(base, path.parent, depth + 1), data)


def _merge(base: Any, over: Any) -> Any:
    """Merge `over` into `base` key by key; a new `kind` replaces the group, whose keys differ."""
    both = isinstance(base, dict) and isinstance(over, dict)
    if not both or over.get("kind", base.get("kind")) != base.get("kind"):
        return over
    return base | {key: _merge(base.get(key), value) for key, value in over.items()}


def _compose(name: str) -> dict[str, Any]:
    """The settings that a name's last part adds to the recipe it names as `base`."""
    if name in MODELS:
        return {"base": MODELS[name]}
    if match := re.fullmatch(r"imagenet-(b|l|xl|xxl|3b)-(256|384)", name):
        settings: dict[str, Any] = {"model": {"size": match[1].upper()}}
        if match[1] not in ("b", "l"):
            settings |= {"distributed": "fsdp", "activation_checkpointing": True}
        return {"base": f"imagenet-{match[2]}", "out": f"runs/{name}", **settings}
    part = r"(?:(mla|standard)|(lave|move)(?:-x([1-9]\d{0,2}))?)"
    match = re.fullmatch(rf"([a-z0-9-]{{1,90}}?)-{part}", name)
    base = match[1] if match else ""
    if match and _find_recipe(base) is None and _find_recipe(f"{base}-base"):
        base = f"{base}-base"
    data = _read(base, Path()) if base else {}
    if match is None or "model" not in data:
        raise FileNotFoundError(
            f"no config {shorten(name)}: expected a YAML file or a recipe (see `moveimg configs`)"
        )
    model, scale = validate(ModelConfig, data["model"], base), int(match[4] or 1)
    attention = model.attention
    value_width = attention.kv_rank if isinstance(attention, MLAConfig) else model.width
    slots = round(scale * model.n_layer * model.width / (2 * value_width))
    changes: dict[str, dict[str, Any]] = {
        "mla": {"kind": "mla", "kv_rank": model.width // 4, "rope_dim": model.head_dim // 8 * 4},
        "standard": {"kind": "none"},
        "lave": {"kind": "lave", "layers": {1: "alternate", 2: "all"}.get(scale, scale)},
        "move": {"kind": "move", "slots": max(1, slots)},
    }
    slot, change = "attention" if match[2] == "mla" else "memory", changes[match[2] or match[3]]
    return {"base": base, "out": f"runs/{name}", "model": {slot: change}}
