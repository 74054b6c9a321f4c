"""References: statistics and images of real images, from an .npz, a folder or a known name."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.error import URLError

import numpy as np
import torch
from pydantic import BaseModel

from moveimg.errors import validate
from moveimg.evaluation.features import Extractor, extract
from moveimg.evaluation.metrics import Statistics, statistics_of
from moveimg.evaluation.sets import (
    ImageSet,
    npz_array,
    npz_entries,
    open_set,
    scan_image_set,
    write_array,
    write_images,
)
from moveimg.files import atomic, parse_json

KEPT_IMAGES = 10_000  # for precision, recall and KID, as in ADM's files
ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
PUBLISHED = {
    "imagenet64": f"{ADM}/64/VIRTUAL_imagenet64_labeled.npz",
    "imagenet128": f"{ADM}/128/VIRTUAL_imagenet128_labeled.npz",
    "imagenet256": f"{ADM}/256/VIRTUAL_imagenet256_labeled.npz",
    "imagenet512": f"{ADM}/512/VIRTUAL_imagenet512.npz",
}
KEYS = {"fid": ("mu", "sigma"), "sfid": ("mu_s", "sigma_s")}  # ADM's names


class About(BaseModel):
    """The part of the entry `about` that is read back; ADM's own files have none."""

    split: Literal["train", "val"] | None = None
    count: int | None = None
    size: tuple[int, int] | None = None
    extractor: str | None = None


@dataclass(frozen=True)
class Reference:
    """Statistics and features of real images.

    Attributes:
        name: the path or name given.
        digest: sha256 of the file; of a folder, of its pixels.
        split: `train`, `val`, or None where it is unknown.
        size: (H, W) of its images; None where it is unknown.
        count: images behind the statistics; None where it is unknown.
        statistics: of `fid` and, with Inception, `sfid`.
        features: float32 [M, D] of its images, for precision, recall and KID; None without images.
    """

    name: str
    digest: str
    split: str | None
    size: tuple[int, int] | None
    count: int | None
    statistics: Mapping[str, Statistics]
    features: np.ndarray | None

    def summary(self) -> dict[str, Any]:
        """For results: the reference's origin, and the images behind each number."""
        return {
            "name": self.name,
            "sha256": self.digest,
            "split": self.split,
            "size": self.size,
            "images_of_statistics": self.count,
            "images_of_precision_recall_kid": None if self.features is None else len(self.features),
        }


def open_reference(name: str, extractor: Extractor, cache: Path) -> Reference:
    """A reference by path or name.

    Args:
        name: an .npz of ADM's layout (mu, sigma, mu_s, sigma_s, arr_0) or with images alone; a
            folder of images of the samples' size; or one of PUBLISHED, downloaded on first use.
        extractor: computes features of its images, and the statistics it lacks.
        cache: where features and downloads are kept.

    Raises FileNotFoundError, or ValueError for other content or another extractor's statistics.
    """
    path = locate(name, cache)
    if path.is_dir():
        return reference_of(open_set(path), extractor, cache)
    entries = npz_entries(path)
    about = _read_about(path) if "about" in entries else About()
    for published, url in PUBLISHED.items():
        if path.name == url.rsplit("/", 1)[-1]:
            size = int(published.removeprefix("imagenet"))
            about.split, about.size = about.split or "train", about.size or (size, size)
    if "mu" in entries:
        _require_extractor(path, about.extractor, extractor)
    images = open_set(path) if "arr_0" in entries else None
    if images is None and "mu" not in entries:
        raise ValueError(f"{path}: has neither images (arr_0) nor statistics (mu, sigma)")
    statistics = _read_statistics(path, entries, about.count)
    features = None
    if images is not None:
        features = extract(images, scan_image_set(images).digest, extractor, cache)
        statistics = _statistics(features) | statistics
    if "fid" not in statistics:
        raise ValueError(f"{path}: has mu without sigma: expected both")
    return Reference(
        name=name,
        digest=digest_of(path),
        split=about.split,
        size=about.size if images is None else images.size,
        count=statistics["fid"].count,
        statistics=statistics,
        features=None if features is None else features["fid"],
    )


def reference_of(
    images: ImageSet, extractor: Extractor, cache: Path, split: str | None = None
) -> Reference:
    """A set of real images as a reference, every number from these images."""
    digest = scan_image_set(images).digest
    features = extract(images, digest, extractor, cache)
    return Reference(
        name=images.name,
        digest=digest,
        split=split,
        size=images.size,
        count=len(images),
        statistics=_statistics(features),
        features=features["fid"],
    )


