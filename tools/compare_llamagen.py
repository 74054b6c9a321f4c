"""Time moveimg and LlamaGen's own code in turn, each in a process of its own, on the CPU.

    git clone https://github.com/FoundationVision/LlamaGen
    python tools/compare_llamagen.py LlamaGen sample --dtype bfloat16 --batch-size 8

The work: `sample` (codes of GPT-B at 256 pixels, guidance 2) or `train` (a step in float32), with
random weights.
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
from types import SimpleNamespace
from typing import Any

import torch
import typer

from moveimg.config import ModelConfig, OptimizerConfig, SamplingSettings
from moveimg.model import Transformer, decoding_model
from moveimg.sampling import image_rngs, sample_codes
from moveimg.training.optimizer import make_optimizers

CODES, CLASSES, GRID = 16384, 1000, (16, 16)
MEMORIES: dict[str, dict[str, Any]] = {
    "dense": {"kind": "none"},
    "MoVE x1": {"kind": "move", "slots": 6},
    "MoVE x4": {"kind": "move", "slots": 24},
}
LLAMAGEN = "LlamaGen"


def import_theirs(checkout: Path, module: str) -> Any:
    """Import a module of LlamaGen's `autoregressive`, which imports nothing of its tokenizer."""
    sys.path.insert(0, str(checkout))
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(checkout))


def make_generator(name: str, checkout: Path, dropout: float = 0.0) -> Any:
    """Build GPT-B; its head, which starts at zero, is drawn as other matrices are."""
    if name == LLAMAGEN:
        names = ("resid_dropout_p", "ffn_dropout_p", "token_dropout_p", "class_dropout_prob")
        model: Any = import_theirs(checkout, "autoregressive.models.gpt").GPT_models["GPT-B"](
            vocab_size=CODES, block_size=256, num_classes=CLASSES, cls_token_num=1,
            model_type="c2i", **dict.fromkeys(names, dropout),
        )  # fmt: skip
        torch.nn.init.normal_(model.output.weight, std=0.02)
        return model
    rates = dict.fromkeys(("token_dropout", "resid_dropout", "ffn_dropout"), dropout)
    values = {"size": "B", "codebook_size": CODES, "n_classes": CLASSES, "grid": GRID}
    model = Transformer(ModelConfig.model_validate(values | rates | {"memory": MEMORIES[name]}))
    torch.nn.init.normal_(model.head.weight, std=0.02)
    return model


def prepare_sample(name: str, options: Any) -> Callable[[], object]:
    model = make_generator(name, options.checkout).eval().to(getattr(torch, options.dtype))
    labels = torch.zeros(options.batch_size, dtype=torch.long)
    if name == LLAMAGEN:
        generate = import_theirs(options.checkout, "autoregressive.models.generate").generate
        return lambda: generate(model, labels, 256, cfg_scale=2.0, top_k=0, top_p=1.0)
    settings, fast = SamplingSettings(cfg_scale=2.0), decoding_model(model, options.quantize)
    return lambda: sample_codes(fast, labels, settings, image_rngs(range(options.batch_size)))


def prepare_train(name: str, options: Any) -> Callable[[], object]:
    model = make_generator(name, options.checkout, dropout=0.1).train()
    codes = torch.randint(CODES, (options.batch_size, 256))
    labels = torch.randint(CLASSES, (options.batch_size,))
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


def prepare(name: str, options: Any) -> None:
    """Build the work in a process of its own."""
    torch.manual_seed(0)
    globals()["work"] = globals()[f"prepare_{options.work}"](name, options)


def run() -> float:
    """Do the work once; return the seconds."""
    begin = time.perf_counter()
    globals()["work"]()
    return time.perf_counter() - begin


def main(
    checkout: Path,
    work: str,
    batch_size: int = 1,
    dtype: str = "float32",
    quantize: str = typer.Option(None, help="int8, of ours alone"),
    rounds: int = typer.Option(3, help="after one that is not counted"),
) -> None:
    options = SimpleNamespace(
        checkout=checkout, work=work, batch_size=batch_size, dtype=dtype, quantize=quantize
    )
    context = multiprocessing.get_context("spawn")
    pools = {
        name: ProcessPoolExecutor(1, context, prepare, (name, options))
        for name in (LLAMAGEN, *MEMORIES)
    }
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
