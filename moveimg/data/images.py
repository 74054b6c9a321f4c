"""Image sources, their splits, and the views that are cut from an image."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import functional

from moveimg.config import Size, as_pair
from moveimg.config.run import Crops
from moveimg.dist import print_rank0
from moveimg.images import UnreadableImageError, center_crop

Split = Literal["train", "val", "test"]
VIEWS_PER_RANGE: dict[Crops, int] = {"center": 1, "flip": 2, "five": 5, "ten": 10}
FOLDER_VAL_FRACTION = 0.2  # of a source that has no validation or test split
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@dataclass(frozen=True, eq=False)
class ImageSource(Dataset):
    """N labelled images: `source[i]` is (PIL.Image in RGB, label).

    Attributes:
        identifiers: one per image; for files the path relative to the source, in posix form.
        labels: int32 [N], in 0..len(class_names)-1.
        load: row number -> RGB image, or UnreadableImageError, which names the image.
        content: row number -> a value that changes with the image (size and time, or pixels).
    """

    name: str
    class_names: list[str]
    identifiers: Sequence[str]
    labels: np.ndarray
    load: Callable[[int], Image.Image]
    content: Callable[[int], Any]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.load(index), int(self.labels[index])

    def select(self, rows: np.ndarray) -> ImageSource:
        """A source of only the images `rows`."""
        names, labels = [self.identifiers[row] for row in rows], self.labels[rows]
        load, content = (partial(_call_at, f, rows) for f in (self.load, self.content))
        return ImageSource(self.name, self.class_names, names, labels, load, content)

    def digest(self) -> str:
        """sha256 over class names, identifiers, labels and `content`, without reading images."""
        digest = hashlib.sha256(repr(self.class_names).encode())
        for row, (identifier, label) in enumerate(zip(self.identifiers, self.labels, strict=True)):
            digest.update(repr((identifier, int(label), self.content(row))).encode())
        return digest.hexdigest()


def _call_at(function: Callable[[int], Any], rows: np.ndarray, index: int) -> Any:
    return function(int(rows[index]))


# A source's own splits (train, val, test), each with the function that opens it
Splits = dict[str, Callable[[], ImageSource]]


def open_images(
    source: str | Path,
    split: Split,
    val_fraction: float | None = None,
    seed: int = 0,
    data_root: Path | None = None,
) -> ImageSource:
    """One split of a named data set, of a data set of the Hub or of a folder.

    `val_fraction` is the share of each class of the training images that is `val`, drawn with
    `seed`; the source's own test (or else validation) split is then `test`. Left out, `val` is the
    source's own validation or test split, or a fifth of a source that has none. `data_root` is the
    folder of downloaded data sets. docs/encoding.md describes folders.

    Raises FileNotFoundError for a missing folder or data set, ValueError for a source without
    images by class or without this split.
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
        fraction = FOLDER_VAL_FRACTION if val_fraction is None else val_fraction
        images = images.select(_draw_split(images.labels, split, fraction, seed))
    if not len(images):
        raise ValueError(f"'{source}' leaves no {split} images with val_fraction {val_fraction}")
    return replace(images, name=f"{source} ({split})")


def _find_splits(source: str | Path, data_root: Path | None) -> Splits:
    from moveimg.data import datasets, folders

    root = Path(source)
    if source == "digits":
        return {"train": partial(_open_digits, "train"), "val": partial(_open_digits, "val")}
    if datasets.is_named_source(source):
        return datasets.find_splits(str(source), data_root)
    if not root.is_dir():
        known = ("digits", *datasets.DATASETS)
        nearest = ", ".join(get_close_matches(str(source), known, cutoff=0.5) or known)
        raise FileNotFoundError(f"no image folder at '{source}': expected one, or one of {nearest}")
    if any(root.glob("*.parquet")) or any(root.glob("data/*.parquet")):
        return datasets.find_tables(root)
    return folders.find_splits(root)


def _draw_split(labels: np.ndarray, split: str, val_fraction: float, seed: int) -> np.ndarray:
    from sklearn.model_selection import train_test_split

    rows: list[np.ndarray] = []
    for label in np.unique(labels):  # each alone: a new image reshuffles one class
        train = members = np.flatnonzero(labels == label)
        n_val, val = min(round(len(members) * val_fraction), len(members) - 1), members[:0]
        if n_val > 0:
            train, val = train_test_split(members, test_size=n_val, random_state=seed)
        rows.append(train if split == "train" else val)
    return np.sort(np.concatenate(rows))


def _array_row(images: np.ndarray, row: int) -> Image.Image:
    return Image.fromarray(images[row]).convert("RGB")


def _row_hex(images: np.ndarray, row: int) -> str:
    return images[row].tobytes().hex()


def digits_arrays(split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """scikit-learn's digits: uint8 [N, 8, 8], labels [N] and row numbers [N] of a fixed split.

    1,437 train and 360 val images, stratified; 17 grey levels, spread over 0..255.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    pixels = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    rows = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    chosen = np.sort(rows[0] if split == "train" else rows[1])
    return pixels[chosen], labels[chosen].astype(np.int64), chosen


def _open_digits(split: str) -> ImageSource:
    images, labels, rows = digits_arrays(split)
    names, labels = [f"digits/{row:04d}" for row in rows], labels.astype(np.int32)
    load, content = partial(_array_row, images), partial(_row_hex, images)
    return ImageSource("digits", DIGITS, names, labels, load, content)


def drop_unreadable(source: ImageSource) -> ImageSource:
    """The source without unreadable images, which are counted and named on stderr."""
    readable, unreadable = [], []
    for row in range(len(source)):
        try:
            source.load(row)
            readable.append(row)
        except UnreadableImageError as error:
            unreadable.append(str(error))
    report_unreadable(unreadable, len(source))
    if not readable:
        raise ValueError(f"{source.name}: none of {len(source)} images could be read")
    return source.select(np.array(readable)) if unreadable else source


def report_unreadable(images: Sequence[str], total: int) -> None:
    """Print the number of unreadable images and the first twenty of them on stderr."""
    if images:
        print_rank0(f"warning: {len(images)} of {total} images cannot be read and are left out:")
    for line in images[:20]:
        print_rank0(f"  {line}")


def crop_views(
    image: Image.Image, size: Size, crops: Crops = "center", ranges: Sequence[float] = (1.0,)
) -> list[Image.Image]:
    """Views of `image` of (height, width) `size`, `count_views(crops, ranges)` of them.

    Each range r centre-crops to size * r pixels (rounded down, as in LlamaGen), and cuts from that
    center: its centre; flip: the centre and its mirror image; five: the corners (top left, top
    right, bottom left, bottom right) and the centre; ten: the five, then their mirror images.
    """
    height, width = as_pair(size)
    views: list[Image.Image] = []
    for ratio in ranges:
        # 1e-9: rounding must not put a product below an integer.
        larger = center_crop(image, (int(height * ratio + 1e-9), int(width * ratio + 1e-9)))
        if crops in ("five", "ten"):
            cut = functional.five_crop if crops == "five" else functional.ten_crop
            views += cut(larger, [height, width])
        else:
            centre = functional.center_crop(larger, [height, width])
            views += [centre] if crops == "center" else [centre, functional.hflip(centre)]
    return views


def count_views(crops: Crops, ranges: Sequence[float]) -> int:
    """The number of views that `crop_views` returns."""
    return VIEWS_PER_RANGE.get(crops, 0) * len(ranges)
