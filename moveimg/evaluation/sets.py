"""Sets of images on disk, read and written in batches: ADM's .npz, or a folder of images.

N images   H height   W width, equal for all images of a set
"""

from __future__ import annotations

import hashlib
import json
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated

import numpy as np
from PIL import Image
from pydantic import Field, TypeAdapter

from moveimg.data import walk_images
from moveimg.dist import print_rank0
from moveimg.errors import describe, validate
from moveimg.files import atomic, atomic_directory, read_json
from moveimg.progress import progress_bar

LABELS_FILE = "labels.json"  # in a folder of images: one label per image, in file order
BATCH = 256
# Errors of zipfile and its decompressors for a damaged archive
DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, KeyError, OSError,
           NotImplementedError)  # fmt: skip
_LABELS = TypeAdapter(list[Annotated[int, Field(strict=True, ge=0, lt=2**31)]])


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
    duplicates: images whose pixels equal an earlier image's.
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
    """An ImageSet of uint8 [N, H, W, 3] in memory."""
    return ImageSet(
        name,
        _check_shape(images.shape, images.dtype, name),
        None if labels is None else np.asarray(labels, np.int64),
        lambda size: (images[i : i + size] for i in range(0, len(images), size)),
    )


def open_set(path: str | Path) -> ImageSet:
    """The set in an .npz with `arr_0` (and labels in `arr_1`), or in a folder.

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
    """Names of the arrays in an .npz. Raises ValueError for a damaged file."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except DAMAGED as error:
        raise ValueError(f"{path}: not a readable .npz ({describe(error)})") from None
    return [name.removesuffix(".npy") for name in names if name.endswith(".npy")]


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


def _open_npz(path: Path) -> ImageSet:
    entries = npz_entries(path)
    if "arr_0" not in entries:
        raise ValueError(f"{path}: has no images (arr_0), only {', '.join(entries) or 'nothing'}")
    with _open_images(path) as (_, shape):
        pass
    labels = None
    if "arr_1" in entries:
        stored = npz_array(path, "arr_1").reshape(-1)
        # whole numbers in a float array are accepted: other programs write them
        if stored.dtype.kind not in "iuf" or not (stored == np.floor(stored)).all():
            raise ValueError(f"{path}: labels (arr_1) are {stored.dtype}: expected whole numbers")
        labels = stored.astype(np.int64)
        if len(labels) != shape[0]:
            raise ValueError(f"{path}: {len(labels)} labels for {shape[0]} images: expected equal")
        if labels.min() < 0:
            raise ValueError(f"{path}: labels reach {labels.min()}: expected 0 or more")
    return ImageSet(str(path), shape, labels, lambda size: _read_npz(path, size))


def _read_npz(path: Path, size: int) -> Iterator[np.ndarray]:
    """Stream arr_0: np.load would hold all of it (9.8 GB for 50,000 images of 256 px)."""
    with _open_images(path) as (stream, shape):
        one = shape[1] * shape[2] * 3
        for start in range(0, shape[0], size):
            count = min(size, shape[0] - start)
            raw = stream.read(count * one)
            if len(raw) != count * one:
                raise ValueError(f"{path}: truncated after {start} of {shape[0]} images")
            yield np.frombuffer(raw, np.uint8).reshape(count, *shape[1:], 3)


@contextmanager
def _open_images(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, int, int]]]:
    """Yield the pixels of arr_0 as a stream, and (N, H, W); ValueError for a damaged file."""
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
            try:
                shape, fortran, dtype = readers[np.lib.format.read_magic(stream)](stream)
            except Exception as error:  # of a foreign header NumPy raises nearly any kind
                raise ValueError(f"{path}: arr_0 is not an array ({describe(error)})") from None
            if fortran:
                raise ValueError(f"{path}: arr_0 is in Fortran order: expected C order")
            yield stream, _check_shape(shape, dtype, str(path))
    except DAMAGED as error:
        raise ValueError(f"{path}: damaged images ({describe(error)})") from None


def _check_shape(shape: Sequence[int], dtype: np.dtype, name: str) -> tuple[int, int, int]:
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
        raise ValueError(
            f"wrong-mode: {name}: images are {dtype} {list(shape)}: expected uint8 [N, H, W, 3] "
            "in 0..255"
        )
    return shape[0], shape[1], shape[2]


def write_npz(
    path: Path, batches: Iterable[np.ndarray], labels: np.ndarray, size: tuple[int, int]
) -> None:
    """Write `arr_0` uint8 [N, H, W, 3], batch by batch, and `arr_1` int64 [N].

    Atomic, uncompressed, and without dates: the same pixels give the same file.
    """
    with atomic(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        write_images(archive, batches, (len(labels), *size, 3))
        write_array(archive, "arr_1", labels.astype(np.int64))


def write_images(
    archive: zipfile.ZipFile, batches: Iterable[np.ndarray], shape: tuple[int, ...]
) -> None:
    """Stream uint8 batches into the entry `arr_0` of an .npz. ValueError for another count."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    written = 0
    with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for batch in batches:
            stream.write(np.ascontiguousarray(batch).data)
            written += len(batch)
    if written != shape[0]:
        raise ValueError(f"{written} images came for a set of {shape[0]}")


def write_array(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    """Write a small array as the entry `name` of an .npz."""
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as stream:
        np.lib.format.write_array(stream, np.asarray(array, order="C"), allow_pickle=False)


# --- folders -------------------------------------------------------------------------------


def write_pngs(folder: Path, batches: Iterable[np.ndarray], labels: np.ndarray) -> None:
    """Write a folder of PNGs named by index, and labels.json; the folder appears whole."""
    with atomic_directory(folder) as temporary:
        index = 0
        for batch in batches:
            for pixels in batch:
                Image.fromarray(pixels).save(temporary / f"{index:06d}.png")
                index += 1
        text = json.dumps(labels.tolist())
        (temporary / LABELS_FILE).write_text(text + "\n", encoding="utf-8")


def _open_folder(folder: Path) -> ImageSet:
    walk = walk_images(folder)
    paths = walk.images
    others = {kind: n for kind, n in walk.others.items() if kind != ".json"}
    if others:
        print_rank0(f"{folder}: {sum(others.values())} files are not images: {others}")
    if not paths:
        raise ValueError(f"{folder}: holds no images")
    height, width = _read_sample(paths[0]).shape[:2]
    labels, names = _folder_labels(folder, paths)

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
                actual, wanted = ("x".join(map(str, s)) for s in (image.size, size))
                raise ValueError(f"wrong-size: {path} is {actual}: expected {wanted} as the first")
            return np.asarray(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read ({describe(error)})") from None


def _folder_labels(
    folder: Path, paths: list[Path]
) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Labels int64 [N] and, where they come from class folders, the names of those."""
    listed = folder / LABELS_FILE
    if listed.is_file():
        labels = validate(_LABELS, read_json(listed), str(listed))
        if len(labels) != len(paths):
            raise ValueError(f"{listed}: {len(labels)} labels: expected a list of {len(paths)}")
        return np.asarray(labels, np.int64), None
    parents = [path.parent for path in paths]
    if folder in parents:
        return None, None
    folders = sorted(set(parents))
    row_of = {parent: row for row, parent in enumerate(folders)}
    rows = np.asarray([row_of[parent] for parent in parents], np.int64)
    return rows, tuple(path.name for path in folders)
