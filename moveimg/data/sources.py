"""Opening of image sources by name: folders, named data sets, the digits, and their splits."""

from __future__ import annotations

from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from moveimg.data.datasets import DATASETS, find_splits, find_tables, is_named_source
from moveimg.data.images import ImageSource, Splits, find_folder_splits

Split = Literal["train", "val", "test"]
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def open_images(
    source: str | Path,
    split: Split,
    val_fraction: float | None = None,
    data_root: Path | None = None,
) -> ImageSource:
    """Open a split of a folder, a named data set or a data set on the Hub (docs/encoding.md).

    With `val_fraction`, `val` is this share of each class, drawn from the training images, and
    `test` is the source's test split, or else its validation split. Without it, `val` is the
    source's validation split, or else its test split, or else a fifth of the training images.
    Raises FileNotFoundError for a missing folder or data set, ValueError for a source without
    classes or without this split.
    """
    splits = _find_splits(source, data_root)
    held_out = next((name for name in ("val", "test") if name in splits), "")
    drawn, own = split != "test" and (val_fraction is not None or not held_out), str(split)
    if split == "val":
        own = "train" if drawn else held_out
    elif split == "test" and "test" not in splits and val_fraction is not None:
        own = held_out
    if own not in splits:
        raise ValueError(f"'{source}' has no {split} split: expected one of {', '.join(splits)}")
    images = splits[own]()
    if drawn:
        fraction = 0.2 if val_fraction is None else val_fraction
        images = images.select(_draw_split(images.labels, split, fraction))
    if not len(images):
        raise ValueError(f"'{source}' has no {split} images at val_fraction {val_fraction}")
    return replace(images, name=f"{source} ({split})")


def _find_splits(source: str | Path, data_root: Path | None) -> Splits:
    root = Path(source)
    if source == "digits":
        return {split: partial(_open_digits, split) for split in ("train", "val")}
    if is_named_source(source):
        return find_splits(str(source), data_root)
    if not root.is_dir():
        known = ("digits", *DATASETS)
        nearest = ", ".join(get_close_matches(str(source), known, cutoff=0.5) or known)
        raise FileNotFoundError(f"no folder '{source}': expected an image folder or {nearest}")
    if any(root.glob("*.parquet")) or any(root.glob("data/*.parquet")):
        return find_tables(root)
    return find_folder_splits(root)


def _draw_split(labels: np.ndarray, split: str, val_fraction: float) -> np.ndarray:
    from sklearn.model_selection import train_test_split

    chosen = []
    for label in np.unique(labels):  # class by class, so that a new image changes one class alone
        rows = np.flatnonzero(labels == label)
        n_val, parts = min(round(len(rows) * val_fraction), len(rows) - 1), (rows, rows[:0])
        if n_val > 0:
            parts = train_test_split(rows, test_size=n_val, random_state=0)
        chosen.append(parts[0 if split == "train" else 1])
    return np.sort(np.concatenate(chosen))


def load_digit_arrays(split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a split of scikit-learn's digits: uint8 [N, 8, 8], labels [N] and row numbers [N]."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    pixels = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    rows = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    chosen = np.sort(rows[0] if split == "train" else rows[1])
    return pixels[chosen], labels[chosen].astype(np.int32), chosen


def _open_digits(split: str) -> ImageSource:
    pixels, labels, rows = load_digit_arrays(split)
    names = [f"digits/{row:04d}" for row in rows]
    load = [Image.fromarray(image).convert("RGB") for image in pixels].__getitem__
    content = [image.tobytes().hex() for image in pixels].__getitem__
    return ImageSource("digits", DIGITS, names, labels, load, content)
