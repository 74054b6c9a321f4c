"""`moveimg sample`, `edit`, `score`, `info`, `inspect`, `bench sample` and `bench train`."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option, Typer

from moveimg import DEFAULT_MODEL
from moveimg.commands import common
from moveimg.commands.common import (
    app,
    command,
    count,
    device_of,
    find_config,
    numbers,
    sampling_options,
)
from moveimg.config import ModelFile, SamplingSettings, TrainConfig, load_config
from moveimg.errors import validate

if TYPE_CHECKING:
    from moveimg.data import ImageSource
    from moveimg.pipeline import Pipeline

SHOWN = 10  # images of each end in the grid of `score`
GRID = (64, 32)  # rows and columns of grid.png at most


@command
@sampling_options
def sample(
    *,
    classes: common.Classes = None,
    model: common.Model = DEFAULT_MODEL,
    num: common.Num = 2,
    seed: common.Seed = 0,
    settings: dict,
    batch_size: common.BatchSize = 32,
    out: Path = Option(Path("samples"), help="The folder for the images."),
    device: common.Device = None,
    dtype: common.Dtype = None,
    quantize: common.Quantize = None,
    compile: common.Compile = False,
    bank: common.Bank = None,
) -> None:
    """Draw images of classes, by default of the first 20, as PNG files and a labelled grid."""
    device_of(device)
    from moveimg.files import lock
    from moveimg.images import labelled_grid, save_png
    from moveimg.pipeline import Pipeline
    from moveimg.progress import progress_bar

    pipeline = Pipeline.from_pretrained(
        model, device=device, dtype=dtype, quantize=quantize, compile=compile, bank=bank
    )
    names = pipeline.class_names
    labels = [pipeline.label(name) for name in classes or range(min(20, len(names)))]
    titles, labels = [names[label] for label in labels], [i for i in labels for _ in range(num)]
    sampling = pipeline.settings(**settings)
    shown = Path(model).resolve().name if Path(model).is_dir() else model  # no path in a PNG
    number_type = str(pipeline.generator.head.weight.dtype).removeprefix("torch.")
    made: dict[str, Any] = {
        "model": shown,
        "dtype": number_type,
        "quantize": quantize,
        "bank": bank,
    }
    made |= {"bank": bank, **sampling.model_dump()}
    rows: list[list] = [[] for _ in titles[: GRID[0]]]
    begun, total = time.perf_counter(), len(labels) * pipeline.generator.config.seq_len
    with lock(out, "moveimg sample"), progress_bar(total, "sample", "code", delay=2) as bar:
        for first in range(0, len(labels), batch_size):
            batch = labels[first : first + batch_size]
            for _, codes in pipeline.iter_codes(batch, sampling, seed=seed + first):  # noqa: B007
                bar.update(len(batch))
            for i, image in enumerate(pipeline.decode(codes), first):
                name = names[labels[i]]
                about = {"class": labels[i], "class_name": name, "seed": seed + i, **made}
                save_png(image, out / f"{labels[i]:04d}-{_slug(name)}-seed{seed + i}.png", about)
                if i // num < GRID[0] and i % num < GRID[1]:
                    rows[i // num].append(image)
    seconds = time.perf_counter() - begun
    about = {"classes": labels[::num], "num": num, "seed": seed, **made}
    save_png(labelled_grid(rows, titles[: GRID[0]]), out / "grid.png", about)
    print(f"{count(len(labels), 'image')} in {seconds:.1f} s -> {out}/ (see {out / 'grid.png'})")


def _slug(name: str) -> str:
    first = name.split(",")[0].strip().lower()[:40]
    return "".join(c if c.isalnum() else "-" for c in first)


@command
@sampling_options
def edit(
    *,
    image: Path = Argument(help="An image file; cropped to the model's size."),
    classes: common.Classes = None,
    keep: str | None = Option(None, help="Keep: top, left, ..., rows of codes, a box or a mask."),
    hole: str | None = Option(None, help="Draw anew: an area; boxes are left,top,right,bottom."),
    passes: int = Option(0, min=0, max=1000, help="Resampling passes, to fit later kept codes."),
    model: common.Model = DEFAULT_MODEL,
    num: common.Num = 4,
    seed: common.Seed = 0,
    settings: dict,
    out: Path = Option(Path("edited"), help="The folder for the images."),
    device: common.Device = None,
    dtype: common.Dtype = None,
    compile: common.Compile = False,
) -> None:
    """Complete an image, draw a part of it anew, or change its class (default: the likeliest).

    With --keep, the kept part is decoded from its codes; with --hole, pixels outside the hole stay
    those of the image. Without both, the upper half is kept.
    """
    if keep is not None and hole is not None:
        raise ValueError("--keep and --hole: expected one of the two")
    device_of(device)
    from moveimg.images import labelled_grid, read_image, save_png
    from moveimg.pipeline import Pipeline

    area = _parse_area(hole or keep or "top")
    original = read_image(image, str(image))
    pipeline = Pipeline.from_pretrained(model, device=device, dtype=dtype, compile=compile)
    names = pipeline.class_names
    if not classes:
        likeliest, share = pipeline.classify([original], top_k=1)[0][0]
        print(f"class {likeliest} ({share:.1%} by likelihood)")
        classes = [str(names.index(likeliest))]
    labels = [pipeline.label(name) for name in classes]
    chosen: dict[str, Any] = {"num": num, "seed": seed, "passes": passes, **settings}
    if hole is None:
        images = pipeline.complete(original, labels, keep=area, **chosen)
    else:
        images = pipeline.edit(original, labels, hole=area, **chosen)
    about = {"model": model, "image": image.name, "keep": keep, "hole": hole, **chosen}
    for i, edited in enumerate(images):
        label = labels[i // num]
        described = about | {"class": label, "class_name": names[label], "seed": seed + i}
        save_png(edited, out / f"{image.stem}-{label:04d}-seed{seed + i}.png", described)
    rows = [[pipeline.crop(original), *images[i : i + num]] for i in range(0, len(images), num)]
    save_png(labelled_grid(rows, [names[label] for label in labels]), out / "grid.png", about)
    print(f"{count(len(images), 'image')} -> {out}/ (beside the original: {out / 'grid.png'})")


def _parse_area(text: str) -> Any:
    """A half's name, rows of codes, a box `left,top,right,bottom`, or the file of a mask."""
    from moveimg.images import read_image

    if Path(text).is_file():
        return read_image(Path(text), text)
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        return text  # a half, or refused
    return int(text) if len(parts) == 1 else [int(part) for part in parts]


