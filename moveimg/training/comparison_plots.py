"""Plots of a comparison: learning curves, loss against parameters, loss against FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moveimg.files import atomic


def plot_all(configs: Sequence[dict[str, Any]], out: Path) -> None:
    """Write curves.png, parameters.png and flops.png for summaries as of comparison.summarize."""
    save(curves(configs), out / "curves.png")
    parameters = scatter(configs, "parameters", "parameters")
    save(parameters, out / "parameters.png")
    save(flops(configs), out / "flops.png")


def save(figure: Figure, path: Path) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=120, bbox_inches="tight", format="png")


def colours(n: int) -> list[Any]:
    return [matplotlib.colormaps["tab20"](i % 20) for i in range(n)]


def curves(configs: Sequence[dict[str, Any]]) -> Figure:
    """Held-out loss over steps: the mean over seeds, and a band of one standard deviation."""
    figure = Figure(figsize=(8, 5))
    axes = figure.add_subplot()
    last = []
    for config, colour in zip(configs, colours(len(configs)), strict=True):
        runs = [dict(map(tuple, run["curve"])) for run in config["runs"]]
        steps = sorted(set.intersection(*(set(run) for run in runs)))
        losses = np.array([[run[step] for step in steps] for run in runs])
        mean = losses.mean(axis=0)
        axes.plot(steps, mean, label=config["name"], color=colour)
        if len(runs) > 1:
            spread = losses.std(axis=0, ddof=1)
            axes.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.2, lw=0)
        last.append(mean[len(mean) // 4 :])
    low, high = min(m.min() for m in last), max(m.max() for m in last)
    if low < high:  # else there is one measurement alone
        margin = 0.1 * (high - low)
        axes.set_ylim(low - margin, high + margin)  # the start would hide the rest
    axes.set_xlabel("step")
    axes.set_ylabel("held-out loss (nats a code)")
    axes.grid(alpha=0.3)
    _legend(axes)
    return figure


def flops(configs: Sequence[dict[str, Any]]) -> Figure:
    """Loss against what a trained token costs, and against what a generated image costs."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _scatter(left, configs, "flops_per_token", "FLOPs a token (forward; training takes 3 times)")
    _scatter(right, configs, "flops_per_image", "FLOPs an image (decoding, unguided)")
    _legend(right)
    return figure


def scatter(configs: Sequence[dict[str, Any]], key: str, title: str) -> Figure:
    """Final loss with its spread over seeds, against a cost."""
    figure = Figure(figsize=(8, 5))
    axes = figure.add_subplot()
    _scatter(axes, configs, key, title)
    _legend(axes)
    return figure


def _scatter(axes: Axes, configs: Sequence[dict[str, Any]], key: str, title: str) -> None:
    for config, colour in zip(configs, colours(len(configs)), strict=True):
        x, y = config[key], config["loss_mean"]
        error, name = config["loss_std"] or 0, config["name"]
        axes.errorbar(x, y, yerr=error, fmt="o", color=colour, capsize=3, label=name)
    axes.set_xlabel(title)
    axes.set_ylabel("held-out loss (nats a code)")
    axes.grid(alpha=0.3)


def _legend(axes: Axes) -> None:
    """Beside the axes: names beside the points would lie on each other."""
    axes.legend(fontsize=7, bbox_to_anchor=(1.01, 1), loc="upper left")
