"""What is measured, and the least that each could take on this machine.

A limit is the longer of two times: the bytes that must be read, at the measured bandwidth, and
the FLOPs of the products, at the measured rate for products of their shapes. `share` is the limit
over what it took.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tokenizer as vq
from moveimg.bench.limits import Layout, matrix_rate, memory_bandwidth
from moveimg.bench.timing import seconds_of, spread, synchronize
from moveimg.config import OptimizerConfig, SamplingSettings
from moveimg.device import peak_memory
from moveimg.files import atomic
from moveimg.model import Transformer
from moveimg.model.cost import token_flops
from moveimg.model.decoding import decoding_model, linear_kind
from moveimg.sampling import image_rngs, iter_codes
from moveimg.training.optimizer import clip_gradients, make_optimizers

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
    kept = sum(layer.numel_per_token() for layer in model.make_cache(1).layers)
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


def bench_encode(
    tokenizer: vq.AutoencoderTokenizer,
    size: int,
    batch_size: int,
    repeats: int,
    device: torch.device,
) -> dict[str, Any]:
    """Turn a batch of images of `size` pixels a side into codes, `repeats` times."""
    images = torch.rand(batch_size, 3, size, size, device=device) * 2 - 1
    shapes: list[tuple[int, int, int]] = []

    def note(module: nn.Conv2d, args: Any, out: Tensor) -> None:
        rows = min(out.numel() // out.shape[1], ROWS_OF_A_CONVOLUTION)
        shapes.append((rows, module.weight[0].numel(), module.out_channels))

    convolutions = [m for m in tokenizer.modules() if isinstance(m, nn.Conv2d)]
    handles = [module.register_forward_hook(note) for module in convolutions]
    with FlopCounterMode(display=False) as counter:
        codes = tokenizer.encode(images)
    for handle in handles:
        handle.remove()
    fast = vq.fast_encoder(tokenizer)  # after counting: what is counted is the plain way
    seconds = seconds_of(lambda: fast.encode(images), device, repeats)
    peak = peak_memory(device)  # before the limits are measured
    dtype = next(tokenizer.parameters()).dtype
    read = sum(p.numel() * p.element_size() for p in tokenizer.parameters())
    limit = least_seconds(read, counter.get_total_flops(), shapes, dtype, device)
    return {
        "what": "encode",
        "images": batch_size,
        "seconds": spread(seconds),
        "images_per_second": spread([batch_size / s for s in seconds]),
        "codes_per_second": spread([codes.numel() / s for s in seconds]),
        "call": lambda: fast.encode(images),
    } | outcome(limit, seconds, peak)


def bench_train(
    model: Transformer,
    optimizer: OptimizerConfig,
    batch_size: int,
    repeats: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """A training step on random codes: forward, cross-entropy, backward, clip, update.

    Its FLOPs are three times those of the forward pass; the share is what is called MFU.
    """
    config = model.train().config
    codes = torch.randint(config.codebook_size, (batch_size, config.seq_len), device=device)
    labels = torch.randint(config.n_classes, (batch_size,), device=device)
    optimizers = make_optimizers(model, optimizer)

    def step() -> None:
        low = dtype == torch.bfloat16
        with torch.autocast(device.type, dtype=dtype, enabled=low):
            loss = model(codes, labels, loss=True)[0] + model.auxiliary_loss()
        for each in optimizers:
            each.zero_grad(set_to_none=True)
        loss.backward()
        clip_gradients(optimizers, optimizer)
        for each in optimizers:
            each.step()

    seconds = seconds_of(step, device, repeats)
    peak = peak_memory(device)  # before the limits are measured
    tokens = batch_size * config.seq_len
    flops = 3 * tokens * token_flops(model, (config.seq_len + 1) / 2)
    limit = least_seconds(0, flops, linear_shapes(model, tokens), dtype, device)
    return {
        "what": "train",
        "images": batch_size,
        "seconds": spread(seconds),
        "steps_per_second": spread([1 / s for s in seconds]),
        "images_per_second": spread([batch_size / s for s in seconds]),
        "codes_per_second": spread([tokens / s for s in seconds]),
        "call": step,
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
