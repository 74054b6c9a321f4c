"""What can be wrong with a set or a comparison: each has a name, a line, and a weight.

A refusal can be overruled by its name (`--allow NAME`); what was found is kept in the results.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from moveimg.evaluation.sets import Content, ImageSet

CUSTOMARY = 50_000  # samples of published FIDs
RUN = 5000  # images of a split of ADM's Inception Score
REFUSALS = (  # that can be overruled: the rest would leave nothing to compute with
    "duplicate-images", "blank-images", "narrow-range", "wrong-size", "validation-reference",
    "training-reference",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """Something found: its name, one line, and whether it ends the evaluation."""

    name: str
    text: str
    refused: bool = False


def check_set(
    images: ImageSet, content: Content, width: int, n_classes: int | None = None
) -> list[Finding]:
    """What is odd about a set of samples.

    Args:
        images, content: the set, and what a look at its pixels told.
        width: features of the layer of FID: fewer samples make a singular covariance.
        n_classes: classes there should be; None: those that occur.
    """
    found = [*_count(len(images), width), *_pixels(len(images), content)]
    if images.labels is None:
        text = "no labels: whether the classes are balanced and mixed was not checked"
        return [*found, Finding("missing-labels", text)]
    return found + check_labels(images.labels, n_classes)


def check_labels(labels: np.ndarray, n_classes: int | None = None) -> list[Finding]:
    """Whether int64 [N] labels hold every class about as often, and in mixed order."""
    found = []
    counts = np.bincount(labels, minlength=n_classes or 0)
    if n_classes is None:
        counts = counts[counts > 0]
    if counts.max() - counts.min() > 1:
        text = f"classes have {counts.min()} to {counts.max()} images: expected equal numbers"
        found.append(Finding("unbalanced-labels", text))
    # in mixed order neighbours share a class with probability 1 / classes
    same = float((labels[1:] == labels[:-1]).mean()) if len(labels) > 1 else 0.0
    kinds = np.count_nonzero(counts)
    if kinds > 1 and len(labels) > 2 * kinds and same > 0.5 + 0.5 / kinds:
        text = (
            f"{same:.0%} of the images have the class of the one before: inception_score_adm takes "
            f"runs of {RUN} images as they come and is wrong for a class-sorted set"
        )
        found.append(Finding("sorted-labels", text))
    return found


def check_size(
    samples: tuple[int, int], reference: tuple[int, int] | None, name: str
) -> list[Finding]:
    """Whether a reference's images have the samples' (H, W); None: the reference holds none."""
    if reference is None or reference == samples:
        return []
    ours, theirs = ("x".join(map(str, reversed(s))) for s in (samples, reference))
    text = f"samples are {ours}, the reference {name} {theirs}: another resolution is another score"
    return [Finding("wrong-size", text, refused=True)]


def check_split(wanted: str, split: str | None, name: str) -> list[Finding]:
    """Generation is scored against training images, reconstruction against validation images.

    wanted, split: `train` or `val`; None where the reference does not tell.
    """
    if split is None or split == wanted:
        return []
    if wanted == "train":
        text = (
            f"{name} holds validation images: a generator's FID is taken against the training "
            "images (a tokenizer's rFID against validation: moveimg reconstruct)"
        )
        return [Finding("validation-reference", text, refused=True)]
    text = (
        f"{name} holds training images: a tokenizer's rFID is taken against the validation images "
        "(a generator's FID against training: moveimg evaluate)"
    )
    return [Finding("training-reference", text, refused=True)]


def enforce(findings: Iterable[Finding], allowed: Sequence[str]) -> list[str]:
    """The lines to show and keep. ValueError for the first refusal that is not allowed by name."""
    lines = []
    for finding in findings:
        line = f"{finding.name}: {finding.text}"
        if finding.refused and finding.name not in allowed:
            raise ValueError(f"{line} (--allow {finding.name} overrules this)")
        lines.append(line)
    return lines


def check_allowed(names: Sequence[str]) -> None:
    """Raise ValueError for a name that no refusal has which could be overruled."""
    for name in names:
        if name not in REFUSALS:
            raise ValueError(f"--allow {name}: expected one of {', '.join(REFUSALS)}")


def _count(count: int, width: int) -> list[Finding]:
    if count <= width:
        text = (
            f"{count} images for {width} features: the covariance is singular and FID far too "
            "high; it compares with nothing but the same number of images"
        )
        return [Finding("too-few-samples", text)]
    if count < CUSTOMARY and width >= 2048:
        text = f"{count} images: published FIDs are of {CUSTOMARY:,}, and fewer give higher ones"
        return [Finding("too-few-samples", text)]
    return []


def _pixels(count: int, content: Content) -> list[Finding]:
    found = []
    if content.brightest == 1:
        text = f"pixels reach {content.brightest} of 255: were values 0..1 stored as integers?"
        found.append(Finding("narrow-range", text, refused=True))
    if content.blank:  # first: black images equal each other, too
        text = f"{content.blank} of {count} images are of one colour (black?)"
        found.append(Finding("blank-images", text, refused=content.blank >= count // 2))
    if content.duplicates:
        everything = content.duplicates >= count // 2
        text = f"{content.duplicates} of {count} images equal an earlier one: a seed used twice?"
        found.append(Finding("duplicate-images", text, refused=everything))
    return found
