"""The application, the options that several commands share, and errors on one line."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperGroup

from moveimg import __version__
from moveimg.config import SamplingSettings
from moveimg.errors import describe, shorten, validate

UsageError: Any = typer.BadParameter.__bases__[0]  # typer's own from 0.2x on, click's before
BUNDLED = Path(__file__).parents[1] / "bundled"
MAX_SEED = 2**32 - 1
MAX_IMAGES = 10_000  # of one call
# The help lists the commands in this order.
PANELS = {
    "Use": ("sample", "edit", "score", "demo", "serve", "info", "inspect", "bench"),
    "Train": ("encode", "train-tokenizer", "train", "compare", "configs", "config-reference"),
    "Evaluate": ("evaluate", "reconstruct"),
    "Convert": ("convert", "push"),
}


@contextmanager
def errors_on_one_line() -> Iterator[None]:
    """End the command with one line on stderr: exit code 2 for bad input, 130 for Ctrl-C."""
    try:
        yield
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # a group's name alone prints its help
            raise
        _fail(_usage(error))
    except (ValueError, OSError, OverflowError) as error:
        if os.environ.get("MOVEIMG_TRACEBACK"):
            raise
        _fail(describe(error))
    except (MemoryError, RuntimeError) as error:
        text = str(error).lower()
        if isinstance(error, RuntimeError) and not (
            "out of memory" in text or "can't allocate memory" in text
        ):
            raise
        _fail(f"not enough memory ({describe(error, 200)})")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise typer.Exit(130) from None


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(2) from None


def _usage(error: Any) -> str:
    """What typer says of an option or argument, with the refused value and where help is."""
    message = " ".join(error.format_message()[:600].split()).rstrip(".")[:300]
    problems: Any = getattr(error.__cause__, "errors", list)()  # pydantic's, of a range
    if problems and (value := shorten(problems[0]["input"])) not in message:
        message += f" (got {value})"
    hint = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
    return f"{message[:1].lower()}{message[1:]}{hint}"


class Commands(TyperGroup):
    """The group of all commands, listed in panels."""

    def make_context(self, *args: Any, **extra: Any) -> Any:
        with errors_on_one_line():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        with errors_on_one_line():
            return super().invoke(ctx)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for panel, names in PANELS.items():
            rows = [(name, self.commands[name].get_short_help_str(200)) for name in names]
            with formatter.section(panel):
                formatter.write_dl(rows)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: rich would take a quarter of a second to load
    pretty_exceptions_enable=False,
    help="Generate images from class labels, one discrete code after another, with MoVE.",
)

Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, mps, ...; default: an accelerator if there is one")
]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float64; default: bfloat16 on recent CUDA GPUs"),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a key of the config."),
]
Restart = Annotated[bool, typer.Option("--restart", help="Start the run again from its beginning.")]
Seed = Annotated[
    int, typer.Option(min=0, max=MAX_SEED, help="Image i is drawn with the seed SEED + i.")
]
Num = Annotated[
    int,
    typer.Option("--num", "--num-samples", min=1, max=MAX_IMAGES, help="Images (per class)."),
]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="The model, in place of the argument.")
]
Views = Annotated[
    int | None, typer.Option(min=1, max=65536, help="Views per batch; default: by device.")
]
ImageSize = Annotated[
    str, typer.Option("--size", help="Pixels of a square's side, or HEIGHTxWIDTH.")
]
BatchSize = Annotated[int, typer.Option(min=1, max=65536, help="Images in one batch.")]
Quantize = Annotated[
    str | None,
    typer.Option(help="int8: 8-bit matrices, faster on a CPU; codes then depend on the batch."),
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile the decoding step: slow start, then faster.")
]


def show_version(asked: bool) -> None:
    """Print the version and end the command."""
    if asked:
        print(f"moveimg {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    # the options before a command's name; no docstring, because it would replace the app's help
    pass


def command(function: Callable[..., Any], group: typer.Typer = app) -> Callable[..., Any]:
    """Register a function as the command of its name (`train_tokenizer` is `train-tokenizer`)."""
    return group.command(name=function.__name__.replace("_", "-"))(function)


def sampling_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Replace a command's parameter `settings` by one option for each of SamplingSettings.

    The function receives a dictionary of the settings that were set on the command line, checked.
    """
    hints = get_type_hints(function, include_extras=True)
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name != "settings":
            parameters.append(parameter.replace(annotation=hints[parameter.name]))
            continue
        for name, field in SamplingSettings.model_fields.items():
            kind: Any = field.annotation if field.annotation in (int, float) else str
            text = str(field.description)
            text = f"{text[:1].upper()}{text[1:]}; default: the model's own."
            hint = Annotated[kind | None, typer.Option(help=text)]
            option = inspect.Parameter(name, parameter.kind, default=None, annotation=hint)
            parameters.append(option)

    @wraps(function)
    def run(**arguments: Any) -> Any:
        given = {name: arguments.pop(name) for name in SamplingSettings.model_fields}
        settings = {name: value for name, value in given.items() if value is not None}
        validate(SamplingSettings, settings, "sampling settings")
        return function(**arguments, settings=settings)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def check_model_name(name: str) -> None:
    """Raise FileNotFoundError for a name that can be no model, before torch is imported.

    The full check is moveimg.pipeline.resolve's: Hub ids and published names are looked up there.
    """
    if any((folder / "config.json").is_file() for folder in (Path(name), BUNDLED / name)):
        return
    if Path(name).is_dir():
        raise FileNotFoundError(f"{name}: no model here (it has no config.json)")
    if name.startswith((".", "/")) or not ("/" in name or name.startswith("llamagen-")):
        bundled = ", ".join(sorted(path.name for path in BUNDLED.iterdir()))
        raise FileNotFoundError(
            f"no model {name!r}: expected a model directory, a bundled name ({bundled}), public "
            "weights (llamagen-...) or a Hugging Face Hub id (owner/name)"
        )


