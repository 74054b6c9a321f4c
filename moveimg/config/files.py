"""YAML files as plain data: their bases, and what the command line overrides.

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
    """A file on top of its bases, with `key.path=value` overrides on top of it.

    Raises FileNotFoundError for a missing file, ValueError for one that is no keys and values.
    """
    data = _with_bases(Path(path), ())
    for override in overrides:
        key, equals, text = override.partition("=")
        if not key or not equals:
            raise ValueError(f"--set {override}: expected key.path=value")
        nested: Any = parse_yaml(text, f"--set {override}")
        for part in reversed(key.split(".")):
            nested = {part: nested}
        data = _merge(data, nested)
    return data


def _with_bases(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such config file")
    if path.resolve() in seen:
        raise ValueError(f"{path}: `base` leads back to itself")
    data = files.read_yaml(path)
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected keys and values, found {type(data).__name__}")
    base = data.pop("base", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise ValueError(f"{path}: base is {shorten(base)}, expected the name of a file")
    return _merge(_with_bases(path.parent / base, (*seen, path.resolve())), data)


def _merge(base: Any, over: Any) -> Any:
    """`over` on top of `base`, key by key. A new `kind` starts afresh: it has other keys."""
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    if "kind" in over and over["kind"] != base.get("kind"):
        return over
    return base | {key: _merge(base.get(key), value) for key, value in over.items()}
