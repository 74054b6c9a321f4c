"""Plots of comparisons and inspections.   G gates: g_0 where a layer has one, then its slots"""

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


# --- comparisons -----------------------------------------------------------------------------


def plot_comparison(configs: Sequence[dict[str, Any]], out: Path) -> None:
    """Write curves.png and costs.png of summaries (see moveimg.compare)."""
    colours = [matplotlib.colormaps["tab20"](i % 20) for i in range(len(configs))]
    save_figure(learning_curves(configs, colours), out / "curves.png")
    figure = Figure(figsize=(18, 5), layout="constrained")
    panels = figure.subplots(1, len(COSTS), sharey=True)
    for axes, (key, title) in zip(panels, COSTS.items(), strict=True):
        for config, colour in zip(configs, colours, strict=True):
            axes.errorbar(config[key], config["loss_mean"], yerr=config["loss_std"] or 0,
                          fmt="o", color=colour, capsize=3, label=config["name"])  # fmt: skip
        axes.set(xlabel=title, ylabel=LOSS)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7, bbox_to_anchor=(1.01, 1), loc="upper left")
    save_figure(figure, out / "costs.png")


def learning_curves(configs: Sequence[dict[str, Any]], colours: Sequence[Any]) -> Figure:
    """Held-out loss over steps: the mean over seeds, and a band of one standard deviation."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    ends = []
    for config, colour in zip(configs, colours, strict=True):
        runs = [dict(map(tuple, run["curve"])) for run in config["runs"]]
        steps = sorted(set.intersection(*(set(run) for run in runs)))
        losses = np.array([[run[step] for step in steps] for run in runs])
        mean = losses.mean(axis=0)
        axes.plot(steps, mean, label=config["name"], color=colour)
        if len(runs) > 1:
            std = losses.std(axis=0, ddof=1)
            axes.fill_between(steps, mean - std, mean + std, color=colour, alpha=0.2, lw=0)
        ends += list(mean[len(mean) // 4 :])
    if min(ends) < max(ends):  # the high losses of the first steps would hide the others
        margin = 0.1 * (max(ends) - min(ends))
        axes.set_ylim(min(ends) - margin, max(ends) + margin)
    axes.set(xlabel="step", ylabel=LOSS)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, bbox_to_anchor=(1.01, 1), loc="upper left")
    return figure


# --- inspections -----------------------------------------------------------------------------


def plot_memory(report: dict[str, Any], out: Path) -> None:
    """Write gates.png and gradients.png of an inspection's report."""
    save_figure(gates_by_layer(report["layers"]), out / "gates.png")
    save_figure(gradients(report["gradients"]), out / "gradients.png")


def gates_by_layer(layers: dict[int, Any]) -> Figure:
    """Mean, deviation and extremes of each gate over layers, heads averaged."""
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
    return figure


def gradients(norms: dict[str, Any]) -> Figure:
    """The gradient norm that each layer sends to the memory, and that of their sum."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.bar([str(layer) for layer in norms["by_layer"]], norms["by_layer"].values(),
             yerr=list(norms["by_layer_spread"].values()), capsize=3)  # fmt: skip
    axes.axhline(norms["bank"], color="black", ls="--", label="the whole memory")
    axes.set_xlabel("layer (what a local table there gets)")
    axes.set_ylabel(f"gradient norm (mean and spread of {norms['batches']} batches)", fontsize=8)
    axes.legend()
    return figure
