"""`moveimg encode`, `train-tokenizer`, `train`, `compare` `configs` and `config-reference`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from moveimg.commands.common import (
    Device,
    Dtype,
    ImageSize,
    Restart,
    Set,
    Views,
    check_images,
    check_model_name,
    check_source,
    command,
    count,
    device_of,
    numbers,
    processes_of,
)


def complete_recipe(incomplete: str) -> list[str]:
    """Recipes' names that begin with a word; the shell completes files where there is none."""
    from moveimg.config.recipes import list_recipes

    return [name for name in list_recipes() if name.startswith(incomplete) and "{" not in name]


Config = Annotated[
    Path,
    typer.Argument(
        help="A YAML file or a recipe: see `moveimg configs`.", autocompletion=complete_recipe
    ),
]


@command
def encode(
    images: Annotated[
        str, typer.Argument(help="A folder of class folders, archives, Parquet, or a data set.")
    ],
    tokenizer: Annotated[
        Path, typer.Option(help="A tokenizer or model directory, or a bundled name.")
    ],
    out: Annotated[Path, typer.Option(help="The folder for train/ and val/ codes.")],
    size: ImageSize = "256",
    crops: Annotated[str, typer.Option(help="Views: center, flip, five or ten.")] = "center",
    ranges: Annotated[
        list[float], typer.Option("--range", help="Cut from size * range pixels; repeatable.")
    ] = [1.0],  # noqa: B006
    val_fraction: Annotated[
        float | None,
        typer.Option(help="Share of the training images held out; default: the source's split."),
    ] = None,
    data_root: Annotated[
        Path | None, typer.Option(help="Folder of downloaded data sets; default: $MOVEIMG_DATA.")
    ] = None,
    batch_size: Views = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Encode images as packed codes.

    The same command continues a run that was stopped. On several devices:
    torchrun --nproc-per-node N -m moveimg encode ...
    """
    from moveimg.config import ImagesConfig, parse_size
    from moveimg.errors import validate

    data: dict[str, Any] = {
        "source": images,
        "size": parse_size(size),
        "crops": crops,
        "ranges": ranges,
    }
    data["val_fraction"] = val_fraction
    check_images(images)
    settings = validate(ImagesConfig, data, "encode")
    check_source(tokenizer, "tokenizer")
    with processes_of(device) as world:
        from moveimg.checkpoint import load_tokenizer
        from moveimg.data import encode_splits
        from moveimg.device import pick_dtype

        vq = load_tokenizer(tokenizer, world.device)
        chosen: dict[str, Any] = {}
        if dtype is not None:
            chosen["dtype"] = pick_dtype(dtype, world.device)
        if batch_size is not None:
            chosen["batch_size"] = batch_size
        manifests = encode_splits(settings, vq, out, data_root, device=world.device, **chosen)
        if world.main:
            for split, manifest in manifests.items():
                encoded = count(manifest.n_images, "image")
                views = count(manifest.settings.n_crops, "view")
                print(f"{out / split}: {encoded} x {views}, {len(manifest.skipped)} skipped")


@command
def train_tokenizer(
    config: Config, set: Set = None, restart: Restart = False, device: Device = None
) -> None:
    """Train a tokenizer on images.

    The same command continues a run that was stopped. On several devices:
    torchrun --nproc-per-node N -m moveimg train-tokenizer CONFIG
    """
    from moveimg.config import TokenizerTrainConfig, load_config

    settings = load_config(config, TokenizerTrainConfig, set or [])
    check_images(settings.images.source)
    with processes_of(device) as world:
        from moveimg.training import tokenizer

        result = tokenizer.train_tokenizer(settings, world, restart)
        if world.main:
            print(f"{settings.out}: {numbers(result)}")


@command
def train(
    config: Config,
    set: Set = None,
    init_from: Annotated[
        str | None, typer.Option(help="Start from this model: a directory or a name.")
    ] = None,
    train: Annotated[
        str | None, typer.Option(help="all, or memory: bank and routers (with --init-from).")
    ] = None,
    restart: Restart = False,
    device: Device = None,
) -> None:
    """Train a generator on packed codes or on images.

    The same command continues a run that was stopped. On several devices:
    torchrun --nproc-per-node N -m moveimg train CONFIG
    """
    from moveimg.config import TrainConfig, load_config

    options = {"init_from": init_from, "train": train}
    chosen = [f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
    settings = load_config(config, TrainConfig, [*(set or []), *chosen])
    if settings.data.codes is not None:
        check_source(settings.data.codes, "packed codes (data.codes)")
    if settings.data.images is not None:
        check_images(settings.data.images.source)
    check_source(settings.data.tokenizer, "tokenizer (data.tokenizer)")
    if init_from is not None:
        check_model_name(init_from)
    with processes_of(device) as world:
        from moveimg.training.generator import train_generator

        result = train_generator(settings, world, restart)
        if world.main:
            print(f"{settings.out}: {numbers(result)}")


@command
def compare(
    configs: Annotated[list[Path], typer.Argument(help="YAML files or recipes, as for `train`.")],
    out: Annotated[Path, typer.Option(help="The folder for the runs and the table.")],
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds.")] = "0,1,2",
    jobs: Annotated[int, typer.Option(min=1, max=256, help="Trainings at the same time.")] = 1,
    set: Set = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY.PATH", help="A key in which the configs may differ, too."),
    ] = None,
    device: Device = None,
) -> None:
    """Train several configs with several seeds, and write a table and plots.

    Finished runs are read, not repeated; the same command continues what was stopped.
    """
    from moveimg.config import TrainConfig, load_config

    for config in configs:  # refused before torch is imported
        load_config(config, TrainConfig, set or [])
    where = device_of(device)
    from moveimg.compare import compare, parse_seeds
    from moveimg.files import lock

    with lock(out, "moveimg compare"):
        print(compare(configs, parse_seeds(seeds), out, set or [], where, jobs, vary or []))


@command
def config_reference() -> None:
    """Print all keys of the YAML configs with their defaults, as Markdown."""
    from moveimg.commands.reference import config_reference

    print(config_reference())


@command
def configs(
    name: Annotated[
        str | None, typer.Argument(help="Print this recipe; default: list all.")
    ] = None,
) -> None:
    """List the recipes that `train` and others take by name, or print one as YAML."""
    from moveimg.config import recipes, yaml_of

    if name is not None:
        print(yaml_of(name), end="")
        return
    for recipe, about in recipes.list_recipes().items():
        print(f"{recipe:<36}{about}")
