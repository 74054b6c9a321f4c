"""Packed codes: a directory of memory-mapped shards, and batches drawn from it.

manifest.json         the `Manifest`; written last, so without it encoding is unfinished
codes-00000.npy ...   uint16 [n, crops, T], T = h*w codes in raster order
labels-00000.npy ...  int32 [n]
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt

from moveimg.config import Size
from moveimg.config.model import Config
from moveimg.config.run import Crops
from moveimg.errors import validate
from moveimg.files import atomic, parse_json, read_text

MANIFEST = "manifest.json"
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Shard(Config):
    """The file of codes and the file of labels of `n` images."""

    codes: Annotated[str, Field(pattern=r"^codes-\d{5,}\.npy$")]
    labels: Annotated[str, Field(pattern=r"^labels-\d{5,}\.npy$")]
    n: PositiveInt
    codes_sha256: Sha256
    labels_sha256: Sha256


class Skipped(Config):
    """An image that could not be read, and the reason."""

    path: str
    reason: str


class EncodeSettings(Config):
    """All settings that determine the bytes of the shards."""

    tokenizer_fingerprint: str
    codebook_size: int = Field(ge=1, le=2**16)  # codes are uint16 on disk
    grid: tuple[PositiveInt, PositiveInt]  # (h, w) of an image's codes
    image_size: Size  # pixels of a square's side, or (height, width)
    crops: Crops = "center"
    ranges: tuple[float, ...] = Field((1.0,), min_length=1)  # crop from size * range pixels
    n_crops: PositiveInt  # views per image, over all ranges
    class_names: tuple[str, ...] = Field(min_length=1)
    source_digest: Sha256  # see ImageSource.digest
    dtype: str  # autocast dtype of the tokenizer
    batch_size: PositiveInt = 64  # maximum views per tokenizer call
    shard_size: PositiveInt = 4096  # images per shard, unreadable ones included


class Manifest(Config):
    """The content of manifest.json; `skipped` lists the images that could not be read."""

    format_version: Literal[1] = 1
    source: str
    settings: EncodeSettings
    n_images: NonNegativeInt
    shards: tuple[Shard, ...]
    skipped: tuple[Skipped, ...]


def load_manifest(path: Path) -> Manifest:
    """Read the manifest in a JSON file. Raises ValueError, which names the first bad key."""
    text = read_text(path, 512 * 2**20)  # larger than usual: it lists every skipped image
    return validate(Manifest, parse_json(text, str(path)), str(path))


def write_shard(directory: Path, number: int, codes: np.ndarray, labels: np.ndarray) -> Shard:
    """Write shard `number`: codes uint16 [n, crops, T] and labels int32 [n]."""
    fields: dict[str, Any] = {"n": len(codes)}
    for kind, array in (("codes", codes), ("labels", labels)):
        fields[kind] = f"{kind}-{number:05d}.npy"
        with atomic(directory / fields[kind]) as temporary:
            np.save(temporary, array)
        fields[f"{kind}_sha256"] = sha256_file(directory / fields[kind])
    return Shard(**fields)


def sha256_file(path: Path) -> str:
    """Return the hexadecimal sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class PackedCodes:
    """Packed codes of N images, opened as memory maps; `labels` is int32 [N].

    Raises FileNotFoundError for a missing file, ValueError for a malformed one.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not (self.directory / MANIFEST).is_file():
            expected = "expected the output of a finished `moveimg encode`"
            raise FileNotFoundError(f"'{directory}' holds no {MANIFEST}: {expected}")
        self.manifest = load_manifest(self.directory / MANIFEST)
        self.settings = settings = self.manifest.settings
        self.n_crops, self.codebook_size = settings.n_crops, settings.codebook_size
        self.image_size, self.grid = settings.image_size, settings.grid
        self.class_names = list(settings.class_names)
        shape, shards = (self.n_crops, self.grid[0] * self.grid[1]), self.manifest.shards
        if not shards:
            raise ValueError(f"'{directory}' holds no shards: expected at least one")
        self._codes = [self._open(shard.codes, "uint16", (shard.n, *shape)) for shard in shards]
        self.labels = np.concatenate([self._open(s.labels, "int32", (s.n,)) for s in shards])
        self._starts = np.cumsum([0] + [shard.n for shard in shards])
        self._checked: set[int] = set()
        low, high, last = self.labels.min(), self.labels.max(), len(self.class_names) - 1
        if low < 0 or high > last:
            raise ValueError(f"'{directory}' has labels {low}..{high}: expected 0..{last}")

    def __len__(self) -> int:
        return len(self.labels)

    def get(self, indices: np.ndarray, crops: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes int64 [B, T] and labels int64 [B] of `indices` [B] in views `crops` [B]."""
        codes = np.empty((len(indices), self._codes[0].shape[2]), np.int64)
        shard_of = np.searchsorted(self._starts, indices, side="right") - 1
        for number in np.unique(shard_of):
            shard, rows = self._codes[number], np.flatnonzero(shard_of == number)
            if number not in self._checked and (largest := shard.max()) >= self.codebook_size:
                limit = f"less than its codebook_size {self.codebook_size}"
                raise ValueError(f"'{self.directory}' has code {largest}: expected {limit}")
            self._checked.add(number)
            codes[rows] = shard[indices[rows] - self._starts[number], crops[rows]]
        return torch.from_numpy(codes), torch.from_numpy(self.labels[indices].astype(np.int64))

    def require_tokenizer(self, fingerprint: str) -> None:
        """Raise ValueError unless the tokenizer with this fingerprint made the codes."""
        if fingerprint != (made_by := self.settings.tokenizer_fingerprint):
            pair = f"tokenizer {made_by[:12]}: expected {fingerprint[:12]}"
            raise ValueError(f"'{self.directory}' was encoded by {pair}")

    def _open(self, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        path = self.directory / name
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if array.dtype != dtype or array.shape != shape:
                raise ValueError(f"{array.dtype} {array.shape}, expected {dtype} {shape}")
        except FileNotFoundError:
            raise FileNotFoundError(f"'{path}' is missing, but {MANIFEST} lists it") from None
        except Exception as error:  # numpy's header parser raises many kinds for broken files
            raise ValueError(f"'{path}' is corrupt or truncated: {str(error)[:200]}") from error
        return np.asarray(array)  # the same map as a plain array, faster to index than np.memmap


@lru_cache(maxsize=4)
def draw_epoch(n: int, n_views: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the order of n images in an epoch and the view of each image, int64 [n] each."""
    order = np.random.default_rng((seed, epoch, 0)).permutation(n)
    return order, np.random.default_rng((seed, epoch, 1)).integers(n_views, size=n)


def draw_views(
    positions: np.ndarray, per_epoch: int, n: int, n_views: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return images and views, int64 [b], at positions [b] of epochs of `per_epoch` images."""
    epochs, offsets = np.divmod(positions, per_epoch)
    images, views = np.empty((2, len(positions)), np.int64)
    for epoch in np.unique(epochs).tolist():
        rows, (order, view_of) = epochs == epoch, draw_epoch(n, n_views, seed, epoch)
        images[rows] = order[offsets[rows]]
        views[rows] = view_of[images[rows]]
    return images, views


def draw_batch(
    codes: PackedCodes, batch_size: int, seed: int, step: int, micro_batch: int = 0, count: int = 1
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Return a micro-batch of a step: codes int64 [b, T], labels and image indices [b].

    b = batch_size / count, the number of micro-batches; the whole batch depends on (seed, step)
    alone. The last, partial batch of an epoch is dropped; with fewer images than `batch_size`, a
    batch spans epochs.
    """
    n, local = len(codes), batch_size // count
    start = step * batch_size + micro_batch * local
    per_epoch = n - n % batch_size or n
    indices, crops = draw_views(start + np.arange(local), per_epoch, n, codes.n_crops, seed)
    return *codes.get(indices, crops), indices
