"""`moveimg info`, `inspect`, `bench sample` and `bench train`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from moveimg import DEFAULT_MODEL
from moveimg.commands import common
from moveimg.commands.common import (
    command,
    find_config,
    format_numbers,
    make_group,
    prepare_device,
)
from moveimg.config import ModelFile, SamplingSettings, TrainConfig, load_config
from moveimg.errors import validate


@command
def info(
    model: common.ModelOrConfig,
    set: common.Set = None,
    train: bool = Option(False, "--train", help="Estimate memory, hours and disk of training."),
    gpus: int | None = Option(None, min=1, max=65536, help="Default: up to 8, by micro_batch."),
    gpu: str = Option("H100", help="The kind of GPU that trains: H100, A100, ..."),
    as_json: bool = Option(False, "--json", help="Print JSON, not a table."),
) -> None:
    """Show the parameters, FLOPs and cache size of a model, or what its training needs."""
    import torch

    from moveimg.checkpoint import read_model_config
    from moveimg.model import model_cost, train_budget
    from moveimg.pipeline import resolve
    from moveimg.tables import format_bytes

    lines = {}
    if train:
        run = load_config(model, TrainConfig, set or [])
        passes = run.batch_size // (run.micro_batch or run.batch_size)
        data = train_budget(run, gpus or math.gcd(8, passes), gpu)
        for key, value in data.items():
            text = f"{value[0]:.2g} to {value[1]:.2g}" if key == "hours" else format_bytes(value)
            lines[key] = f"{value:.3g}" if key.startswith("flops") else text
    else:
        config = find_config(model, ModelFile, set)
        settings = config.model if config else read_model_config(resolve(model))
        data = asdict(model_cost(settings, torch.bfloat16))
        lines = {key: f"{value:,.0f}" for key, value in data.items()}
    if as_json:
        print(json.dumps(data, indent=2))
    else:
        if train:
            print("Estimated: per GPU, at 25 to 50 % of its peak; checkpoints and codes on disk")
        print("\n".join(f"{key:<24}{text:>18}" for key, text in lines.items()))


@command
def inspect(
    model: str = Argument(help="A model's name or directory."),
    codes: Path | None = Option(None, help="Packed codes; default: the model's samples."),
    num: int = Option(256, min=1, max=10_000, help="Images to read."),
    batch_size: common.BatchSize = 32,
    seed: common.Seed = 0,
    out: Path = Option(Path("inspection"), help="The folder for the report."),
    row: int | None = Option(None, metavar="CODE", help="Also report what this code's rows do."),
    device: common.Device = None,
) -> None:
    """Report gates, memory, gradients and experts of a model as JSON, and plot its gates."""
    prepare_device(device)
    from moveimg.files import lock
    from moveimg.inspect import inspect_model
    from moveimg.pipeline import Pipeline

    pipeline = Pipeline.from_pretrained(model, device=device)
    with lock(out, "moveimg inspect"):
        report = inspect_model(pipeline, out, codes, num, batch_size, seed, row)
    for layer, gates in report.get("layers", {}).items():
        means = [sum(heads) / len(heads) for heads in zip(*gates["mean"], strict=True)]
        line = format_numbers(dict(zip(gates["gates"], means, strict=True)))
        print(f"layer {layer}: {line}; memory share {gates['memory_share']:.0%}")
    if effect := report.get("row"):
        raised = format_numbers({f"code {code}": change for code, change in effect["raised"][:4]})
        print(f"row {row}: {effect['positions']} positions, KL {effect['kl']:.4f} nats; {raised}")
    for layer, load in report["experts"].items():
        print(f"layer {layer}: maximum expert load {max(load) * len(load):.2f} x uniform")
    print(f"-> {out}/ (inspection.json, gates.png)")


bench = make_group("bench")
Repeats = Annotated[int, Option(min=1, max=10_000, help="Timed repetitions, after one more.")]


@bench.command("sample")
def bench_sample(
    model: common.ModelOrConfig = DEFAULT_MODEL,
    batch_size: common.BatchSize = 8,
    repeats: Repeats = 5,
    cfg_scale: float = Option(2.0, help="Guidance scale; 1 is no guidance."),
    quantize: common.Quantize = None,
    set: common.Set = None,
    device: common.Device = None,
    dtype: common.Dtype = None,
) -> None:
    """Measure how many images and codes per second are drawn."""
    settings = validate(SamplingSettings, {"cfg_scale": cfg_scale}, "sampling settings")
    where = prepare_device(device)
    from moveimg.bench import bench_sample, describe_figures, make_random_model
    from moveimg.checkpoint import load_generator
    from moveimg.device import pick_dtype
    from moveimg.pipeline import resolve

    config = find_config(model, ModelFile, set)
    generator = make_random_model(config.model) if config else load_generator(resolve(model))
    generator = generator.to(where, pick_dtype(dtype, where))
    print(describe_figures(bench_sample(generator, settings, batch_size, repeats, quantize), where))


@bench.command("train")
def bench_train(
    config: common.Config,
    batch_size: common.BatchSize = 8,
    repeats: Repeats = 5,
    set: common.Set = None,
    device: common.Device = None,
) -> None:
    """Measure training steps per second on random codes, from random weights."""
    settings = load_config(config, TrainConfig, set or [])
    micro = settings.micro_batch or batch_size
    micro = batch_size if batch_size % micro else micro
    settings = settings.model_copy(update={"batch_size": batch_size, "micro_batch": micro})
    where = prepare_device(device)
    from moveimg.bench import bench_train, describe_figures

    print(describe_figures(bench_train(settings, repeats, where), where))
