"""What is measured, and the least that each could take on this machine.

A limit is the longer of two times: the bytes that must be read, at the measured bandwidth, and
the FLOPs of the products, at the measured rate for products of their shapes. `share` is the limit
over what it took.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

import tokenizer as vq
from moveimg.bench.limits import Layout, matrix_rate, memory_bandwidth
from moveimg.bench.timing import seconds_of, spread, synchronize
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

ROWS_OF_A_CONVOLUTION = 4096  # more would measure the same rate for longer


def bench_sample(
    model: Transformer,
    settings: SamplingSettings,
    batch_size: int,
    repeats: int,
    device: torch.device,
    quantize: str | None = None,
) -> dict[str, Any]:
    """Draw the codes of `batch_size` images, `repeats` times.

    Least bytes: every matrix once a step, and the cache as far as it is filled. Least FLOPs: those
    of all rows, two an image with guidance.
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

    if device.type == "cuda":
        draw()  # beside the one that is never counted: steps are recorded at the second call
    seconds = seconds_of(draw, device, repeats)
    peak = peak_memory(device)  # before the limits are measured
    rows, length = batch_size * (1 if settings.cfg_scale == 1 else 2), config.seq_len
    context = (length + 1) / 2
    dtype = model.head.weight.dtype
    kept = sum(layer.numel_per_token() for layer in model.make_cache(1).layers)  # type: ignore[operator]
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    weight_bytes = matrices * (1 if quantize == "int8" else dtype.itemsize)
    read = length * (weight_bytes + rows * context * kept * dtype.itemsize)
    flops = length * rows * token_flops(model, context, decoding=True)
    layout = linear_kind(model.head.weight, quantize)
    limit = least_seconds(read, flops, linear_shapes(model, rows), dtype, device, layout)
    return {
        "what": "sample",
        "images": batch_size,
        "seconds": spread(seconds),
        "images_per_second": spread([batch_size / s for s in seconds]),
        "codes_per_second": spread([batch_size * length / s for s in seconds]),
        "first_row_seconds": spread(first_rows[-repeats:]),
        "call": draw,
    } | outcome(limit, seconds, peak)


def _convolution_flops(x: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    return conv_flop_count(list(x), list(weight), list(out_shape))


def bench_encode(
    tokenizer: vq.AutoencoderTokenizer,
    size: int,
    batch_size: int,
    repeats: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """A call of the tokenizer as `moveimg encode` makes it, `repeats` times.

    `batch_size` uint8 views of `size` pixels a side become codes; `dtype` is that of autocast, as
    of encode_images. Images are neither read nor cut, nor codes written.
    """
    views = torch.randint(256, (batch_size, 3, size, size), dtype=torch.uint8)
    side = size // tokenizer.downsample
    settings: Any = SimpleNamespace(  # what of EncodeSettings matters here
        codebook_size=tokenizer.codebook_size, grid=(side, side), n_crops=1, batch_size=batch_size
    )
    encode = make_encoder(tokenizer, settings, device, dtype)
    shapes: list[tuple[int, int, int]] = []

    def note(module: nn.Conv2d, args: Any, out: Tensor) -> None:
        rows = min(out.numel() // out.shape[1], ROWS_OF_A_CONVOLUTION)
        shapes.append((rows, module.weight[0].numel(), module.out_channels))

    convolutions = [m for m in tokenizer.modules() if isinstance(m, nn.Conv2d)]
    handles = [module.register_forward_hook(note) for module in convolutions]
    winograd = {torch.ops.aten._nnpack_spatial_convolution: _convolution_flops}  # as the plain way
    with FlopCounterMode(display=False, custom_mapping=winograd) as counter:
        tokenizer.encode(normalize(views.to(device)))
    for handle in handles:
        handle.remove()
    seconds = seconds_of(lambda: encode(views), device, repeats)
    peak = peak_memory(device)  # before the limits are measured
    weight = next(tokenizer.parameters())
    read = sum(p.numel() * p.element_size() for p in tokenizer.parameters())
    limit = least_seconds(read, counter.get_total_flops(), shapes, dtype or weight.dtype, device)
    return {
        "what": "encode",
        "images": batch_size,
        "seconds": spread(seconds),
        "images_per_second": spread([batch_size / s for s in seconds]),
        "codes_per_second": spread([batch_size * side * side / s for s in seconds]),
        "call": lambda: encode(views),
    } | outcome(limit, seconds, peak)


class RandomCodes:
    """What a training asks of packed codes: n images of random codes and classes, in memory."""

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
    """The steps of `moveimg train` on random codes, from random weights.

    Its FLOPs are three times those of the forward pass; the share is what is called MFU.
    """
    config = config.model_copy(update={"evaluation": None})
    torch.manual_seed(config.seed)
    model = Transformer(config.model).to(device)
    if config.train == "memory":
        freeze_backbone(model)
    spreading = plan(config, World(device=device))
    codes: Any = RandomCodes(config.model, config.batch_size)
    tokenizer: Any = None  # of previews alone
    task = GeneratorTask(config, model, tokenizer, codes, codes, spreading)
    run = Run(task, config, device, spreading)
    seconds = seconds_of(run.advance, device, repeats)
    peak = peak_memory(device)  # before the limits are measured
    tokens = config.batch_size * config.model.seq_len
    flops = 3 * tokens * token_flops(model, (config.model.seq_len + 1) / 2)
    shapes = linear_shapes(model, tokens // spreading.parts)
    limit = least_seconds(0, flops, shapes, spreading.dtype, device)
    return {
        "what": "train",
        "images": config.batch_size,
        "seconds": spread(seconds),
        "steps_per_second": spread([1 / s for s in seconds]),
        "images_per_second": spread([config.batch_size / s for s in seconds]),
        "codes_per_second": spread([tokens / s for s in seconds]),
        "call": run.advance,
    } | outcome(limit, seconds, peak)


def linear_shapes(model: nn.Module, rows: int) -> list[tuple[int, int, int]]:
    """(rows, in, out) of every linear layer."""
    return [
        (rows, module.in_features, module.out_features)
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]


def least_seconds(
    read: float,
    flops: float,
    shapes: list[tuple[int, int, int]],
    dtype: torch.dtype,
    device: torch.device,
    layout: Layout = lambda linear: linear,
) -> dict[str, float]:
    """The limit of work that reads `read` bytes and takes `flops`, with the rates behind it."""
    bandwidth, rate = memory_bandwidth(device), matrix_rate(shapes, dtype, device, layout)
    return {
        "bytes": read,
        "flops": flops,
        "bytes_per_second": bandwidth,
        "flops_per_second": rate,
    }


def outcome(limit: dict[str, float], seconds: list[float], peak: int) -> dict[str, Any]:
    """Peak memory in bytes, the limit, and the shares of its rates that were reached."""
    median = spread(seconds)["median"]
    shares = {
        "bytes": limit["bytes"] / limit["bytes_per_second"] / median,
        "flops": limit["flops"] / limit["flops_per_second"] / median,
    }
    return {"peak_memory": peak, "limit": limit, "share": shares}


def write_trace(call: Callable[[], Any], path: Path) -> None:
    """A trace of one `call`, for chrome://tracing or Perfetto. OSError if it cannot be written."""
    from torch.profiler import profile

    with profile() as trace:
        call()
    with atomic(path) as temporary:
        trace.export_chrome_trace(str(temporary))
        if not temporary.is_file() or not temporary.stat().st_size:  # a full disk is not told
            raise OSError(f"{path}: the trace could not be written")
