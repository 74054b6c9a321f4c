"""`moveimg train`, `train-tokenizer` and `compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from moveimg.commands.common import Device, Restart, Set, command, device_of, numbers


@command
def train(
    config: Annotated[Path, typer.Argument(help="a YAML file, as in configs/")],
    set: Set = None,
    init_from: Annotated[
        str | None, typer.Option(help="start from this model: a directory or a name")
    ] = None,
    train: Annotated[
        str | None, typer.Option(help="all, or memory: bank and routers alone (with --init-from)")
    ] = None,
    restart: Restart = False,
    device: Device = None,
) -> None:
    """Codes or images -> model directory. The same command continues a run that was stopped.

    On several devices: torchrun --nproc-per-node N -m moveimg train CONFIG
    """
    from moveimg.config import TrainConfig, load_config
    from moveimg.dist import processes
    from moveimg.training.generator import train_generator

    given = {"init_from": init_from, "train": train}
    chosen = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    with processes(device) as world:
        settings = load_config(config, TrainConfig, [*(set or []), *chosen])
        result = train_generator(settings, world, restart)
        if world.main:
            print(f"{settings.out}: {numbers(result)}")


@command
def train_tokenizer(
    config: Annotated[Path, typer.Argument(help="a YAML file, as in configs/")],
    set: Set = None,
    restart: Restart = False,
    device: Device = None,
) -> None:
    """Images -> tokenizer directory. The same command continues a run that was stopped.

    On several devices: torchrun --nproc-per-node N -m moveimg train-tokenizer CONFIG
    """
    from moveimg.config import TokenizerTrainConfig, load_config
    from moveimg.dist import processes
    from moveimg.training import tokenizer

    with processes(device) as world:
        settings = load_config(config, TokenizerTrainConfig, set or [])
        result = tokenizer.train_tokenizer(settings, world, restart)
        if world.main:
            print(f"{settings.out}: {numbers(result)}")


@command
def compare(
    configs: Annotated[list[Path], typer.Argument(help="YAML files, as for train")],
    out: Annotated[Path, typer.Option(help="folder for the runs and the table")],
    seeds: Annotated[str, typer.Option(help="comma-separated")] = "0,1,2",
    jobs: Annotated[int, typer.Option(min=1, help="trainings side by side")] = 1,
    set: Set = None,
    device: Device = None,
) -> None:
    """Several configs, several seeds -> a table and plots. Finished runs are not repeated."""
    from moveimg.training.compare import compare, parse_seeds

    print(compare(configs, parse_seeds(seeds), out, set or [], device_of(device), jobs))
