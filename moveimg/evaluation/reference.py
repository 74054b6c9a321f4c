"""What a set is compared with: statistics and images in an .npz, or a folder, or a known name."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import torch

from moveimg.evaluation.features import Extractor, extract
from moveimg.evaluation.sets import ImageSet, npz_array, npz_entries, open_set, scan_image_set
from moveimg.evaluation.statistics import Statistics, statistics_of
from moveimg.evaluation.writing import write_array, write_images
from moveimg.files import atomic

KEPT_IMAGES = 10_000  # for precision, recall and KID, as in ADM's files
ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
PUBLISHED = {
    "imagenet64": f"{ADM}/64/VIRTUAL_imagenet64_labeled.npz",
    "imagenet128": f"{ADM}/128/VIRTUAL_imagenet128_labeled.npz",
    "imagenet256": f"{ADM}/256/VIRTUAL_imagenet256_labeled.npz",
    "imagenet512": f"{ADM}/512/VIRTUAL_imagenet512.npz",
}
KEYS = {"fid": ("mu", "sigma"), "sfid": ("mu_s", "sigma_s")}  # ADM's names


@dataclass(frozen=True)
class Reference:
    """The real side of a comparison.

    Attributes:
        name: the path or name given.
        digest: sha256 of the file; of a folder, of its pixels.
        split: `train`, `val`, or None where nothing tells.
        size: (H, W) of its images; None where it holds none and does not tell.
        count: images behind the statistics; None where the file does not tell.
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
        """For results: what it is, and how many images stand behind each number."""
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
            folder of pictures of the samples' size; or one of PUBLISHED, downloaded on first use.
        extractor: what sees its images, and computes what statistics it lacks.
        cache: where features and downloads are kept.

    Raises FileNotFoundError, or ValueError where it is none or of another extractor.
    """
    path = locate(name, cache)
    if path.is_dir():
        return reference_of(open_set(path), extractor, cache)
    entries = npz_entries(path)
    about = json.loads(npz_array(path, "about").item()) if "about" in entries else {}
    for published, url in PUBLISHED.items():
        if path.name == url.rsplit("/", 1)[-1]:
            size = int(published.removeprefix("imagenet"))
            about = {"split": "train", "size": (size, size)} | about
    _require_extractor(path, about.get("extractor"), extractor, "mu" in entries)
    images = open_set(path) if "arr_0" in entries else None
    if images is None and "mu" not in entries:
        raise ValueError(f"{path}: has neither images (arr_0) nor statistics (mu, sigma)")
    found = _stored(path, entries, about.get("count"))
    features = None
    if images is not None:
        features = extract(images, scan_image_set(images).digest, extractor, cache)
        found = _statistics(features) | found
    return Reference(
        name=name,
        digest=digest_of(path),
        split=about.get("split"),
        size=images.size if images is not None else _size(about),
        count=found["fid"].count,
        statistics=found,
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

    Returns what the file says of itself.
    """
    made = reference_of(images, extractor, cache, split)
    rows = np.arange(len(images))
    if len(rows) > KEPT_IMAGES:
        rows = np.sort(np.random.default_rng(0).permutation(len(rows))[:KEPT_IMAGES])
    about = {
        "name": images.name,
        "split": split,
        "count": len(images),
        "size": images.size,
        "sha256_of_pixels": made.digest,
        "extractor": extractor.fingerprint,
        "extractor_name": extractor.name,
    }
    with atomic(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for role, (mu, sigma) in KEYS.items():
            if role in made.statistics:
                write_array(archive, mu, made.statistics[role].mu)
                write_array(archive, sigma, made.statistics[role].sigma)
        write_images(archive, _rows(images, rows), (len(rows), *images.size, 3))
        write_array(archive, "about", np.array(json.dumps(about)))
    return about


def digest_of(path: Path) -> str:
    """sha256 of a reference's file; of a folder, of its pixels."""
    if path.is_dir():
        return scan_image_set(open_set(path)).digest
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def locate(name: str, cache: Path) -> Path:
    """The file or folder of a reference. FileNotFoundError or ValueError where there is none."""
    path = fetch(name, cache) if name in PUBLISHED else Path(name)
    if not path.exists():
        known = ", ".join(PUBLISHED)
        raise FileNotFoundError(f"no reference {name!r}: expected a file, a folder or {known}")
    if not path.is_dir() and path.suffix != ".npz":
        raise ValueError(f"{path}: expected an .npz, a folder or one of {', '.join(PUBLISHED)}")
    return path


def fetch(name: str, cache: Path) -> Path:
    """ADM's file of a published name, downloaded once; FileNotFoundError if it is not to be had."""
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


def _size(about: Mapping[str, Any]) -> tuple[int, int] | None:
    """What a file says of the size of its images, where it holds none."""
    size = about.get("size")
    return (int(size[0]), int(size[1])) if size else None


def _statistics(features: Mapping[str, np.ndarray]) -> dict[str, Statistics]:
    return {role: statistics_of(features[role]) for role in KEYS if role in features}


def _stored(path: Path, entries: list[str], count: int | None) -> dict[str, Statistics]:
    found = {}
    for role, (mu, sigma) in KEYS.items():
        if mu in entries and sigma in entries:
            pair = [npz_array(path, key).astype(np.float64) for key in (mu, sigma)]
            if pair[0].ndim != 1 or pair[1].shape != (len(pair[0]), len(pair[0])):
                raise ValueError(
                    f"{path}: {mu} {list(pair[0].shape)} and {sigma} {list(pair[1].shape)}: "
                    "expected [D] and [D, D]"
                )
            if not all(np.isfinite(array).all() for array in pair):
                raise ValueError(f"non-finite: {path}: {mu} or {sigma} is not finite")
            found[role] = Statistics(pair[0], pair[1], count)
    return found


def _require_extractor(path: Path, stored: str | None, extractor: Extractor, has_mu: bool) -> None:
    """Statistics of one network say nothing about features of another."""
    own_classifier = extractor.class_names is not None
    if has_mu and (stored or "") != extractor.fingerprint and (stored or own_classifier):
        made_by = f"extractor {stored[:12]}" if stored else "Inception"
        raise ValueError(
            f"other-extractor: {path} holds statistics of {made_by}, the samples are seen by "
            f"{extractor.name} ({extractor.fingerprint[:12]})"
        )


def _rows(images: ImageSet, rows: np.ndarray) -> Any:
    """The images of sorted row numbers, in parts."""
    start = 0
    for batch in images.read(256):
        chosen = rows[(rows >= start) & (rows < start + len(batch))] - start
        yield batch[chosen]
        start += len(batch)
