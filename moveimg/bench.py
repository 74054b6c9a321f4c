"""How fast sampling and training are on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moveimg.config import ModelConfig, SamplingSettings, TrainConfig
from moveimg.device import hardware, peak_memory
from moveimg.dist import World
from moveimg.model import Transformer, decoding_model, token_flops
from moveimg.sampling import image_rngs, iter_codes
from moveimg.training.generator import GeneratorTask, freeze_backbone
from moveimg.training.loop import Run
from moveimg.training.parallel import choose_parallelism

Figures = dict[str, list[float]]  # unit -> a value per repetition


def bench_sample(
    model: Transformer,
    settings: SamplingSettings,
    batch_size: int,
    repeats: int,
    quantize: str | None = None,
) -> Figures:
    """Measure drawing the codes of `batch_size` images; with guidance an image is two rows."""
    config, device = model.config, model.head.weight.device
    fast, rngs = decoding_model(model, quantize), image_rngs(range(batch_size))
    labels = torch.arange(batch_size, device=device) % config.n_classes
    first_rows: list[float] = []

    def draw() -> None:
        begun = time.perf_counter()
        for done, _ in enumerate(iter_codes(fast, labels, settings, rngs), 1):
            if done == config.grid[1]:
                synchronize(device)
                first_rows.append(time.perf_counter() - begun)

    length, rows = config.seq_len, batch_size * (1 if settings.cfg_scale == 1 else 2)
    flops = length * rows * token_flops(model, (length + 1) / 2, decoding=True)
    figures = measure(draw, device, repeats, batch_size, batch_size * length, flops)
    return figures | {"seconds to the first row": first_rows[1:]}


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


def bench_train(config: TrainConfig, repeats: int, device: torch.device) -> Figures:
    """Measure the steps of `moveimg train` on random codes, from random weights."""
    torch.manual_seed(config.seed)
    model = Transformer(config.model).to(device)
    if config.train == "memory":
        freeze_backbone(model)
    parallel = choose_parallelism(config, World(device=device))
    codes: Any = RandomCodes(config.model, config.batch_size)
    tokenizer: Any = None  # previews alone need one
    task = GeneratorTask(config, model, tokenizer, codes, codes, parallel)
    run = Run(task, config, parallel)
    tokens = config.batch_size * config.model.seq_len
    flops = 3 * tokens * token_flops(model, (config.model.seq_len + 1) / 2)
    figures = measure(run.advance, device, repeats, config.batch_size, tokens, flops)
    return figures | {"steps per second": [1 / seconds for seconds in figures["seconds"]]}


def measure(
    call: Callable[[], object],
    device: torch.device,
    repeats: int,
    images: int,
    codes: int,
    flops: float,
) -> Figures:
    """Time `repeats` calls, after one that is not counted; each makes `images`, `codes`, `flops`.

    torch.utils.benchmark.Timer would warm up by two calls before every single measurement.
    """
    seconds = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - begun)
    work = {"images": images, "codes": codes, "GFLOPs": flops / 1e9}
    rates = {f"{unit} per second": [done / s for s in seconds[1:]] for unit, done in work.items()}
    return {"seconds": seconds[1:], **rates}


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def describe_figures(figures: Figures, device: torch.device) -> str:
    """Lines for people: each median with its range, and the peak memory of the process."""
    machine = hardware(device)
    lines = [f"on {machine['name']} ({device}, {machine['threads']} threads, torch "
             f"{machine['torch']}), medians of {len(figures['seconds'])} (range)"]  # fmt: skip
    for unit, values in figures.items():
        span = f"({min(values):,.4g} to {max(values):,.4g})"
        lines.append(f"{unit:<26}{statistics.median(values):>12,.4g}  {span}")
    return "\n".join([*lines, f"{'peak memory (MiB)':<26}{peak_memory(device) / 2**20:>12,.0f}"])
