"""The typer application, options of several commands, and errors on one line."""

from __future__ import annotations

import ast
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NoReturn

from typer import Argument, Exit, Option, Typer
from typer.core import TyperGroup
from typer.exceptions import TyperException
from typer.main import get_group

from moveimg import __version__

MODULES = ("sample", "serve", "inspect", "train", "evaluation", "convert")  # in the help's order
GROUPS = {  # the modules and help texts of groups of commands
    "bench": ("inspect", "Measure this machine's speed."),
    "convert": (
        "convert",
        "Convert LlamaGen's or taming's weights, or a model, to a new directory.",
    ),
}
OUT_OF_MEMORY = ("memoryerror", "out of memory", "can't allocate memory")


class Group(TyperGroup):
    """A group whose help shows the whole first sentence of each command."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(k, c.get_short_help_str(200)) for k, c in self.commands.items()])


class Commands(TyperGroup):
    """The group of all commands: their errors are one line on stderr and exit code 2."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(find_commands())

    def get_command(self, ctx: Any, name: str) -> Any:
        """Import the command's module, which registers it."""
        if name not in find_commands():
            return None
        import_module(f"moveimg.commands.{find_commands()[name][0]}")
        return get_group(app).commands[name]

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        try:
            code = super().main(*args, **extra | {"standalone_mode": False})
            if code == 130:
                print("interrupted", file=sys.stderr)
            raise SystemExit(code)
        except TyperException as error:
            message = describe_usage(error)
        except Exception as error:
            memory = any(sign in repr(error).lower() for sign in OUT_OF_MEMORY)
            expected = memory or isinstance(error, ValueError | OSError | OverflowError)
            if os.environ.get("MOVEIMG_TRACEBACK") or not expected:
                raise
            from moveimg.errors import describe

            message = f"error: {'not enough memory: ' if memory else ''}{describe(error)}"
        print(message, file=sys.stderr)
        raise SystemExit(2)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, about) for name, (_, about) in find_commands().items()])


@cache
def find_commands() -> dict[str, tuple[str, str]]:
    """The module and the first sentence of the help of each command, by its name.

    They are read from the sources, since importing all modules would triple the time of --help.
    """
    commands: dict[str, tuple[str, str]] = {}
    for module in MODULES:
        source = Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef):
                decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
                about = (ast.get_docstring(node) or "").partition("\n")[0]
                if "command" in decorators:
                    commands[node.name.replace("_", "-")] = module, about
    return commands | GROUPS


def describe_usage(error: Any) -> str:
    """typer's message on an option or argument, with the refused value and the help command."""
    if type(error).__name__ == "NoArgsIsHelpError":  # a group's name alone prints its help
        return error.format_message()
    from moveimg.errors import shorten

    message = " ".join(error.format_message()[:600].split()).rstrip(".")[:300]
    problems: Any = getattr(error.__cause__, "errors", list)()  # pydantic's, for a range
    got = f" (got {shorten(problems[0]['input'])})" if problems else ""
    hint = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
    return f"error: {message[:1].lower()}{message[1:]}{got}{hint}"


app = Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: rich would take a quarter of a second to load
    pretty_exceptions_enable=False,
)
command = app.command()  # the name of `train_tokenizer` is `train-tokenizer`


def make_group(name: str) -> Typer:
    """Add a group of commands to the application."""
    group = Typer(cls=Group, no_args_is_help=True, rich_markup_mode=None, help=GROUPS[name][1])
    app.add_typer(group, name=name)
    return group


Model = Annotated[str, Option(help="A name, a model directory or a Hub id.")]
ModelOrConfig = Annotated[str, Argument(metavar="MODEL", help="A model, YAML file or recipe.")]
Config = Annotated[str, Argument(help="A YAML file or a recipe: see `moveimg configs`.")]
Classes = Annotated[list[str] | None, Argument(help="Class names or indices.")]
Device = Annotated[str | None, Option(help="cpu, cuda, mps, ...; default: an accelerator, or cpu.")]
Dtype = Annotated[str | None, Option(help="float32, bfloat16 or float64; default: by device.")]
Set = Annotated[list[str] | None, Option(metavar="KEY.PATH=VALUE", help="Override a setting.")]
Restart = Annotated[bool, Option("--restart", help="Delete the run, and start over.")]
Seed = Annotated[int, Option(min=0, max=2**32 - 1, help="Image i has the seed SEED + i.")]
Num = Annotated[int, Option(min=1, max=10_000, help="Images (per class).")]
ImageSize = Annotated[str, Option("--size", help="Pixels of a square's side, or HEIGHTxWIDTH.")]
BatchSize = Annotated[int, Option(min=1, max=65536, help="Images in one batch.")]
Quantize = Annotated[str | None, Option(help="int8 weights on a CPU; codes depend on the batch.")]
Bank = Annotated[str | None, Option(help="The bank's rows: int8, int4, disk (read if used), cpu.")]
Compile = Annotated[bool, Option("--compile", help="Compile the decoding step: slow to start.")]


@app.callback(invoke_without_command=True)
def main(version: bool = Option(False, "--version", help="Print the version.")) -> None:
    """Generate images from class labels, one discrete code after another, with MoVE."""
    if version:
        print(f"moveimg {__version__}")
        raise Exit


def sampling_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Replace a command's parameter `settings`, a dictionary, by the options that it holds."""
    from moveimg.config import SamplingSettings

    signature = inspect.signature(function, eval_str=True)
    parameters = [p for p in signature.parameters.values() if p.name != "settings"]
    for name, field in SamplingSettings.model_fields.items():
        text = f"{str(field.description).capitalize()}; default: the model's own."
        kind: Any = field.annotation
        option = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        parameters.append(option.replace(annotation=Annotated[kind | None, Option(help=text)]))

    @wraps(function)
    def run(**arguments: Any) -> Any:
        values = {name: arguments.pop(name) for name in SamplingSettings.model_fields}
        return function(**arguments, settings={k: v for k, v in values.items() if v is not None})

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def find_config(name: str, kind: type, overrides: list[str] | None) -> Any:
    """The settings of a YAML file or recipe as `kind`; None for a model, which has no overrides."""
    from moveimg.checkpoint import BUNDLED
    from moveimg.config import SUFFIXES, load_config

    if not (Path(name).is_dir() or (BUNDLED / name).is_dir()):
        try:
            return load_config(name, kind, overrides or [])
        except FileNotFoundError:
            if name.endswith(SUFFIXES):
                raise
    if overrides:
        raise ValueError(f"--set {overrides[0]}: expected a config, whose keys it overrides")
    return None


def prepare_device(name: str | None) -> Any:
    """The torch device of a --device option; on a CPU, also lets malloc keep freed memory."""
    from moveimg.device import keep_memory, pick_device

    device = pick_device(name)
    if device.type == "cpu":
        keep_memory()
    return device


@contextmanager
def open_world(device: str | None) -> Iterator[Any]:
    """Yield the World of a command started by torchrun or alone, with its device prepared."""
    from moveimg.dist import processes

    with processes(device) as world:
        prepare_device(str(world.device))
        yield world


def format_count(number: int, noun: str) -> str:
    """A number with its noun: `1 image`, `2,000 images`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_numbers(result: dict[str, float]) -> str:
    """A dictionary of numbers on one line: `loss 1.234, accuracy 0.5`."""
    return ", ".join(f"{key} {value:.4g}" for key, value in result.items())
