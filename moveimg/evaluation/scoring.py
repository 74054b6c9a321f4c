"""A set of samples against a reference: the guards, one pass of the network, all numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moveimg.evaluation.classifier import accuracy_by_class
from moveimg.evaluation.features import Extractor, extract
from moveimg.evaluation.guards import check_set, check_size, check_split, enforce
from moveimg.evaluation.metrics import (
    frechet_distance,
    inception_scores,
    kernel_distance,
    precision_recall,
)
from moveimg.evaluation.reference import Reference
from moveimg.evaluation.sets import ImageSet, look
from moveimg.evaluation.statistics import statistics_of


def score(
    images: ImageSet,
    reference: Reference,
    extractor: Extractor,
    cache: Path,
    n_classes: int | None = None,
    allowed: Sequence[str] = (),
) -> dict[str, Any]:
    """Every number there is of generated images, with what they came from.

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
    content = look(images)
    width = len(reference.statistics["fid"].mu)
    lines += enforce(check_set(images, content, width, n_classes), allowed)
    features = extract(images, content.digest, extractor, cache)
    metrics = compute(features, reference)
    metrics["distinct"] = 1 - content.duplicates / len(images)
    metrics |= condition(features, images.labels, extractor)
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
    """Whether images of (H, W) may be held against a reference at all; see enforce.

    wanted: the split the reference should be of: train for a generator, val for a tokenizer.
    """
    findings = check_split(wanted, reference.split, reference.name)
    return enforce(findings + check_size(size, reference.size, reference.name), allowed)


def compute(features: dict[str, np.ndarray], reference: Reference) -> dict[str, Any]:
    """FID and, where the extractor has their layers, sFID and IS; with images of the reference
    precision, recall and KID.

    features: float32 [N, D] by role, of the samples.
    """
    metrics: dict[str, Any] = {}
    for role in ("fid", "sfid"):
        if role in features and role in reference.statistics:
            ours = statistics_of(features[role])
            metrics[role] = frechet_distance(ours, reference.statistics[role])
    if "sfid" in features:  # Inception: its classes are not ours, and IS is made for it
        metrics |= inception_scores(features["logits"])
    if reference.features is not None:
        metrics |= precision_recall(features["fid"], reference.features)
        metrics |= kernel_distance(features["fid"], reference.features)
    return metrics


def condition(
    features: dict[str, np.ndarray], labels: np.ndarray | None, extractor: Extractor
) -> dict[str, Any]:
    """How often a classifier sees the class that was asked for."""
    names = extractor.class_names
    if names is None or labels is None or labels.max() >= len(names):
        return {}
    by_class = accuracy_by_class(features["logits"], labels, len(names))
    right = features["logits"].argmax(1) == labels
    return {"accuracy": float(right.mean()), "accuracy_by_class": by_class}
