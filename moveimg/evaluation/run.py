"""`moveimg evaluate`: sample sets drawn and scored, and tables of their results."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from moveimg import __version__
from moveimg.checkpoint import BUNDLED
from moveimg.config import SamplingSettings
from moveimg.data import is_named_source
from moveimg.device import hardware
from moveimg.errors import describe
from moveimg.evaluation.extractors import (
    EFFICIENTNET,
    Extractor,
    extract,
    load_classifier,
    load_efficientnet,
    load_inception,
)
from moveimg.evaluation.metrics import (
    frechet_distance,
    inception_scores,
    kernel_distance,
    precision_recall,
    statistics_of,
)
from moveimg.evaluation.reference import locate, open_reference
from moveimg.evaluation.sample import sample_set
from moveimg.evaluation.sets import open_set, scan_image_set
from moveimg.files import lock, read_json, write_json
from moveimg.pipeline import Pipeline
from moveimg.tables import markdown_table

REFERENCES = {"digits": "digits", "fashion": "fashion-mnist"}  # of the bundled models
PUBLISHED_COUNT = 50_000  # samples behind published FIDs
COLUMNS = {  # of a table of results: title and format
    "fid": ("FID", ".4g"),
    "sfid": ("sFID", ".4g"),
    "inception_score_adm": ("IS (ADM)", ".4g"),
    "inception_score_shuffled": ("IS (shuffled)", ".4g"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
    "kid": ("KID", ".6f"),
    "accuracy": ("class shown", ".1%"),
}


def open_extractor(
    reference: str | None,
    classifier: Path | None,
    inception_weights: Path | None,
    device: torch.device,
) -> Extractor:
    """The feature extractor of a comparison with `reference`, which must exist.

    `classifier` is a file of --make-extractor, or `efficientnet-lite0`. Without one it is the
    bundled classifier of a data set, else Inception with torch-fidelity's weights.
    Raises as locate, load_classifier, load_efficientnet and load_inception.
    """
    source = (reference or "").split(":")[0]
    if reference is not None and not is_named_source(source):
        locate(reference)
    bundled = {source: model for model, source in REFERENCES.items()}
    if source in bundled and classifier is inception_weights is None:
        classifier = BUNDLED / bundled[source] / "extractor.safetensors"
    if str(classifier) == EFFICIENTNET:
        return load_efficientnet(device)
    if classifier is not None:
        return load_classifier(classifier, device)
    return load_inception(inception_weights, device)


def evaluate_model(
    pipeline: Pipeline, plan: dict[str, Any], reference: str, extractor: Extractor, out: Path | None
) -> tuple[dict[str, Any], Path] | None:
    """Draw a model's samples (or continue to), score them, write results.json beside them.

    `plan` comes from make_plan; `out` defaults to evaluation/MODEL-HASH with the plan's hash.
    Returns the results and their folder; None on every rank but 0.
    """
    name = Path(pipeline.name).name
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    folder = out or Path("evaluation") / f"{name}-{digest[:8]}"
    height, width = (n * pipeline.tokenizer.downsample for n in pipeline.generator.config.grid)
    if os.environ.get("RANK", "0") == "0":  # a bad reference is refused before drawing
        open_reference(reference, (plan["resize"] or height, plan["resize"] or width), extractor)
    with lock(folder, "moveimg evaluate"):
        path = sample_set(pipeline, plan, folder)
    if path is None:
        return None
    about = {"name": name, "model": pipeline.name, "plan": plan}
    return score(path, reference, extractor, folder, about), folder


def score(
    samples: Path,
    reference: str,
    extractor: Extractor,
    out: Path | None = None,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Score a sample set of any program: its metrics, reference and extractor as a dictionary.

    FID; sFID and IS where the extractor has their layers; precision, recall and KID where the
    reference has images. Written with `about` to results.json in `out`. `samples` is an .npz in
    ADM's layout or a folder of images. Raises as open_set, open_reference and extract.
    """
    images = open_set(samples)
    real, count = open_reference(reference, images.size, extractor), len(images)
    digest, duplicates = scan_image_set(images)
    features = extract(images, digest, extractor)
    metrics: dict[str, Any] = {
        role: frechet_distance(statistics_of(features[role]), statistics)
        for role, statistics in real.statistics.items()
    }
    if "sfid" in features:  # Inception: IS is defined by its classes
        metrics |= inception_scores(features["logits"])
    if real.features is not None:
        metrics |= precision_recall(features["fid"], real.features)
        metrics |= kernel_distance(features["fid"], real.features)
    metrics["distinct"] = 1 - duplicates / count
    if extractor.class_names is not None and images.labels is not None:
        metrics["accuracy"] = float((features["logits"].argmax(1) == images.labels).mean())
    warnings = []
    if count <= (width := features["fid"].shape[1]):
        warnings.append(f"{count} images for {width} features: the covariance is singular")
    elif count < PUBLISHED_COUNT and "sfid" in features:
        warnings.append(f"{count} images: published FIDs use {PUBLISHED_COUNT} and are lower")
    if duplicates:
        warnings.append(f"{duplicates} of {count} images equal an earlier one: a seed used twice?")
    packages = ("torch-fidelity", "numpy")
    results = {
        "format": 1,
        "name": samples.name,
        **(about or {}),
        "metrics": metrics,
        "samples": {"count": count, "size": images.size, "sha256": digest},
        "reference": {
            "name": real.name,
            "sha256": real.digest,
            "images_of_statistics": real.statistics["fid"].count,
            "images_of_precision_recall_kid": None if real.features is None else len(real.features),
        },
        "extractor": {
            "name": extractor.name,
            "space": extractor.space,
            "sha256": extractor.fingerprint,
            "held_out_accuracy": extractor.held_out,
        },
        "warnings": warnings,
        "versions": {"moveimg": __version__} | {name: version(name) for name in packages},
        "hardware": hardware(extractor.device),
    }
    if out is not None:
        write_json(out / "results.json", results)
    return results


def read_results(path: Path) -> dict[str, Any]:
    """Read a results.json. Raises FileNotFoundError, or ValueError for other content."""
    results = read_json(path)
    try:
        _row(results)
    except Exception as error:  # another program's JSON
        raise ValueError(f"{path}: not results of moveimg evaluate ({describe(error)})") from None
    return results


def results_table(results: Sequence[dict[str, Any]]) -> str:
    """A Markdown table with a row for each result; columns without any value are left out."""
    rows = [_row(result) for result in results]
    columns = {"name": "", "images": "images"} | {key: title for key, (title, _) in COLUMNS.items()}
    columns |= {key: key for key in ("settings", "reference", "feature space")}
    used = {key: title for key, title in columns.items() if any(row.get(key) for row in rows)}
    return markdown_table(rows, used)


def _row(result: dict[str, Any]) -> dict[str, str]:
    metrics = result["metrics"]
    shown = {key: form for key, (_, form) in COLUMNS.items() if metrics.get(key) is not None}
    row = {key: format(metrics[key], form) for key, form in shown.items()}
    if plan := result.get("plan"):  # the guidance scale, and settings other than the defaults
        default = SamplingSettings().model_dump() | {"cfg_scale": None}
        changed = {k: v for k, v in plan["sampling"].items() if v != default.get(k)}
        row["settings"] = ", ".join(f"{k} {v}".removesuffix(".0") for k, v in changed.items())
    return row | {
        "name": result["name"],
        "images": f"{result['samples']['count']:,}",
        "reference": result["reference"]["name"].rsplit("/", 1)[-1],
        "feature space": result["extractor"]["space"],
    }
