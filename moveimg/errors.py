"""Error messages on one line, and plain data read into pydantic models."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # importing pydantic takes longer than all else that `moveimg --help` needs
    from pydantic import TypeAdapter, ValidationError
    from pydantic_core import ErrorDetails

T = TypeVar("T")


def shorten(value: object, limit: int = 60) -> str:
    """The repr of a value on one line of at most `limit` characters."""
    if isinstance(value, str | bytes):
        value = value[: limit + 1]  # repr of a long text takes time, too
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # an integer of more digits than Python prints
        text = "a number too long to print"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def list_names(names: Iterable[str], limit: int = 5) -> str:
    """The first names, comma-separated, and the number of those left out."""
    names = list(names)
    shown = ", ".join(name if len(name) <= 60 else name[:57] + "..." for name in names[:limit])
    more = len(names) - limit
    return f"{shown} and {more} more" if more > 0 else shown or "none"


def validate(kind: type[T] | TypeAdapter[T], data: Any, origin: str) -> T:
    """An instance of `kind`, a pydantic model or TypeAdapter, from plain data.

    Raises ValueError: one line with `origin`, the key and the value.
    """
    from pydantic import TypeAdapter, ValidationError

    adapter: TypeAdapter[T] = kind if isinstance(kind, TypeAdapter) else TypeAdapter(kind)
    try:
        return adapter.validate_python(data)
    except ValidationError as error:
        raise ValueError(f"{origin}: {one_line(error)}") from None
    except RecursionError:
        raise ValueError(f"{origin}: nested too deeply") from None


def one_line(error: ValidationError) -> str:
    """The first problem of a pydantic error as `key.path: what is expected (got value)`."""
    problems = error.errors(include_url=False)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return _describe_problem(problems[0]) + more


def _describe_problem(problem: ErrorDetails) -> str:
    path, context = [str(part) for part in problem["loc"]], problem.get("ctx", {})
    match problem["type"]:
        case "extra_forbidden":
            message = "unknown key"
        case "missing":
            message = "missing"
        case "value_error":
            message = problem["msg"].removeprefix("Value error, ")
        case "union_tag_invalid":
            path.append("kind")
            message = f"expected one of {context['expected_tags']} (got {shorten(context['tag'])})"
        case "union_tag_not_found":
            path.append("kind")
            message = "missing"
        case _:
            message = f"{problem['msg']} (got {shorten(problem['input'])})"
    where = ".".join(part if len(part) <= 60 else part[:57] + "..." for part in path)
    return f"{where}: {message}" if where else message


def describe(error: BaseException, limit: int = 500) -> str:
    """The message of an error on one line; of an OSError with its path."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        path, text = error.filename2 or error.filename, error.strerror
        if isinstance(error, FileExistsError):  # raised by mkdir
            text = "is a file, expected a folder"
        text = f"{path}: {text}" if path else text
    text = " ".join(text[: 4 * limit].split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
