"""How fast sampling, encoding and training are here, beside what the machine allows.

The limits are memory bandwidth and matrix rate, measured in the same run. A share is the least
time of the work at a limit over the measured time: the bytes that must be read at the bandwidth,
or the FLOPs of the products at the rate of products of their shapes.
"""

from __future__ import annotations

import statistics
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

import tokenizer as vq
from moveimg.config import ModelConfig, SamplingSettings, TrainConfig
from moveimg.data import make_encoder, normalize
from moveimg.device import peak_memory
from moveimg.dist import World
from moveimg.files import atomic
from moveimg.model import Transformer, decoding_model, linear_kind
from moveimg.model.cost import token_flops
from moveimg.sampling import image_rngs, iter_codes
from moveimg.training.generator import GeneratorTask
from moveimg.training.initial import freeze_backbone
from moveimg.training.loop import Run
from moveimg.training.parallel import plan

STREAM_BYTES = {"cpu": 2**28, "cuda": 2**32}  # far more than any cache holds
ROWS_OF_A_CONVOLUTION = 4096  # more would measure the same rate for longer
UNITS = {
    "images_per_second": "images per second",
    "codes_per_second": "codes per second",
    "steps_per_second": "steps per second",
    "first_row_seconds": "seconds to the first row",
    "seconds": "seconds",
}
Shapes = list[tuple[int, int, int]]  # rows, in, out of matrix products
Layout = Callable[[nn.Linear], nn.Module]


# --- the three workloads ---------------------------------------------------------------------


def bench_sample(
    model: Transformer,
    settings: SamplingSettings,
    batch_size: int,
    repeats: int,
    device: torch.device,
    quantize: str | None = None,
) -> dict[str, Any]:
    """Draw the codes of `batch_size` images, `repeats` times.

    Least bytes: every matrix once per decoding step, and the filled part of the cache. Least FLOPs:
    those of all rows, two per image with guidance.
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

    seconds, peak = measure(draw, device, repeats)
    rows, length = batch_size * (1 if settings.cfg_scale == 1 else 2), config.seq_len
    context = (length + 1) / 2
    dtype = model.head.weight.dtype
    cached = sum(layer.numel_per_token() for layer in model.make_cache(1).layers)
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    weight_bytes = matrices * (1 if quantize == "int8" else dtype.itemsize)
    rate = matrix_rate(
        linear_shapes(model, rows), dtype, device, linear_kind(model.head.weight, quantize)
    )
    return summarize(
        "sample", batch_size, batch_size * length, seconds, peak, draw,
        read=length * (weight_bytes + rows * context * cached * dtype.itemsize),
        flops=length * rows * token_flops(model, context, decoding=True),
        bandwidth=memory_bandwidth(device), rate=rate,
    ) | {"first_row_seconds": spread(first_rows[-repeats:])}  # fmt: skip


def bench_encode(
    tokenizer: vq.AutoencoderTokenizer,
    size: int,
    batch_size: int,
    repeats: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Encode a batch as `moveimg encode` does, `repeats` times; images are neither read nor cut.

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
        rows = min(out.numel() // out.shape[1], ROWS_OF_A_CONVOLUTION)
        shapes.append((rows, module.weight[0].numel(), module.out_channels))

    convolutions = [m for m in tokenizer.modules() if isinstance(m, nn.Conv2d)]
    handles = [module.register_forward_hook(note) for module in convolutions]
    winograd = {torch.ops.aten._nnpack_spatial_convolution: _convolution_flops}
    with FlopCounterMode(display=False, custom_mapping=winograd) as counter:
        tokenizer.encode(normalize(views.to(device)))
    for handle in handles:
        handle.remove()
    seconds, peak = measure(lambda: encode(views), device, repeats)
    weights = list(tokenizer.parameters())
    return summarize(
        "encode", batch_size, batch_size * side * side, seconds, peak, lambda: encode(views),
        read=sum(p.numel() * p.element_size() for p in weights),
        flops=counter.get_total_flops(), bandwidth=memory_bandwidth(device),
        rate=matrix_rate(shapes, dtype or weights[0].dtype, device),
    )  # fmt: skip


def _convolution_flops(x: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    """FLOPs of a Winograd convolution, counted as those of the direct one."""
    return conv_flop_count(list(x), list(weight), list(out_shape))


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
    parallel = plan(config, World(device=device))
    codes: Any = RandomCodes(config.model, config.batch_size)
    tokenizer: Any = None  # previews alone need one
    run = Run(GeneratorTask(config, model, tokenizer, codes, codes, parallel), config, device,
              parallel)  # fmt: skip
    seconds, peak = measure(run.advance, device, repeats)
    tokens = config.batch_size * config.model.seq_len
    shapes = linear_shapes(model, tokens // parallel.parts)
    result = summarize(
        "train", config.batch_size, tokens, seconds, peak, run.advance, read=0,
        flops=3 * tokens * token_flops(model, (config.model.seq_len + 1) / 2),
        bandwidth=memory_bandwidth(device), rate=matrix_rate(shapes, parallel.dtype, device),
    )  # fmt: skip
    return result | {"steps_per_second": spread([1 / s for s in seconds])}


# --- measuring -------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def time_calls(call: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls, after two that are not counted (compilation, caches).

    torch.utils.benchmark.Timer would repeat its own warm-up before every single measurement.
    """
    call()
    synchronize(device)
    return timeit.repeat(lambda: (call(), synchronize(device)), number=1, repeat=repeats)


