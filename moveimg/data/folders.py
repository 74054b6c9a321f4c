"""The one walker of image folders, and a folder with one subfolder of images per class."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from moveimg.data.images import ImageSource, Split, choose_split
from moveimg.dist import print_rank0
from moveimg.errors import list_names
from moveimg.images import read_image

SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
          "dev": "val", "eval": "val", "test": "test", "testing": "test"}  # fmt: skip
TOOL_ENTRIES = {"@eadir", "__macosx", "thumbs.db", "desktop.ini", "lost+found", "$recycle.bin"}


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes, lower case with a dot, of every image format that Pillow reads."""
    known = Image.registered_extensions()
    return frozenset(suffix for suffix, kind in known.items() if kind in Image.OPEN) - {".pdf"}


@dataclass
class FolderWalk:
    """The files below a folder: image paths in a fixed order, and how many others by suffix."""

    images: list[Path] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)


def walk_images(root: Path) -> FolderWalk:
    """Every image file below `root`, each real file once, sorted by path.

    Hidden entries and those of tools (`@eaDir`, `__MACOSX`, `._*`) are skipped at every depth, and
    so is what is no regular file. Links are followed unless they lead to a folder or file that the
    walk has already entered, or to one of its parents.
    """
    walk, seen = FolderWalk(), {(root.stat().st_dev, root.stat().st_ino)}
    seen |= {(parent.stat().st_dev, parent.stat().st_ino) for parent in root.resolve().parents}
    folders = [root]
    while folders:
        entries = sorted(os.scandir(folders.pop()), key=lambda entry: entry.name)
        # Real entries first, so that a link never takes the place of what it leads to.
        for entry in sorted(entries, key=lambda entry: entry.is_symlink()):
            if _is_tool_entry(entry.name):
                continue
            try:
                status = entry.stat()
                key = (status.st_dev, status.st_ino)
            except OSError:
                walk.others["broken link"] += 1
                continue
            if key in seen and (entry.is_symlink() or entry.is_dir()):
                continue
            if entry.is_dir():
                seen.add(key)
                folders.append(Path(entry.path))
            elif entry.is_file() and Path(entry.name).suffix.lower() in image_suffixes():
                seen.add(key)
                walk.images.append(Path(entry.path))
            else:
                walk.others[Path(entry.name).suffix.lower() or "no suffix"] += 1
    walk.images.sort(key=lambda path: path.relative_to(root).parts)
    return walk


def list_subfolders(folder: Path) -> list[str]:
    """Names of the subfolders without hidden ones and those of tools, sorted."""
    names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    return sorted(name for name in names if not _is_tool_entry(name))


def find_splits(root: Path) -> dict[str, Path]:
    """The folders of `root` that are splits, by split; empty where `root` has none.

    Raises ValueError where folders are named like splits and cannot be used as such: a model must
    not be trained on the classes `train` and `test`.
    """
    names = list_subfolders(root)
    kinds = {name: SPLITS.get(name.lower()) for name in names}
    if not any(kinds.values()):
        return {}
    splits = {kind: root / name for name, kind in kinds.items() if kind}
    usable = "train" in splits and len(splits) >= 2 and len(splits) == len(names)
    if not usable or not all(list_subfolders(folder) for folder in splits.values()):
        raise ValueError(
            f"'{root}' has the subfolders {list_names(names)}: expected class folders alone, or "
            "one folder of training and one of validation or test images, with class subfolders"
        )
    return splits


@dataclass(frozen=True)
class _Files:
    """Files under `root`, by row number."""

    root: Path
    names: list[str]
    as_published: bool

    def load(self, row: int) -> Image.Image:
        return read_image(self.root / self.names[row], self.names[row], self.as_published)

    def content(self, row: int) -> tuple[int, int]:
        try:
            status = (self.root / self.names[row]).stat()
        except FileNotFoundError:  # removed since: left out when it is to be read
            return -1, -1
        return status.st_size, status.st_mtime_ns


def open_folder(root: Path, split: Split, val_fraction: float | None, seed: int) -> ImageSource:
    """One split of a folder; see `moveimg.data.images.open_images`."""
    from moveimg.data.archives import imagenet_names

    splits = find_splits(root) or {"train": root}
    classes = _shared_classes(root, splits)
    listed = {part: _list_images(root, folder, classes) for part, folder in splits.items()}
    labels = {part: found[1] for part, found in listed.items()}
    part, rows = choose_split(labels, split, val_fraction, seed, str(root))
    names = [listed[part][0][row] for row in rows]
    readable = imagenet_names(classes)
    files = _Files(root, names, as_published=readable is not None)
    return ImageSource(
        name=f"{root} ({split})",
        class_names=readable or [unicodedata.normalize("NFC", name) for name in classes],
        identifiers=names,
        labels=labels[part][rows],
        load=files.load,
        content=files.content,
    )


def report_classes(source: ImageSource) -> None:
    """Print the number and the names of the classes on stderr."""
    names = source.class_names
    print_rank0(f"{source.name}: {len(names)} class{'es' * (len(names) > 1)}: {list_names(names)}")


def _shared_classes(root: Path, splits: dict[str, Path]) -> list[str]:
    of_split = {part: list_subfolders(folder) for part, folder in splits.items()}
    train = of_split["train"]
    for part, names in of_split.items():
        if names != train:
            only_train, only_other = set(train) - set(names), set(names) - set(train)
            raise ValueError(
                f"'{root}' has different classes in train/ and {splits[part].name}/: expected the "
                f"same, but only in train: {list_names(sorted(only_train))}; only in {part}: "
                f"{list_names(sorted(only_other))}"
            )
    if len(train) == 1 and len(list_subfolders(splits["train"] / train[0])) > 1:
        inner = splits["train"] / train[0]
        print_rank0(f"warning: '{root}' is one class, {train[0]!r}; did you mean '{inner}'?")
    return train


def _list_images(root: Path, base: Path, classes: list[str]) -> tuple[list[str], np.ndarray]:
    """Paths relative to `root`, class after class, and labels int32 [N]."""
    if not classes:
        raise ValueError(f"'{base}' has no subfolders: expected one subfolder per class")
    walk = walk_images(base)
    by_class: dict[str, list[str]] = {name: [] for name in classes}
    for path in walk.images:
        name = path.relative_to(base).parts[0]
        if name in by_class:
            by_class[name].append(path.relative_to(root).as_posix())
    if walk.others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in walk.others.most_common(8))
        print_rank0(f"'{base}': {walk.others.total()} files are no images: {kinds}")
    empty = [name for name in classes if not by_class[name]]
    if len(empty) == len(classes):
        raise ValueError(f"'{base}' holds no images: expected .png, .jpeg, .webp and the like")
    if empty:
        raise ValueError(f"'{base}' has class folders without images: {list_names(empty)}")
    counts = [len(by_class[name]) for name in classes]
    names = [sys.intern(name) for label in classes for name in by_class[label]]
    return names, np.arange(len(classes), dtype=np.int32).repeat(counts)


def _is_tool_entry(name: str) -> bool:
    return name.startswith(".") or name.lower() in TOOL_ENTRIES