def is_config(name: str) -> bool:
    """Whether an argument that may be a model or a config is a config.

    It is where the name ends as a YAML file's does, or is a recipe's and no model's.
    """
    from moveimg.config import SUFFIXES, is_recipe

    if name.endswith(SUFFIXES):
        return True
    return not (Path(name).is_dir() or (BUNDLED / name).is_dir()) and is_recipe(name)


def refuse_overrides(overrides: list[str] | None) -> None:
    """Raise ValueError for --set beside a model, whose settings cannot change."""
    if overrides:
        raise ValueError(f"--set {overrides[0]}: expected a config, whose keys it overrides")


def check_source(path: str | Path, what: str) -> None:
    """Raise FileNotFoundError where `path` is neither a file or folder nor a bundled name."""
    if not Path(path).exists() and not (BUNDLED / path).exists():
        raise FileNotFoundError(f"{path}: no such {what}")


def check_images(source: str) -> None:
    """Raise FileNotFoundError for an absolute path that does not exist; other names come later.

    A name may be a data set's or a Hub id: to know them takes torch.
    """
    if Path(source).is_absolute() and not Path(source).exists():
        raise FileNotFoundError(f"{source}: no such folder of images")


def one_model(argument: str | None, option: str | None) -> str:
    """The model of a command that takes it as its argument or as --model.

    Raises ValueError unless exactly one of the two is given.
    """
    if (argument is None) == (option is None):
        given = "both" if argument else "neither"
        raise ValueError(f"expected a model, as the argument or as --model (got {given})")
    return str(argument or option)


def device_of(name: str | None) -> Any:
    """The torch device of a --device option; on a CPU the process keeps freed memory from now."""
    from moveimg.device import keep_memory, pick_device

    device = pick_device(name)
    if device.type == "cpu":
        keep_memory()
    return device


@contextmanager
def processes_of(device: str | None) -> Iterator[Any]:
    """Yield the World of a command that torchrun may have started; see device_of."""
    from moveimg.device import keep_memory
    from moveimg.dist import processes

    with processes(device) as world:
        if world.device.type == "cpu":
            keep_memory()
        yield world


def count(number: int, noun: str) -> str:
    """`1 image`, `2,000 images`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def numbers(result: dict[str, float]) -> str:
    """`loss 1.234, accuracy 0.5`: a dictionary of numbers on one line."""
    return ", ".join(f"{key} {value:.4g}" for key, value in result.items())


def print_json(data: Any) -> None:
    """Print plain data as indented JSON."""
    print(json.dumps(data, indent=2))
