"""Sets of images written part by part: ADM's .npz, or a folder of PNGs."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from moveimg.evaluation.sets import LABELS_FILE
from moveimg.files import atomic, atomic_directory


def write_npz(
    path: Path, parts: Iterable[np.ndarray], labels: np.ndarray, size: tuple[int, int]
) -> None:
    """Write `arr_0` uint8 [N, H, W, 3] from its parts and `arr_1` int64 [N], never all at once.

    Atomic, uncompressed, and without dates: the same pixels give the same file.
    """
    with atomic(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        write_images(archive, parts, (len(labels), *size, 3))
        write_array(archive, "arr_1", labels.astype(np.int64))


def write_images(
    archive: zipfile.ZipFile, parts: Iterable[np.ndarray], shape: tuple[int, ...]
) -> None:
    """Stream uint8 parts into the entry `arr_0` of an .npz. ValueError if they are not `shape`."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    written = 0
    with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for part in parts:
            stream.write(np.ascontiguousarray(part).data)
            written += len(part)
    if written != shape[0]:
        raise ValueError(f"{written} images came for a set of {shape[0]}")


def write_array(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    """Write a small array as the entry `name` of an .npz."""
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as stream:
        np.lib.format.write_array(stream, np.asarray(array, order="C"), allow_pickle=False)


def write_pngs(folder: Path, parts: Iterable[np.ndarray], labels: np.ndarray) -> None:
    """Write a folder of PNGs named by index, and its labels; it appears whole."""
    with atomic_directory(folder) as temporary:
        for index, pixels in enumerate(_images(parts)):
            Image.fromarray(pixels).save(temporary / f"{index:06d}.png")
        text = json.dumps(labels.tolist())
        (temporary / LABELS_FILE).write_text(text + "\n", encoding="utf-8")


def _images(parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for part in parts:
        yield from part
