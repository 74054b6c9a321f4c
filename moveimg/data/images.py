"""Image sources and their splits: data sets by name, folders by class, archives, Parquet files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from moveimg.dist import print_rank0
from moveimg.images import UnreadableImageError, grey_to_rgb

Split = Literal["train", "val", "test"]
FOLDER_VAL_FRACTION = 0.2  # of a source that has no validation or test split
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@dataclass(frozen=True, eq=False)
class ImageSource(Dataset):
    """N labelled images: `source[i]` is (PIL.Image in RGB, label).

    Attributes:
        name: for manifests and messages.
        class_names: one per label, in label order.
        identifiers: one per image; for files the path relative to the source, in posix form.
        labels: int32 [N], in 0..len(class_names)-1.
        load: row number -> RGB image; raises UnreadableImageError, which names the image.
        content: row number -> what changes with the image's bytes (size and time, or pixels).
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
        """The source of the images `rows` alone."""
        return replace(
            self,
            identifiers=[self.identifiers[row] for row in rows],
            labels=self.labels[rows],
            load=partial(_call_at, self.load, rows),
            content=partial(_call_at, self.content, rows),
        )

    def digest(self) -> str:
        """sha256 over class names, identifiers, labels and `content`, without reading images."""
        digest = hashlib.sha256(repr(self.class_names).encode())
        for row, (identifier, label) in enumerate(zip(self.identifiers, self.labels, strict=True)):
            digest.update(repr((identifier, int(label), self.content(row))).encode())
        return digest.hexdigest()


# A source's own splits (train, val, test), each with the function that opens it
Parts = dict[str, Callable[[], ImageSource]]


def open_images(
    source: str | Path,
    split: Split,
    val_fraction: float | None = None,
    seed: int = 0,
    data_root: Path | None = None,
) -> ImageSource:
    """One split of a named data set or of a folder.

    A folder holds one of: a subfolder of images per class; `train/` and `val/` (and `test/`) with
    the same classes in each; ImageNet's archives under their published names; Parquet files.

    Args:
        source: `digits`, a name of moveimg.data.datasets, a Hub data set id, or a folder.
        split: train, val or test.
        val_fraction: share of each class of the training images that is `val`, drawn with `seed`;
            the source's own test (or else validation) split is then `test`. Left out: `val` is the
            source's own validation or test split, or a fifth of a source that has none.
        seed: of that draw.
        data_root: folder of downloaded data sets.

    Raises:
        FileNotFoundError: there is no such folder, data set or file.
        ValueError: it holds no images by class, or has no such split.
    """
    if split not in ("train", "val", "test"):
        raise ValueError(f"unknown split {split!r}: expected train, val or test")
    if val_fraction is not None and not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}: expected 0 <= val_fraction < 1")
    parts = _find_parts(source, data_root)
    part, drawn = choose_part(parts, split, val_fraction, str(source))
    images = parts[part]()
    if drawn is not None:
        images = images.select(draw_split(images.labels, split, drawn, seed, str(source)))
    return replace(images, name=f"{source} ({split})")


def is_named_source(source: str | Path) -> bool:
    """Whether a source is a data set's name rather than a folder."""
    from moveimg.data import datasets

    return source == "digits" or datasets.is_named(source)


def drop_unreadable(source: ImageSource) -> ImageSource:
    """The source without the images that cannot be read; they are counted and named on stderr."""
    readable, unreadable = [], []
    for row in range(len(source)):
        try:
            source.load(row)
            readable.append(row)
        except UnreadableImageError as error:
            unreadable.append(str(error))
    if unreadable and not readable:
        raise ValueError(f"{source.name}: none of {len(source)} images could be read")
    report_unreadable(unreadable, len(source))
    return source.select(np.array(readable)) if unreadable else source


def report_unreadable(images: Sequence[str], total: int) -> None:
    """Print the number and the first twenty of the images that cannot be read on stderr."""
    if images:
        print_rank0(f"warning: {len(images)} of {total} images cannot be read and are left out:")
    for line in images[:20]:
        print_rank0(f"  {line}")


# --- splits --------------------------------------------------------------------------------


def choose_part(
    parts: Collection[str], split: Split, val_fraction: float | None, name: str
) -> tuple[str, float | None]:
    """Which of a source's own splits holds `split`, and val_fraction where it has to be drawn."""
    own_val = next((part for part in ("val", "test") if part in parts), None)
    if split == "test":
        held_out = "test" if "test" in parts else own_val if val_fraction is not None else None
        if held_out is None:
            raise ValueError(f"'{name}' has no test split: expected train or val")
        return held_out, None
    if own_val is not None and val_fraction is None:
        return ("train" if split == "train" else own_val), None
    return "train", FOLDER_VAL_FRACTION if val_fraction is None else val_fraction


def draw_split(
    labels: np.ndarray, split: Split, val_fraction: float, seed: int, name: str
) -> np.ndarray:
    """Row numbers of a stratified split, sorted, int64.

    Each class is split alone: a joint stratified split refuses classes of one image, and lets
    a class that gains an image reshuffle the others. Raises ValueError where no row is left.
    """
    from sklearn.model_selection import train_test_split

    members_of = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1])
    rows: list[np.ndarray] = []
    for members in members_of:
        n_val = min(round(len(members) * val_fraction), len(members) - 1)
        train, val = (members, members[:0])
        if n_val > 0:
            train, val = train_test_split(members, test_size=n_val, random_state=seed)
        rows.append(train if split == "train" else val)
    chosen = np.sort(np.concatenate(rows))
    if not len(chosen):
        raise ValueError(
            f"'{name}' leaves no images for the {split} split with val_fraction {val_fraction}: "
            "expected more images per class, or a val/ folder beside train/"
        )
    return chosen


def _find_parts(source: str | Path, data_root: Path | None) -> Parts:
    from moveimg.data import archives, datasets, folders

    if source == "digits":
        return {"train": partial(_open_digits, "train"), "val": partial(_open_digits, "val")}
    if datasets.is_named(source):
        return datasets.find_parts(str(source), data_root)
    root = Path(source)
    if not root.exists():
        raise FileNotFoundError(
            f"no image folder at '{source}': expected a folder with one subfolder per class, or a "
            f"data set{datasets.suggest_names(str(source))}"
        )
    if not root.is_dir():
        raise ValueError(f"'{source}' is not a folder: expected one with one subfolder per class")
    if archives.has_archives(root) and not folders.find_splits(root):
        return archives.find_imagenet(root)
    if archives.has_parquet(root):
        return archives.find_tables(root)
    return folders.find_parts(root)


# --- images in memory ----------------------------------------------------------------------


def array_source(
    class_names: Sequence[str], identifiers: Sequence[str], images: np.ndarray, labels: np.ndarray
) -> ImageSource:
    """A source of images held in memory: uint8 [N, H, W] or [N, H, W, 3]."""
    load, content = partial(_array_row, images), partial(_row_hex, images)
    return ImageSource("", list(class_names), identifiers, labels.astype(np.int32), load, content)


def digits_arrays(split: Split) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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


def _open_digits(split: Split) -> ImageSource:
    images, labels, rows = digits_arrays(split)
    return array_source(DIGITS, [f"digits/{row:04d}" for row in rows], images, labels)


def _array_row(images: np.ndarray, row: int) -> Image.Image:
    return grey_to_rgb(images[row])


def _row_hex(images: np.ndarray, row: int) -> str:
    return images[row].tobytes().hex()


def _call_at(function: Callable[[int], Any], rows: np.ndarray, index: int) -> Any:
    return function(int(rows[index]))