@command
def score(
    source: str = Argument(help="A folder of images, by class or not, or a data set."),
    split: str | None = Option(None, help="train, val or test; default: val, if there is one."),
    classify: bool = Option(False, "--classify", help="Find the likeliest class (C passes)."),
    model: common.Model = DEFAULT_MODEL,
    batch_size: common.BatchSize = 32,
    out: Path = Option(Path("scores.csv"), help="The table; a grid is written beside it."),
    device: common.Device = None,
    dtype: common.Dtype = None,
) -> None:
    """Write the likelihood of each image as CSV, the strangest first.

    Images in class folders are scored given their class, others given their likeliest class.
    """
    device_of(device)
    from moveimg.files import write_text
    from moveimg.images import labelled_grid, save_png
    from moveimg.pipeline import Pipeline
    from moveimg.progress import progress_bar

    pipeline = Pipeline.from_pretrained(model, device=device, dtype=dtype)
    images, labels = _open_labelled(source, split, pipeline)
    names, right = pipeline.class_names, 0
    table: list[tuple[float, int, dict[str, Any]]] = []
    with progress_bar(len(images), "score", "image", delay=2) as bar:
        for first in range(0, len(images), batch_size):
            rows = range(first, min(first + batch_size, len(images)))
            codes = pipeline.encode([images.load(row) for row in rows])
            guesses = pipeline.classify(codes, top_k=1) if classify or labels is None else []
            likeliest = [names.index(name) for ((name, _),) in guesses]
            chosen = likeliest if labels is None else [labels[images.labels[row]] for row in rows]
            likelihood = pipeline.log_likelihood(codes, chosen)
            right += sum(map(int.__eq__, likeliest, chosen))
            for i, row in enumerate(rows):
                line: dict[str, Any] = {"image": images.identifiers[row], "class": names[chosen[i]]}
                for key in ("nats_per_code", "bits_per_code", "bits_per_pixel"):
                    line[key] = f"{getattr(likelihood, key)[i]:.5f}"
                if guesses:
                    line["likeliest"], share = guesses[i][0]
                    line["probability"] = f"{share:.5f}"
                table.append((likelihood.nats_per_code[i].item(), row, line))
            bar.update(len(rows))
    table.sort(key=lambda entry: -entry[0])
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, table[0][2], lineterminator="\n")
    writer.writeheader()
    writer.writerows(line for *_, line in table)
    write_text(out, text.getvalue())
    ends = {"strangest": table[:SHOWN], "likeliest": table[::-1][:SHOWN]}
    shown = [[pipeline.crop(images.load(row)) for _, row, _ in end] for end in ends.values()]
    grid = out.with_name(f"{out.stem}.png")
    save_png(labelled_grid(shown, [*ends]), grid, {"source": source})
    mean = sum(nats for nats, *_ in table) / len(table)
    print(f"{count(len(table), 'image')}: {mean:.4f} nats per code -> {out}, {grid.name}")
    if classify and labels is not None:
        print(f"accuracy by likelihood: {right / len(table):.2%}")


