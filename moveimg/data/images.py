"""Image sources: the bundled digits, a folder by class, ImageNet's archives, Parquet files."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from moveimg.images import UnreadableImageError as UnreadableImageError
from moveimg.images import grey_to_rgb

Split = Literal["train", "val"]


class Names(Sequence[str]):
    """Many short strings in one buffer.

    A list of ImageNet's 1.3 million names takes a tenth of a gigabyte, and as much again in every
    worker process that touches it (touching a Python object writes its reference count).
    """

    def __init__(self, names: Iterable[str]) -> None:
        text, ends = bytearray(), array("q", [0])
        for name in names:
            text += name.encode("utf-8", "surrogateescape")
            ends.append(len(text))
        self._text, self._ends = bytes(text), np.frombuffer(ends, np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        part = self._text[self._ends[index] : self._ends[index + 1]]
        return part.decode("utf-8", "surrogateescape")


@dataclass(frozen=True, eq=False)
class ImageSource(Dataset):
    """N labelled images: `source[i]` is (PIL.Image in RGB, label).

    name: what it is, for manifests and messages
    class_names: one per label, in label order
    identifiers: one per image; for files the path relative to the source, in posix form
    labels: int32 [N], in 0..len(class_names)-1
    load: row number -> RGB image; raises UnreadableImageError, which names the image
    content: row number -> what tells a replaced image from the old: its bytes' number
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

    def digest(self) -> str:
        """sha256 over identifiers, labels and sizes in bytes (digits: pixels).

        It notices images added, removed, renamed, relabelled or replaced by others of another
        size, without reading a whole dataset.
        """
        digest = hashlib.sha256(repr(self.class_names).encode())
        for row, (identifier, label) in enumerate(zip(self.identifiers, self.labels, strict=True)):
            digest.update(repr((identifier, int(label), self.content(row))).encode())
        return digest.hexdigest()


def open_images(
    source: str | Path, split: Split, val_fraction: float = 0.2, seed: int = 0
) -> ImageSource:
    """Open one split of `digits` or of what a folder holds.

    A folder holds one of
    - one subfolder per class (searched recursively for images), or `train/` and `val/` with the
      same class subfolders in each. Class names are the subfolders' names, sorted; hidden
      subfolders are left out; WordNet ids of ImageNet-1k get their names.
    - ImageNet's own archives, unpacked by nobody, under their published names (imagenet.py)
    - Parquet files of a Hugging Face dataset (parquet.py; needs the extra `datasets`)

    Where there is no val split, `val_fraction` of each class, drawn with `seed`, is one: at least
    one image of a class stays in train. `val_fraction=0` makes everything train. Sources with a
    split of their own, as the digits, ignore both.

    Raises FileNotFoundError for a folder that is missing, ValueError for one that holds no
    images by class or an unknown split.
    """
    if split not in ("train", "val"):
        raise ValueError(f"unknown split {split!r}: expected 'train' or 'val'")
    if source == "digits":
        return _open_digits(split)
    root = Path(source)
    if not root.exists():
        raise FileNotFoundError(
            f"no image folder at '{source}': expected 'digits' or a folder with one subfolder "
            "per class"
        )
    if not root.is_dir():
        raise ValueError(f"'{source}' is not a folder: expected one with one subfolder per class")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}: expected 0 <= val_fraction < 1")
    from moveimg.data import folders, imagenet, parquet

    if imagenet.has_archives(root) and not folders.has_splits(root):
        return imagenet.open_archives(root, split)
    if parquet.has_parquet(root):
        return parquet.open_parquet(root, split, val_fraction, seed)
    return folders.open_folder(root, split, val_fraction, seed)


def _open_digits(split: Split) -> ImageSource:
    from moveimg.data import digits

    images, labels = digits.digits_arrays(split)
    return ImageSource(
        name=f"digits ({split})",
        class_names=list(digits.CLASS_NAMES),
        identifiers=[f"digits/{row:04d}" for row in digits.split_rows(split)],
        labels=labels.astype(np.int32),
        load=partial(_grey_row, images),
        content=partial(_row_hex, images),
    )


def _grey_row(images: np.ndarray, row: int) -> Image.Image:
    return grey_to_rgb(images[row])


def _row_hex(images: np.ndarray, row: int) -> str:
    return images[row].tobytes().hex()


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
            f"'{name}' leaves no images for the {split} split with val_fraction "
            f"{val_fraction}: expected more images per class, or a val split of its own (train/ "
            "and val/ subfolders)"
        )
    return chosen
