"""Plots of comparisons and inspections."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from moveimg.files import atomic

LOSS = "loss (nats per code)"
COSTS = {
    "parameters": "million parameters",
    "flops_per_token": "MFLOPs per token (forward; training takes 3 times)",
    "seconds": "ms per training step",
}
MARKERS, LINES = "os^Dv", ("-", "--", ":", "-.", (0, (5, 1)))  # one each for 10 colours
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


def plot_comparison(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Write curves.png, costs.png; saturation.png for several slot counts, memory.png for records.

    `rows` are those of comparison.json. A band is one standard deviation over seeds.
    """
    style = {}
    for i, row in enumerate(rows):
        color, group = matplotlib.colormaps["tab10"](i % 10), i // 10 % len(MARKERS)
        look = {"color": color, "marker": MARKERS[group], "linestyle": LINES[group]}
        style[row["name"]] = {"label": row["name"], "markersize": 4, **look}
    _plot_curves(rows, style, out)
    _plot_costs(rows, style, out)
    if len(banks := _pick_slot_counts(rows)) > 1:
        figure = Figure(figsize=(6, 4.5), layout="constrained")
        axes = figure.add_subplot()
        stds = [row["loss"]["std"] or 0 for row in banks]
        values = [row["loss"]["mean"] for row in banks]
        axes.errorbar([row["bank"] for row in banks], values, yerr=stds, fmt="o-", capsize=3)
        for row in banks:
            axes.annotate(row["name"], (row["bank"], row["loss"]["mean"]), fontsize=8)
        axes.set(xlabel="parameters of the bank", ylabel=LOSS, xscale="log")
        axes.grid(alpha=0.3)
        save_figure(figure, out / "saturation.png")
    if recorded := [row for row in rows if row["runs"][0].get("records")]:
        _plot_records(recorded, style, out)


def _pick_slot_counts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first row with MoVE, and the rows that differ from it in the number of slots alone."""

    def settings(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["attention"], row["ffn"], {**row["memory"], "slots": None}

    moves = [row for row in rows if row["memory"]["kind"] == "move"]
    return [row for row in moves if settings(row) == settings(moves[0])]


def _plot_curves(rows: Sequence[dict[str, Any]], style: dict[str, Any], out: Path) -> None:
    figure, ends = Figure(figsize=(9, 6), layout="constrained"), []
    axes = figure.add_subplot()
    for row in sorted(rows, key=lambda row: -row["val_loss"]["mean"]):  # as their lines end
        runs = [dict(map(tuple, run["curve"])) for run in row["runs"]]
        steps = sorted(set.intersection(*map(set, runs)))
        losses = np.array([[run[step] for step in steps] for run in runs])
        mean, std = losses.mean(axis=0), losses.std(axis=0, ddof=int(len(runs) > 1))
        axes.plot(steps, mean, **style[row["name"]])
        axes.fill_between(
            steps, mean - std, mean + std, color=style[row["name"]]["color"], alpha=0.1
        )
        ends += list(mean[len(mean) // 4 :])
    if min(ends) < max(ends):  # the high losses of the first steps would hide the others
        margin = 0.1 * (max(ends) - min(ends))
        axes.set_ylim(min(ends) - margin, max(ends) + margin)
    axes.set(xlabel="step", ylabel=f"held-out {LOSS}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, bbox_to_anchor=(1.01, 1), loc="upper left")
    save_figure(figure, out / "curves.png")


def _plot_costs(rows: Sequence[dict[str, Any]], style: dict[str, Any], out: Path) -> None:
    figure = Figure(figsize=(6 * len(COSTS), 5))
    panels = figure.subplots(1, len(COSTS), sharey=True)
    for panel, (key, label) in zip(panels, COSTS.items(), strict=True):
        for row in rows:
            measured = row["seconds"] and 1e3 * np.median(row["seconds"]["step"])
            cost = measured if key == "seconds" else row[key] / 1e6
            if cost is not None:
                panel.errorbar(cost, row["loss"]["mean"], yerr=row["loss"]["std"] or 0,
                               capsize=3, **style[row["name"]] | {"linestyle": ""})  # fmt: skip
        panel.set(xlabel=label, ylabel=LOSS)
        panel.locator_params(axis="x", nbins=5)
        panel.grid(alpha=0.3)
    handles, names = panels[0].get_legend_handles_labels()
    panels[-1].legend(handles, names, fontsize=7, bbox_to_anchor=(1.02, 1), loc="upper left")
    save_figure(figure, out / "costs.png")


def _plot_records(rows: Sequence[dict[str, Any]], style: dict[str, Any], out: Path) -> None:
    """Alignment of the layers' gradients, the bank's gradient, mean gates; means over seeds."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = figure.subplots(2, 2).flatten()
    for row in rows:
        # records of each step, one per seed
        by_step = list(zip(*(run["records"] for run in row["runs"]), strict=False))
        steps = [records[0]["step"] for records in by_step]
        series = {
            "alignment of the layers' gradients": lambda r: r["alignment"],
            "norm of the bank's gradient": lambda r: r["bank"],
            "mean g_0": lambda r: np.mean(list(r["g_0"].values())),
            "mean gate of the slots": lambda r: np.mean(list(r["slots"].values())),
        }
        for axes, (title, read) in zip(panels, series.items(), strict=True):
            values = [np.mean([read(record) for record in records]) for records in by_step]
            axes.plot(steps, values, **style[row["name"]])
            axes.set(title=title, xlabel="step")
            axes.grid(alpha=0.3)
    panels[1].set_yscale("log")
    panels[1].legend(fontsize=7, bbox_to_anchor=(1.01, 1), loc="upper left")
    save_figure(figure, out / "memory.png")


def plot_gates(layers: dict[int, Any], out: Path) -> None:
    """Write gates.png: mean, std and saturated shares of each gate by layer, means over heads."""
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
