"""Numbers of a comparison -> summary, Markdown, CSV."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from typing import Any

from scipy.stats import t as student

MIB = 2**20

# What stands behind numbers whose names do not say it all; table.json has this as `columns`.
ABOUT = {
    "loss_std": "over seeds, of the sample (n - 1)",
    "flops_per_token": "of a forward pass, as in training, which takes three times that",
    "flops_per_image": "of generating an image with the cache, without guidance",
    "cache_bytes_per_token": "kept for a position while generating, float32, all layers",
    "peak_memory": "bytes, the largest over seeds: resident, of the whole process (Python and "
    "libraries included); on CUDA what torch has allocated on the device",
}


def summarize(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to each config's result what the table shows, the first config being the baseline.

    loss_mean, loss_std     held-out loss over seeds; the spread is of the sample, n - 1
    difference, interval    mean over seeds of (loss - baseline's with the same seed), and half
                            its 95 % confidence interval by Student's t (None with one seed)
    """
    baseline = {run["seed"]: run["loss"] for run in results[0]["runs"]}
    summaries = []
    for result in results:
        runs = result["runs"]
        losses = [run["loss"] for run in runs]
        differences = [run["loss"] - baseline[run["seed"]] for run in runs]
        spread = len(losses) > 1
        summary = {
            "loss_mean": statistics.mean(losses),
            "loss_std": statistics.stdev(losses) if spread else None,
            "difference": statistics.mean(differences),
            "interval": half_interval(differences) if spread else None,
            "steps_per_second": statistics.median(run["steps_per_second"] for run in runs),
            "peak_memory": max((run["peak_memory"] or 0 for run in runs), default=0),
        }
        summaries.append(result | summary)
    return summaries


def half_interval(values: Sequence[float]) -> float:
    """Half the 95 % confidence interval of the mean of at least two values."""
    quantile = float(student.ppf(0.975, len(values) - 1))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def _spread(value: float, spread: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + ("" if spread is None else f" ± {spread:.4f}")


def _maybe(value: float | None, form: str) -> str:
    """A number; nothing where it is not known."""
    return "" if value is None else f"{value:{form}}"


# Column title -> the cell of a config's summary.
COLUMNS: dict[str, Any] = {
    "config": lambda r: r["name"],
    "held-out loss (nats a code)": lambda r: _spread(r["loss_mean"], r["loss_std"]),
    "seeds": lambda r: f"{len(r['runs'])}",
    "to the first (95 %)": lambda r: _spread(r["difference"], r["interval"], "+"),
    "parameters": lambda r: f"{r['parameters']:,}",
    "active a token": lambda r: f"{r['active']:,}",
    "MFLOPs a token (forward)": lambda r: f"{r['flops_per_token'] / 1e6:.3f}",
    "GFLOPs an image (decoding)": lambda r: f"{r['flops_per_image'] / 1e9:.3f}",
    "cache bytes a token (float32)": lambda r: f"{r['cache_bytes_per_token']:,}",
    "steps/s": lambda r: f"{r['steps_per_second']:.2f}",
    "images/s sampled": lambda r: _maybe(r["images_per_second"], ".1f"),
    "peak memory (MiB, whole process; CUDA: allocated)": lambda r: _maybe(
        r["peak_memory"] / MIB or None, ",.0f"
    ),
}

CSV_KEYS = (
    "name", "loss_mean", "loss_std", "difference", "interval", "parameters", "active", "bank",
    "flops_per_token", "flops_per_image", "cache_bytes_per_token", "steps_per_second",
    "images_per_second", "peak_memory",
)  # fmt: skip


def markdown_table(configs: Sequence[dict[str, Any]]) -> str:
    """A config a row, its cells rounded for people."""
    lines = [list(COLUMNS), ["---"] * len(COLUMNS)]
    lines += [[cell(config) for cell in COLUMNS.values()] for config in configs]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def csv_table(configs: Sequence[dict[str, Any]]) -> str:
    """A config a row, its numbers as they are, and each seed's loss."""
    file = io.StringIO()
    seeds = [run["seed"] for run in configs[0]["runs"]]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*CSV_KEYS, *(f"loss_seed{seed}" for seed in seeds)])
    for config in configs:
        losses = {run["seed"]: run["loss"] for run in config["runs"]}
        writer.writerow([*(config[key] for key in CSV_KEYS), *(losses[seed] for seed in seeds)])
    return file.getvalue()
