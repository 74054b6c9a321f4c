"""Folders with one subfolder of images per class."""

from __future__ import annotations

import os
import re
from collections import Counter
from functools import cache, partial
from pathlib import Path
from unicodedata import normalize

import numpy as np
from PIL import Image

from moveimg.data.images import ImageSource, Splits
from moveimg.dist import print_rank0
from moveimg.errors import list_names
from moveimg.files import atomic_directory
from moveimg.images import SUFFIXES, read_image

SPLIT_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
SPLIT_ENDING = re.compile(r"[ _-]*(set|split|data|images)?[ _-]*\d*$")  # train_set, val2017
TOOL_FOLDERS = {"@eadir", "__macosx", "lost+found", "$recycle.bin", "#recycle", "__pycache__"}
print_once = cache(print_rank0)  # a folder is opened once per split


def walk_images(root: Path) -> tuple[list[str], Counter[str]]:
    """Sorted paths of image files below `root`, relative to it; other files counted by suffix.

    Hidden entries and folders of tools (`@eaDir`, `__MACOSX`) are skipped at every depth. Linked
    folders are followed last, except those already entered and the parents of `root`.
    """
    images: list[str] = []
    others: Counter[str] = Counter()
    entered, waiting = {str(parent) for parent in root.resolve().parents}, [str(root)]
    for top in waiting:  # grows in the loop
        for folder, subfolders, files in os.walk(top):
            if (real := os.path.realpath(folder)) in entered:
                subfolders.clear()
                continue
            entered.add(real)
            subfolders[:] = filter(_is_visible, subfolders)
            waiting += sorted(path for n in subfolders if os.path.islink(path := f"{folder}/{n}"))
            for name in filter(_is_visible, files):
                suffix = os.path.splitext(name)[1].lower()
                if suffix in SUFFIXES:
                    images.append(f"{folder}/{name}".removeprefix(f"{root}/"))
                else:
                    others[suffix or "without a suffix"] += 1
    images.sort(key=lambda path: path.replace("/", "\0"))  # folder by folder, on any file system
    return images, others


def _is_visible(name: str) -> bool:
    return name[0] != "." and name.lower() not in TOOL_FOLDERS


def find_split_folders(root: Path) -> dict[str, str]:
    """The split (train, val, test) of each subfolder; empty if no name is that of a split.

    Raises ValueError for split folders beside others or without `train`: a model must not be
    trained on the classes `train` and `test`.
    """
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and _is_visible(path.name))
    splits = [SPLIT_OF.get(SPLIT_ENDING.sub("", name.lower()), "") for name in names]
    if any(splits) and ("train" not in splits or "" in splits or len(set(splits)) < len(splits)):
        raise ValueError(
            f"'{root}' has the subfolders {list_names(names)}: expected class folders alone, or "
            "`train` and `val`, `test` or both, each with class subfolders"
        )
    return dict(zip(names, splits, strict=True)) if any(splits) else {}


def find_splits(root: Path) -> Splits:
    """The splits of a folder of class subfolders; see `moveimg.data.images.open_images`."""
    if (root / "ILSVRC2012_img_train.tar").is_file():
        _unpack_imagenet(root)
    splits, (paths, others) = find_split_folders(root), walk_images(root)
    by_class: dict[str, dict[str, list[str]]] = {}
    for path in paths:
        first, _, rest = path.partition("/")
        split, inner = (splits.get(first, ""), rest) if splits else ("train", path)
        folder, slash, _ = inner.partition("/")
        if split and slash:
            group = by_class.setdefault(split, {})
            group.setdefault(normalize("NFC", folder), []).append(path)  # macOS splits `é` in two
        else:
            others["image outside the class folders"] += 1
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(8))
        print_once(f"not read in '{root}': {kinds}")
    if "train" not in by_class:
        raise ValueError(f"'{root}' holds no images by class: expected one subfolder per class")
    for split, group in by_class.items():
        if differing := sorted(set(by_class["train"]) ^ set(group)):
            names = list_names(differing)
            raise ValueError(
                f"'{root}' has other classes of images in train than in {split}: {names}"
            )
    return {split: partial(_open_folder, root, group) for split, group in by_class.items()}


def _unpack_imagenet(root: Path) -> None:
    """Unpack ImageNet's archives of 2012 into train/ and val/ beside them, if missing."""
    from torchvision.datasets import imagenet

    try:
        for split in ("train", "val"):
            if not (root / split).exists():
                print_rank0(f"unpacking ImageNet into '{root / split}'")
                with atomic_directory(root / split) as folder:
                    if split == "train":
                        imagenet.parse_train_archive(root, folder=folder.name)
                    else:
                        imagenet.parse_devkit_archive(root)
                        imagenet.parse_val_archive(root, folder=folder.name)
    except RuntimeError as error:  # an archive that is missing or damaged
        raise ValueError(f"'{root}': {error}") from None


def _open_folder(root: Path, by_class: dict[str, list[str]]) -> ImageSource:
    classes = sorted(by_class)
    names = [path for name in classes for path in by_class[name]]
    labels = np.repeat(np.arange(len(classes)), [len(by_class[name]) for name in classes])
    known = imagenet_names(classes)
    load = partial(_read_file, root, names, known is not None)
    content = partial(_file_status, root, names)
    return ImageSource(str(root), known or classes, names, labels.astype(np.int32), load, content)


def open_flat_folder(root: Path) -> ImageSource:
    """All images below a folder, without classes: every label is 0, of the class ''."""
    return _open_folder(root, {"": walk_images(root)[0]})


def _read_file(root: Path, names: list[str], as_published: bool, row: int) -> Image.Image:
    return read_image(root / names[row], names[row], as_published)


def _file_status(root: Path, names: list[str], row: int) -> tuple[int, int]:
    try:
        status = (root / names[row]).stat()
    except FileNotFoundError:  # removed since: reading it will fail
        return -1, -1
    return status.st_size, status.st_mtime_ns


def imagenet_names(folders: list[str]) -> list[str] | None:
    """Names of the classes if all `folders` are WordNet ids of ImageNet-1k, else None."""
    if not all(re.fullmatch(r"n\d{8}", name) for name in folders):
        return None
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    names = dict(zip(info.label_names(), info.label_descriptions(), strict=True))
    return [names[wnid] for wnid in folders] if names.keys() >= set(folders) else None
