"""Several configs, several seeds, one table: same steps, same data order, same settings."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moveimg.checkpoint import read_model_config, write_json
from moveimg.config import TrainConfig, load_config
from moveimg.files import write_text
from moveimg.model.cost import model_cost
from moveimg.training.generator import train_generator


def parse_seeds(text: str) -> list[int]:
    """`0,1,2` -> [0, 1, 2]. Raises ValueError for anything else, or a repeated seed."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts) or len(set(parts)) != len(parts):
        raise ValueError(f"seeds {text!r}: expected different whole numbers, as in 0,1,2")
    return [int(part) for part in parts]


def compare(
    configs: Sequence[Path],
    seeds: Sequence[int],
    out: Path,
    overrides: Sequence[str],
    device: torch.device,
) -> str:
    """Train every config with every seed into out/NAME-seedN; write and return the table.

    A run that is finished is read, one that was stopped continues. The table stands in
    out/table.md, with everything behind it in out/table.json.

    Raises ValueError when two configs have one name or differ in steps or batch size.
    """
    runs = {path.stem: load_config(path, TrainConfig, overrides) for path in configs}
    if len(runs) != len(configs):
        raise ValueError("two configs have the same file name: expected different ones")
    budgets = {name: (run.steps, run.batch_size) for name, run in runs.items()}
    if len(set(budgets.values())) > 1:
        raise ValueError(f"steps and batch sizes differ, expected one budget: {budgets}")
    results = []
    for name, run in runs.items():
        finished = []
        for seed in seeds:
            directory = out / f"{name}-seed{seed}"
            print(f"{name}, seed {seed}")
            one = run.model_copy(update={"seed": seed, "out": directory})
            finished.append({"seed": seed, **train_generator(one, device)})
        cost = model_cost(read_model_config(out / f"{name}-seed{seeds[0]}"))
        losses = [run["loss"] for run in finished]
        results.append(
            {
                "name": name,
                "loss_mean": statistics.mean(losses),
                "loss_std": statistics.stdev(losses) if len(losses) > 1 else None,
                "runs": finished,
                **cost.as_dict(),
            }
        )
    table = markdown_table(results)
    write_json(out / "table.json", results)
    write_text(out / "table.md", table + "\n")
    return table


def markdown_table(results: Sequence[dict[str, Any]]) -> str:
    """Results as a Markdown table, a config a row."""
    lines = [
        "| config | held-out loss (nats a code) | seeds | parameters | bank | GFLOPs an image |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in results:
        spread = "" if row["loss_std"] is None else f" ± {row['loss_std']:.4f}"
        lines.append(
            f"| {row['name']} | {row['loss_mean']:.4f}{spread} | {len(row['runs'])} "
            f"| {row['parameters']:,} | {row['bank']:,} | {row['flops_per_image'] / 1e9:.3f} |"
        )
    return "\n".join(lines)
