"""`moveimg sample`, `info`, `inspect` and `bench`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from moveimg.commands.common import (
    MAX_SEED,
    BatchSize,
    Compile,
    Device,
    Dtype,
    Seed,
    Set,
    app,
    check_model_name,
    check_source,
    command,
    count,
    device_of,
    numbers,
    print_json,
    sampling_options,
)

MAX_IMAGES = 10_000  # of one call of `sample`
GRID = (64, 32)  # rows and columns of grid.png at most

bench = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure the speed of this machine, beside the limits of its hardware.",
)
app.add_typer(bench, name="bench")
Quantize = Annotated[
    str | None,
    typer.Option(help="int8: 8-bit matrices, faster on a CPU; codes then depend on the batch."),
]


@command
@sampling_options
def sample(
    *,
    classes: Annotated[
        list[str] | None,
        typer.Argument(help="Class names or indices; default: every class, 20 at most."),
    ] = None,
    model: Annotated[
        str, typer.Option(help="A bundled name, a model directory or a Hub id.")
    ] = "digits",
    num: Annotated[
        int,
        typer.Option("--num", "--num-samples", min=1, max=MAX_IMAGES, help="Images per class."),
    ] = 2,
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
    from moveimg.images import labelled_grid, save_png
    from moveimg.pipeline import Pipeline
    from moveimg.progress import progress_bar

    extra = {"compile": True} if compile else {}
    pipeline = Pipeline.from_pretrained(
        model, device=device, dtype=dtype, quantize=quantize, **extra
    )
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
    with progress_bar(total, "sample", "code", delay=2) as bar:
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
    model: Annotated[
        str, typer.Argument(help="A config (YAML), a bundled name or a model directory.")
    ],
    set: Set = None,
    dtype: Annotated[str, typer.Option(help="The dtype of the cache and the bank.")] = "bfloat16",
    train: Annotated[
        bool, typer.Option("--train", help="Estimate the training of a config: memory, hours, disk")
    ] = False,
    gpus: Annotated[
        int | None,
        typer.Option(min=1, max=65536, help="GPUs that train; default: up to 8, by micro_batch."),
    ] = None,
    gpu: Annotated[str, typer.Option(help="The kind of GPU that trains: H100, A100, ...")] = "H100",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON in place of a table.")
    ] = False,
) -> None:
    """Show the parameters, FLOPs and cache size of a model, or what its training needs."""
    from moveimg.config import ModelFile, TrainConfig, load_config

    is_yaml = model.endswith((".yaml", ".yml"))
    if not is_yaml:
        _refuse_overrides(set)
        check_model_name(model)
    if train:
        if not is_yaml:
            raise ValueError(f"--train: expected a config (YAML), got '{model}'")
        run = load_config(model, TrainConfig, set or [])
        from moveimg.training.budget import comment, describe_budget, train_budget

        passes = run.batch_size // (run.micro_batch or run.batch_size)
        budget = train_budget(run, gpus or math.gcd(8, passes), gpu)
        if as_json:
            print_json(budget.as_dict() | {"epoch": budget.epoch()})
        else:
            print(describe_budget(budget), comment(budget), sep="\n\n")
        return
    config = load_config(model, ModelFile, set or []).model if is_yaml else None
    from moveimg.checkpoint import read_model_config
    from moveimg.device import DTYPES
    from moveimg.model.cost import describe_cost, model_cost
    from moveimg.pipeline import resolve

    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    cost = model_cost(config or read_model_config(resolve(model)), DTYPES[dtype])
    if as_json:
        print_json(cost.as_dict())
    else:
        print(describe_cost(cost, dtype))


def _refuse_overrides(overrides: list[str] | None) -> None:
    if overrides:
        raise ValueError(f"--set {overrides[0]}: expected a config (YAML), whose keys it overrides")


@command
def inspect(
    model: Annotated[str, typer.Argument(help="A bundled name or a model directory.")],
    codes: Annotated[
        Path | None, typer.Option(help="Packed codes to read; default: the model's own samples.")
    ] = None,
    num: Annotated[
        int, typer.Option("--num", "--num-samples", min=1, max=100_000, help="Images to read.")
    ] = 256,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="The folder for the report.")] = Path("inspection"),
    device: Device = None,
) -> None:
    """Report gates, memory, gradients and experts of a model as JSON, plots and warnings."""
    check_model_name(model)
    if codes is not None:
        check_source(codes, "codes")
    device_of(device)
    from moveimg.inspect import inspect_model
    from moveimg.pipeline import Pipeline

    pipeline = Pipeline.from_pretrained(model, device=device)
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


# --- bench -----------------------------------------------------------------------------------

Repeats = Annotated[
    int, typer.Option(min=1, max=10_000, help="Timed repetitions, after one that is not timed.")
]
Json = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file, too.")]
Trace = Annotated[Path | None, typer.Option("--profile", help="Write a trace of one run here.")]


def sample_speed(
    model: Annotated[
        str, typer.Argument(help="A model, or a config (YAML) for random weights.")
    ] = "digits",
    batch_size: BatchSize = 8,
    repeats: Repeats = 5,
    cfg_scale: Annotated[float, typer.Option(help="Guidance scale; 1 is no guidance.")] = 2.0,
    quantize: Quantize = None,
    set: Set = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = None,
    profile: Trace = None,
) -> None:
    """Measure how many images and codes per second are drawn, and the time to the first row."""
    from moveimg.config import ModelFile, SamplingSettings, load_config
    from moveimg.errors import validate

    settings = validate(SamplingSettings, {"cfg_scale": cfg_scale}, "sampling settings")
    config = None
    if model.endswith((".yaml", ".yml")):
        config = load_config(model, ModelFile, set or []).model
    else:
        _refuse_overrides(set)
        check_model_name(model)
    where = device_of(device)
    from moveimg.bench import bench_sample
    from moveimg.checkpoint import load_generator
    from moveimg.device import pick_dtype
    from moveimg.model import Transformer
    from moveimg.pipeline import resolve

    if config is None:
        generator = load_generator(resolve(model))
    else:
        generator = Transformer(config)
        generator.head.reset_parameters()  # it starts at zero, and equal logits are drawn faster
    generator = generator.to(where, number_type := pick_dtype(dtype, where)).eval()
    _report(
        lambda: bench_sample(generator, settings, batch_size, repeats, where, quantize),
        {"model": model, "dtype": str(number_type), "quantize": quantize, "cfg_scale": cfg_scale},
        repeats, where, json, profile,
    )  # fmt: skip


def encode_speed(
    tokenizer: Annotated[
        str, typer.Argument(help="A tokenizer or model directory, or vq-16 (random weights).")
    ] = "digits",
    size: Annotated[int, typer.Option(min=1, max=4096, help="Pixels per side.")] = 32,
    batch_size: Annotated[
        int | None, typer.Option(min=1, max=65536, help="Views per batch; default: by device.")
    ] = None,
    repeats: Repeats = 5,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = None,
    profile: Trace = None,
) -> None:
    """Measure how many images per second the tokenizer turns into codes."""
    if tokenizer != "vq-16":
        check_source(tokenizer, "tokenizer")
    where = device_of(device)
    import tokenizer as vq
    from moveimg.bench import bench_encode
    from moveimg.checkpoint import load_tokenizer
    from moveimg.data import default_batch_size
    from moveimg.device import pick_dtype

    number_type = pick_dtype(dtype, where)
    if tokenizer == "vq-16":
        plain = vq.build(vq.parse_config({"kind": "vq"}, "tokenizer"))
        model = vq.fast_tokenizer(plain.freeze().to(where))
    else:
        model = load_tokenizer(Path(tokenizer), where)
    if size % model.downsample:
        raise ValueError(f"size {size}: expected a multiple of {model.downsample}")
    views = batch_size or default_batch_size(size, where)
    _report(
        lambda: bench_encode(model, size, views, repeats, where, number_type),
        {"tokenizer": tokenizer, "size": size, "dtype": str(number_type)},
        repeats, where, json, profile,
    )  # fmt: skip


def train_speed(
    config: Annotated[Path, typer.Argument(help="A config (YAML) of `moveimg train`.")],
    batch_size: BatchSize = 8,
    repeats: Repeats = 5,
    set: Set = None,
    device: Device = None,
    json: Json = None,
    profile: Trace = None,
) -> None:
    """Measure training steps per second on random codes, and their share of the matrix rate (MFU).

    The config's micro_batch is used where it divides --batch-size; weights are random.
    """
    from moveimg.config import TrainConfig, load_config

    settings = load_config(config, TrainConfig, set or [])
    micro = settings.micro_batch or batch_size
    micro = batch_size if batch_size % micro else micro
    settings = settings.model_copy(update={"batch_size": batch_size, "micro_batch": micro})
    where = device_of(device)
    from moveimg.bench import bench_train
    from moveimg.device import pick_dtype

    about = {"config": str(config), "dtype": str(pick_dtype(settings.dtype, where))}
    about |= {key: getattr(settings, key) for key in ("micro_batch", "compile")}
    _report(lambda: bench_train(settings, repeats, where), about, repeats, where, json, profile)


for _name, _function in {
    "sample": sample_speed,
    "encode": encode_speed,
    "train": train_speed,
}.items():
    bench.command(name=_name)(_function)


def _report(
    measure: Callable[[], dict[str, Any]],
    about: dict[str, Any],
    repeats: int,
    device: Any,
    json: Path | None,
    profile: Path | None,
) -> None:
    """Measure, print the figures, and write the files asked for."""
    from moveimg.bench import describe_result, write_trace
    from moveimg.device import hardware
    from moveimg.files import require_file_name, write_json

    for path in filter(None, (json, profile)):
        require_file_name(path)  # now, not after minutes
    result = {**about, "repeats": repeats, "machine": hardware(device)} | measure()
    call = result.pop("call")
    print(describe_result(result))
    if json is not None:
        write_json(json, result)
    if profile is not None:
        write_trace(call, profile)
        print(f"trace: {profile} (chrome://tracing or ui.perfetto.dev)")