def _open_labelled(
    source: str, split: Any, pipeline: Pipeline
) -> tuple[ImageSource, list[int] | None]:
    """The readable images, and the model's label of each class; None for images without classes."""
    from moveimg.data import drop_unreadable, find_split_folders, open_flat_folder, open_images
    from moveimg.images import SUFFIXES

    folder = Path(source)
    if folder.is_dir() and any(p.suffix.lower() in SUFFIXES for p in folder.iterdir()):
        return drop_unreadable(open_flat_folder(folder)), None
    if split is None and folder.is_dir() and not find_split_folders(folder):
        images = open_images(source, "train", 0.0)  # all of them
    else:
        images = open_images(source, split or "val")
    return drop_unreadable(images), [pipeline.label(name) for name in images.class_names]


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
    num: common.Num = 256,
    batch_size: common.BatchSize = 32,
    seed: common.Seed = 0,
    out: Path = Option(Path("inspection"), help="The folder for the report."),
    device: common.Device = None,
) -> None:
    """Report gates, memory, gradients and experts of a model as JSON, and plot its gates."""
    device_of(device)
    from moveimg.files import lock
    from moveimg.inspect import inspect_model
    from moveimg.pipeline import Pipeline

    pipeline = Pipeline.from_pretrained(model, device=device)
    with lock(out, "moveimg inspect"):
        report = inspect_model(pipeline, out, codes, num, batch_size, seed)
    for layer, gates in report.get("layers", {}).items():
        means = [sum(heads) / len(heads) for heads in zip(*gates["mean"], strict=True)]
        line = numbers(dict(zip(gates["gates"], means, strict=True)))
        print(f"layer {layer}: {line}; memory's share of V {gates['memory_share']:.0%}")
    for layer, load in report["experts"].items():
        print(f"layer {layer}: busiest expert {max(load) * len(load):.2f} times its even share")
    print(f"-> {out}/ (inspection.json, gates.png)")


bench = Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure this machine's speed.")
app.add_typer(bench, name="bench")
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
    where = device_of(device)
    from moveimg.bench import bench_sample, describe_figures
    from moveimg.checkpoint import load_generator
    from moveimg.device import pick_dtype
    from moveimg.model import Transformer
    from moveimg.pipeline import resolve

    config = find_config(model, ModelFile, set)
    generator = Transformer(config.model) if config else load_generator(resolve(model))
    if config:
        generator.head.reset_parameters()  # it starts at zero, and equal logits are drawn faster
    generator = generator.to(where, pick_dtype(dtype, where)).eval()
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
    where = device_of(device)
    from moveimg.bench import bench_train, describe_figures

    print(describe_figures(bench_train(settings, repeats, where), where))
