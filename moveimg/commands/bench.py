"""`moveimg bench sample`, `encode` and `train`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from moveimg.commands.common import Device, Dtype, Set, app, command

bench = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="How fast it is here, beside what the machine allows.",
)
app.add_typer(bench, name="bench")

Repeats = Annotated[int, typer.Option(min=1, help="times, after one that is not counted")]
Batch = Annotated[int, typer.Option(min=1, help="images side by side")]
Json = Annotated[Path | None, typer.Option("--json", help="write the figures here, too")]
Trace = Annotated[Path | None, typer.Option("--profile", help="write a trace of one run here")]
What = Annotated[
    str, typer.Argument(help="a model, or a config (YAML), whose weights are then random")
]


def sample(
    what: What = "digits",
    batch_size: Batch = 8,
    repeats: Repeats = 5,
    cfg_scale: Annotated[float, typer.Option(help="guidance; 1 is none")] = 2.0,
    quantize: Annotated[str | None, typer.Option(help="int8: matrices of 8 bits (CPU)")] = None,
    set: Set = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = None,
    profile: Trace = None,
) -> None:
    """Codes of images drawn: images and codes a second, time to the first row."""
    from moveimg.bench.workloads import bench_sample
    from moveimg.config import SamplingSettings
    from moveimg.device import pick_device, pick_dtype
    from moveimg.errors import validate

    where = pick_device(device)
    number_type = pick_dtype(dtype, where)
    model = _generator(what, set or []).to(where, number_type).eval()
    settings = validate(SamplingSettings, {"cfg_scale": cfg_scale}, "sampling settings")
    _show(
        lambda times: bench_sample(model, settings, batch_size, times, where, quantize),
        {"model": what, "dtype": str(number_type), "quantize": quantize, "cfg_scale": cfg_scale},
        repeats, where, json, profile,
    )  # fmt: skip


def encode(
    tokenizer: Annotated[
        str, typer.Argument(help="a tokenizer's or a model's directory, or vq-16 (random weights)")
    ] = "digits",
    size: Annotated[int, typer.Option(min=1, help="pixels of a side")] = 32,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="views a call of the tokenizer; left out, by device")
    ] = None,
    repeats: Repeats = 5,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = None,
    profile: Trace = None,
) -> None:
    """Images -> codes, as by a call of `moveimg encode`: images and codes a second."""
    import tokenizer as vq
    from moveimg.bench.workloads import bench_encode
    from moveimg.checkpoint import load_tokenizer
    from moveimg.data import default_batch_size
    from moveimg.device import pick_device, pick_dtype

    where = pick_device(device)
    number_type = pick_dtype(dtype, where)
    if tokenizer == "vq-16":
        plain = vq.build(vq.parse_config({"kind": "vq"}, "tokenizer"))
        model = vq.fast_tokenizer(plain.freeze().to(where))
    else:
        model = load_tokenizer(Path(tokenizer), where)
    if size % model.downsample:
        raise ValueError(f"size {size}: expected a multiple of {model.downsample}")
    views = batch_size or default_batch_size(size, where)
    _show(
        lambda times: bench_encode(model, size, views, times, where, number_type),
        {"tokenizer": tokenizer, "size": size, "dtype": str(number_type)},
        repeats, where, json, profile,
    )  # fmt: skip


def train(
    config: Annotated[Path, typer.Argument(help="a config (YAML) of `moveimg train`")],
    batch_size: Batch = 8,
    repeats: Repeats = 5,
    set: Set = None,
    device: Device = None,
    json: Json = None,
    profile: Trace = None,
) -> None:
    """Steps of `moveimg train` on random codes: steps a second, share of the matrix rate (MFU).

    With the config's own micro_batch where it divides --batch-size, else in one pass; from random
    weights, whatever init_from says.
    """
    from moveimg.bench.workloads import bench_train
    from moveimg.config import TrainConfig, load_config
    from moveimg.device import pick_device, pick_dtype

    where = pick_device(device)
    settings = load_config(config, TrainConfig, set or [])
    micro = settings.micro_batch or batch_size
    micro = batch_size if batch_size % micro else micro
    settings = settings.model_copy(update={"batch_size": batch_size, "micro_batch": micro})
    about = {"config": str(config), "dtype": str(pick_dtype(settings.dtype, where))}
    about |= {key: getattr(settings, key) for key in ("micro_batch", "compile")}
    _show(lambda times: bench_train(settings, times, where), about, repeats, where, json, profile)


for function in (sample, encode, train):
    command(function, bench)


def _generator(what: str, overrides: list[str]) -> Any:
    """The generator of a model, or one of a config with random weights."""
    from moveimg.checkpoint import load_generator
    from moveimg.config import ModelFile, load_config
    from moveimg.model import Transformer
    from moveimg.pipeline import resolve

    if what.endswith((".yaml", ".yml")):
        model = Transformer(load_config(Path(what), ModelFile, overrides).model)
        # the head starts at zero, and equal logits would be drawn from faster than others
        model.head.reset_parameters()
        return model
    if overrides:
        raise ValueError("--set changes a config file; a model is as it was trained")
    return load_generator(resolve(what))


def _show(
    measure: Callable[[int], dict[str, Any]],
    about: dict[str, Any],
    repeats: int,
    device: Any,
    json: Path | None,
    profile: Path | None,
) -> None:
    """Measure, print a table, and write what was asked for."""
    from moveimg.bench.report import describe
    from moveimg.bench.workloads import write_trace
    from moveimg.device import hardware
    from moveimg.files import require_file_name, write_json

    for path in filter(None, (json, profile)):
        require_file_name(path)  # now, not after minutes
    result = {**about, "repeats": repeats, "machine": hardware(device)} | measure(repeats)
    call = result.pop("call")
    print(describe(result))
    if json is not None:
        write_json(json, result)
    if profile is not None:
        write_trace(call, profile)
        print(f"trace: {profile} (chrome://tracing or ui.perfetto.dev)")
