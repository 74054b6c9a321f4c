"""Checks of a set and of a comparison: each problem has a name, a line, and may be a refusal.

A refusal is overruled by its name (`--allow NAME`); all lines are kept in the results.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moveimg.evaluation.sets import Content, ImageSet

PUBLISHED_COUNT = 50_000  # samples behind published FIDs
ADM_SPLIT = 5000  # images of a split of ADM's Inception Score
LOW_RECALL = 0.1
REFUSALS = (  # that can be overruled; without the others there would be nothing to compute with
    "duplicate-images", "blank-images", "narrow-range", "wrong-size", "validation-reference",
    "training-reference",
)  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """A problem's name, one line about it, and whether it ends the evaluation."""

    name: str
    text: str
    refused: bool = False


def check_set(
    images: ImageSet, content: Content, width: int, n_classes: int | None = None
) -> list[Problem]:
    """Problems of a set of samples.

    Args:
        images, content: the set, and scan_image_set's facts about it.
        width: features of the layer of FID: fewer samples make a singular covariance.
        n_classes: classes there should be; None: those that occur.
    """
    count, problems = len(images), []
    if count <= width:
        text = (
            f"{count} images for {width} features: the covariance is singular and FID far too "
            "high; it compares with nothing but the same number of images"
        )
        problems.append(Problem("too-few-samples", text))
    elif count < PUBLISHED_COUNT and width >= 2048:
        text = f"{count} images: published FIDs are of {PUBLISHED_COUNT:,}; fewer give higher ones"
        problems.append(Problem("too-few-samples", text))
    if content.brightest == 1:
        text = "pixels reach 1 of 255: were values 0..1 stored as integers?"
        problems.append(Problem("narrow-range", text, refused=True))
    if content.blank:  # before duplicates: black images are duplicates, too
        text = f"{content.blank} of {count} images are of one colour (black?)"
        problems.append(Problem("blank-images", text, refused=content.blank >= count // 2))
    if content.duplicates:
        text = f"{content.duplicates} of {count} images equal an earlier one: a seed used twice?"
        most = content.duplicates >= count // 2
        problems.append(Problem("duplicate-images", text, refused=most))
    if images.labels is None:
        text = "no labels: whether the classes are balanced and mixed was not checked"
        return [*problems, Problem("missing-labels", text)]
    return problems + check_labels(images.labels, n_classes)


def check_labels(labels: np.ndarray, n_classes: int | None = None) -> list[Problem]:
    """Whether int64 [N] labels hold every class about as often, and in mixed order."""
    problems = []
    classes, counts = np.unique(labels, return_counts=True)
    missing = n_classes is not None and np.count_nonzero(classes < n_classes) < n_classes
    fewest = 0 if missing else counts.min()
    if counts.max() - fewest > 1:
        text = f"classes have {fewest} to {counts.max()} images: expected equal numbers"
        problems.append(Problem("unbalanced-labels", text))
    # in mixed order neighbours share a class with probability 1 / classes
    same = float((labels[1:] == labels[:-1]).mean()) if len(labels) > 1 else 0.0
    kinds = len(counts)
    if kinds > 1 and len(labels) > 2 * kinds and same > 0.5 + 0.5 / kinds:
        text = (
            f"{same:.0%} of the images have the class of the one before: inception_score_adm uses "
            f"runs of {ADM_SPLIT} images in file order and is wrong for a class-sorted set"
        )
        problems.append(Problem("sorted-labels", text))
    return problems


def check_size(
    samples: tuple[int, int], reference: tuple[int, int] | None, name: str
) -> list[Problem]:
    """Whether a reference's images have the samples' (H, W); None: it has no images."""
    if reference is None or reference == samples:
        return []
    ours, theirs = ("x".join(map(str, reversed(s))) for s in (samples, reference))
    text = f"samples are {ours}, the reference {name} {theirs}: another resolution is another score"
    return [Problem("wrong-size", text, refused=True)]


def check_split(wanted: str, split: str | None, name: str) -> list[Problem]:
    """Whether a generator meets training images, and a tokenizer validation images.

    wanted, split: `train` or `val`; None where the reference's split is unknown.
    """
    if split is None or split == wanted:
        return []
    if wanted == "train":
        text = (
            f"{name} holds validation images: a generator's FID is taken against the training "
            "images (a tokenizer's rFID against validation: moveimg reconstruct)"
        )
        return [Problem("validation-reference", text, refused=True)]
    text = (
        f"{name} holds training images: a tokenizer's rFID is taken against the validation images "
        "(a generator's FID against training: moveimg evaluate)"
    )
    return [Problem("training-reference", text, refused=True)]


def check_metrics(metrics: dict[str, Any]) -> list[str]:
    """Warnings about misleading numbers. Raises ValueError for a number that is not finite."""
    for key, value in metrics.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"non-finite: {key} is {value}: features or pixels are damaged")
    if metrics.get("recall", 1) < LOW_RECALL < metrics.get("precision", 0):
        return [
            f"low-recall: precision {metrics['precision']:.2f}, recall {metrics['recall']:.3f}: "
            "few kinds of samples, near a few real images; precision alone flatters"
        ]
    return []


def enforce(problems: Iterable[Problem], allowed: Sequence[str]) -> list[str]:
    """The lines to show and keep. ValueError for the first refusal that is not allowed by name."""
    lines = []
    for problem in problems:
        line = f"{problem.name}: {problem.text}"
        if problem.refused and problem.name not in allowed:
            raise ValueError(f"{line} (--allow {problem.name} overrules this)")
        lines.append(line)
    return lines


def check_allowed(names: Sequence[str]) -> None:
    """Raise ValueError for a name that is not a refusal which can be overruled."""
    for name in names:
        if name not in REFUSALS:
            raise ValueError(f"--allow {name}: expected one of {', '.join(REFUSALS)}")