def measure(call: Callable[[], Any], device: torch.device, repeats: int) -> tuple[list[float], int]:
    """Seconds of each call, and the peak memory in bytes (before the limits are measured)."""
    return time_calls(call, device, repeats), peak_memory(device)


def memory_bandwidth(device: torch.device) -> float:
    """Bytes per second of reading a large tensor once (its sum), the median of seven."""
    n = STREAM_BYTES.get(device.type, 2**28) // 4
    data = torch.ones(n, device=device)
    return 4 * n / statistics.median(time_calls(data.sum, device, 7))


def matrix_rate(
    shapes: Shapes, dtype: torch.dtype, device: torch.device, layout: Layout = lambda linear: linear
) -> float:
    """FLOPs per second of products W [n, k] x [k, rows] over all shapes in turn.

    Each shape has a matrix of its own, so that small ones do not stay in a cache that the model's
    would not stay in. `layout` makes of a linear layer the module to measure, whose `takes` is its
    input's dtype, where it is another.
    """
    products = []
    for rows, k, n in shapes:
        linear = nn.Linear(k, n, bias=False, device=device, dtype=dtype).requires_grad_(False)
        product = layout(linear)
        x = torch.randn(rows, k, device=device).to(getattr(product, "takes", dtype))
        products.append((product, x))
    with torch.inference_mode():
        seconds = time_calls(lambda: [product(x) for product, x in products], device, 7)
    return sum(2.0 * rows * k * n for rows, k, n in shapes) / statistics.median(seconds)


def linear_shapes(model: nn.Module, rows: int) -> Shapes:
    """The shapes of every linear layer's product with `rows` rows."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return [(rows, linear.in_features, linear.out_features) for linear in linears]


def spread(values: list[float]) -> dict[str, float]:
    """Least, median and greatest."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def summarize(
    workload: str,
    images: int,
    codes: int,
    seconds: list[float],
    peak: int,
    call: Callable[[], Any],
    *,
    read: float,
    flops: float,
    bandwidth: float,
    rate: float,
) -> dict[str, Any]:
    """Rates, the limits, and the shares of the limits that were reached."""
    median = statistics.median(seconds)
    return {
        "what": workload,
        "images": images,
        "seconds": spread(seconds),
        "images_per_second": spread([images / s for s in seconds]),
        "codes_per_second": spread([codes / s for s in seconds]),
        "peak_memory": peak,
        "limit": {
            "bytes": read,
            "flops": flops,
            "bytes_per_second": bandwidth,
            "flops_per_second": rate,
        },
        "share": {"bytes": read / bandwidth / median, "flops": flops / rate / median},
        "call": call,
    }


def describe_result(result: dict[str, Any]) -> str:
    """Lines for people: medians with their range, the limits and the shares reached."""
    machine, limit, share = result["machine"], result["limit"], result["share"]
    images = f"{result['images']} image{'' if result['images'] == 1 else 's'}"
    lines = [
        f"{result['what']}, {images}, median of {result['repeats']} (range), on "
        f"{machine['name']} ({machine['device']}, {machine['threads']} threads, torch "
        f"{machine['torch']})"
    ]
    for key, unit in UNITS.items():
        if value := result.get(key):
            span = f"({value['min']:,.4g} to {value['max']:,.4g})"
            lines.append(f"{unit:<26}{value['median']:>12,.4g}  {span}")
    lines.append(f"{'peak memory (MiB)':<26}{result['peak_memory'] / 2**20:>12,.0f}")
    if limit["bytes"]:
        lines.append(
            f"{'bandwidth (GB/s)':<26}{limit['bytes_per_second'] / 1e9:>12,.4g}  measured; "
            f"{limit['bytes'] / 1e9:,.4g} GB to read: {share['bytes']:.0%} of it"
        )
    lines.append(
        f"{'matrix rate (GFLOP/s)':<26}{limit['flops_per_second'] / 1e9:>12,.4g}  measured at "
        f"these shapes; {limit['flops'] / 1e9:,.4g} GFLOPs to do: {share['flops']:.0%} of it"
    )
    return "\n".join(lines)


def write_trace(call: Callable[[], Any], path: Path) -> None:
    """A trace of one `call`, for chrome://tracing or Perfetto. OSError if it cannot be written."""
    with profile() as trace:
        call()
    with atomic(path) as temporary:
        trace.export_chrome_trace(str(temporary))
        if not temporary.is_file() or not temporary.stat().st_size:  # no error on a full disk
            raise OSError(f"{path}: the trace could not be written")
