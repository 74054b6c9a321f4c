"""Labelled images, folders of them with a subfolder per class, and crops."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import functional

from moveimg.config import Size, as_pair
from moveimg.config.run import Crops
from moveimg.dist import print_rank0
from moveimg.errors import list_names
from moveimg.files import atomic_directory
from moveimg.images import SUFFIXES, UnreadableImageError, center_crop, read_image

VIEWS_PER_RANGE: dict[Crops, int] = {"center": 1, "flip": 2, "five": 5, "ten": 10}
SPLIT_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
SPLIT_ENDING = re.compile(r"[ _-]*(set|split|data|images)?[ _-]*\d*$")  # train_set, val2017
TOOL_FOLDERS = {"@eadir", "__macosx", "lost+found", "$recycle.bin", "#recycle", "__pycache__"}
print_once = cache(print_rank0)  # a folder is opened once per split


@dataclass(frozen=True, eq=False)
class ImageSource(Dataset):
    """N labelled images: `source[i]` is (PIL.Image in RGB, label)."""

    name: str
    class_names: list[str]
    identifiers: Sequence[str]  # of a file: its POSIX path relative to the source
    labels: np.ndarray  # int32 [N], in 0..len(class_names)-1
    load: Callable[[int], Image.Image]  # row -> RGB image; raises UnreadableImageError
    content: Callable[[int], Any]  # row -> a value that changes with the image, as a file's mtime

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.load(index), int(self.labels[index])

    def select(self, rows: np.ndarray) -> ImageSource:
        """Return a source of the images `rows` alone."""
        names, labels = [self.identifiers[row] for row in rows], self.labels[rows]
        load, content = (partial(_call_at, f, rows) for f in (self.load, self.content))
        return ImageSource(self.name, self.class_names, names, labels, load, content)

    def digest(self) -> str:
        """Return the sha256 of class names, identifiers, labels and `content`; reads no image."""
        digest = hashlib.sha256(repr(self.class_names).encode())
        for row, (identifier, label) in enumerate(zip(self.identifiers, self.labels, strict=True)):
            digest.update(repr((identifier, int(label), self.content(row))).encode())
        return digest.hexdigest()


def _call_at(function: Callable[[int], Any], rows: np.ndarray, index: int) -> Any:
    return function(int(rows[index]))


# name of a split (train, val, test) -> function that opens the split
Splits = dict[str, Callable[[], ImageSource]]


def walk_images(root: Path) -> tuple[list[str], Counter[str]]:
    """Return sorted paths, relative to `root`, of images below it; and counts of other suffixes.

    Hidden entries and folders of tools (`@eaDir`, `__MACOSX`) are skipped at every depth. Links to
    folders are followed last, but never into the same folder twice or into a parent of `root`.
    """
    images: list[str] = []
    others: Counter[str] = Counter()
    entered, waiting = {str(parent) for parent in root.resolve().parents}, [str(root)]
    for top in waiting:  # the loop appends to it
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
    """Map subfolder names to splits (train, val, test); empty if no subfolder names a split.

    Raises ValueError for split folders among other folders or without `train`, so that a model is
    never trained on classes named `train` and `test`.
    """
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and _is_visible(path.name))
    splits = [SPLIT_OF.get(SPLIT_ENDING.sub("", name.lower()), "") for name in names]
    if not any(splits):
        return {}
    if "train" not in splits or "" in splits or len(set(splits)) < len(splits):
        raise ValueError(
            f"'{root}' has the subfolders {list_names(names)}: expected class folders alone, or "
            "`train` and `val`, `test` or both, each with class subfolders"
        )
    return dict(zip(names, splits, strict=True))


def find_folder_splits(root: Path) -> Splits:
    """Return the splits of a folder with a subfolder per class; see `open_images`."""
    if (root / "ILSVRC2012_img_train.tar").is_file():
        _unpack_imagenet(root)
    splits, (paths, others) = find_split_folders(root), walk_images(root)
    by_class: dict[str, dict[str, list[str]]] = {}
    for path in paths:
        first, _, rest = path.partition("/")
        split, inner = (splits.get(first, ""), rest) if splits else ("train", path)
        folder, slash, _ = inner.partition("/")
        if split and slash:
            name = normalize("NFC", folder)  # macOS writes `é` as two characters
            by_class.setdefault(split, {}).setdefault(name, []).append(path)
        else:
            others["image outside the class folders"] += 1
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(8))
        print_once(f"ignored in '{root}': {kinds}")
    if "train" not in by_class:
        raise ValueError(f"'{root}' holds no images by class: expected one subfolder per class")
    for split, group in by_class.items():
        if differing := by_class["train"].keys() ^ group.keys():
            names = list_names(sorted(differing))
            raise ValueError(
                f"'{root}': classes in train and {split} differ: {names}, expected equal ones"
            )
    return {split: partial(_open_folder, root, group) for split, group in by_class.items()}


def _unpack_imagenet(root: Path) -> None:
    """Unpack the archives of ImageNet 2012 into train/ and val/ next to them, if missing."""
    from torchvision.datasets import imagenet

    parsers = {"train": imagenet.parse_train_archive, "val": imagenet.parse_val_archive}
    try:
        for split, parse in parsers.items():
            if not (root / split).exists():
                print_rank0(f"unpacking ImageNet into '{root / split}'")
                imagenet.parse_devkit_archive(root)  # the classes of val
                with atomic_directory(root / split) as folder:
                    parse(root, folder=folder.name)
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
    """Open all images below a folder without classes: every label is 0, of the class ''."""
    return _open_folder(root, {"": walk_images(root)[0]})


def _read_file(root: Path, names: list[str], as_published: bool, row: int) -> Image.Image:
    return read_image(root / names[row], names[row], as_published)


def _file_status(root: Path, names: list[str], row: int) -> tuple[int, int]:
    try:
        status = (root / names[row]).stat()
    except FileNotFoundError:  # a broken link: reading it will fail
        return -1, -1
    return status.st_size, status.st_mtime_ns


def imagenet_names(folders: list[str]) -> list[str] | None:
    """Return the class names if all `folders` are WordNet ids of ImageNet-1k, else None."""
    if not all(re.fullmatch(r"n\d{8}", name) for name in folders):
        return None
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    names = dict(zip(info.label_names(), info.label_descriptions(), strict=True))
    return [names[wnid] for wnid in folders] if names.keys() >= set(folders) else None


def evenly_spaced(n: int, count: int) -> list[int]:
    """Return at most `count` evenly spaced indices in 0..n-1, of all classes in a sorted list."""
    return np.linspace(0, n - 1, min(n, count)).round().astype(int).tolist()


def drop_unreadable(source: ImageSource) -> ImageSource:
    """Return `source` without unreadable images, which are counted and named on stderr."""
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
        first = f"warning: {len(images)} of {total} images cannot be read and are left out:"
        print_rank0("\n  ".join([first, *images[:20]]))


def crop_views(
    image: Image.Image, size: Size, crops: Crops = "center", ranges: Sequence[float] = (1.0,)
) -> list[Image.Image]:
    """Cut `count_views(crops, ranges)` views of (height, width) `size` from `image`.

    For each range r the image is resized and centre-cropped to size * r pixels (rounded down, as in
    LlamaGen). Its views are the centre (center), also mirrored (flip), or the corners (top left,
    top right, bottom left, bottom right) and the centre (five), also mirrored (ten).
    """
    height, width = as_pair(size)
    views: list[Image.Image] = []
    for ratio in ranges:
        # 1e-9: keeps rounding errors from pushing a whole product below its integer
        larger = center_crop(image, (int(height * ratio + 1e-9), int(width * ratio + 1e-9)))
        if crops in ("five", "ten"):
            cut = functional.five_crop if crops == "five" else functional.ten_crop
            views += cut(larger, [height, width])
        else:
            centre = functional.center_crop(larger, [height, width])
            views += [centre] if crops == "center" else [centre, functional.hflip(centre)]
    return views


def count_views(crops: Crops, ranges: Sequence[float]) -> int:
    """Return the number of views that `crop_views` cuts."""
    return VIEWS_PER_RANGE.get(crops, 0) * len(ranges)
