"""How fast sampling, encoding and training are here, beside the limits of the machine.

The limits are the memory bandwidth and the rate of matrix products, measured in the same run. A
share is the least time that the work can take at a limit over the measured time.
"""

from __future__ import annotations

import statistics
import time
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import profile

import tokenizer as vq
from moveimg.config import ModelConfig, SamplingSettings, TrainConfig
from moveimg.data import make_encoder, normalize
from moveimg.device import peak_memory
from moveimg.dist import World
from moveimg.files import atomic
from moveimg.model import Transformer, decoding_model, linear_kind, token_flops
from moveimg.sampling import image_rngs, iter_codes
from moveimg.training.generator import GeneratorTask
from moveimg.training.initial import freeze_backbone
from moveimg.training.loop import Run
from moveimg.training.parallel import choose_parallelism

STREAM_BYTES = {"cpu": 2**28, "cuda": 2**32}  # far more than any cache holds
MAX_ROWS = 4096  # of a product whose rate is measured; more would give the same rate
UNITS = {
    "images_per_second": "images per second",
    "codes_per_second": "codes per second",
    "steps_per_second": "steps per second",
    "first_row_seconds": "seconds to the first row",
    "seconds": "seconds",
}
Shapes = list[tuple[int, int, int]]  # rows, in, out of matrix products


@dataclass(frozen=True)
class Workload:
    """A call to time: its images and codes, and the least work that it needs.

    Attributes:
        read: bytes that must be read.
        flops: of the matrix products.
        shapes, dtype: of those products.
        layout: makes of a linear layer the module that multiplies.
    """

    call: Callable[[], Any]
    images: int
    codes: int
    read: float
    flops: float
    shapes: Shapes
    dtype: torch.dtype
    layout: Callable[[nn.Linear], nn.Module] = lambda linear: linear


def bench_sample(
    model: Transformer,
    settings: SamplingSettings,
    batch_size: int,
    repeats: int,
    device: torch.device,
    quantize: str | None = None,
) -> dict[str, Any]:
    """Draw the codes of `batch_size` images, `repeats` times.

    Every decoding step reads every matrix and the filled part of the cache. With guidance an image
    is two rows.
    """
    config = model.config
    fast, rngs = decoding_model(model, quantize), image_rngs(range(batch_size))
    labels = torch.arange(batch_size, device=device) % config.n_classes
    first_rows: list[float] = []

    def draw() -> None:
        begun = time.perf_counter()
        for done, _ in enumerate(iter_codes(fast, labels, settings, rngs), 1):
            if done == config.grid[1]:
                synchronize(device)
                first_rows.append(time.perf_counter() - begun)

    rows, length = batch_size * (1 if settings.cfg_scale == 1 else 2), config.seq_len
    context, dtype = (length + 1) / 2, model.head.weight.dtype
    shapes = linear_shapes(model, rows)
    cached = sum(layer.numel_per_token() for layer in model.make_cache(1).layers)
    weight_bytes = sum(k * n for _, k, n in shapes) * (1 if quantize else dtype.itemsize)
    read = length * (weight_bytes + rows * context * cached * dtype.itemsize)
    flops = length * rows * token_flops(model, context, decoding=True)
    layout = linear_kind(model.head.weight, quantize)
    work = Workload(draw, batch_size, batch_size * length, read, flops, shapes, dtype, layout)
    result = {"what": "sample"} | measure(work, device, repeats)
    return result | {"first_row_seconds": spread(first_rows[-repeats:])}


