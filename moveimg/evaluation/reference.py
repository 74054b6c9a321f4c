"""References: statistics and images of real images, from an .npz, a folder or a known name."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel

from moveimg.data import is_named_source, open_images
from moveimg.errors import validate
from moveimg.evaluation.features import Extractor, extract
from moveimg.evaluation.metrics import Statistics, statistics_of
from moveimg.evaluation.sets import (
    ImageSet,
    npz_array,
    npz_entries,
    open_set,
    scan_image_set,
    source_images,
    write_array,
    write_images,
)
from moveimg.files import atomic, fetch, parse_json

KEPT_IMAGES = 10_000  # for precision, recall and KID, as in ADM's files
ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
PUBLISHED = {
    "imagenet64": f"{ADM}/64/VIRTUAL_imagenet64_labeled.npz",
    "imagenet128": f"{ADM}/128/VIRTUAL_imagenet128_labeled.npz",
    "imagenet256": f"{ADM}/256/VIRTUAL_imagenet256_labeled.npz",
    "imagenet512": f"{ADM}/512/VIRTUAL_imagenet512.npz",
}
ADMS_FILES = [url.rsplit("/", 1)[-1] for url in PUBLISHED.values()]
KEYS = {"fid": ("mu", "sigma"), "sfid": ("mu_s", "sigma_s")}  # ADM's names


class About(BaseModel):
    """The part of the entry `about` that is read back; ADM's own files have none."""

    split: Literal["train", "val"] | None = None
    count: int | None = None
    size: tuple[int, int] | None = None
    extractor: str | None = None


@dataclass(frozen=True)
class Reference:
    """Statistics and features of real images; None where something is unknown."""

    name: str
    digest: str  # sha256 of the file; of a folder, of its pixels
    split: str | None  # train or val
    size: tuple[int, int] | None  # (H, W)
    count: int | None  # images behind the statistics
    statistics: Mapping[str, Statistics]  # of `fid` and, with Inception, `sfid`
    features: np.ndarray | None  # float32 [M, D] of its images; None without images

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


def open_reference(
    name: str, size: tuple[int, int], extractor: Extractor, cache: Path
) -> Reference:
    """A reference by path or name.

    It is a data set, whose training images are cropped to the samples' (H, W) `size`; an .npz of
    ADM's layout (mu, sigma, mu_s, sigma_s, arr_0) or with images alone; a folder of images; or one
    of PUBLISHED, downloaded on first use. `extractor` computes what the file lacks.
    Raises FileNotFoundError, or ValueError for other content or another extractor's statistics.
    """
    if is_named_source(name):
        images = source_images(open_images(name, "train"), size)
        return reference_of(images, extractor, cache, "train")
    path = locate(name, cache)
    if path.is_dir():
        return reference_of(open_set(path), extractor, cache)
    entries, about, statistics, features = npz_entries(path), About(), {}, None
    if "about" in entries:
        stored = parse_json(str(npz_array(path, "about")), f"{path}: about")
        about = validate(About, stored, f"{path}: about")
    if path.name in ADMS_FILES:
        about.split = "train"
    stored_by = about.extractor or "Inception"  # a file of others is of Inception
    ours = (extractor.fingerprint, "Inception" if "sfid" in extractor.layers else None)
    if "mu" in entries and stored_by not in ours:
        raise ValueError(
            f"other-extractor: {path} holds statistics of {stored_by}, the samples' features are "
            f"of {extractor.name} ({extractor.fingerprint})"
        )
    if "arr_0" in entries or "mu" not in entries:
        images = open_set(path)
        extracted = extract(images, scan_image_set(images).digest, extractor, cache)
        features, about.size = extracted["fid"], images.size
        statistics = _statistics(extracted)
    for role, (mu, sigma) in KEYS.items():
        if mu in entries:
            statistics[role] = _read_statistics(path, mu, sigma, about.count)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    count = statistics["fid"].count
    return Reference(name, digest, about.split, about.size, count, statistics, features)


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
        write_images(archive, _select(images, rows), len(rows))
        write_array(archive, "about", np.array(json.dumps(about)))
    return about


def locate(name: str, cache: Path) -> Path:
    """The file or folder of a reference, downloaded where it is ADM's. Raises FileNotFoundError."""
    if name in PUBLISHED:
        url = PUBLISHED[name]
        return fetch(url, cache / "references" / url.rsplit("/", 1)[-1])
    if not Path(name).exists():
        known = ", ".join(PUBLISHED)
        raise FileNotFoundError(f"no reference {name!r}: expected an .npz, a folder or {known}")
    return Path(name)


def _statistics(features: Mapping[str, np.ndarray]) -> dict[str, Statistics]:
    return {role: statistics_of(features[role]) for role in KEYS if role in features}


def _read_statistics(path: Path, mu_key: str, sigma_key: str, count: int | None) -> Statistics:
    mu, sigma = npz_array(path, mu_key), npz_array(path, sigma_key)
    where = f"{path}: {mu_key} {mu.dtype} {list(mu.shape)}, {sigma_key} {list(sigma.shape)}"
    real = mu.dtype.kind in "fiu" and sigma.dtype.kind in "fiu"
    if not real or mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"{where}: expected real numbers [D] and [D, D]")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"non-finite: {where}: not all numbers are finite")
    return Statistics(mu.astype(np.float64), sigma.astype(np.float64), count)


def _select(images: ImageSet, rows: np.ndarray) -> Iterator[np.ndarray]:
    """The images of sorted row numbers, in batches."""
    start = 0
    for batch in images.read(256):
        yield batch[rows[(rows >= start) & (rows < start + len(batch))] - start]
        start += len(batch)
