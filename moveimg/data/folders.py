"""The one walker of image folders, and folders with one subfolder of images per class."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from unicodedata import normalize

import numpy as np
from PIL import Image

from moveimg.data.images import ImageSource, Parts
from moveimg.dist import print_rank0
from moveimg.errors import list_names
from moveimg.images import image_suffixes, read_image

SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "eval"),
    "test": ("test", "testing"),
}
SPLIT_OF = {name: split for split, names in SPLITS.items() for name in names}
SPLIT_ENDING = re.compile(r"[ _-]*(set|split|data|images)?[ _-]*\d*$")  # train_set, val2017
TOOL_ENTRIES = {"@eadir", "__macosx", "thumbs.db", "desktop.ini", "lost+found", "$recycle.bin",
                "#recycle", "system volume information", "__pycache__"}  # fmt: skip
print_once = cache(print_rank0)  # a folder is opened once per split


@dataclass(frozen=True)
class FolderWalk:
    """The files below a folder: image paths in a fixed order, and how many others by suffix."""

    images: list[Path]
    others: Counter[str]


def walk_images(root: Path) -> FolderWalk:
    """Every image file below `root`, each real file once, sorted by path; see list_images."""
    names, others = list_images(root)
    return FolderWalk([root / name for name in names], others)


def list_images(root: Path) -> tuple[list[str], Counter[str]]:
    """Paths of image files below `root`, relative to it and sorted, and how many other files.

    Hidden entries and those of tools (`@eaDir`, `__MACOSX`, `._*`) are skipped at every depth, and
    so is what is no regular file. Links are followed last, unless they lead to a file or folder
    that the walk has already entered or to one of its parents.
    """
    images: list[str] = []
    others: Counter[str] = Counter()
    entered = _enter(root)
    folders: list[str] = [str(root)]
    links: list[os.DirEntry[str]] = []
    while folders or links:
        if folders:
            entries = _visible_entries(folders.pop())
            links += [entry for entry in entries if entry.is_symlink()]
            entries = [entry for entry in entries if not entry.is_symlink()]
        else:
            entries = [links.pop(0)]
        for entry in entries:
            try:
                status = os.stat(entry.path)
            except OSError:
                others["broken link"] += 1
                continue
            key, is_folder = (status.st_dev, status.st_ino), stat.S_ISDIR(status.st_mode)
            suffix = Path(entry.name).suffix.lower()
            if key in entered and (is_folder or entry.is_symlink()):
                continue
            entered.add(key)
            if is_folder:
                folders.append(entry.path)
            elif stat.S_ISREG(status.st_mode) and suffix in image_suffixes():
                images.append(entry.path.removeprefix(os.path.join(root, "")))
            else:
                others[suffix or "without a suffix"] += 1
    images.sort(key=lambda path: path.replace("/", "\0"))  # folder by folder, on any file system
    return images, others


def list_subfolders(folder: Path) -> list[str]:
    """Names of the subfolders, sorted; without those of tools and links to other listed ones."""
    entered, names = _enter(folder), []
    for entry in sorted(_visible_entries(folder), key=os.DirEntry.is_symlink):
        if entry.is_dir():
            status = os.stat(entry.path)
            if (status.st_dev, status.st_ino) not in entered:
                entered.add((status.st_dev, status.st_ino))
                names.append(entry.name)
    return sorted(names)


def find_splits(root: Path) -> dict[str, Path]:
    """The folders of `root` that are splits, by split; empty where `root` has none.

    Raises ValueError where folders are named like splits and cannot be used as such: a model must
    not be trained on the classes `train` and `test`.
    """
    names = list_subfolders(root)
    kinds = {name: SPLIT_OF.get(SPLIT_ENDING.sub("", name.lower())) for name in names}
    if not any(kinds.values()):
        return {}
    if "train" in kinds.values():  # a flat folder of unlabelled test images is left out
        kinds = {
            n: kind for n, kind in kinds.items() if kind != "test" or list_subfolders(root / n)
        }
    splits = {kind: root / name for name, kind in kinds.items() if kind}
    usable = "train" in splits and 2 <= len(splits) == len(kinds)
    if not usable or not all(list_subfolders(folder) for folder in splits.values()):
        raise ValueError(
            f"'{root}' has the subfolders {list_names(names)}: expected class folders alone, or "
            "a folder `train` and one of `val` and `test`, or both, each with class subfolders"
        )
    return splits


def find_parts(root: Path) -> Parts:
    """The splits of a folder of class subfolders; see `moveimg.data.images.open_images`."""
    splits = find_splits(root) or {"train": root}
    classes = {part: _list_classes(folder) for part, folder in splits.items()}
    train = classes["train"]
    for part, names in classes.items():
        if names != train:
            only_train, only_other = (
                sorted(set(train) - set(names)),
                sorted(set(names) - set(train)),
            )
            raise ValueError(
                f"'{root}' has different classes in {splits['train'].name}/ and "
                f"{splits[part].name}/: expected the same, but only in the first: "
                f"{list_names(only_train)}; only in the second: {list_names(only_other)}"
            )
    if not train:
        raise ValueError(f"'{root}' has no subfolders: expected one subfolder per class")
    if len(train) == 1:
        inner = next(
            path for path in splits["train"].iterdir() if normalize("NFC", path.name) == train[0]
        )
        if len(list_subfolders(inner)) > 1:
            print_once(f"warning: '{root}' is one class, {train[0]!r}; did you mean '{inner}'?")
    return {part: partial(_open_part, root, folder, train) for part, folder in splits.items()}


def open_flat_folder(root: Path) -> ImageSource:
    """All images below a folder, without classes: every label is 0, of the class ''.

    Raises ValueError where there are none.
    """
    names = list_images(root)[0]
    if not names:
        raise ValueError(f"'{root}' holds no images: expected .png, .jpeg, .webp and the like")
    return ImageSource(
        name=str(root),
        class_names=[""],
        identifiers=names,
        labels=np.zeros(len(names), np.int32),
        load=partial(_read_file, root, names, False),
        content=partial(_file_status, root, names),
    )


def report_classes(source: ImageSource) -> None:
    """Print the number and the names of the classes on stderr."""
    names = source.class_names
    print_rank0(f"{source.name}: {len(names)} class{'es' * (len(names) > 1)}: {list_names(names)}")


def _open_part(root: Path, base: Path, classes: list[str]) -> ImageSource:
    from moveimg.data.archives import imagenet_names

    paths, others = list_images(base)
    by_class: dict[str, list[str]] = {name: [] for name in classes}
    prefix = base.relative_to(root).as_posix() + "/" if base != root else ""
    for path in paths:
        folder, slash, _ = path.partition("/")
        if slash:
            by_class[normalize("NFC", folder)].append(prefix + path)
        else:
            others["image outside the class folders"] += 1
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(8))
        print_once(f"not read in '{base}': {kinds}")
    if not any(by_class.values()):
        raise ValueError(f"'{base}' holds no images: expected .png, .jpeg, .webp and the like")
    if empty := [name for name in classes if not by_class[name]]:
        raise ValueError(f"'{base}' has class folders without images: {list_names(empty)}")
    names = [name for paths in by_class.values() for name in paths]
    imagenet = imagenet_names(classes)
    return ImageSource(
        name=str(root),
        class_names=imagenet or classes,
        identifiers=names,
        labels=np.arange(len(classes), dtype=np.int32).repeat([len(p) for p in by_class.values()]),
        load=partial(_read_file, root, names, imagenet is not None),
        content=partial(_file_status, root, names),
    )


def _read_file(root: Path, names: list[str], as_published: bool, row: int) -> Image.Image:
    return read_image(root / names[row], names[row], as_published)


def _file_status(root: Path, names: list[str], row: int) -> tuple[int, int]:
    try:
        status = (root / names[row]).stat()
    except FileNotFoundError:  # removed since: left out when it is to be read
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _list_classes(folder: Path) -> list[str]:
    """Names of the class folders in NFC: macOS writes `é` as two characters."""
    return sorted({normalize("NFC", name) for name in list_subfolders(folder)})


def _enter(folder: Path) -> set[tuple[int, int]]:
    """The identities of a folder and its parents, which a link must not lead back to."""
    folder = folder.resolve()
    return {(status.st_dev, status.st_ino) for status in map(os.stat, (folder, *folder.parents))}


def _visible_entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """The entries of a folder by name, without hidden ones and those of tools."""
    with os.scandir(folder) as entries:
        kept = [entry for entry in entries if entry.name[0] != "."]
    return sorted((e for e in kept if e.name.lower() not in TOOL_ENTRIES), key=lambda e: e.name)
