"""The figure of docs/training.md: one process, and two with gloo under DDP and FSDP2.

    python -m tests.tools.process_curves --steps 30 --out FOLDER

Trains a tiny generator with dropout three times; writes FOLDER/processes.png and prints the largest
differences of the held-out losses and of the final weights.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from matplotlib.figure import Figure

from moveimg.training.generator import train_generator
from tests.test_training import CPU, encode_tiny_digits, newest_state, train_config
from tests.tools.processes import job, launch

NAMES = {"one": "one process", "ddp": "two, DDP", "fsdp": "two, FSDP2"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    folder, steps = chosen.out, chosen.steps
    encode_tiny_digits(folder)
    every = {"validate_every": 1, "preview_every": steps, "checkpoint_every": steps}
    configs = {
        name: train_config(
            folder, folder / name, steps=steps, micro_batch=4,
            distributed="fsdp" if name == "fsdp" else "ddp", **every,
        )
        for name in NAMES
    }  # fmt: skip
    train_generator(configs["one"], CPU)
    launch(2, [job(configs["ddp"]), job(configs["fsdp"])], folder)
    curves = {name: losses(configs[name].out) for name in NAMES}
    weights = newest_state(configs["one"].out)
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for style, (name, label) in zip(("-", "--", ":"), NAMES.items(), strict=True):
        left.plot(range(1, steps + 1), curves[name], style, label=label, linewidth=2)
        if name != "one":
            gaps = [abs(a - b) for a, b in zip(curves[name], curves["one"], strict=True)]
            right.plot(range(1, steps + 1), gaps, style, label=label)
            found = newest_state(configs[name].out)
            worst = max(float((found[key] - weights[key]).abs().max()) for key in weights)
            print(f"{label}: largest difference of a loss {max(gaps):.1e}, of a weight {worst:.1e}")
    left.set(xlabel="step", ylabel="held-out loss (nats a code)")
    right.set(xlabel="step", ylabel="difference to one process", yscale="log")
    left.legend()
    figure.savefig(folder / "processes.png", dpi=110)


def losses(out: Path) -> list[float]:
    lines = (out / "training/metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
