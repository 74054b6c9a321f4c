"""results.json, its table, and the plot of a sweep."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from moveimg import __version__
from moveimg.config import SamplingSettings
from moveimg.device import hardware
from moveimg.files import write_json, write_text
from moveimg.tables import markdown_table

COLUMNS = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score_adm": "IS (ADM)",
    "inception_score_shuffled": "IS (shuffled)",
    "precision": "precision",
    "recall": "recall",
    "kid": "KID x 1000",
    "accuracy": "class shown",
}


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware, for results."""
    versions = {name: version(name) for name in ("torch", "torch-fidelity", "numpy")}
    versions |= {"moveimg": __version__, "python": platform.python_version()}
    return {"versions": versions, "hardware": hardware(device)}


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write results as JSON, atomically."""
    write_json(path, {"format": 1, **results})


def results_table(results: Sequence[dict[str, Any]]) -> str:
    """A Markdown table with a row for each result; columns without any value are left out."""
    rows = [_row(result) for result in results]
    keys = [key for key in COLUMNS if any(key in row for row in rows)]
    if any("settings" in row for row in rows):
        keys.append("settings")
    titles = {"name": "", "images": "images", **COLUMNS, "settings": "settings"}
    columns = {key: titles[key] for key in ("name", "images", *keys)} | {"reference": "reference"}
    spaces = dict.fromkeys(result["extractor"]["space"] for result in results)
    return "\n\n".join([markdown_table(rows, columns), *(f"Feature space: {s}." for s in spaces)])


def write_sweep(
    folder: Path, key: str, values: Sequence[float], results: Sequence[dict[str, Any]]
) -> None:
    """Write sweep.md, a row per value, and sweep.png, FID and IS (or accuracy) over the values."""
    from matplotlib.figure import Figure  # not pyplot, whose backend is the user's

    from moveimg.plots import save_figure

    write_text(folder / "sweep.md", results_table(results) + "\n")
    figure = Figure(figsize=(6, 4), layout="constrained")
    left = figure.subplots()
    left.plot(values, [result["metrics"]["fid"] for result in results], "o-", color="tab:blue")
    left.set(xlabel=key, title=f"{results[0]['samples']['count']:,} images")
    left.set_ylabel("FID (lower is better)", color="tab:blue")
    inception = "sfid" in results[0]["metrics"]
    second = "inception_score_adm" if inception else "accuracy"
    right = left.twinx()
    right.plot(values, [r["metrics"][second] for r in results], "s--", color="tab:orange")
    right.set_ylabel(COLUMNS[second], color="tab:orange")
    save_figure(figure, folder / "sweep.png")


def _row(result: dict[str, Any]) -> dict[str, str]:
    metrics = result["metrics"]
    row = {key: _format(key, metrics[key]) for key in COLUMNS if metrics.get(key) is not None}
    if plan := result.get("plan"):  # the guidance scale, and what differs from the defaults
        default = SamplingSettings().model_dump() | {"cfg_scale": None}
        changed = {k: v for k, v in plan["sampling"].items() if v != default.get(k)}
        row["settings"] = ", ".join(f"{k} {v}".removesuffix(".0") for k, v in changed.items())
    row["name"] = result["name"]
    row["images"] = f"{result['samples']['count']:,}"
    row["reference"] = result["reference"]["name"].rsplit("/", 1)[-1]
    return row


def _format(key: str, value: Any) -> str:
    if key == "kid":
        return f"{1000 * value:.3f}"
    if key == "accuracy":
        return f"{value:.1%}"
    if key in ("precision", "recall"):
        return f"{value:.3f}"
    return f"{value:.2f}" if value >= 10 else f"{value:.3f}"
