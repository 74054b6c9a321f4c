"""Settings from YAML files as plain data, with base files and overrides.

A file may name another, or a recipe, as its `base:`; its own keys win. On the command line
`--set model.memory.slots=6` overrides a key by its dotted path.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from moveimg import files
from moveimg.config import recipes
from moveimg.errors import shorten
from moveimg.files import parse_yaml

SUFFIXES = (".yaml", ".yml")


def read_yaml(source: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The settings of a file or recipe over its bases, then the `key.path=value` overrides.

    Raises FileNotFoundError for a missing file, ValueError for one without keys and values.
    """
    data = _read_with_bases(str(source), Path(), ())
    for override in overrides:
        key, equals, text = override.partition("=")
        if not key or not equals:
            raise ValueError(f"--set {shorten(override)}: expected key.path=value")
        nested: Any = parse_yaml(text, f"--set {override[:60]}")
        for part in reversed(key.split(".")):
            nested = {part: nested}
        data = _merge(data, nested)
    return data


def is_recipe(name: str) -> bool:
    """Whether a name is a recipe's. Raises ValueError for one whose part does not fit its model."""
    try:
        return bool(re.fullmatch(recipes.NAME, name) and read_yaml(name))
    except FileNotFoundError:
        return False


def yaml_of(name: str) -> str:
    """A recipe as YAML: its file, or for a name put together from parts all its settings.

    Raises FileNotFoundError for an unknown name.
    """
    if path := recipes.find_recipe(name):
        return path.read_text(encoding="utf-8")
    return yaml.safe_dump(read_yaml(name), sort_keys=False, default_flow_style=None)


def _read_with_bases(source: str, folder: Path, seen: tuple[str, ...]) -> dict[str, Any]:
    """The settings of a file, its path relative to `folder`, or of a recipe."""
    path = folder / source
    if not (path.is_file() or source.endswith(SUFFIXES)):
        path = recipes.find_recipe(source) or Path(source)
    if str(path.resolve()) in seen or len(seen) > 20:
        raise ValueError(f"{path}: `base` leads back to itself")
    seen = (*seen, str(path.resolve()))
    if path.is_file():
        data = files.read_yaml(path)
    elif source.endswith(SUFFIXES):
        raise FileNotFoundError(f"{path}: no such config file")
    else:
        data = recipes.compose(source, lambda name: _read_with_bases(name, Path(), seen))
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected keys and values, got {type(data).__name__}")
    base = data.pop("base", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise ValueError(f"{path}: base is {shorten(base)}, expected a file or a recipe")
    return _merge(_read_with_bases(base, path.parent, seen), data)


def _merge(base: Any, over: Any) -> Any:
    """Merge `over` into `base` key by key; a new `kind` replaces the group, whose keys differ."""
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    if "kind" in over and over["kind"] != base.get("kind"):
        return over
    return base | {key: _merge(base.get(key), value) for key, value in over.items()}
