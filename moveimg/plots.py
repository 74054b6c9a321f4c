"""Plots of comparisons and inspections."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from moveimg.files import atomic

LOSS = "held-out loss (nats per code)"
COSTS = {
    "parameters": "parameters",
    "flops_per_token": "FLOPs per token (forward; training takes 3 times)",
    "flops_per_image": "FLOPs per image (decoding, unguided)",
}
STATISTICS = {
    "mean": "mean gate",
    "spread": "standard deviation",
    "near_zero": "share below 0.1",
    "near_two": "share above 1.9",
}


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG, atomically."""
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=120, bbox_inches="tight", format="png")


def plot_comparison(configs: Sequence[dict[str, Any]], out: Path) -> None:
    """Write curves.png and costs.png of results (see moveimg.compare).

    A curve is the mean held-out loss over seeds, with a band of one standard deviation.
    """
    curves, costs = Figure(figsize=(8, 5), layout="constrained"), Figure(figsize=(18, 5))
    axes, panels, ends = curves.add_subplot(), costs.subplots(1, len(COSTS), sharey=True), []
    for i, config in enumerate(configs):
        style = {"label": config["name"], "color": matplotlib.colormaps["tab20"](i % 20)}
        runs = [dict(map(tuple, run["curve"])) for run in config["runs"]]
        steps = sorted(set.intersection(*map(set, runs)))
        losses = np.array([[run[step] for step in steps] for run in runs])
        mean, spread = losses.mean(axis=0), losses.std(axis=0, ddof=int(len(runs) > 1))
        axes.plot(steps, mean, **style)
        axes.fill_between(steps, mean - spread, mean + spread, color=style["color"], alpha=0.2)
        ends += list(mean[len(mean) // 4 :])
        for panel, key in zip(panels, COSTS, strict=True):
            panel.errorbar(config[key], config["loss_mean"], yerr=config["loss_std"] or 0, fmt="o",
                           capsize=3, **style)  # fmt: skip
    if min(ends) < max(ends):  # the high losses of the first steps would hide the others
        margin = 0.1 * (max(ends) - min(ends))
        axes.set_ylim(min(ends) - margin, max(ends) + margin)
    for panel, label in zip((axes, *panels), ("step", *COSTS.values()), strict=True):
        panel.set(xlabel=label, ylabel=LOSS)
        panel.grid(alpha=0.3)
    for panel in (axes, panels[-1]):
        panel.legend(fontsize=7, bbox_to_anchor=(1.01, 1), loc="upper left")
    save_figure(curves, out / "curves.png")
    save_figure(costs, out / "costs.png")


def plot_gates(layers: dict[int, Any], out: Path) -> None:
    """Write gates.png: mean, deviation and extremes of each gate over layers, heads averaged."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = figure.subplots(2, 2).flatten()
    for axes, (key, title) in zip(panels, STATISTICS.items(), strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for layer, gates in layers.items():
            for name, value in zip(gates["gates"], np.mean(gates[key], axis=0), strict=True):
                lines.setdefault(name, []).append((layer, float(value)))
        for name, points in lines.items():
            style = {"color": "black", "lw": 2} if name == "g_0" else {"alpha": 0.7}
            axes.plot(*zip(*points, strict=True), marker="o", ms=3, label=name, **style)
        axes.set(title=title, xlabel="layer")
        axes.grid(alpha=0.3)
    if len(lines) <= 13:
        panels[0].legend(fontsize=7)
    save_figure(figure, out / "gates.png")
