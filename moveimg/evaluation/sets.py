"""Sets of images on disk, read and written in batches: ADM's .npz, or a folder of images.

N images   H height   W width, equal for all images of a set
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from moveimg.data import ImageSource, crop_views, open_flat_folder
from moveimg.errors import describe
from moveimg.files import atomic, require_file
from moveimg.progress import progress_bar


@dataclass(frozen=True)
class ImageSet:
    """Images of one size and their labels, read in batches."""

    name: str  # its path, for messages
    shape: tuple[int, int, int]  # (N, H, W)
    labels: np.ndarray | None  # int64 [N]; None where they are unknown
    read: Callable[[int], Iterator[np.ndarray]]  # batch size -> uint8 [b, H, W, 3], in order

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        return self.shape[1:]


def scan_image_set(images: ImageSet) -> tuple[str, int]:
    """The sha256 over shape and pixels, and the number of images that equal an earlier one."""
    digest = hashlib.sha256(repr(images.shape).encode())
    seen: set[bytes] = set()
    with progress_bar(len(images), f"read {images.name}", "image") as bar:
        for batch in images.read(256):
            digest.update(np.ascontiguousarray(batch))
            seen.update(hashlib.sha256(image.tobytes()).digest() for image in batch)
            bar.update(len(batch))
    return digest.hexdigest(), len(images) - len(seen)


def source_images(source: ImageSource, size: tuple[int, int] | None = None) -> ImageSet:
    """A source's centre crops of (H, W) `size` as a set; without `size`, images of one size."""
    height, width = size or source.load(0).size[::-1]

    def load(row: int) -> np.ndarray:
        image = source.load(row)
        if size is not None:
            image = crop_views(image, size)[0]
        elif image.size != (width, height):  # a resize would change the score
            name = source.identifiers[row]
            raise ValueError(f"{name} is {image.size}: expected {width, height}, the first image's")
        return np.asarray(image)

    def read(count: int) -> Iterator[np.ndarray]:
        for start in range(0, len(source), count):
            yield np.stack([load(row) for row in range(start, min(start + count, len(source)))])

    labels = np.asarray(source.labels, np.int64)
    return ImageSet(source.name, (len(source), height, width), labels, read)


def open_set(path: Path) -> ImageSet:
    """The set in an .npz with `arr_0` (and labels in `arr_1`), or of all images below a folder.

    Raises FileNotFoundError, or ValueError for anything but images of one size.
    """
    if path.is_dir():
        return replace(source_images(open_flat_folder(path)), labels=None)
    stream, shape = _open_pixels(path)
    stream.close()
    labels = None
    if "arr_1" in npz_entries(path):
        stored = npz_array(path, "arr_1").reshape(-1)
        if stored.dtype.kind not in "iu" or len(stored) != shape[0] or stored.min() < 0:
            raise ValueError(
                f"{path}: labels (arr_1) are {stored.dtype} {list(stored.shape)}: expected "
                f"{shape[0]} whole numbers from 0 on"
            )
        labels = stored.astype(np.int64)
    return ImageSet(str(path), shape, labels, lambda size: _read_npz(path, size))


# --- .npz ----------------------------------------------------------------------------------


def npz_entries(path: Path) -> list[str]:
    """Names of the arrays in an .npz. Raises FileNotFoundError, or ValueError if damaged."""
    require_file(path)
    with _reading(path, "an .npz"), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def npz_array(path: Path, entry: str) -> np.ndarray:
    """One small array of an .npz, verified by the archive's checksum."""
    with _reading(path, entry), np.load(path, allow_pickle=False) as arrays:
        return np.asarray(arrays[entry])  # bytes, where the entry is no .npy


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Raise ValueError with the path for any error: damaged files raise many kinds."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path}: cannot read {what} ({describe(error)})") from None


def _open_pixels(path: Path) -> tuple[IO[bytes], tuple[int, int, int]]:
    """The pixels of arr_0 as a stream, and (N, H, W)."""
    require_file(path)
    readers: dict[Any, Any] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    with _reading(path, "arr_0"), zipfile.ZipFile(path) as archive:
        stream = archive.open("arr_0.npy")
        shape, fortran, dtype = readers[np.lib.format.read_magic(stream)](stream)
        if fortran or dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
            raise ValueError(f"{dtype} {list(shape)}: expected uint8 [N, H, W, 3] in C order")
        return stream, shape[:3]


def _read_npz(path: Path, size: int) -> Iterator[np.ndarray]:
    """Stream arr_0: np.load would hold all of it (9.8 GB for 50,000 images of 256 px)."""
    stream, (images, height, width) = _open_pixels(path)
    with stream:
        for start in range(0, images, size):
            count = min(size, images - start)
            with _reading(path, f"image {start}"):
                raw = stream.read(count * height * width * 3)
                batch = np.frombuffer(raw, np.uint8).reshape(count, height, width, 3)
            yield batch


def write_npz(path: Path, batches: Iterable[np.ndarray], labels: np.ndarray) -> None:
    """Write `arr_0` uint8 [N, H, W, 3], batch by batch, and `arr_1` int64 [N].

    Atomic, uncompressed, and without dates: the same pixels give the same file.
    """
    with atomic(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as stream:
            for number, batch in enumerate(batches):
                if number == 0:
                    shape = (len(labels), *batch.shape[1:])
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(stream, header)
                stream.write(np.ascontiguousarray(batch).data)
        with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as stream:
            np.lib.format.write_array(stream, labels.astype(np.int64), allow_pickle=False)
