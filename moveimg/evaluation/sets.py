"""Sets of images on disk, read and written in batches: ADM's .npz, or a folder of images."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moveimg.data import ImageSource, crop_views, open_flat_folder
from moveimg.errors import describe
from moveimg.files import atomic, require_file
from moveimg.progress import progress_bar


@dataclass(frozen=True)
class ImageSet:
    """Images of one (H, W) size and their labels int64 [N], if known, read in batches."""

    name: str
    count: int
    size: tuple[int, int]
    labels: np.ndarray | None
    read: Callable[[int], Iterator[np.ndarray]]  # batch size -> uint8 [b, H, W, 3], in order


def scan_image_set(images: ImageSet) -> tuple[str, int]:
    """Return the sha256 of shape and pixels, and the number of images equal to an earlier one."""
    digest = hashlib.sha256(repr((images.count, *images.size)).encode())
    seen: set[bytes] = set()
    with progress_bar(images.count, f"read {images.name}", "image") as bar:
        for batch in images.read(256):
            digest.update(np.ascontiguousarray(batch))
            seen.update(hashlib.sha256(image.tobytes()).digest() for image in batch)
            bar.update(len(batch))
    return digest.hexdigest(), images.count - len(seen)


def source_images(source: ImageSource, size: tuple[int, int] | None = None) -> ImageSet:
    """Return a set of a source's images, centre-cropped to (H, W) `size`, or else uncropped."""
    height, width = size or source.load(0).size[::-1]

    def load(row: int) -> np.ndarray:
        image = source.load(row)
        if size is not None:
            image = crop_views(image, size)[0]
        elif image.size != (width, height):  # a resize would change the score
            name = source.identifiers[row]
            raise ValueError(f"{name} is {image.size}: expected {width, height}, the first image's")
        return np.asarray(image)

    def read(batch_size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(source), batch_size):
            rows = range(start, min(start + batch_size, len(source)))
            yield np.stack([load(row) for row in rows])

    labels = np.asarray(source.labels, np.int64)
    return ImageSet(source.name, len(source), (height, width), labels, read)


@contextmanager
def open_npz(path: Path) -> Iterator[zipfile.ZipFile]:
    """Yield an opened .npz; any error inside becomes a ValueError, one line with the path."""
    require_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except Exception as error:  # damaged files raise many kinds
        raise ValueError(f"{path}: {describe(error)}") from None


def read_array(archive: zipfile.ZipFile, entry: str) -> np.ndarray:
    """Read an array of an opened .npz."""
    with archive.open(f"{entry}.npy") as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def open_set(path: Path) -> ImageSet:
    """Open an .npz with `arr_0` (labels: `arr_1`), or all images below a folder, as a set."""
    if path.is_dir():
        return replace(source_images(open_flat_folder(path)), labels=None)
    labels = None
    with open_npz(path) as archive:
        with archive.open("arr_0.npy") as stream:
            np.lib.format.read_magic(stream)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        if fortran or dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
            raise ValueError(f"arr_0 is {dtype} {list(shape)}: expected uint8 [N, H, W, 3]")
        if "arr_1.npy" in archive.namelist():
            labels = read_array(archive, "arr_1").reshape(-1)
            if labels.dtype.kind not in "iu" or len(labels) != shape[0] or labels.min() < 0:
                found = f"arr_1 is {labels.dtype} {list(labels.shape)}"
                raise ValueError(f"{found}: expected {shape[0]} labels from 0 on")
            labels = labels.astype(np.int64)

    def read(batch_size: int) -> Iterator[np.ndarray]:
        # np.load would hold all images: 9.8 GB for 50,000 of 256 pixels
        with open_npz(path) as archive, archive.open("arr_0.npy") as stream:
            np.lib.format.read_magic(stream)
            np.lib.format.read_array_header_1_0(stream)
            for start in range(0, shape[0], batch_size):
                batch = (min(batch_size, shape[0] - start), *shape[1:])
                pixels = stream.read(int(np.prod(batch)))
                yield np.frombuffer(pixels, np.uint8).reshape(batch)

    return ImageSet(str(path), shape[0], shape[1:3], labels, read)


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
