"""`moveimg sample`, `info` and `inspect`."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from moveimg import DEFAULT_MODEL
from moveimg.commands.common import (
    MAX_IMAGES,
    MAX_SEED,
    BatchSize,
    Compile,
    Device,
    Dtype,
    ModelOption,
    Num,
    Quantize,
    Seed,
    Set,
    check_model_name,
    check_source,
    command,
    count,
    device_of,
    is_config,
    numbers,
    one_model,
    print_json,
    refuse_overrides,
    sampling_options,
)

GRID = (64, 32)  # rows and columns of grid.png at most


@command
@sampling_options
def sample(
    *,
    classes: Annotated[
        list[str] | None, typer.Argument(help="Class names or indices; default: the first 20.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="A name, a model directory or a Hub id.")
    ] = DEFAULT_MODEL,
    num: Num = 2,
    seed: Seed = 0,
    settings: dict,
    batch_size: BatchSize = 32,
    out: Annotated[Path, typer.Option(help="The folder for the images.")] = Path("samples"),
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    compile: Compile = False,
) -> None:
    """Draw images of classes as PNG files and a labelled grid.

    A call draws at most 10,000 images.
    """
    check_model_name(model)
    _check_total(num * max(1, len(classes or ())), seed)
    device_of(device)
    from moveimg.files import lock
    from moveimg.images import labelled_grid, save_png
    from moveimg.pipeline import Pipeline
    from moveimg.progress import progress_bar

    extra: Any = {"compile": True} if compile else {}
    extra |= {"device": device, "dtype": dtype, "quantize": quantize}
    pipeline = Pipeline.from_pretrained(model, **extra)
    names = pipeline.class_names
    chosen = classes or range(min(20, len(names)))
    labels = [label for label in map(pipeline.label, chosen) for _ in range(num)]
    _check_total(len(labels), seed)
    sampling = pipeline.settings(**settings)
    out.mkdir(parents=True, exist_ok=True)
    shown = Path(model).resolve().name if Path(model).is_dir() else model  # PNGs are passed on
    number_type = str(pipeline.generator.head.weight.dtype).removeprefix("torch.")
    made = {"dtype": number_type, "quantize": quantize} | sampling.model_dump()
    rows: dict[int, list] = {row: [] for row in range(min(len(labels) // num, GRID[0]))}
    begun = time.perf_counter()
    total = len(labels) * pipeline.generator.config.seq_len
    with lock(out, "moveimg sample"), progress_bar(total, "sample", "code", delay=2) as bar:
        for first in range(0, len(labels), batch_size):
            batch = labels[first : first + batch_size]
            for _, codes in pipeline.iter_codes(batch, sampling, seed=seed + first):  # noqa: B007
                bar.update(len(batch))
            for i, image in enumerate(pipeline.decode(codes), first):
                label = labels[i]
                about = {"model": shown, "class": label, "class_name": names[label]}
                about["seed"] = seed + i
                path = out / f"{label:04d}-{_slug(names[label])}-seed{seed + i}.png"
                save_png(image, path, about | made)
                if i // num < GRID[0] and i % num < GRID[1]:
                    rows[i // num].append(image)
    seconds = time.perf_counter() - begun
    about = {"model": shown, "classes": labels[::num], "num": num, "seed": seed}
    titles = [names[labels[row * num]] for row in rows]
    save_png(
        labelled_grid(list(rows.values()), titles), out / "grid.png", about | sampling.model_dump()
    )
    in_grid = "all" if sum(map(len, rows.values())) == len(labels) else "the first"
    print(f"{count(len(labels), 'image')} in {seconds:.1f} s -> {out}/ "
          f"({in_grid} of them: {out / 'grid.png'})")  # fmt: skip


def _check_total(total: int, seed: int) -> None:
    if total > MAX_IMAGES:
        raise ValueError(f"{count(total, 'image')}: expected at most {MAX_IMAGES:,} per call")
    if seed + total - 1 > MAX_SEED:
        raise ValueError(f"seed {seed}: expected at most {MAX_SEED - total + 1} for {total} images")


def _slug(name: str) -> str:
    first = name.split(",")[0].strip().lower()[:40]
    return "".join(c if c.isalnum() else "-" for c in first)


@command
def info(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="A config (YAML file or recipe), or a model's name or directory."
        ),
    ] = None,
    model_option: ModelOption = None,
    set: Set = None,
    dtype: Annotated[str, typer.Option(help="The dtype of the cache and the bank.")] = "bfloat16",
    train: Annotated[
        bool, typer.Option("--train", help="Estimate the training of a config: memory, hours, disk")
    ] = False,
    gpus: Annotated[
        int | None, typer.Option(min=1, max=65536, help="GPUs; default: up to 8, by micro_batch.")
    ] = None,
    gpu: Annotated[str, typer.Option(help="The kind of GPU that trains: H100, A100, ...")] = "H100",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON in place of a table.")
    ] = False,
) -> None:
    """Show the parameters, FLOPs and cache size of a model, or what its training needs."""
    from moveimg.config import ModelFile, TrainConfig, is_recipe, load_config

    model = one_model(name, model_option)
    is_yaml = is_config(model) or (train and is_recipe(model))
    if not is_yaml:
        refuse_overrides(set)
        check_model_name(model)
    if train:
        if not is_yaml:
            raise ValueError(f"--train: expected a config (YAML file or recipe), got '{model}'")
        run = load_config(model, TrainConfig, set or [])
        from moveimg.model import train_budget
        from moveimg.tables import format_bytes

        passes = run.batch_size // (run.micro_batch or run.batch_size)
        budget = train_budget(run, gpus or math.gcd(8, passes), gpu)
        if as_json:
            print_json(budget)
            return
        print("Estimated: per GPU, at 25 to 50 % of its peak; checkpoints and codes on disk")
        for key, value in budget.items():
            text = f"{value[0]:.2g} to {value[1]:.2g}" if key == "hours" else format_bytes(value)
            print(f"{key:<22}{f'{value:.3g}' if key.startswith('flops') else text:>15}")
        return
    config = load_config(model, ModelFile, set or []).model if is_yaml else None
    from moveimg.checkpoint import read_model_config
    from moveimg.device import DTYPES
    from moveimg.model import model_cost
    from moveimg.pipeline import resolve

    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    cost = asdict(model_cost(config or read_model_config(resolve(model)), DTYPES[dtype]))
    if as_json:
        print_json(cost)
    for key, value in cost.items() if not as_json else ():
        print(f"{key:<24}{value:>18,.0f}")


@command
def inspect(
    name: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A bundled name or a model directory.")
    ] = None,
    model_option: ModelOption = None,
    codes: Annotated[
        Path | None, typer.Option(help="Packed codes to read; default: the model's own samples.")
    ] = None,
    num: Num = 256,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="The folder for the report.")] = Path("inspection"),
    device: Device = None,
) -> None:
    """Report gates, memory, gradients and experts of a model as JSON, plots and warnings."""
    model = one_model(name, model_option)
    check_model_name(model)
    if codes is not None:
        check_source(codes, "codes")
    device_of(device)
    from moveimg.files import lock
    from moveimg.inspect import inspect_model
    from moveimg.pipeline import Pipeline

    pipeline = Pipeline.from_pretrained(model, device=device)
    with lock(out, "moveimg inspect"):
        report = inspect_model(pipeline, out, codes, num, batch_size, seed)
    for layer, gates in report.get("layers", {}).items():
        columns = zip(*gates["mean"], strict=True)
        means = {
            name: sum(heads) / len(heads)
            for name, heads in zip(gates["gates"], columns, strict=True)
        }
        print(f"layer {layer}: {numbers(means)}; memory's share of V {gates['memory_share']:.0%}")
    for layer, load in report["experts"].items():
        print(f"layer {layer}: busiest expert {max(load) * len(load):.2f} times its even share")
    for line in report["warnings"]:
        print(f"warning: {line}")
    print(f"-> {out}/ (inspection.json and plots)")
