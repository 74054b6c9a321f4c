"""The `moveimg` command. Thin: options in, one call, one line or picture out.

Heavy imports stand inside the commands, so that `moveimg --help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
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
    str | None, typer.Option(help="float32, bfloat16 or float64 (default: bfloat16 on CUDA)")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="override a key of the config"),
]
Restart = Annotated[bool, typer.Option(help="start over where an earlier run left its state")]


class Split(StrEnum):
    """Which part of an image source."""

    train = "train"
    val = "val"


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Register a command; bad input ends it with one line on stderr and exit code 2."""

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

    return app.command(name=function.__name__.replace("_", "-"))(run)


def describe(error: Exception) -> str:
    """An error on one line; an OSError with its path."""
    if isinstance(error, OSError) and error.strerror:
        path = error.filename2 or error.filename
        return f"{path}: {error.strerror}" if path else error.strerror
    return " ".join(str(error).split())


@command
def sample(
    classes: Annotated[
        list[str] | None, typer.Argument(help="indices or names (default: every class, up to 20)")
    ] = None,
    model: Annotated[str, typer.Option(help="a bundled name or a model directory")] = "digits",
    num: Annotated[int, typer.Option(min=1, help="images for each class")] = 2,
    seed: Annotated[int, typer.Option(help="image i is drawn with seed + i")] = 0,
    cfg_scale: Annotated[float | None, typer.Option(help="guidance; 1 is none")] = None,
    cfg_schedule: Annotated[
        str | None, typer.Option(help="constant, linear or power-cosine")
    ] = None,
    cfg_power: Annotated[float | None, typer.Option(help="power-cosine's exponent")] = None,
    cfg_start: Annotated[
        float | None, typer.Option(help="fraction of codes before guidance starts")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy")] = None,
    top_k: Annotated[int | None, typer.Option(help="keep the k likeliest codes; 0 is all")] = None,
    top_p: Annotated[float | None, typer.Option(help="keep this much probability")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="images generated side by side")] = 32,
    out: Annotated[Path, typer.Option(help="folder for the images")] = Path("samples"),
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Class labels -> PNGs and a labelled grid."""
    from moveimg.pictures import labelled_grid, save_png
    from moveimg.pipeline import Pipeline

    pipeline = Pipeline.from_pretrained(model, device=device, dtype=dtype)
    chosen = classes or [str(i) for i in range(min(20, len(pipeline.class_names)))]
    labels = [pipeline.label(name) for name in chosen]
    given: dict[str, Any] = {
        "cfg_scale": cfg_scale, "cfg_schedule": cfg_schedule, "cfg_power": cfg_power,
        "cfg_start": cfg_start, "temperature": temperature, "top_k": top_k, "top_p": top_p,
    }  # fmt: skip
    settings = pipeline.settings(**given)
    out.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    repeated = [label for label in labels for _ in range(num)]
    pictures = pipeline.sample(repeated, **given, seed=seed, batch_size=batch_size)
    seconds = time.perf_counter() - begun
    for i, (label, picture) in enumerate(zip(repeated, pictures, strict=True)):
        name = pipeline.class_names[label]
        about = {"model": model, "class": label, "class_name": name, "seed": seed + i}
        path = out / f"{label:04d}-{_slug(name)}-seed{seed + i}.png"
        save_png(picture, path, about | settings.model_dump())
    rows = [pictures[i : i + num] for i in range(0, len(pictures), num)]
    names = [pipeline.class_names[label] for label in labels]
    about = {"model": model, "classes": labels, "num": num, "seed": seed}
    save_png(labelled_grid(rows, names), out / "grid.png", about | settings.model_dump())
    print(f"{len(pictures)} images in {seconds:.1f} s -> {out}/ (all of them: {out / 'grid.png'})")


@command
def train(
    config: Annotated[Path, typer.Argument(help="a YAML file, as in configs/")],
    set: Set = None,
    restart: Restart = False,
    device: Device = None,
) -> None:
    """Codes or images -> model directory. The same command continues a run that was stopped."""
    from moveimg.config import TrainConfig, load_config
    from moveimg.training.generator import train_generator

    settings = load_config(config, TrainConfig, set or [])
    result = train_generator(settings, _device(device), restart)
    print(f"{settings.out}: {_numbers(result)}")


@command
def train_tokenizer(
    config: Annotated[Path, typer.Argument(help="a YAML file, as in configs/")],
    set: Set = None,
    restart: Restart = False,
    device: Device = None,
) -> None:
    """Images -> tokenizer directory. The same command continues a run that was stopped."""
    from moveimg.config import TokenizerTrainConfig, load_config
    from moveimg.training import tokenizer

    settings = load_config(config, TokenizerTrainConfig, set or [])
    result = tokenizer.train_tokenizer(settings, _device(device), restart)
    print(f"{settings.out}: {_numbers(result)}")


@command
def encode(
    images: Annotated[str, typer.Argument(help="a folder of class subfolders, or `digits`")],
    tokenizer: Annotated[Path, typer.Option(help="a tokenizer's directory, or a model's")],
    out: Annotated[Path, typer.Option(help="folder for train/ and val/ codes")],
    size: Annotated[int, typer.Option(min=1, help="pixels of a side")] = 256,
    crops: Annotated[str, typer.Option(help="center, flip, five or ten views")] = "center",
    ranges: Annotated[
        list[float], typer.Option("--range", help="cut from size * range pixels; repeatable")
    ] = [1.0],  # noqa: B006
    batch_size: Annotated[int, typer.Option(min=1, help="views a call of the tokenizer")] = 64,
    device: Device = None,
) -> None:
    """Image folder -> packed codes. The same command continues what was stopped."""
    from moveimg.config import ImagesConfig, validate
    from moveimg.data.encode import encode_splits
    from moveimg.training.generator import load_tokenizer

    given = {"source": images, "size": size, "crops": crops, "ranges": ranges}
    vq = load_tokenizer(tokenizer, where := _device(device))
    settings = validate(ImagesConfig, given, "encode")
    manifests = encode_splits(settings, vq, out, device=where, batch_size=batch_size)
    for split, manifest in manifests.items():
        n, views = manifest.n_images, manifest.settings.n_crops
        print(f"{out / split}: {n} images x {views} views, {len(manifest.skipped)} skipped")
        for skipped in manifest.skipped:
            print(f"  skipped {skipped.path}: {skipped.reason}")


@command
def reconstruct(
    images: Annotated[str, typer.Argument(help="a folder of class subfolders, or `digits`")],
    tokenizer: Annotated[Path, typer.Option(help="a tokenizer's directory, or a model's")],
    size: Annotated[int, typer.Option(min=1, help="pixels of a side")] = 256,
    ratio: Annotated[float, typer.Option("--range", help="cut from size * range pixels")] = 1.0,
    split: Annotated[Split, typer.Option(help="which part of the images")] = Split.val,
    out: Annotated[Path | None, typer.Option(help="a PNG of images and reconstructions")] = None,
    device: Device = None,
) -> None:
    """Images through a tokenizer and back: error and code usage, as JSON."""
    from moveimg.data.images import open_images
    from moveimg.pictures import save_png
    from moveimg.reconstruct import reconstruct
    from moveimg.training.generator import load_tokenizer

    vq = load_tokenizer(tokenizer, _device(device))
    figures, picture = reconstruct(open_images(images, split.value), vq, size, ratio)
    if out is not None:
        save_png(picture, out, figures.as_dict())
    _print_json(figures.as_dict())


@command
def info(
    what: Annotated[Path, typer.Argument(help="a config (YAML), a model directory, or `digits`")],
    set: Set = None,
    dtype: Annotated[str, typer.Option(help="type of the cache and the bank")] = "bfloat16",
    as_json: Annotated[bool, typer.Option("--json", help="plain JSON instead of a table")] = False,
) -> None:
    """Parameters by part, FLOPs and cache bytes of a config or a model."""
    from moveimg.device import DTYPES
    from moveimg.model.cost import describe_cost, model_cost

    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    cost = model_cost(_model_config(what, set or []), DTYPES[dtype])
    if as_json:
        _print_json(cost.as_dict())
    else:
        print(describe_cost(cost, dtype))


@command
def compare(
    configs: Annotated[list[Path], typer.Argument(help="YAML files, as for train")],
    out: Annotated[Path, typer.Option(help="folder for the runs and the table")],
    seeds: Annotated[str, typer.Option(help="comma-separated")] = "0,1,2",
    set: Set = None,
    device: Device = None,
) -> None:
    """Several configs, several seeds -> a table. Runs that are finished are not repeated."""
    from moveimg.training.compare import compare, parse_seeds

    print(compare(configs, parse_seeds(seeds), out, set or [], _device(device)))


def _device(name: str | None) -> Any:
    from moveimg.device import pick_device

    return pick_device(name)


def _model_config(what: Path, overrides: list[str]) -> Any:
    """The generator's config of a YAML file or of a model."""
    from moveimg.config import ModelFile, load_config

    if what.suffix in (".yaml", ".yml"):
        return load_config(what, ModelFile, overrides).model
    from moveimg.checkpoint import read_model_config
    from moveimg.pipeline import resolve

    if overrides:
        raise ValueError("--set changes a config file; a model is as it was trained")
    return read_model_config(resolve(what))


def _slug(name: str) -> str:
    first = name.split(",")[0].strip().lower()
    return "".join(c if c.isalnum() else "-" for c in first)[:40]


def _numbers(result: dict[str, float]) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in result.items())


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))


def main() -> None:
    """Entry point of the console script."""
    app()
