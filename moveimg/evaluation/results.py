"""results.json, its table beside published numbers, and the plot of a sweep."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict

from moveimg.config import SamplingSettings
from moveimg.device import hardware
from moveimg.errors import validate
from moveimg.files import atomic, read_json, write_json, write_text
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
# arXiv 2406.06525; MoVE and LaVE: 2601.22887; RAR: 2411.00776; VAR: 2404.02905; MAR: 2406.11838.
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
    "RAR-B": (1.95,),
    "RAR-L": (1.70,),
    "RAR-XL": (1.50,),
    "RAR-XXL": (1.48,),
    "VAR-d16": (3.30,),
    "VAR-d20": (2.57,),
    "VAR-d24": (2.09,),
    "VAR-d30": (1.92,),
    "MAR-B": (2.31,),
    "MAR-L": (1.78,),
    "MAR-H": (1.55,),
    "RandAR-L": (2.55,),
    "AliTok, 177M": (1.44,),
}


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class _Samples(_Open):
    count: int


class _Reference(_Open):
    name: str
    sha256: str


class _Extractor(_Open):
    space: str
    sha256: str


class _Plan(_Open):
    sampling: dict[str, Any]


class Results(_Open):
    """The parts of results.json that are read back."""

    format: Literal[1]
    name: str
    metrics: dict[str, float | list[float | None] | None]
    samples: _Samples
    reference: _Reference
    extractor: _Extractor
    plan: _Plan | None = None
    warnings: list[str] = []


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware, for results."""
    versions = {"python": platform.python_version()}
    for name in ("moveimg", "torch", "torch-fidelity", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {"versions": versions, "hardware": hardware(device)}


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write results as JSON, atomically."""
    write_json(path, {"format": 1, **results})


def read_results(path: Path) -> dict[str, Any]:
    """Read a file of write_results. Raises FileNotFoundError, or ValueError for other content."""
    return validate(Results, read_json(path), str(path)).model_dump()


def results_table(results: Sequence[dict[str, Any]], published: bool = False) -> str:
    """A Markdown table with a row for each result; columns without any value are left out.

    published: append the rows of PUBLISHED, marked as published, if a result was scored with
    Inception; no other extractor's numbers compare with them.
    """
    rows = [_row(result) for result in results]
    if published and any("sfid" in result["metrics"] for result in results):
        rows += [_published_row(name, numbers) for name, numbers in PUBLISHED.items()]
    keys = [key for key in COLUMNS if any(key in row for row in rows)]
    drawn = any(result.get("plan") for result in results)
    spaces = {result["extractor"]["space"] for result in results}
    columns = ["name", "images", *keys, *(["settings"] if drawn else []), "reference"]
    columns += ["space"] if len(spaces) > 1 else []
    titles = COLUMNS | {"name": "", "space": "feature space"}
    table = markdown_table(rows, {key: titles.get(key, key) for key in columns})
    return table if len(spaces) > 1 else f"{table}\n\nFeature space: {spaces.pop()}."


def write_sweep(
    folder: Path, key: str, values: Sequence[float], results: Sequence[dict[str, Any]]
) -> None:
    """Write sweep.md, a row per value, and sweep.png, FID and IS (or accuracy) over the values."""
    from matplotlib.figure import Figure  # not pyplot, whose backend is the user's

    write_text(folder / "sweep.md", results_table(results) + "\n")
    figure = Figure(figsize=(6, 4), layout="constrained")
    left = figure.subplots()
    left.plot(values, [result["metrics"]["fid"] for result in results], "o-", color="tab:blue")
    left.set_xlabel(key)
    left.set_ylabel("FID (lower is better)", color="tab:blue")
    for second in ("inception_score_adm", "accuracy"):
        if second in results[0]["metrics"]:
            right = left.twinx()
            right.plot(values, [r["metrics"][second] for r in results], "s--", color="tab:orange")
            right.set_ylabel(COLUMNS[second], color="tab:orange")
            break
    space = results[0]["extractor"]["space"].split(":")[0]
    left.set_title(f"{results[0]['samples']['count']:,} images; {space}", fontsize=9)
    with atomic(folder / "sweep.png") as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _row(result: dict[str, Any]) -> dict[str, str]:
    metrics = result["metrics"]
    row = {key: _format(key, metrics[key]) for key in COLUMNS if metrics.get(key) is not None}
    row["name"] = str(result.get("name", "samples"))
    row["settings"] = _describe_settings((result.get("plan") or {}).get("sampling"))
    row["images"] = f"{result['samples']['count']:,}"
    row["reference"] = result["reference"]["name"].rsplit("/", 1)[-1]
    row["space"] = result["extractor"]["space"]
    return row


def _published_row(name: str, numbers: tuple[float, ...]) -> dict[str, str]:
    keys = ("fid", "inception_score_adm", "precision", "recall")
    row = {key: str(number) for key, number in zip(keys, numbers, strict=False)}
    row |= {"name": f"{name} (published)", "images": "50,000", "reference": "imagenet256"}
    return row | {"space": "as published", "settings": "as published"}


def _describe_settings(sampling: dict[str, Any] | None) -> str:
    """The guidance scale, and the settings that differ from their defaults."""
    if sampling is None:
        return "not known"
    default = SamplingSettings().model_dump()
    scale = str(sampling.get("cfg_scale", default["cfg_scale"])).removesuffix(".0")
    others = [f"{k} {v}" for k, v in sampling.items() if k != "cfg_scale" and v != default.get(k)]
    return ", ".join([f"cfg_scale {scale}", *others])


def _format(key: str, value: Any) -> str:
    if not isinstance(value, int | float):
        return str(value)
    if key == "kid":
        return f"{1000 * value:.3f}"
    if key == "accuracy":
        return f"{value:.1%}"
    if key in ("precision", "recall"):
        return f"{value:.3f}"
    return f"{value:.2f}" if value >= 10 else f"{value:.3f}"
