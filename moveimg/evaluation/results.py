"""Results: JSON with all that is needed to get a number again, a row, and rows side by side."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict

from moveimg.config import SamplingSettings
from moveimg.device import hardware
from moveimg.errors import validate
from moveimg.evaluation.peers import PUBLISHED_PEERS
from moveimg.files import read_json, write_text

FORMAT = 1
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


class Results(BaseModel):
    """The parts of results.json that are read back."""

    model_config = ConfigDict(extra="allow")
    format: Literal[1]
    name: str
    metrics: dict[str, float | list[float | None] | None]
    reference: dict[str, Any]
    extractor: dict[str, Any]
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
    """Results as JSON, atomically."""
    text = json.dumps({"format": FORMAT, **results}, indent=2, ensure_ascii=False)
    write_text(path, text + "\n")


def read_results(path: Path) -> dict[str, Any]:
    """Results of write_results. FileNotFoundError, or ValueError where it is something else."""
    return validate(Results, read_json(path), str(path)).model_dump()


def markdown_table(results: Sequence[dict[str, Any]], peers: bool = False) -> str:
    """Results as Markdown rows; columns that nobody has are left out.

    peers: rows of PUBLISHED_PEERS below, marked as published. They are left out where no result
    was scored with Inception: nothing compares with them then.
    """
    rows = [_row(result) for result in results]
    if peers and any("sfid" in result["metrics"] for result in results):
        rows += [_peer(*peer) for peer in PUBLISHED_PEERS]
    keys = [key for key in COLUMNS if any(row.get(key) for row in rows)]
    spaces = {result["extractor"]["space"] for result in results}
    drawn = any("plan" in result for result in results)  # by this program: how is known
    columns = ["name", "images", *keys, *(["settings"] if drawn else []), "reference"]
    columns += ["space"] if len(spaces) > 1 else []
    titles = COLUMNS | {"name": "", "space": "feature space"}
    lines = [_cells(titles.get(key, key) for key in columns), _cells("---" for _ in columns)]
    lines += [_cells(row.get(key, "") for key in columns) for row in rows]
    if len(spaces) == 1:
        lines += ["", f"Feature space: {spaces.pop()}."]
    return "\n".join(lines)


def _cells(texts: Iterable[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def _row(result: dict[str, Any]) -> dict[str, str]:
    metrics = result["metrics"]
    row = {key: _number(key, metrics[key]) for key in COLUMNS if key in metrics}
    row["name"] = str(result.get("name", "samples"))
    row["settings"] = _settings(result.get("plan", {}).get("sampling"))
    row["images"] = f"{result['samples']['count']:,}"
    row["reference"] = str(result["reference"]["name"]).rsplit("/", 1)[-1]
    row["space"] = result["extractor"]["space"]
    return row


def _peer(
    name: str, fid: float, score: float | None, precision: float | None, recall: float | None
) -> dict[str, str]:
    given = {"fid": fid, "inception_score_adm": score, "precision": precision, "recall": recall}
    row = {key: str(value) for key, value in given.items() if value is not None}
    about = {"name": f"{name} (published)", "images": "50,000", "reference": "imagenet256"}
    return row | about | {"space": "as published", "settings": "as published"}


def _settings(sampling: dict[str, Any] | None) -> str:
    """Guidance, which no number means much without, and what else is not plain."""
    if sampling is None:
        return "not known"
    plain = SamplingSettings().model_dump()
    others = [f"{k} {v}" for k, v in sampling.items() if k != "cfg_scale" and v != plain.get(k)]
    return ", ".join([f"cfg_scale {sampling['cfg_scale']:g}", *others])


def _number(key: str, value: float) -> str:
    if key == "kid":
        return f"{1000 * value:.3f}"
    if key == "accuracy":
        return f"{value:.1%}"
    if key in ("precision", "recall"):
        return f"{value:.3f}"
    return f"{value:.2f}" if value >= 10 else f"{value:.3f}"
