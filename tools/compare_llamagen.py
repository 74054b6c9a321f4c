"""Time moveimg and LlamaGen's code by turns on the CPU, each in its own process.

    git clone https://github.com/FoundationVision/LlamaGen
    python tools/compare_llamagen.py LlamaGen sample --dtype bfloat16 --batch-size 8

The timed work is `sample` (codes of GPT-B at 256 pixels, guidance 2) or `train` (a step in
float32), with random weights.
"""

from __future__ import annotations

import importlib
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import typer

from moveimg.config import ModelConfig, OptimizerConfig, SamplingSettings
from moveimg.model import Transformer, prepare_for_sampling
from moveimg.sampling import image_rngs, sample_codes
from moveimg.training.optimizer import make_optimizers

CODES, CLASSES = 16384, 1000
MEMORIES: dict[str, dict[str, Any]] = {
    "dense": {"kind": "none"},
    "MoVE x1": {"kind": "move", "slots": 6},
    "MoVE x4": {"kind": "move", "slots": 24},
}
LLAMAGEN = "LlamaGen"


def make_generator(name: str, dropout: float) -> Any:
    """Build GPT-B with random weights, those of the zero-initialised head included."""
    if name == LLAMAGEN:
        names = ("resid_dropout_p", "ffn_dropout_p", "token_dropout_p", "class_dropout_prob")
        model: Any = importlib.import_module("autoregressive.models.gpt").GPT_models["GPT-B"](
            vocab_size=CODES, block_size=256, num_classes=CLASSES, cls_token_num=1,
            model_type="c2i", **dict.fromkeys(names, dropout),
        )  # fmt: skip
        torch.nn.init.normal_(model.output.weight, std=0.02)
        return model
    rates = dict.fromkeys(("token_dropout", "resid_dropout", "ffn_dropout"), dropout)
    values = {"size": "B", "codebook_size": CODES, "n_classes": CLASSES, "memory": MEMORIES[name]}
    model = Transformer(ModelConfig.model_validate(values | rates))
    torch.nn.init.normal_(model.head.weight, std=0.02)
    return model


def prepare_sample(name: str, batch_size: int, dtype: str, quantize: str) -> Callable[[], object]:
    model = make_generator(name, 0.0).eval().to(getattr(torch, dtype))
    labels = torch.zeros(batch_size, dtype=torch.long)
    if name == LLAMAGEN:
        generate = importlib.import_module("autoregressive.models.generate").generate
        return lambda: generate(model, labels, 256, cfg_scale=2.0, top_k=0, top_p=1.0)
    settings, fast = SamplingSettings(cfg_scale=2.0), prepare_for_sampling(model, quantize or None)
    return lambda: sample_codes(fast, labels, settings, image_rngs(range(batch_size)))


def prepare_train(name: str, batch_size: int, *_: str) -> Callable[[], object]:
    model = make_generator(name, 0.1).train()
    codes = torch.randint(CODES, (batch_size, 256))
    labels = torch.randint(CLASSES, (batch_size,))
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    optimizers = [adamw] if name == LLAMAGEN else make_optimizers(model, OptimizerConfig())

    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        if name == LLAMAGEN:
            loss = model(idx=codes[:, :-1], cond_idx=labels, targets=codes)[1]
        else:
            dropped = labels.masked_fill(torch.rand(len(labels)) < 0.1, CLASSES)
            loss = model(codes, dropped, loss=True)[0]
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    return step


def prepare(checkout: Path, work: str, *options: Any) -> None:
    """Build the function that `run` times, in a process of the pool."""
    sys.path.append(str(checkout))  # last: its `tokenizer` must not hide ours
    torch.manual_seed(0)
    make: Any = {"sample": prepare_sample, "train": prepare_train}[work]
    globals()["call"] = make(*options)


def run() -> float:
    """Call the prepared function once; returns the seconds."""
    begin = time.perf_counter()
    globals()["call"]()
    return time.perf_counter() - begin


def main(
    checkout: Path,
    work: str,
    batch_size: int = 1,
    dtype: str = "float32",
    quantize: str = typer.Option("", help="int8, for moveimg only"),
    rounds: int = typer.Option(3, help="timed rounds, after an untimed one"),
) -> None:
    context = multiprocessing.get_context("spawn")
    pools = {}
    for name in (LLAMAGEN, *MEMORIES):
        options = (checkout, work, name, batch_size, dtype, quantize)
        pools[name] = ProcessPoolExecutor(1, context, prepare, options)
    times: dict[str, list[float]] = {name: [] for name in pools}
    for number in range(rounds + 1):
        for name in times if number % 2 else reversed(times):
            seconds = pools[name].submit(run).result()
            times[name] += [seconds] if number else []
    for name, own in times.items():
        ratio = statistics.median(a / b for a, b in zip(times[LLAMAGEN], own, strict=True))
        spread = f"{min(own):.2f} to {max(own):.2f}"
        print(f"{name:<9} {statistics.median(own):7.2f} s ({spread}), {ratio:.2f} times as fast")


if __name__ == "__main__":
    typer.run(main)
