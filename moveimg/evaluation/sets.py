"""Sets of images on disk, read in batches: ADM's .npz, or a folder of pictures.

N images   H height   W width, of all of them
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from moveimg.data import walk_images
from moveimg.dist import print_rank0
from moveimg.files import read_json
from moveimg.progress import progress_bar

LABELS_FILE = "labels.json"  # in a folder of images: one label per image, in file order
BATCH = 256


@dataclass(frozen=True)
class ImageSet:
    """Images of one size and their labels, read in batches.

    Attributes:
        name: its path, for messages.
        shape: (N, H, W).
        labels: int64 [N], or None where they are unknown.
        read: batch size -> iterator over uint8 [b, H, W, 3], in order.
        class_names: names of the labels, where they come from class folders.
    """

    name: str
    shape: tuple[int, int, int]
    labels: np.ndarray | None
    read: Callable[[int], Iterator[np.ndarray]]
    class_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        return self.shape[1:]


@dataclass(frozen=True)
class Content:
    """Facts about all pixels of a set.

    digest: sha256 over shape and pixels, in order.
    duplicates: images whose pixels are those of an earlier one.
    blank: images of a single colour (black ones among them).
    brightest: the largest pixel value.
    """

    digest: str
    duplicates: int
    blank: int
    brightest: int


def scan_image_set(images: ImageSet) -> Content:
    """Read a set once, without a network: its hash, duplicates, blank images and range."""
    digest = hashlib.sha256(repr(images.shape).encode())
    seen: set[bytes] = set()
    blank = brightest = 0
    with progress_bar(len(images), f"read {images.name}", "image") as bar:
        for batch in images.read(BATCH):
            batch = np.ascontiguousarray(batch)
            digest.update(batch)
            seen.update(hashlib.blake2b(image, digest_size=16).digest() for image in batch)
            flat = batch.reshape(len(batch), -1, 3)
            blank += int((flat == flat[:, :1]).all(axis=(1, 2)).sum())
            brightest = max(brightest, int(batch.max()))
            bar.update(len(batch))
    return Content(digest.hexdigest(), len(images) - len(seen), blank, brightest)


def array_set(name: str, images: np.ndarray, labels: Sequence[int] | None = None) -> ImageSet:
    """Images uint8 [N, H, W, 3] in memory as a set."""
    return ImageSet(
        name,
        _checked_shape(images.shape, images.dtype, name),
        None if labels is None else np.asarray(labels, np.int64),
        lambda size: (images[i : i + size] for i in range(0, len(images), size)),
    )


def open_set(path: str | Path) -> ImageSet:
    """A set of any program: an .npz with `arr_0` (and labels in `arr_1`), or a folder.

    A folder is searched for images recursively, sorted by path; labels come from its
    `labels.json`, or from class subfolders, whose names are kept.

    Raises FileNotFoundError, or ValueError where it is not RGB images of one size.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder of images")
    if path.suffix != ".npz":
        raise ValueError(f"{path}: expected an .npz (arr_0: images, arr_1: labels) or a folder")
    return _open_npz(path)


# --- .npz ----------------------------------------------------------------------------------


def npz_entries(path: Path) -> list[str]:
    """Names of the arrays in an .npz. ValueError where it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path}: not a readable .npz ({error})") from None


def npz_array(path: Path, entry: str) -> np.ndarray:
    """One small array of an .npz, checked by the archive's checksum."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[entry]
    except (zipfile.BadZipFile, ValueError, EOFError, KeyError) as error:
        raise ValueError(f"{path}: cannot read {entry} ({error})") from None


def _open_npz(path: Path) -> ImageSet:
    entries = npz_entries(path)
    if "arr_0" not in entries:
        raise ValueError(f"{path}: has no images (arr_0), only {', '.join(entries) or 'nothing'}")
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
        full, dtype = _npy_header(stream, path)
        shape = _checked_shape(full, dtype, str(path))
    labels = None
    if "arr_1" in entries:
        labels = npz_array(path, "arr_1").astype(np.int64).reshape(-1)
        if len(labels) != shape[0]:
            raise ValueError(f"{path}: {len(labels)} labels for {shape[0]} images: expected equal")
        if labels.min() < 0:
            raise ValueError(f"{path}: labels reach {labels.min()}: expected 0 or more")
    return ImageSet(str(path), shape, labels, lambda size: _read_npz(path, size))


def _read_npz(path: Path, size: int) -> Iterator[np.ndarray]:
    """Stream arr_0: np.load would hold all of it (9.8 GB for 50,000 images of 256 px)."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
            shape, _ = _npy_header(stream, path)
            one = int(np.prod(shape[1:]))
            for start in range(0, shape[0], size):
                count = min(size, shape[0] - start)
                raw = stream.read(count * one)
                if len(raw) != count * one:
                    raise ValueError(f"{path}: truncated after {start} of {shape[0]} images")
                yield np.frombuffer(raw, np.uint8).reshape(count, *shape[1:])
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path}: damaged images ({error})") from None


def _npy_header(stream: IO[bytes], path: Path) -> tuple[tuple[int, ...], np.dtype]:
    try:
        version = np.lib.format.read_magic(stream)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = read(stream)
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: arr_0 is no plain array ({error})") from None
    if fortran:
        raise ValueError(f"{path}: arr_0 is in Fortran order: expected C order")
    return shape, dtype


def _checked_shape(shape: Sequence[int], dtype: np.dtype, name: str) -> tuple[int, int, int]:
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise ValueError(
            f"wrong-mode: {name}: images are {dtype} {list(shape)}: expected uint8 [N, H, W, 3] "
            "in 0..255"
        )
    return shape[0], shape[1], shape[2]


# --- folders -------------------------------------------------------------------------------


def _open_folder(folder: Path) -> ImageSet:
    walk = walk_images(folder)
    paths = walk.images
    others = {kind: n for kind, n in walk.others.items() if kind != ".json"}
    if others:
        print_rank0(f"{folder}: {sum(others.values())} files are no images: {others}")
    if not paths:
        raise ValueError(f"{folder}: holds no images")
    with Image.open(paths[0]) as first:
        width, height = first.size
    labels, names = _folder_labels(folder, paths)

    def read(size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(paths), size):
            chunk = paths[start : start + size]
            yield np.stack([_read_sample(path, (width, height)) for path in chunk])

    return ImageSet(str(folder), (len(paths), height, width), labels, read, names)


def _read_sample(path: Path, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3]. Nothing is converted or resized: that would change the score."""
    try:
        with Image.open(path) as image:
            if image.mode != "RGB":
                raise ValueError(f"wrong-mode: {path} is {image.mode}: expected RGB")
            if image.size != size:
                found, wanted = ("x".join(map(str, s)) for s in (image.size, size))
                raise ValueError(f"wrong-size: {path} is {found}: expected {wanted} as the first")
            return np.asarray(image)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None


def _folder_labels(
    folder: Path, paths: list[Path]
) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Labels int64 [N] and, where they come from class folders, the names of those."""
    listed = folder / LABELS_FILE
    if listed.is_file():
        labels = read_json(listed)
        whole = isinstance(labels, list) and all(type(x) is int and x >= 0 for x in labels)
        if not whole or len(labels) != len(paths):
            raise ValueError(
                f"{listed}: expected a list of {len(paths)} labels of 0 or more, one per image"
            )
        return np.asarray(labels, np.int64), None
    parents = [path.parent for path in paths]
    if folder in parents:
        return None, None
    folders = sorted(set(parents))
    rows = np.asarray([folders.index(parent) for parent in parents], np.int64)
    return rows, tuple(path.name for path in folders)