def bench_encode(
    tokenizer: vq.AutoencoderTokenizer,
    size: int,
    batch_size: int,
    repeats: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Encode a batch of views as `moveimg encode` does, `repeats` times, without reading images.

    `batch_size` uint8 views of `size` x `size` pixels become codes; `dtype` is autocast's.
    """
    views = torch.randint(256, (batch_size, 3, size, size), dtype=torch.uint8)
    side = size // tokenizer.downsample
    settings: Any = SimpleNamespace(  # the EncodeSettings that matter here
        codebook_size=tokenizer.codebook_size, grid=(side, side), n_crops=1, batch_size=batch_size
    )
    encode = make_encoder(tokenizer, settings, device, dtype)
    shapes: Shapes = []

    def note(module: nn.Conv2d, args: Any, out: Tensor) -> None:
        shapes.append((out.numel() // out.shape[1], module.weight[0].numel(), out.shape[1]))

    handles = [
        module.register_forward_hook(note)
        for module in tokenizer.modules()
        if isinstance(module, nn.Conv2d)
    ]
    tokenizer.encode(normalize(views.to(device)))
    for handle in handles:
        handle.remove()
    weights = list(tokenizer.parameters())
    read = sum(p.numel() * p.element_size() for p in weights)
    flops = sum(2.0 * rows * k * n for rows, k, n in shapes)
    codes = batch_size * side * side
    work = Workload(lambda: encode(views), batch_size, codes, read, flops, shapes,
                    dtype or weights[0].dtype)  # fmt: skip
    return {"what": "encode"} | measure(work, device, repeats)


class RandomCodes:
    """Packed codes of n images in memory, random codes and classes."""

    n_crops = 1

    def __init__(self, config: ModelConfig, n: int) -> None:
        self.codes = torch.randint(config.codebook_size, (n, config.seq_len))
        self.labels = torch.randint(config.n_classes, (n,))
        self.class_names = [str(i) for i in range(config.n_classes)]

    def __len__(self) -> int:
        return len(self.codes)

    def get(self, indices: np.ndarray, crops: np.ndarray) -> tuple[Tensor, Tensor]:
        return self.codes[indices], self.labels[indices]


def bench_train(config: TrainConfig, repeats: int, device: torch.device) -> dict[str, Any]:
    """Make the steps of `moveimg train` on random codes, from random weights.

    Their FLOPs are three times those of the forward pass; the share of the rate is called MFU.
    """
    config = config.model_copy(update={"evaluation": None})
    torch.manual_seed(config.seed)
    model = Transformer(config.model).to(device)
    if config.train == "memory":
        freeze_backbone(model)
    parallel = choose_parallelism(config, World(device=device))
    codes: Any = RandomCodes(config.model, config.batch_size)
    tokenizer: Any = None  # previews alone need one
    task = GeneratorTask(config, model, tokenizer, codes, codes, parallel)
    run = Run(task, config, device, parallel)
    tokens = config.batch_size * config.model.seq_len
    flops = 3 * tokens * token_flops(model, (config.model.seq_len + 1) / 2)
    shapes = linear_shapes(model, tokens // parallel.parts)
    work = Workload(run.advance, config.batch_size, tokens, 0, flops, shapes, parallel.dtype)
    result = {"what": "train"} | measure(work, device, repeats)
    rate = {key: value / config.batch_size for key, value in result["images_per_second"].items()}
    return result | {"steps_per_second": rate}


def measure(work: Workload, device: torch.device, repeats: int) -> dict[str, Any]:
    """Seconds, rates and peak memory of a workload, the limits, and the shares reached."""
    seconds = time_calls(work.call, device, repeats)
    peak, median = peak_memory(device), statistics.median(seconds)  # before limits are measured
    bandwidth = memory_bandwidth(device)
    rate = matrix_rate(work, device)
    return {
        "images": work.images,
        "seconds": spread(seconds),
        "images_per_second": spread([work.images / s for s in seconds]),
        "codes_per_second": spread([work.codes / s for s in seconds]),
        "peak_memory": peak,
        "limit": {
            "bytes": work.read,
            "flops": work.flops,
            "bytes_per_second": bandwidth,
            "flops_per_second": rate,
        },
        "share": {"bytes": work.read / bandwidth / median, "flops": work.flops / rate / median},
        "call": work.call,
    }


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def time_calls(call: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls, after one that is not counted.

    torch.utils.benchmark.Timer would warm up by two calls before every single measurement.
    """
    call()
    if device.type == "cuda":
        call()  # a compiled step is recorded at its second call
    synchronize(device)

    def call_and_wait() -> None:
        call()
        synchronize(device)

    return timeit.repeat(call_and_wait, number=1, repeat=repeats)


def memory_bandwidth(device: torch.device) -> float:
    """Bytes per second of reading a large tensor once (its sum), the median of seven."""
    n = STREAM_BYTES.get(device.type, 2**28) // 4
    data = torch.ones(n, device=device)
    return 4 * n / statistics.median(time_calls(data.sum, device, 7))


def matrix_rate(work: Workload, device: torch.device) -> float:
    """FLOPs per second of the products of a workload's shapes in turn, the median of seven.

    Each shape has a matrix of its own: as in the model, small ones do not stay in a cache.
    """
    products, flops = [], 0.0
    for rows, k, n in work.shapes:
        rows = min(rows, MAX_ROWS)
        linear = nn.Linear(k, n, bias=False, device=device, dtype=work.dtype).requires_grad_(False)
        product = work.layout(linear)
        x = torch.randn(rows, k, device=device).to(getattr(product, "takes", work.dtype))
        products.append((product, x))
        flops += 2.0 * rows * k * n
    with torch.inference_mode():
        seconds = time_calls(lambda: [product(x) for product, x in products], device, 7)
    return flops / statistics.median(seconds)


def linear_shapes(model: nn.Module, rows: int) -> Shapes:
    """The shapes of every linear layer's product with `rows` rows."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return [(rows, linear.in_features, linear.out_features) for linear in linears]


def spread(values: list[float]) -> dict[str, float]:
    """Least, median and greatest."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def describe_result(result: dict[str, Any]) -> str:
    """Lines for people: medians with their range, the limits and the shares reached."""
    machine, limit, share = result["machine"], result["limit"], result["share"]
    images = f"{result['images']} image{'' if result['images'] == 1 else 's'}"
    lines = [
        f"{result['what']}, {images}, median of {result['repeats']} (range), on {machine['name']} "
        f"({machine['device']}, {machine['threads']} threads, torch {machine['torch']})"
    ]
    for key, unit in UNITS.items():
        if value := result.get(key):
            span = f"({value['min']:,.4g} to {value['max']:,.4g})"
            lines.append(f"{unit:<26}{value['median']:>12,.4g}  {span}")
    lines.append(f"{'peak memory (MiB)':<26}{result['peak_memory'] / 2**20:>12,.0f}")
    limits = {"bytes": ("bandwidth (GB/s)", "GB to read"),
              "flops": ("matrix rate (GFLOP/s)", "GFLOPs at these shapes")}  # fmt: skip
    for key, (name, work) in limits.items():
        if limit[key]:
            rate = f"{name:<26}{limit[f'{key}_per_second'] / 1e9:>12,.4g}  measured"
            lines.append(f"{rate}; {limit[key] / 1e9:,.4g} {work}: {share[key]:.0%} of it reached")
    return "\n".join(lines)


def write_trace(call: Callable[[], Any], path: Path) -> None:
    """Write a trace of one `call`, for chrome://tracing or Perfetto. OSError on a full disk."""
    with profile() as trace:
        call()
    with atomic(path) as temporary:
        trace.export_chrome_trace(str(temporary))
        if not temporary.is_file() or not temporary.stat().st_size:  # no error on a full disk
            raise OSError(f"{path}: the trace could not be written")
