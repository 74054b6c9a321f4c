"""A folder with one subfolder of images per class."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from moveimg.data.imagenet import readable_names
from moveimg.data.images import ImageSource, Names, Split, draw_split
from moveimg.images import read_image


@dataclass(frozen=True)
class _Files:
    """Files under `root`, by row number."""

    root: Path
    names: Names
    as_published: bool

    def load(self, row: int) -> Image.Image:
        name = self.names[row]
        return read_image(self.root / name, name, self.as_published)

    def size(self, row: int) -> int:
        try:
            return (self.root / self.names[row]).stat().st_size
        except FileNotFoundError:  # a link to nothing: left out when it is to be read
            return -1


def open_folder(root: Path, split: Split, val_fraction: float, seed: int) -> ImageSource:
    """One split of a folder; see `moveimg.data.images.open_images`."""
    whole = has_splits(root)
    folders = _agreeing_classes(root) if whole else _subfolders(root)
    base = root / split if whole else root
    names, labels = _list_images(root, base, folders)
    if not whole:
        rows = draw_split(labels, split, val_fraction, seed, str(root))
        names, labels = Names(names[row] for row in rows), labels[rows]
    readable = readable_names(folders)
    files = _Files(root, names, as_published=readable is not None)
    return ImageSource(
        name=f"{root} ({split})",
        class_names=readable or folders,
        identifiers=names,
        labels=labels,
        load=files.load,
        content=files.size,
    )


def has_splits(root: Path) -> bool:
    """Whether `root` is laid out as train/ and val/ with classes in each.

    Raises ValueError where split names stand in the place of class names, which would train a
    model on the classes 'train' and 'val'.
    """
    names = set(_subfolders(root))
    if {"train", "val"} <= names and _subfolders(root / "train") and _subfolders(root / "val"):
        return True
    if names and names <= {"train", "val", "test"}:
        raise ValueError(
            f"'{root}' has the subfolders {sorted(names)}: expected both train/ and val/ with "
            "class subfolders in each, or class subfolders directly"
        )
    return False


def _subfolders(folder: Path) -> list[str]:
    """Names of the visible subfolders, sorted: tools leave hidden ones in image folders."""
    return sorted(
        entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."
    )


def _agreeing_classes(root: Path) -> list[str]:
    train, val = _subfolders(root / "train"), _subfolders(root / "val")
    if train != val:
        only_train, only_val = sorted(set(train) - set(val)), sorted(set(val) - set(train))
        raise ValueError(
            f"'{root}' has different classes in train/ and val/: expected the same, but only in "
            f"train: {_shorten(only_train)}; only in val: {_shorten(only_val)}"
        )
    return train


def _list_images(root: Path, base: Path, folders: list[str]) -> tuple[Names, np.ndarray]:
    """Paths relative to `root`, class after class, and labels int32 [N].

    Files that torchvision's ImageFolder would take. Class after class, so that no list of all
    the paths is ever held.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if not folders:
        raise ValueError(f"'{base}' has no subfolders: expected one subfolder per class")
    counts = np.zeros(len(folders), np.int64)

    def listed() -> Iterator[str]:
        for label, folder in enumerate(folders):
            found = [
                Path(where, name).relative_to(root)
                for where, _, files in os.walk(base / folder, followlinks=True)
                for name in files
                if name.lower().endswith(IMG_EXTENSIONS)
            ]
            counts[label] = len(found)
            # As path parts, not strings: a fixed order on every file system and platform.
            yield from (path.as_posix() for path in sorted(found, key=lambda path: path.parts))

    names = Names(listed())
    expected = f"expected {', '.join(IMG_EXTENSIONS)} files"
    if not len(names):
        raise ValueError(f"'{base}' holds no images: {expected}")
    if not counts.all():
        empty = [folders[label] for label in np.flatnonzero(counts == 0)]
        raise ValueError(
            f"'{base}' has class folders without images: {_shorten(empty)}; {expected} in each"
        )
    return names, np.arange(len(folders), dtype=np.int32).repeat(counts)


def _shorten(names: list[str], most: int = 5) -> str:
    if not names:
        return "none"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
