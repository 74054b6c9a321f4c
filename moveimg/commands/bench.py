"""`moveimg bench sample` and `train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moveimg import DEFAULT_MODEL
from moveimg.commands.common import (
    BatchSize,
    Device,
    Dtype,
    Quantize,
    Set,
    app,
    check_model_name,
    device_of,
    is_config,
    refuse_overrides,
)

bench = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Measure the speed of this machine."
)
app.add_typer(bench, name="bench")

Repeats = Annotated[
    int, typer.Option(min=1, max=10_000, help="Timed repetitions, after one that is not timed.")
]


@bench.command("sample")
def sample_speed(
    model: Annotated[
        str, typer.Argument(help="A model, or a config (YAML file or recipe).")
    ] = DEFAULT_MODEL,
    batch_size: BatchSize = 8,
    repeats: Repeats = 5,
    cfg_scale: Annotated[float, typer.Option(help="Guidance scale; 1 is no guidance.")] = 2.0,
    quantize: Quantize = None,
    set: Set = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Measure how many images and codes per second are drawn, and the time to the first row."""
    from moveimg.config import ModelFile, SamplingSettings, load_config
    from moveimg.errors import validate

    settings = validate(SamplingSettings, {"cfg_scale": cfg_scale}, "sampling settings")
    config = None
    if is_config(model):
        config = load_config(model, ModelFile, set or []).model
    else:
        refuse_overrides(set)
        check_model_name(model)
    where = device_of(device)
    from moveimg.bench import bench_sample, describe_figures
    from moveimg.checkpoint import load_generator
    from moveimg.device import pick_dtype
    from moveimg.model import Transformer
    from moveimg.pipeline import resolve

    if config is None:
        generator = load_generator(resolve(model))
    else:
        generator = Transformer(config)
        generator.head.reset_parameters()  # it starts at zero, and equal logits are drawn faster
    generator = generator.to(where, pick_dtype(dtype, where)).eval()
    figures = bench_sample(generator, settings, batch_size, repeats, quantize)
    print(describe_figures(figures, where))


@bench.command("train")
def train_speed(
    config: Annotated[
        Path, typer.Argument(help="A config of `moveimg train`: a YAML file or a recipe.")
    ],
    batch_size: BatchSize = 8,
    repeats: Repeats = 5,
    set: Set = None,
    device: Device = None,
) -> None:
    """Measure training steps per second on random codes.

    The config's micro_batch is used where it divides --batch-size; weights are random.
    """
    from moveimg.config import TrainConfig, load_config

    settings = load_config(config, TrainConfig, set or [])
    micro = settings.micro_batch or batch_size
    micro = batch_size if batch_size % micro else micro
    settings = settings.model_copy(update={"batch_size": batch_size, "micro_batch": micro})
    where = device_of(device)
    from moveimg.bench import bench_train, describe_figures

    print(describe_figures(bench_train(settings, repeats, where), where))
