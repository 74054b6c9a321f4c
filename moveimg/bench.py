"""Benchmarks of sampling and training speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from moveimg.config import ModelConfig, SamplingSettings, TrainConfig
from moveimg.device import hardware, peak_memory
from moveimg.dist import World
from moveimg.model import Transformer, prepare_for_sampling
from moveimg.progress import progress_bar
from moveimg.sampling import image_rngs, sample_codes
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
    """Measure drawing the codes of `batch_size` images."""
    device, fast = model.head.weight.device, prepare_for_sampling(model, quantize)
    labels = torch.arange(batch_size, device=device) % model.config.n_classes
    work = {"images": batch_size, "codes": batch_size * model.config.seq_len}
    rngs = image_rngs(range(batch_size))
    return measure(lambda: sample_codes(fast, labels, settings, rngs), device, repeats, work)


def make_random_model(config: ModelConfig) -> Transformer:
    """A generator of random weights, in eval mode."""
    model = Transformer(config)
    model.head.reset_parameters()  # the head is initialised to zero; equal logits sample faster
    return model.eval()


class RandomCodes:
    """Packed codes in memory: a batch of random codes and classes."""

    n_crops = 1

    def __init__(self, config: TrainConfig) -> None:
        model, n = config.model, config.batch_size
        self.codes = torch.randint(model.codebook_size, (n, model.seq_len))
        self.labels = torch.randint(model.n_classes, (n,))
        self.class_names = [str(i) for i in range(model.n_classes)]

    def __len__(self) -> int:
        return len(self.codes)

    def get(self, indices: Any, crops: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self.codes[indices], self.labels[indices]


def bench_train(config: TrainConfig, repeats: int, device: torch.device) -> Figures:
    """Measure the steps of `moveimg train` on random codes, from random weights."""
    torch.manual_seed(config.seed)
    model = Transformer(config.model).to(device)
    if config.train == "memory":
        freeze_backbone(model)
    parallel, codes = choose_parallelism(config, World(device=device)), RandomCodes(config)
    tokenizer: Any = None  # previews alone need one
    task = GeneratorTask(config, model, tokenizer, codes, codes, parallel)  # type: ignore[arg-type]
    work = {"images": config.batch_size, "codes": config.batch_size * config.model.seq_len}
    run = Run(task, config, parallel)
    return measure(run.advance, device, repeats, work | {"steps": 1})


def bench_rounds(
    configs: dict[str, TrainConfig], rounds: int, device: torch.device
) -> dict[str, dict[str, list[float]]]:
    """Seconds of a training step and of sampling 8 images (fastest of 3), per config and round.

    Weights are random. The configs alternate, so that a slow moment of the machine falls on all.
    """
    spent: dict[str, dict[str, list[float]]] = {
        name: {"step": [], "sample": []} for name in configs
    }
    with progress_bar(rounds, "measure", "round") as bar:
        for _ in range(rounds):
            for name, seconds in spent.items():
                model = make_random_model(configs[name].model).to(device)
                drawn = bench_sample(model, SamplingSettings(), 8, 3)
                seconds["step"].append(min(bench_train(configs[name], 3, device)["seconds"]))
                seconds["sample"].append(min(drawn["seconds"]))
            bar.update()
    return spent


def measure(
    call: Callable[[], object], device: torch.device, repeats: int, work: dict[str, int]
) -> Figures:
    """Time `repeats` calls, after one that is not counted; each does `work`."""
    seconds = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - begun)
    rates = {f"{unit} per second": [done / s for s in seconds[1:]] for unit, done in work.items()}
    return {"seconds": seconds[1:], **rates}


def describe_figures(figures: Figures, device: torch.device) -> str:
    """A text report: each median with its range, and the peak memory of the process."""
    machine = hardware(device)
    lines = [f"on {machine['name']} ({device}, {machine['threads']} threads, torch "
             f"{machine['torch']}), medians of {len(figures['seconds'])} (range)"]  # fmt: skip
    for unit, values in figures.items():
        span = f"({min(values):,.4g} to {max(values):,.4g})"
        lines.append(f"{unit:<26}{statistics.median(values):>12,.4g}  {span}")
    return "\n".join([*lines, f"{'peak memory (MiB)':<26}{peak_memory(device) / 2**20:>12,.0f}"])
