"""`moveimg info`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from moveimg.commands.common import Set, command, print_json


@command
def info(
    what: Annotated[Path, typer.Argument(help="a config (YAML), a model directory, or `digits`")],
    set: Set = None,
    dtype: Annotated[str, typer.Option(help="type of the cache and the bank")] = "bfloat16",
    train: Annotated[
        bool, typer.Option("--train", help="what training the config takes: memory, hours, disk")
    ] = False,
    gpus: Annotated[
        int | None,
        typer.Option(min=1, help="devices that train (--train; left out: up to 8, by micro_batch)"),
    ] = None,
    gpu: Annotated[str, typer.Option(help="their kind, as H100 or A100 (--train)")] = "H100",
    as_json: Annotated[bool, typer.Option("--json", help="plain JSON instead of a table")] = False,
) -> None:
    """Parameters by part, FLOPs and cache bytes of a config or a model; what its training takes."""
    if train:
        _train_budget(what, set or [], gpus, gpu, as_json)
        return
    from moveimg.device import DTYPES
    from moveimg.model.cost import describe_cost, model_cost

    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    cost = model_cost(_model_config(what, set or []), DTYPES[dtype])
    if as_json:
        print_json(cost.as_dict())
    else:
        print(describe_cost(cost, dtype))


def _train_budget(
    what: Path, overrides: list[str], gpus: int | None, gpu: str, as_json: bool
) -> None:
    if what.suffix not in (".yaml", ".yml"):
        raise ValueError(f"--train: expected a config (YAML), not '{what}'")
    from moveimg.config import TrainConfig, load_config
    from moveimg.training.budget import comment, describe_budget, train_budget

    config = load_config(what, TrainConfig, overrides)
    parts = config.batch_size // (config.micro_batch or config.batch_size)
    budget = train_budget(config, gpus or math.gcd(8, parts), gpu)
    if as_json:
        print_json(budget.as_dict() | {"epoch": budget.epoch()})
    else:
        print(describe_budget(budget), comment(budget), sep="\n\n")


def _model_config(what: Path, overrides: list[str]) -> Any:
    """The generator's config of a YAML file or of a model."""
    from moveimg.config import ModelFile, load_config

    if what.suffix in (".yaml", ".yml"):
        try:
            return load_config(what, ModelFile, overrides).model
        except ValueError as error:
            if str(error) != f"{what}: model: Field required":
                raise
            raise ValueError(
                f"{what}: has no `model`; if it is a tokenizer's config: info is about generators"
            ) from None
    from moveimg.checkpoint import read_model_config
    from moveimg.pipeline import resolve

    if overrides:
        raise ValueError("--set changes a config file; a model is as it was trained")
    return read_model_config(resolve(what))
