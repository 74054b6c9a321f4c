"""References: statistics and features of real images, from an .npz, a folder or by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moveimg.data import is_named_source, open_flat_folder, open_images, sha256_file
from moveimg.evaluation.extractors import INCEPTION, Extractor, extract, features_cache
from moveimg.evaluation.metrics import Statistics, statistics_of
from moveimg.evaluation.sets import (
    ImageSet,
    npz_array,
    npz_entries,
    open_set,
    scan_image_set,
    source_images,
)
from moveimg.files import fetch

ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
PUBLISHED = {f"imagenet{n}": f"{ADM}/{n}/VIRTUAL_imagenet{n}_labeled.npz" for n in (64, 128, 256)}
PUBLISHED["imagenet512"] = f"{ADM}/512/VIRTUAL_imagenet512.npz"
KEYS = {"fid": ("mu", "sigma"), "sfid": ("mu_s", "sigma_s")}  # ADM's names


@dataclass(frozen=True)
class Reference:
    """Statistics and features of real images."""

    name: str
    digest: str  # sha256 of the file; of a folder, of its pixels
    size: tuple[int, int] | None  # (H, W); None without images
    statistics: Mapping[str, Statistics]  # of `fid` and, with Inception, `sfid`
    features: np.ndarray | None = None  # float32 [M, D] of its images; None without images


def open_reference(name: str, size: tuple[int, int], extractor: Extractor) -> Reference:
    """A reference for samples of (H, W) `size` by path or name.

    It is a data set (its training images; NAME:val or NAME:test another split, NAME:val:0.1 a tenth
    held out of the training images) or a folder, both cropped to `size`; an .npz of ADM's layout
    (mu, sigma, mu_s, sigma_s, arr_0) or with images alone; or one of PUBLISHED, downloaded on first
    use. `extractor` computes what the file lacks.
    Raises FileNotFoundError, or ValueError for other content, another size, or statistics alone
    where the extractor is not Inception.
    """
    source, *part = name.split(":")
    if is_named_source(source):
        split: Any = part[0] if part else "train"
        fraction = float(part[1]) if part[1:] else None
        return reference_of(source_images(open_images(source, split, fraction), size), extractor)
    path = locate(name)
    if path.is_dir():
        return reference_of(source_images(open_flat_folder(path), size), extractor)
    entries, inception = npz_entries(path), extractor.name == INCEPTION
    statistics = {
        role: _read_statistics(path, mu, sigma)
        for role, (mu, sigma) in KEYS.items()
        if mu in entries and inception
    }
    if "arr_0" not in entries and statistics:
        return Reference(name, sha256_file(path), None, statistics)
    images = open_set(path)
    if images.size != size:
        raise ValueError(f"samples are {size}, the reference {name} {images.size}")
    computed = reference_of(images, extractor)
    return Reference(
        name, sha256_file(path), size, {**computed.statistics, **statistics}, computed.features
    )


def reference_of(images: ImageSet, extractor: Extractor) -> Reference:
    """A reference computed from a set of real images."""
    digest, _ = scan_image_set(images)
    features = extract(images, digest, extractor)
    statistics = {role: statistics_of(features[role]) for role in KEYS if role in features}
    return Reference(images.name, digest, images.size, statistics, features["fid"])


def locate(name: str) -> Path:
    """The file or folder of a reference; ADM's are downloaded. Raises FileNotFoundError."""
    if name in PUBLISHED:
        url = PUBLISHED[name]
        return fetch(url, features_cache() / "references" / url.rsplit("/", 1)[-1])
    if not Path(name).exists():
        known = ", ".join(PUBLISHED)
        raise FileNotFoundError(f"no reference {name!r}: expected an .npz, a folder or {known}")
    return Path(name)


def _read_statistics(path: Path, mu_key: str, sigma_key: str) -> Statistics:
    mu, sigma = npz_array(path, mu_key), npz_array(path, sigma_key)
    numbers = mu.dtype.kind in "fiu" and sigma.dtype.kind in "fiu" and mu.ndim == 1
    if not numbers or sigma.shape != (len(mu), len(mu)) or not np.isfinite(sigma.sum() + mu.sum()):
        raise ValueError(
            f"{path}: {mu_key} {mu.dtype} {list(mu.shape)}, {sigma_key} {sigma.dtype} "
            f"{list(sigma.shape)}: expected finite real numbers [D] and [D, D]"
        )
    return Statistics(mu.astype(np.float64), sigma.astype(np.float64))
