"""results.json, its table beside published numbers, and the plot of a sweep."""

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
from moveimg.errors import describe
from moveimg.files import read_json, write_json, write_text
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
# Numbers as their authors published them: ImageNet 256 x 256, 50,000 samples, ADM's evaluator
# (some samples are drawn at 384 and scored at 256). None of them was measured here. LlamaGen:
# arXiv 2406.06525; MoVE and LaVE: 2601.22887.
# name: FID, and where published inception score, precision, recall
PUBLISHED: dict[str, tuple[float, ...]] = {
    "LlamaGen-B, 256": (5.46, 193.6, 0.84, 0.46),
    "LlamaGen-B, 384": (6.09,),
    "LlamaGen-L, 256": (3.80, 248.3, 0.83, 0.51),
    "LlamaGen-L, 384": (3.07, 256.1, 0.83, 0.52),
    "LlamaGen-XL, 384": (2.62, 244.1, 0.80, 0.57),
    "LlamaGen-XXL, 384": (2.34, 253.9, 0.80, 0.59),
    "LlamaGen-3B, 384": (2.18, 263.3, 0.81, 0.58),
    "MoVE paper: GPT-B Standard": (6.53,),
    "MoVE paper: GPT-B MoVE x1": (5.62,),
    "MoVE paper: GPT-L Standard": (3.47,),
    "MoVE paper: GPT-L LaVE": (3.77,),
    "MoVE paper: GPT-L MoVE x1": (3.10,),
}


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware, for results."""
    versions = {name: version(name) for name in ("torch", "torch-fidelity", "numpy")}
    versions |= {"moveimg": __version__, "python": platform.python_version()}
    return {"versions": versions, "hardware": hardware(device)}


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write results as JSON, atomically."""
    write_json(path, {"format": 1, **results})


def read_results(path: Path) -> dict[str, Any]:
    """Read a file of write_results. Raises FileNotFoundError, or ValueError for other content."""
    results = read_json(path)
    try:
        _row(results)
    except Exception as error:  # of another program's JSON
        raise ValueError(f"{path}: not results of moveimg evaluate ({describe(error)})") from None
    return results


def results_table(results: Sequence[dict[str, Any]], published: bool = False) -> str:
    """A Markdown table with a row for each result; columns without any value are left out.

    published: append the rows of PUBLISHED, marked as published, if a result was scored with
    Inception; no other extractor's numbers compare with them.
    """
    rows = [_row(result) for result in results]
    if published and any("sfid" in result["metrics"] for result in results):
        keys = ("fid", "inception_score_adm", "precision", "recall")
        for name, numbers in PUBLISHED.items():
            row = {"name": f"{name} (published)", "images": "50,000", "reference": "imagenet256"}
            rows.append(row | dict(zip(keys, map(str, numbers), strict=False)))
    shown = [key for key in COLUMNS if any(key in row for row in rows)]
    if any("settings" in row for row in rows):
        shown.append("settings")
    spaces = {result["extractor"]["space"] for result in results}
    columns = ["name", "images", *shown, "reference", *["feature space"][: len(spaces) - 1]]
    titles = COLUMNS | {"name": ""}
    table = markdown_table(rows, {key: titles.get(key, key) for key in columns})
    return table if len(spaces) > 1 else f"{table}\n\nFeature space: {spaces.pop()}."


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
    row["feature space"] = result["extractor"]["space"]
    return row


def _format(key: str, value: Any) -> str:
    if key == "kid":
        return f"{1000 * value:.3f}"
    if key == "accuracy":
        return f"{value:.1%}"
    if key in ("precision", "recall"):
        return f"{value:.3f}"
    return f"{value:.2f}" if value >= 10 else f"{value:.3f}"
