"""The app, the options that several commands take, and how bad input ends a command."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from moveimg import __version__
from moveimg.errors import describe

UsageError: Any = typer.BadParameter.__bases__[0]  # typer's own from 0.2x on, click's before


@contextmanager
def on_one_line() -> Iterator[None]:
    """An option or argument that does not fit ends the command as any other bad input does."""
    try:
        yield
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # a group alone: its help follows
            raise
        message = " ".join(error.format_message().split()).replace("Value error, ", "")
        problems: Any = getattr(error.__cause__, "errors", list)()  # pydantic's, by typer's side
        given = repr(problems[0]["input"]) if problems else ""
        told = "" if given in message else f" (got {given})"
        context = error.ctx
        hint = f" (see {context.command_path} --help)" if context else ""
        line = f"{message[:1].lower()}{message[1:].rstrip('.')}{told}{hint}"
        print(f"error: {line}", file=sys.stderr)
        raise typer.Exit(2) from None


class Commands(TyperGroup):
    """The group of all commands."""

    def make_context(self, *args: Any, **extra: Any) -> Any:
        with on_one_line():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        with on_one_line():
            return super().invoke(ctx)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: rich would take a quarter of a second to load
    pretty_exceptions_enable=False,
    help="Images from class labels, one code after another, with a Mixture of Value Embeddings.",
)

Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, mps, ... (default: an accelerator if there is one)")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16 or float64 (default: bfloat16 on CUDA from capability 8.0)"
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="override a key of the config"),
]
Restart = Annotated[bool, typer.Option(help="start over where an earlier run left its state")]


def show_version(asked: bool) -> None:
    if asked:
        print(f"moveimg {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=show_version, is_eager=True, help="print the version and end"
        ),
    ] = False,
) -> None:
    # what the command takes before the name of a command; no docstring: the help has its own
    pass


def command(function: Callable[..., Any], group: typer.Typer = app) -> Callable[..., Any]:
    """Register a command of `group`; bad input ends it with one line on stderr and exit code 2."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (ValueError, OSError) as error:
            if os.environ.get("MOVEIMG_TRACEBACK"):
                raise
            print(f"error: {describe(error)}", file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from None

    return group.command(name=function.__name__.replace("_", "-"))(run)


def device_of(name: str | None) -> Any:
    """The torch device of a --device option."""
    from moveimg.device import pick_device

    return pick_device(name)


def numbers(result: dict[str, float]) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in result.items())


def print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))
