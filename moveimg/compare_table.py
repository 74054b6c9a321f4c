"""Statistics over the seeds of a comparison, and its table in Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from scipy.stats import t as student

from moveimg.tables import markdown_table

# The meaning of numbers whose names do not say all of it; written to table.json as `columns`.
ABOUT = {
    "loss_std": "over seeds, of the sample (n - 1)",
    "flops_per_token": "of a forward pass; a training step does three times as many",
    "flops_per_image": "of drawing one image with the cache, without guidance",
    "peak_memory": "bytes, largest over seeds: resident, of the whole process; CUDA: allocated",
}


def summarize(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each config's result with its statistics over seeds; the first config is the baseline.

    loss_mean, loss_std     held-out loss over seeds; the deviation is of the sample (n - 1)
    difference, interval    mean over seeds of (loss - baseline's with the same seed), and half
                            its 95 % confidence interval by Student's t (None with one seed)
    """
    baseline = {run["seed"]: run["loss"] for run in results[0]["runs"]}
    summaries = []
    for result in results:
        runs = result["runs"]
        losses = [run["loss"] for run in runs]
        differences = [run["loss"] - baseline[run["seed"]] for run in runs]
        several = len(losses) > 1
        summaries.append(
            result
            | {
                "loss_mean": statistics.mean(losses),
                "loss_std": statistics.stdev(losses) if several else None,
                "difference": statistics.mean(differences),
                "interval": half_interval(differences) if several else None,
                "steps_per_second": statistics.median(run["steps_per_second"] for run in runs),
                "peak_memory": max(run["peak_memory"] or 0 for run in runs),
            }
        )
    return summaries


def half_interval(values: Sequence[float]) -> float:
    """Half the 95 % confidence interval of the mean of at least two values."""
    quantile = float(student.ppf(0.975, len(values) - 1))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def with_deviation(value: float, deviation: float | None, sign: str = "") -> str:
    """`1.2345 ± 0.0678`, or the value alone."""
    return f"{value:{sign}.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")


# Column title -> the cell of a config's summary, rounded for people.
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "config": lambda r: r["name"],
    "held-out loss (nats per code)": lambda r: with_deviation(r["loss_mean"], r["loss_std"]),
    "seeds": lambda r: f"{len(r['runs'])}",
    "to the first (95 %)": lambda r: with_deviation(r["difference"], r["interval"], "+"),
    "parameters": lambda r: f"{r['parameters']:,}",
    "active per token": lambda r: f"{r['active']:,}",
    "MFLOPs per token (forward)": lambda r: f"{r['flops_per_token'] / 1e6:.3f}",
    "GFLOPs per image (decoding)": lambda r: f"{r['flops_per_image'] / 1e9:.3f}",
    "cache bytes per token (float32)": lambda r: f"{r['cache_bytes_per_token']:,}",
    "steps/s": lambda r: f"{r['steps_per_second']:.2f}",
    "images/s sampled": lambda r: (
        "" if r["images_per_second"] is None else f"{r['images_per_second']:.1f}"
    ),
    "peak memory (MiB, whole process; CUDA: allocated)": lambda r: (
        f"{r['peak_memory'] / 2**20:,.0f}"
    ),
}


def comparison_table(summaries: Sequence[dict[str, Any]]) -> str:
    """A Markdown table with a row per config."""
    cells = [{title: cell(row) for title, cell in COLUMNS.items()} for row in summaries]
    return markdown_table(cells, {title: title for title in COLUMNS})


def csv_table(summaries: Sequence[dict[str, Any]]) -> str:
    """A row per config with its unrounded numbers and each seed's loss."""
    file = io.StringIO()
    rows = [
        {key: value for key, value in summary.items() if key != "runs"}
        | {f"loss_seed{run['seed']}": run["loss"] for run in summary["runs"]}
        for summary in summaries
    ]
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
