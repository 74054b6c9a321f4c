"""References: statistics and features of real images, of an .npz, a folder or a data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moveimg.data import is_named_source, open_flat_folder, open_images, sha256_file
from moveimg.evaluation import sets
from moveimg.evaluation.extractors import INCEPTION, Extractor, extract
from moveimg.evaluation.metrics import Statistics, compute_statistics
from moveimg.files import fetch
from moveimg.pretrained.hub import cache_directory

ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
PUBLISHED = {f"imagenet{n}": f"{ADM}/{n}/VIRTUAL_imagenet{n}_labeled.npz" for n in (64, 128, 256)}
PUBLISHED["imagenet512"] = f"{ADM}/512/VIRTUAL_imagenet512.npz"
KEYS = {"fid": ("mu", "sigma"), "sfid": ("mu_s", "sigma_s")}  # ADM's names


@dataclass(frozen=True)
class Reference:
    """Statistics and features of the real images that samples are compared with."""

    name: str
    digest: str  # sha256 of the .npz, or else of the pixels
    statistics: dict[str, Statistics]  # of `fid` and, with Inception, `sfid`
    features: np.ndarray | None  # float32 [M, D]; None if the file has no images


def open_reference(name: str, size: tuple[int, int], extractor: Extractor) -> Reference:
    """Open the reference of samples of (H, W) `size`. Raises FileNotFoundError or ValueError.

    `name` is a data set (its training images; NAME:val or NAME:test for another split, NAME:val:0.1
    for a tenth held out of the training images) or a folder, both cropped to `size`; an .npz of
    ADM's layout (mu, sigma, mu_s, sigma_s, arr_0) or of images alone; or a key of PUBLISHED.
    Statistics in a file are used with Inception only, else `extractor` computes them from images.
    """
    path = locate(name)
    if path is None:
        data_set, split, fraction, *_ = [*name.split(":"), "", ""]
        part: Any = split or "train"
        source = open_images(data_set, part, float(fraction) if fraction else None)
        return make_reference(sets.source_images(source, size), extractor)
    if path.is_dir():
        return make_reference(sets.source_images(open_flat_folder(path), size), extractor)
    statistics = {}
    with sets.open_npz(path) as archive:
        entries = {entry.removesuffix(".npy") for entry in archive.namelist()}
        roles = [role for role in KEYS if entries & {*KEYS[role]} and extractor.space == INCEPTION]
        no_images = bool(roles) and "arr_0" not in entries
        for role in ["fid", *roles] if no_images else roles:
            mu, sigma = (sets.read_array(archive, key).astype(np.float64) for key in KEYS[role])
            if mu.ndim != 1 or sigma.shape != mu.shape * 2 or not np.isfinite(mu @ sigma @ mu):
                shapes = f"{list(mu.shape)} and {list(sigma.shape)}"
                raise ValueError(f"{KEYS[role]} are {shapes}: expected finite [D] and [D, D]")
            statistics[role] = mu, sigma
    if no_images:
        return Reference(name, sha256_file(path), statistics, None)
    images = sets.open_set(path)
    if images.size != size:
        raise ValueError(f"samples are {size}: expected {images.size} as the reference {name}")
    computed = make_reference(images, extractor)
    return Reference(name, sha256_file(path), computed.statistics | statistics, computed.features)


def make_reference(images: sets.ImageSet, extractor: Extractor) -> Reference:
    """Compute a reference from a set of real images."""
    digest, _ = sets.scan_image_set(images)
    features = extract(images, digest, extractor)
    statistics = {role: compute_statistics(features[role]) for role in KEYS if role in features}
    return Reference(images.name, digest, statistics, features["fid"])


def locate(name: str) -> Path | None:
    """Return a reference's path, ADM's files downloaded; None for the name of a data set."""
    if is_named_source(name.split(":")[0]):
        return None
    if url := PUBLISHED.get(name):
        return fetch(url, cache_directory() / "evaluation/references" / url.rsplit("/", 1)[-1])
    if not Path(name).exists():
        known = ", ".join(PUBLISHED)
        raise FileNotFoundError(f"no reference {name!r}: expected an .npz, a folder or {known}")
    return Path(name)
