"""`moveimg bench sample`, `encode` and `train`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from moveimg import DEFAULT_MODEL
from moveimg.commands.common import (
    BatchSize,
    Device,
    Dtype,
    Quantize,
    Set,
    Views,
    app,
    check_model_name,
    check_source,
    device_of,
    is_config,
    refuse_overrides,
)

bench = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure the speed of this machine, beside the limits of its hardware.",
)
app.add_typer(bench, name="bench")

Repeats = Annotated[
    int, typer.Option(min=1, max=10_000, help="Timed repetitions, after one that is not timed.")
]
Json = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file, too.")]
Trace = Annotated[Path | None, typer.Option("--profile", help="Write a trace of one run here.")]


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
    json: Json = None,
    profile: Trace = None,
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


@bench.command("encode")
def encode_speed(
    tokenizer: Annotated[str, typer.Argument(help="A directory, or vq-16.")] = DEFAULT_MODEL,
    size: Annotated[int, typer.Option(min=1, max=4096, help="Pixels per side.")] = 32,
    batch_size: Views = None,
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


@bench.command("train")
def train_speed(
    config: Annotated[
        Path, typer.Argument(help="A config of `moveimg train`: a YAML file or a recipe.")
    ],
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