def write_reference(
    path: Path, images: ImageSet, extractor: Extractor, cache: Path, split: str | None
) -> dict[str, Any]:
    """Write an .npz that ADM's evaluator reads, too: statistics of all images, and 10,000 of them.

    Returns the content of its entry `about`.
    """
    reference = reference_of(images, extractor, cache, split)
    rows = np.arange(len(images))
    if len(rows) > KEPT_IMAGES:
        rows = np.sort(np.random.default_rng(0).permutation(len(rows))[:KEPT_IMAGES])
    about = {
        "name": images.name,
        "split": split,
        "count": len(images),
        "size": images.size,
        "sha256_of_pixels": reference.digest,
        "extractor": extractor.fingerprint,
        "extractor_name": extractor.name,
    }
    with atomic(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for role, (mu, sigma) in KEYS.items():
            if role in reference.statistics:
                write_array(archive, mu, reference.statistics[role].mu)
                write_array(archive, sigma, reference.statistics[role].sigma)
        write_images(archive, _select(images, rows), (len(rows), *images.size, 3))
        write_array(archive, "about", np.array(json.dumps(about)))
    return about


def digest_of(path: Path) -> str:
    """sha256 of a reference's file; of a folder, of its pixels."""
    if path.is_dir():
        return scan_image_set(open_set(path)).digest
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def locate(name: str, cache: Path) -> Path:
    """The file or folder of a reference. FileNotFoundError, or ValueError for another kind."""
    path = fetch(name, cache) if name in PUBLISHED else Path(name)
    if not path.exists():
        known = ", ".join(PUBLISHED)
        raise FileNotFoundError(f"no reference {name!r}: expected a file, a folder or {known}")
    if not path.is_dir() and path.suffix != ".npz":
        raise ValueError(f"{path}: expected an .npz, a folder or one of {', '.join(PUBLISHED)}")
    return path


def fetch(name: str, cache: Path) -> Path:
    """ADM's file of a published name, downloaded once. Raises FileNotFoundError without network."""
    url = PUBLISHED[name]
    path = cache / "references" / url.rsplit("/", 1)[-1]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))
        except (URLError, OSError) as error:
            raise FileNotFoundError(
                f"the reference {name} is not here and cannot be downloaded ({error}): bring {url} "
                f"to {path}, or give its path"
            ) from None
    return path


def _read_about(path: Path) -> About:
    origin = f"{path}: about"
    return validate(About, parse_json(str(npz_array(path, "about")), origin), origin)


def _statistics(features: Mapping[str, np.ndarray]) -> dict[str, Statistics]:
    return {role: statistics_of(features[role]) for role in KEYS if role in features}


def _read_statistics(path: Path, entries: list[str], count: int | None) -> dict[str, Statistics]:
    statistics = {}
    for role, keys in KEYS.items():
        if not set(keys) <= set(entries):
            continue
        mu, sigma = (npz_array(path, key) for key in keys)
        where = f"{path}: {keys[0]} {mu.dtype} {list(mu.shape)}, {keys[1]} {list(sigma.shape)}"
        if mu.dtype.kind not in "fiu" or sigma.dtype.kind not in "fiu":
            raise ValueError(f"{where}: expected real numbers")
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise ValueError(f"{where}: expected [D] and [D, D]")
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise ValueError(f"non-finite: {where}: not all numbers are finite")
        statistics[role] = Statistics(mu.astype(np.float64), sigma.astype(np.float64), count)
    return statistics


def _require_extractor(path: Path, stored: str | None, extractor: Extractor) -> None:
    """Raise ValueError for statistics of another network: they say nothing about its features."""
    if stored == extractor.fingerprint or (stored is None and extractor.class_names is None):
        return  # a file of others is of Inception
    made_by = f"extractor {stored[:12]}" if stored else "Inception"
    raise ValueError(
        f"other-extractor: {path} holds statistics of {made_by}, the samples' features are of "
        f"{extractor.name} ({extractor.fingerprint[:12]})"
    )


def _select(images: ImageSet, rows: np.ndarray) -> Iterator[np.ndarray]:
    """The images of sorted row numbers, in batches."""
    start = 0
    for batch in images.read(256):
        yield batch[rows[(rows >= start) & (rows < start + len(batch))] - start]
        start += len(batch)
