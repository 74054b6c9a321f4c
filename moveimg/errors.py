"""One-line error messages, and validation of plain data by pydantic."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


def shorten(value: object, limit: int = 60) -> str:
    """Return the repr of a value on one line of at most `limit` characters."""
    if isinstance(value, str | bytes):
        value = value[: limit + 1]  # repr of a long text takes time, too
    try:
        return _cut(" ".join(repr(value).split()), limit)
    except ValueError:  # an integer with more digits than Python prints
        return "a number too long to print"


def list_names(names: Iterable[str], limit: int = 5) -> str:
    """Return the first `limit` names, comma-separated, and the number of further names."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(_cut(name) for name in names[:limit]) or "none") + more


def validate(kind: type[T] | TypeAdapter[T], data: Any, origin: str) -> T:
    """Validate plain data as `kind`, a pydantic model or TypeAdapter; returns the instance.

    Raises ValueError: one line with `origin`, the key and the value.
    """
    adapter: TypeAdapter[T] = kind if isinstance(kind, TypeAdapter) else TypeAdapter(kind)
    try:
        return adapter.validate_python(data)
    except ValidationError as error:
        problem, *more = error.errors(include_url=False)
    except RecursionError:
        raise ValueError(f"{origin}: nested too deeply") from None
    where = ".".join(_cut(str(part)) for part in problem["loc"])
    message = {"extra_forbidden": "unknown key", "missing": "missing"}.get(problem["type"])
    if problem["type"] == "value_error":
        message = problem["msg"].removeprefix("Value error, ")
    message = message or f"{problem['msg']} (got {shorten(problem['input'])})"
    ending = f" (and {len(more)} more)" if more else ""
    raise ValueError(": ".join(filter(None, (origin, where, message))) + ending)


def describe(error: BaseException, limit: int = 500) -> str:
    """Return the message of an error on one line, and for an OSError the path."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        path = error.filename2 or error.filename
        text = f"{path}: {error.strerror}" if path else error.strerror
    return _cut(" ".join(text[: 4 * limit].split()) or type(error).__name__, limit)


def _cut(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
