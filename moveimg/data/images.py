"""Image sources: the bundled digits, or a folder with one subfolder per class."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

Split = Literal["train", "val"]


class UnreadableImageError(ValueError):
    """An image file that cannot be decoded; the message is the reason."""


@dataclass(frozen=True, eq=False)
class ImageSource(Dataset):
    """Labelled images: `source[i]` is (PIL.Image in RGB, label).

    name: what it is, for manifests and messages
    class_names: one per label, in label order
    identifiers: one per image; paths relative to the folder, in posix form
    labels: one per image, in 0..len(class_names)-1
    load: item -> RGB image; raises UnreadableImageError
    """

    name: str
    class_names: list[str]
    identifiers: list[str]
    labels: list[int]
    items: Sequence[Any]
    load: Callable[[Any], Image.Image]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.load(self.items[index]), self.labels[index]

    def digest(self) -> str:
        """sha256 over identifiers, labels and sizes in bytes (digits: pixels).

        It notices images added, removed, renamed, relabelled or replaced by others of another
        size, without reading a whole dataset.
        """
        digest = hashlib.sha256(repr(self.class_names).encode())
        for identifier, label, item in zip(self.identifiers, self.labels, self.items, strict=True):
            content = item.stat().st_size if isinstance(item, Path) else item.tobytes().hex()
            digest.update(repr((identifier, label, content)).encode())
        return digest.hexdigest()


def open_images(
    source: str | Path, split: Split, val_fraction: float = 0.2, seed: int = 0
) -> ImageSource:
    """Open one split of `digits` or of an image folder.

    A folder holds one subfolder per class (searched recursively for images), or `train/` and
    `val/` with the same class subfolders in each. Without the two, `val_fraction` of each
    class, drawn with `seed`, is the val split: at least one image of a class stays in train.
    `val_fraction=0` makes everything train. The digits' split is fixed: it ignores both.
    Class names are the subfolders' names, sorted; hidden subfolders are left out.

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

    class_names = _subfolders(root)
    name = f"{source} ({split})"
    if _has_splits(root):
        class_names = _agreeing_classes(root)
        return _folder_source(name, root, *_list_images(root / split, class_names), class_names)
    paths, labels = _list_images(root, class_names)
    rows = _split_rows(labels, split, val_fraction, seed)
    if not len(rows):
        raise ValueError(
            f"'{source}' leaves no images for the {split} split with val_fraction "
            f"{val_fraction}: expected more images per class, or train/ and val/ subfolders"
        )
    return _folder_source(
        name, root, [paths[i] for i in rows], [labels[i] for i in rows], class_names
    )


def _open_digits(split: Split) -> ImageSource:
    from moveimg.data import digits

    images, labels = digits.digits_arrays(split)
    return ImageSource(
        name=f"digits ({split})",
        class_names=list(digits.CLASS_NAMES),
        identifiers=[f"digits/{row:04d}" for row in digits.split_rows(split)],
        labels=labels.tolist(),
        items=list(images),
        load=_grey_to_rgb,
    )


def _folder_source(
    name: str, root: Path, paths: list[Path], labels: list[int], class_names: list[str]
) -> ImageSource:
    return ImageSource(
        name=name,
        class_names=class_names,
        identifiers=[path.relative_to(root).as_posix() for path in paths],
        labels=labels,
        items=paths,
        load=partial(_read_rgb, root),
    )


def _subfolders(folder: Path) -> list[str]:
    """Names of the visible subfolders, sorted: tools leave hidden ones in image folders."""
    return sorted(
        entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."
    )


def _has_splits(root: Path) -> bool:
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


def _agreeing_classes(root: Path) -> list[str]:
    train, val = _subfolders(root / "train"), _subfolders(root / "val")
    if train != val:
        only_train, only_val = sorted(set(train) - set(val)), sorted(set(val) - set(train))
        raise ValueError(
            f"'{root}' has different classes in train/ and val/: expected the same, but only in "
            f"train: {_shorten(only_train)}; only in val: {_shorten(only_val)}"
        )
    return train


def _list_images(folder: Path, class_names: list[str]) -> tuple[list[Path], list[int]]:
    """Sorted image paths and their labels, by torchvision's rules for an ImageFolder."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    if not class_names:
        raise ValueError(f"'{folder}' has no subfolders: expected one subfolder per class")
    samples = make_dataset(
        str(folder),
        {name: label for label, name in enumerate(class_names)},
        extensions=IMG_EXTENSIONS,
        allow_empty=True,
    )
    if not samples:
        raise ValueError(f"'{folder}' holds no images: expected {', '.join(IMG_EXTENSIONS)} files")
    present = {label for _, label in samples}
    empty = [name for label, name in enumerate(class_names) if label not in present]
    if empty:
        raise ValueError(
            f"'{folder}' has class folders without images: {_shorten(empty)}; expected "
            f"{', '.join(IMG_EXTENSIONS)} files in each"
        )
    # As path parts, not strings: a fixed order on every file system and platform.
    samples.sort(key=lambda sample: (sample[1], Path(sample[0]).parts))
    return [Path(path) for path, _ in samples], [label for _, label in samples]


def _split_rows(labels: list[int], split: Split, val_fraction: float, seed: int) -> np.ndarray:
    """Row numbers of a stratified split, sorted, int64 [N].

    Each class is split alone: a joint stratified split refuses classes of one image, and lets
    a class that gains an image reshuffle the others.
    """
    from sklearn.model_selection import train_test_split

    members_of = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1])
    rows: list[np.ndarray] = []
    for members in members_of:
        n_val = min(round(len(members) * val_fraction), len(members) - 1)
        train, val = (members, members[:0])
        if n_val:
            train, val = train_test_split(members, test_size=n_val, random_state=seed)
        rows.append(train if split == "train" else val)
    return np.sort(np.concatenate(rows))


def _read_rgb(root: Path, path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16"):
                # Pillow clips 16-bit grey to 255, which turns most of it white.
                return _grey_to_rgb((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds for broken files
        reason = str(error).replace(str(path), path.relative_to(root).as_posix())
        raise UnreadableImageError(f"{type(error).__name__}: {reason}") from error


def _grey_to_rgb(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels).convert("RGB")


def _shorten(names: list[str], most: int = 5) -> str:
    if not names:
        return "none"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
