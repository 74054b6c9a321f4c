"""The report as pictures. L layers with a mixer   G gates: g_0 where there is one, then slots"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from moveimg.files import atomic

GATE = {"vmin": 0, "vmax": 2, "cmap": "coolwarm"}  # 1, in the middle, is where gates start


def save(figure: Figure, path: Path) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=110, bbox_inches="tight", format="png")


def plot_memory(report: dict[str, Any], picture: Image.Image, out: Path) -> None:
    """Write gates, heads, classes, positions, map, bank and gradients, each a PNG.

    `picture` is the image whose gates the map shows.
    """
    layers = report["layers"]
    save(by_layer(layers), out / "gates.png")
    save(by_head(layers), out / "heads.png")
    save(panels(layers, "by_class", "class"), out / "classes.png")
    save(panels(layers, "by_position", "position"), out / "positions.png")
    title = f"{report['class_names'][report['map_label']]}, image {report['map_index']}"
    save(grid_maps(layers, report["map"], picture, title), out / "map.png")
    save(rows(report["bank"]), out / "bank.png")
    save(gradients(report["gradients"]), out / "gradients.png")


def by_layer(layers: dict[int, Any]) -> Figure:
    """Mean, spread and extremes of each gate: a line a layer, heads averaged."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2).flatten()
    titles = {"mean": "mean gate", "spread": "spread (standard deviation)",
              "near_zero": "share below 0.1", "near_two": "share above 1.9"}  # fmt: skip
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for layer, gates in layers.items():
            for name, value in zip(gates["gates"], np.mean(gates[key], axis=0), strict=True):
                lines.setdefault(name, []).append((layer, float(value)))
        for name, points in lines.items():
            style = {"color": "black", "lw": 2} if name == "g_0" else {"alpha": 0.7}
            axis.plot(*zip(*points, strict=True), marker="o", ms=3, label=name, **style)
        axis.set_title(title)
        axis.set_xlabel("layer")
        axis.grid(alpha=0.3)
    if len(lines) <= 13:
        axes[0].legend(fontsize=7)
    return figure


def by_head(layers: dict[int, Any], most: int = 9) -> Figure:
    """Mean of each gate: a panel a gate, a row a layer, a column a head."""
    means: dict[str, dict[int, list[float]]] = {}
    for layer, gates in layers.items():
        columns = zip(*gates["mean"], strict=True)
        for name, heads in zip(gates["gates"], columns, strict=True):
            means.setdefault(name, {})[layer] = list(heads)
    shown = list(means.items())[:most]
    figure = Figure(figsize=(1 + 2 * len(shown), 1 + 0.3 * len(layers)), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, (name, by_layer) in zip(axes, shown, strict=True):
        image = axis.imshow(np.array(list(by_layer.values())), aspect="auto", **GATE)
        axis.set_yticks(range(len(by_layer)), list(by_layer), fontsize=7)
        axis.set_title(name, fontsize=8)
        axis.set_xlabel("head", fontsize=7)
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=list(axes), label="mean gate")
    return figure


def panels(layers: dict[int, Any], key: str, what: str) -> Figure:
    """A panel a layer: gates (rows) over classes or positions (columns)."""
    figure = Figure(figsize=(11, 1.2 + 1.3 * len(layers)), layout="constrained")
    axes = figure.subplots(len(layers), 1, squeeze=False, sharex=True)[:, 0]
    for axis, (layer, gates) in zip(axes, layers.items(), strict=True):
        means = np.array(gates[key], dtype=float)
        means = means[: 1 + int(np.nonzero(~np.isnan(means).all(1))[0].max())]  # null class unseen
        image = axis.imshow(means.T, aspect="auto", interpolation="nearest", **GATE)
        names = gates["gates"]
        axis.set_yticks(range(len(names)) if len(names) <= 9 else [0])
        axis.set_yticklabels(names if len(names) <= 9 else names[:1], fontsize=6)
        axis.set_ylabel(f"layer {layer}", fontsize=7)
    axes[-1].set_xlabel(what)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=list(axes), label="mean gate")
    return figure


def grid_maps(
    layers: dict[int, Any], maps: dict[int, Any], picture: Image.Image, title: str, columns: int = 9
) -> Figure:
    """A picture, then its gates where its codes stand: a row a layer, a column a gate."""
    names = next(iter(layers.values()))["gates"]
    columns = 1 + min(columns, max(len(gates["gates"]) for gates in layers.values()))
    figure = Figure(figsize=(1.3 * columns + 1, 1.4 * len(layers)), layout="constrained")
    axes = figure.subplots(len(layers), columns, squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    for line, (layer, planes) in zip(axes, maps.items(), strict=True):
        line[0].imshow(picture.convert("RGB"))
        line[0].set_ylabel(f"layer {layer}", fontsize=7)
        for axis, values in zip(line[1:], planes, strict=False):  # as many as there is room for
            plane = np.array(values, dtype=float)
            image = axis.imshow(plane, interpolation="nearest", **GATE)
    axes[0, 0].set_title("the picture", fontsize=7)
    for axis, name in zip(axes[0, 1:], names, strict=False):
        axis.set_title(name, fontsize=7)
    figure.suptitle(title, fontsize=8)
    figure.colorbar(image, ax=axes, label="gate, heads averaged")
    return figure


def rows(bank: dict[str, Any]) -> Figure:
    """How often codes are read, and how alike the slots are."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    reads, similar = figure.subplots(1, 2)
    reads.plot(np.sort(bank["reads"])[::-1])
    reads.set_yscale("symlog")
    reads.set_title(f"reads of each code ({bank['unread']} of {bank['rows']} not in these)")
    reads.set_xlabel("code, by rank")
    image = similar.imshow(bank["similarity"], vmin=-1, vmax=1, cmap="coolwarm")
    for locator in (similar.xaxis, similar.yaxis):
        locator.set_major_locator(MaxNLocator(integer=True))
    similar.set_title("mean cosine of two slots' rows")
    figure.colorbar(image, ax=similar)
    return figure


def gradients(found: dict[str, Any]) -> Figure:
    """What each layer sends the memory, beside what reaches a bank that all of them share."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.add_subplot()
    names = [str(layer) for layer in found["by_layer"]]
    spread = list(found["by_layer_spread"].values())
    axis.bar(names, list(found["by_layer"].values()), yerr=spread, capsize=3)
    axis.axhline(found["bank"], color="black", ls="--", label="the whole memory")
    axis.set_xlabel("layer (what a local table there gets)")
    axis.set_ylabel(f"gradient norm (mean and spread of {found['batches']} batches)", fontsize=8)
    axis.legend()
    return figure


def expert_shares(loads: dict[int, Any]) -> Figure:
    """Each expert's share of the choices, a row a layer."""
    figure = Figure(figsize=(8, 1 + 0.4 * len(loads)), layout="constrained")
    axis = figure.add_subplot()
    shares = np.array(list(loads.values()))
    image = axis.imshow(shares * shares.shape[1], vmin=0, vmax=2, cmap="coolwarm", aspect="auto")
    axis.set_yticks(range(len(loads)), [f"layer {layer}" for layer in loads], fontsize=7)
    axis.set_xlabel("expert")
    figure.colorbar(image, ax=axis, label="load (1 is even)")
    return figure
