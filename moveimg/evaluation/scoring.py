"""A set of samples against a reference: the guards, one pass of the network, all numbers."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moveimg.errors import list_names
from moveimg.evaluation.features import Extractor, extract
from moveimg.evaluation.guards import check_metrics, check_set, check_size, check_split, enforce
from moveimg.evaluation.metrics import (
    frechet_distance,
    inception_scores,
    kernel_distance,
    precision_recall,
    statistics_of,
)
from moveimg.evaluation.reference import Reference
from moveimg.evaluation.sets import ImageSet, scan_image_set

LEFT_OUT = "the share of images that show their class is left out"


def score(
    images: ImageSet,
    reference: Reference,
    extractor: Extractor,
    cache: Path,
    n_classes: int | None = None,
    allowed: Sequence[str] = (),
) -> dict[str, Any]:
    """All metrics of generated images, and what they were computed from.

    Args:
        images: the samples.
        reference: training images, or their statistics.
        extractor: the same that made the reference's features.
        cache: where features are kept.
        n_classes: classes of the model; None: those that occur.
        allowed: guards that may be overruled, by name.

    Returns:
        plain data: `metrics`, `samples`, `reference`, `extractor` and `warnings`.

    Raises ValueError, beginning with the guard's name, for a comparison that would mislead.
    """
    lines = check_pair(images.size, reference, allowed)
    content = scan_image_set(images)
    width = len(reference.statistics["fid"].mu)
    lines += enforce(check_set(images, content, width, n_classes), allowed)
    features = extract(images, content.digest, extractor, cache)
    metrics = compute(features, reference)
    metrics["distinct"] = 1 - content.duplicates / len(images)
    labels, problem = match_labels(images, extractor)
    lines += [problem] if problem else []
    metrics |= condition(features, labels, extractor)
    lines += check_metrics(metrics)
    return {
        "metrics": metrics,
        "samples": {"count": len(images), "size": images.size, "sha256": content.digest},
        "reference": reference.summary(),
        "extractor": extractor.summary(),
        "warnings": lines,
    }


def check_pair(
    size: tuple[int, int], reference: Reference, allowed: Sequence[str], wanted: str = "train"
) -> list[str]:
    """Warnings about comparing images of (H, W) with a reference; see enforce for refusals.

    wanted: the split the reference should be of: train for a generator, val for a tokenizer.
    """
    problems = check_split(wanted, reference.split, reference.name)
    return enforce(problems + check_size(size, reference.size, reference.name), allowed)


def compute(features: dict[str, np.ndarray], reference: Reference) -> dict[str, Any]:
    """FID; sFID and IS where the extractor has their layers; precision, recall and KID where the
    reference has images.

    features: float32 [N, D] by role, of the samples.
    """
    metrics: dict[str, Any] = {}
    for role in ("fid", "sfid"):
        if role in features and role in reference.statistics:
            ours = statistics_of(features[role])
            metrics[role] = frechet_distance(ours, reference.statistics[role])
    if "sfid" in features:  # only Inception has sFID's layer, and IS is defined by its classes
        metrics |= inception_scores(features["logits"])
    if reference.features is not None:
        metrics |= precision_recall(features["fid"], reference.features)
        metrics |= kernel_distance(features["fid"], reference.features)
    return metrics


def match_labels(images: ImageSet, extractor: Extractor) -> tuple[np.ndarray | None, str | None]:
    """Labels [N] in the classifier's numbering, or None and the reason why there are none.

    Class folders are matched by name; numbers count as the classifier's, in 0..C-1.
    """
    names, labels = extractor.class_names, images.labels
    if names is None or labels is None:
        return None, None
    if images.class_names is None:
        if labels.max() < len(names):
            return labels, None
        hint = "; do they count from 1?" if labels.min() == 1 else ""
        return None, (
            f"unknown-classes: labels reach {labels.max()}, the classifier has 0..{len(names) - 1}"
            f"{hint}: {LEFT_OUT}"
        )
    index_of = {_normalize(name): index for index, name in enumerate(names)}
    numbers = {str(index): index for index in range(len(names))}
    keys = [_normalize(name) for name in images.class_names]
    for table in (index_of, numbers):
        if all(key in table for key in keys):
            return np.array([table[key] for key in keys])[labels], None
    unknown = [name for name in images.class_names if _normalize(name) not in index_of]
    return None, f"unknown-classes: the classifier knows no class {list_names(unknown)}: {LEFT_OUT}"


def condition(
    features: dict[str, np.ndarray], labels: np.ndarray | None, extractor: Extractor
) -> dict[str, Any]:
    """The share of images [N] that the classifier recognises as their label, in all and per class.

    A class without images has None.
    """
    names = extractor.class_names
    if names is None or labels is None or labels.max() >= len(names):
        return {}
    right = features["logits"].argmax(1) == labels
    by_class = [
        float(right[labels == label].mean()) if (labels == label).any() else None
        for label in range(len(names))
    ]
    return {"accuracy": float(right.mean()), "accuracy_by_class": by_class}


def _normalize(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold().strip()
