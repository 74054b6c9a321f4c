"""scikit-learn's digits: 1,797 scans of handwritten digits, 8x8 pixels, part of the package."""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np

CLASS_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SIZE = 8
VAL_FRACTION = 0.2
_SPLIT_SEED = 0


def digits_arrays(split: Literal["train", "val"]) -> tuple[np.ndarray, np.ndarray]:
    """One split of the digits: images uint8 [N, 8, 8] in 0..255, labels int64 [N] in 0..9.

    The split is stratified and never changes: 1,437 train images, 360 val images. The scans'
    17 grey levels are spread evenly over 0..255. No network is used.
    """
    images, labels = _arrays()
    rows = split_rows(split)
    return images[rows], labels[rows]


def split_rows(split: Literal["train", "val"]) -> np.ndarray:
    """Sorted row numbers, int64 [N], of a split in `sklearn.datasets.load_digits()`."""
    from sklearn.model_selection import train_test_split

    _, labels = _arrays()
    train, val = train_test_split(
        np.arange(len(labels)),
        test_size=VAL_FRACTION,
        stratify=labels,
        random_state=_SPLIT_SEED,
    )
    return np.sort(train if split == "train" else val)


@cache
def _arrays() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = np.rint(images.reshape(-1, SIZE, SIZE) * (255 / 16)).astype(np.uint8)
    return pixels, labels.astype(np.int64)
