"""A set of samples against a reference: the guards, one pass of the network, all numbers.

Comparisons that mislead have a name: a line in the results, or a refusal.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moveimg.errors import list_names
from moveimg.evaluation.features import Extractor, extract
from moveimg.evaluation.metrics import (
    ADM_SPLIT,
    frechet_distance,
    inception_scores,
    kernel_distance,
    precision_recall,
    statistics_of,
)
from moveimg.evaluation.reference import Reference
from moveimg.evaluation.sets import Content, ImageSet, scan_image_set

PUBLISHED_COUNT = 50_000  # samples behind published FIDs
LOW_RECALL = 0.1


def score(
    images: ImageSet,
    reference: Reference,
    extractor: Extractor,
    cache: Path,
    guards: Guards,
    n_classes: int | None = None,
) -> dict[str, Any]:
    """All metrics of generated images as plain data, with what they were computed from.

    The extractor is the one that made the reference's features. `n_classes` None means the
    classes that occur. Raises ValueError, beginning with the guard's name, for a comparison that
    would mislead.
    """
    check_pair(images.size, reference, guards)
    content = scan_image_set(images)
    check_set(images, content, len(reference.statistics["fid"].mu), n_classes, guards)
    features = extract(images, content.digest, extractor, cache)
    metrics = compute(features, reference)
    metrics["distinct"] = 1 - content.duplicates / len(images)
    metrics |= condition(features, match_labels(images, extractor, guards), extractor)
    check_metrics(metrics, guards)
    return {
        "metrics": metrics,
        "samples": {"count": len(images), "size": images.size, "sha256": content.digest},
        "reference": reference.summary(),
        "extractor": extractor.summary(),
        "warnings": guards.lines,
    }


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


def match_labels(images: ImageSet, extractor: Extractor, guards: Guards) -> np.ndarray | None:
    """Labels [N] in the classifier's numbering; None, with a warning, where there are none.

    Class folders are matched by name; numbers count as the classifier's, in 0..C-1.
    """
    names, labels = extractor.class_names, images.labels
    if names is None or labels is None:
        return None
    known, folders = [_normalize(name) for name in names], images.class_names
    if folders is None:
        if labels.max() < len(names):
            return labels
        unknown = [str(labels.max())]  # of classes that count from 1, perhaps
    else:
        keys = [_normalize(name) for name in folders]
        for table in (known, [str(index) for index in range(len(names))]):
            if set(keys) <= set(table):
                return np.array([table.index(key) for key in keys])[labels]
        unknown = [name for name, key in zip(folders, keys, strict=True) if key not in known]
    text = f"the classifier's classes 0..{len(names) - 1} lack {list_names(unknown)}: no accuracy"
    guards.warn("unknown-classes", text)
    return None


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


# --- guards --------------------------------------------------------------------------------


class Guards:
    """The problems of one comparison; a refusal is overruled by its name (`--allow NAME`)."""

    def __init__(self, allowed: Sequence[str] = ()) -> None:
        self.allowed = allowed
        self.lines: list[str] = []  # `name: text` of every warning and overruled refusal

    def warn(self, name: str, text: str) -> None:
        self.lines.append(f"{name}: {text}")

    def refuse(self, name: str, text: str) -> None:
        """Raise ValueError, unless the refusal is allowed by name."""
        if name not in self.allowed:
            raise ValueError(f"{name}: {text} (--allow {name} overrules this)")
        self.warn(name, text)


def check_pair(
    size: tuple[int, int], reference: Reference, guards: Guards, wanted: str = "train"
) -> None:
    """Check the split of a reference and its resolution against the samples' (H, W).

    wanted: the split the reference should be of: train for a generator, val for a tokenizer.
    """
    if reference.split not in (None, wanted):
        name = "validation-reference" if wanted == "train" else "training-reference"
        text = "a generator's FID is taken against training, a tokenizer's rFID against validation"
        guards.refuse(name, f"{reference.name} holds {reference.split} images: {text} images")
    if reference.size not in (None, size):
        ours, theirs = (f"{s[1]}x{s[0]}" for s in (size, reference.size or size))
        guards.refuse("wrong-size", f"samples are {ours}, the reference {reference.name} {theirs}")


def check_set(
    images: ImageSet, content: Content, width: int, n_classes: int | None, guards: Guards
) -> None:
    """Check a set of samples and the facts of scan_image_set about it.

    `width` is the number of FID's features: fewer samples make a singular covariance.
    """
    count = len(images)
    if count <= width:
        text = f"{count} images for {width} features: the covariance is singular, FID far too high"
        guards.warn("too-few-samples", text)
    elif count < PUBLISHED_COUNT and width >= 2048:
        text = f"{count} images: published FIDs are of {PUBLISHED_COUNT:,}; fewer give higher ones"
        guards.warn("too-few-samples", text)
    if content.brightest == 1:
        text = "pixels reach 1 of 255: were values 0..1 stored as integers?"
        guards.refuse("narrow-range", text)
    if content.blank:  # before duplicates: black images are duplicates, too
        report = guards.refuse if content.blank >= count // 2 else guards.warn
        report("blank-images", f"{content.blank} of {count} images are of one colour (black?)")
    if content.duplicates:
        report = guards.refuse if content.duplicates >= count // 2 else guards.warn
        text = f"{content.duplicates} of {count} images equal an earlier one: a seed used twice?"
        report("duplicate-images", text)
    if images.labels is None:
        guards.warn("missing-labels", "whether the classes are balanced and mixed is unknown")
    else:
        check_labels(images.labels, n_classes, guards)


def check_labels(labels: np.ndarray, n_classes: int | None, guards: Guards) -> None:
    """Check that int64 [N] labels hold every class about as often, and in mixed order."""
    classes, counts = np.unique(labels, return_counts=True)
    missing = n_classes is not None and np.count_nonzero(classes < n_classes) < n_classes
    fewest = 0 if missing else counts.min()
    if counts.max() - fewest > 1:
        text = f"classes have {fewest} to {counts.max()} images: expected equal numbers"
        guards.warn("unbalanced-labels", text)
    # in mixed order neighbours share a class with probability 1 / classes
    same = float((labels[1:] == labels[:-1]).mean()) if len(labels) > 1 else 0.0
    kinds = len(counts)
    if kinds > 1 and len(labels) > 2 * kinds and same > 0.5 + 0.5 / kinds:
        text = (
            f"{same:.0%} of the images have the class of the one before: inception_score_adm uses "
            f"runs of {ADM_SPLIT} images in file order and is wrong for a class-sorted set"
        )
        guards.warn("sorted-labels", text)


def check_metrics(metrics: dict[str, Any], guards: Guards) -> None:
    """Warn of misleading numbers. Raises ValueError for a number that is not finite."""
    for key, value in metrics.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"non-finite: {key} is {value}: features or pixels are damaged")
    if metrics.get("recall", 1) < LOW_RECALL < metrics.get("precision", 0):
        text = (
            f"precision {metrics['precision']:.2f}, recall {metrics['recall']:.3f}: few kinds of "
            "samples, near a few real images; precision alone flatters"
        )
        guards.warn("low-recall", text)
