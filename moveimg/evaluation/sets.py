"""Sets of images on disk, read and written in batches: ADM's .npz, or a folder of images.

N images   H height   W width, equal for all images of a set
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from moveimg.data import ImageSource, crop_views, walk_images
from moveimg.errors import describe
from moveimg.files import atomic
from moveimg.progress import progress_bar

BATCH = 256


@dataclass(frozen=True)
class ImageSet:
    """Images of one size and their labels, read in batches."""

    name: str  # its path, for messages
    shape: tuple[int, int, int]  # (N, H, W)
    labels: np.ndarray | None  # int64 [N]; None where they are unknown
    read: Callable[[int], Iterator[np.ndarray]]  # batch size -> uint8 [b, H, W, 3], in order
    class_names: tuple[str, ...] | None = None  # where labels come from class folders

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        return self.shape[1:]


@dataclass(frozen=True)
class Content:
    """Facts about all pixels of a set."""

    digest: str  # sha256 over shape and pixels, in order
    duplicates: int  # images whose pixels equal an earlier image's
    blank: int  # images of a single colour
    brightest: int  # the largest pixel value


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


def source_images(source: ImageSource, size: tuple[int, int]) -> ImageSet:
    """The centre crops of a source as a set, cropped as they are read."""

    def read(count: int) -> Iterator[np.ndarray]:
        for start in range(0, len(source), count):
            rows = range(start, min(start + count, len(source)))
            views = [crop_views(source[i][0], size, "center", (1.0,))[0] for i in rows]
            yield np.stack([np.asarray(view) for view in views])

    labels = np.asarray(source.labels, np.int64)
    return ImageSet(source.name, (len(source), *size), labels, read)


def open_set(path: Path) -> ImageSet:
    """The set in an .npz with `arr_0` (and labels in `arr_1`), or in a folder.

    A folder is searched for images recursively, sorted by path; labels come from class subfolders,
    whose names are kept.

    Raises FileNotFoundError, or ValueError where it is not RGB images of one size.
    """
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder of images")
    with _open_images(path) as (_, shape):
        pass
    labels = None
    if "arr_1" in npz_entries(path):
        stored = npz_array(path, "arr_1").reshape(-1)
        # whole numbers in a float array are accepted: other programs write them
        if stored.dtype.kind not in "iuf" or not (stored == np.floor(stored)).all():
            raise ValueError(f"{path}: labels (arr_1) are {stored.dtype}: expected whole numbers")
        labels = stored.astype(np.int64)
        if len(labels) != shape[0] or labels.min() < 0:
            raise ValueError(
                f"{path}: {len(labels)} labels from {labels.min()} on: expected {shape[0]} from 0"
            )
    return ImageSet(str(path), shape, labels, lambda size: _read_npz(path, size))


# --- .npz ----------------------------------------------------------------------------------


def npz_entries(path: Path) -> list[str]:
    """Names of the arrays in an .npz. Raises ValueError for a damaged file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except Exception as error:  # zipfile raises many kinds for damaged archives
        raise ValueError(f"{path}: not a readable .npz ({describe(error)})") from None


def npz_array(path: Path, entry: str) -> np.ndarray:
    """One small array of an .npz, verified by the archive's checksum."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            array = arrays[entry]
            if not isinstance(array, np.ndarray):  # bytes, where the entry is no .npy
                raise ValueError("no array")
            return array
    except Exception as error:  # of a foreign header NumPy raises nearly any kind
        raise ValueError(f"{path}: cannot read {entry} ({describe(error)})") from None


def _read_npz(path: Path, size: int) -> Iterator[np.ndarray]:
    """Stream arr_0: np.load would hold all of it (9.8 GB for 50,000 images of 256 px)."""
    with _open_images(path) as (stream, (images, height, width)):
        for start in range(0, images, size):
            count = min(size, images - start)
            try:  # the archive's checksum is compared at its end
                raw = stream.read(count * height * width * 3)
                batch = np.frombuffer(raw, np.uint8).reshape(count, height, width, 3)
            except Exception as error:  # zipfile and zlib raise many kinds for damaged data
                raise ValueError(f"{path}: damaged after {start} images ({error})") from None
            yield batch


@contextmanager
def _open_images(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, int, int]]]:
    """Yield the pixels of arr_0 as a stream, and (N, H, W); ValueError for a damaged file."""
    if "arr_0" not in (entries := npz_entries(path)):
        raise ValueError(f"{path}: has no images (arr_0), only {', '.join(entries) or 'nothing'}")
    readers: dict[Any, Any] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    with zipfile.ZipFile(path) as archive:
        try:
            stream = archive.open("arr_0.npy")
            shape, fortran, dtype = readers[np.lib.format.read_magic(stream)](stream)
        except Exception as error:  # of a foreign header NumPy raises nearly any kind
            raise ValueError(f"{path}: arr_0 is not an array ({describe(error)})") from None
        if fortran or dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
            order = " in Fortran order" if fortran else ""
            raise ValueError(
                f"wrong-mode: {path}: images are {dtype} {list(shape)}{order}: expected uint8 "
                "[N, H, W, 3] in 0..255"
            )
        with stream:
            yield stream, shape[:3]


def write_npz(path: Path, batches: Iterable[np.ndarray], labels: np.ndarray) -> None:
    """Write `arr_0` uint8 [N, H, W, 3], batch by batch, and `arr_1` int64 [N].

    Atomic, uncompressed, and without dates: the same pixels give the same file.
    """
    with atomic(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        write_images(archive, batches, len(labels))
        write_array(archive, "arr_1", labels.astype(np.int64))


def write_images(archive: zipfile.ZipFile, batches: Iterable[np.ndarray], count: int) -> None:
    """Stream uint8 batches of `count` images in all into the entry `arr_0` of an .npz."""
    with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as stream:
        for number, batch in enumerate(batches):
            if number == 0:
                shape = (count, *batch.shape[1:])
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(stream, header)
            stream.write(np.ascontiguousarray(batch).data)


def write_array(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    """Write a small array as the entry `name` of an .npz."""
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as stream:
        np.lib.format.write_array(stream, np.asarray(array, order="C"), allow_pickle=False)


# --- folders -------------------------------------------------------------------------------


def _open_folder(folder: Path) -> ImageSet:
    paths = [folder / name for name in walk_images(folder)[0]]
    if not paths:
        raise ValueError(f"{folder}: holds no images")
    height, width = _read_sample(paths[0]).shape[:2]
    parents = [path.parent for path in paths]
    folders = sorted(set(parents))
    labels, names = None, None
    if folder not in folders:
        rows = {parent: row for row, parent in enumerate(folders)}
        labels = np.asarray([rows[parent] for parent in parents], np.int64)
        names = tuple(path.name for path in folders)

    def read(size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(paths), size):
            chunk = paths[start : start + size]
            yield np.stack([_read_sample(path, (width, height)) for path in chunk])

    return ImageSet(str(folder), (len(paths), height, width), labels, read, names)


def _read_sample(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """uint8 [H, W, 3]. Nothing is converted or resized: that would change the score."""
    try:
        with Image.open(path) as image:
            if image.mode != "RGB":
                raise ValueError(f"wrong-mode: {path} is {image.mode}: expected RGB")
            if size is not None and image.size != size:
                raise ValueError(f"wrong-size: {path} is {image.size}: expected {size} as others")
            return np.asarray(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read ({describe(error)})") from None
