"""Settings from YAML files as plain data, with base files and overrides.

A file may name another as its `base:`; its own keys win. On the command line
`--set model.memory.slots=6` overrides a key by its dotted path.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moveimg import files
from moveimg.errors import shorten
from moveimg.files import parse_yaml


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The settings of a file merged over its bases, then the `key.path=value` overrides.

    Raises FileNotFoundError for a missing file, ValueError for one without keys and values.
    """
    data = _read_with_bases(Path(path), ())
    for override in overrides:
        key, equals, text = override.partition("=")
        if not key or not equals:
            raise ValueError(f"--set {shorten(override)}: expected key.path=value")
        nested: Any = parse_yaml(text, f"--set {override[:60]}")
        for part in reversed(key.split(".")):
            nested = {part: nested}
        data = _merge(data, nested)
    return data


def _read_with_bases(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such config file")
    if path.resolve() in seen or len(seen) > 20:
        raise ValueError(f"{path}: `base` leads back to itself")
    data = files.read_yaml(path)
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected keys and values, got {type(data).__name__}")
    base = data.pop("base", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise ValueError(f"{path}: base is {shorten(base)}, expected the name of a file")
    return _merge(_read_with_bases(path.parent / base, (*seen, path.resolve())), data)


def _merge(base: Any, over: Any) -> Any:
    """Merge `over` into `base` key by key; a new `kind` replaces the group, whose keys differ."""
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    if "kind" in over and over["kind"] != base.get("kind"):
        return over
    return base | {key: _merge(base.get(key), value) for key, value in over.items()}
