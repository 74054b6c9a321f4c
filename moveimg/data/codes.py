"""Packed codes: a directory of memory-mapped shards, and batches drawn from it.

manifest.json         what the codes are (`Manifest`); written last, so its presence means done
codes-00000.npy ...   uint16 [n, crops, T], T = h*w codes in raster order
labels-00000.npy ...  int32 [n]
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, PositiveInt

from moveimg.config import Size
from moveimg.config.model import Config
from moveimg.config.run import Crops
from moveimg.errors import validate
from moveimg.files import atomic, parse_json, read_text, write_text

MANIFEST = "manifest.json"
MANIFEST_LIMIT = 512 * 2**20  # bytes; a skipped image is a line
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Shard(Config):
    """Two files: the codes and the labels of `n` images."""

    codes: Annotated[str, Field(pattern=r"^codes-\d{5,}\.npy$")]
    labels: Annotated[str, Field(pattern=r"^labels-\d{5,}\.npy$")]
    n: PositiveInt
    codes_sha256: Sha256
    labels_sha256: Sha256


class Skipped(Config):
    """An image that could not be read, and why."""

    path: str
    reason: str


class FinishedShard(Config):
    """A shard on disk and the images left out of it; `shard` is None if no image could be read."""

    shard: Shard | None
    skipped: tuple[Skipped, ...]


class EncodeSettings(Config):
    """All settings that determine the bytes of the shards."""

    tokenizer_fingerprint: str
    codebook_size: int = Field(ge=1, le=2**16)  # codes are uint16 on disk
    grid: tuple[PositiveInt, PositiveInt]  # h and w of an image's codes
    image_size: Size  # pixels of a square's side, or (height, width)
    crops: Crops
    ranges: tuple[float, ...] = Field(min_length=1)  # enlargements before cropping
    n_crops: PositiveInt  # views of an image, over all ranges
    class_names: tuple[str, ...] = Field(min_length=1)
    source_digest: Sha256  # see ImageSource.digest
    dtype: str  # precision of the tokenizer's arithmetic
    batch_size: PositiveInt  # views per call of the tokenizer, at most
    shard_size: PositiveInt  # images a shard is made from


class Manifest(Config):
    """The content of manifest.json; `source` names the images, `skipped` were unreadable."""

    format_version: Literal[1] = 1
    source: str
    settings: EncodeSettings
    n_images: PositiveInt
    shards: tuple[Shard, ...] = Field(min_length=1)
    skipped: tuple[Skipped, ...]


def load_json(path: Path, kind: type[Any]) -> Any:
    """The pydantic model `kind` in a JSON file. Raises ValueError, which names the first fault."""
    return validate(kind, parse_json(read_text(path, MANIFEST_LIMIT), str(path)), str(path))


def save_json(path: Path, model: BaseModel) -> None:
    """Write a pydantic model as JSON, atomically."""
    write_text(path, model.model_dump_json(indent=1) + "\n")


def write_shard(directory: Path, number: int, codes: np.ndarray, labels: np.ndarray) -> Shard:
    """Write the shard `number`: codes uint16 [n, crops, T] and labels int32 [n]."""
    made: dict[str, Any] = {"n": len(codes)}
    for kind, array in (("codes", codes), ("labels", labels)):
        made[kind] = f"{kind}-{number:05d}.npy"
        with atomic(directory / made[kind]) as temporary:
            np.save(temporary, array)
        made[f"{kind}_sha256"] = sha256_file(directory / made[kind])
    return Shard(**made)


def is_intact(directory: Path, shard: Shard) -> bool:
    """Whether both files of a shard are there, with the bytes that were written."""
    digests = {shard.codes: shard.codes_sha256, shard.labels: shard.labels_sha256}
    present = all((directory / name).is_file() for name in digests)
    return present and all(sha256_file(directory / n) == digest for n, digest in digests.items())


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class PackedCodes:
    """Read access to a packed-codes directory of N images; `labels` is int32 [N].

    Raises FileNotFoundError when the manifest or a shard is missing, ValueError when one is
    malformed. `verify` hashes every file.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not (self.directory / MANIFEST).is_file():
            expected = "expected codes of a finished `moveimg encode`"
            raise FileNotFoundError(f"'{directory}' holds no {MANIFEST}: {expected}")
        self.manifest: Manifest = load_json(self.directory / MANIFEST, Manifest)
        self.settings = settings = self.manifest.settings
        self.n_crops, self.codebook_size = settings.n_crops, settings.codebook_size
        self.image_size, self.grid = settings.image_size, settings.grid
        self.class_names = list(settings.class_names)
        shape, shards = (self.n_crops, self.grid[0] * self.grid[1]), self.manifest.shards
        self._codes = [self._open(shard.codes, "uint16", (shard.n, *shape)) for shard in shards]
        self.labels = np.concatenate([self._open(s.labels, "int32", (s.n,)) for s in shards])
        self._starts = np.cumsum([0] + [shard.n for shard in shards])
        self._checked: set[int] = set()
        if self.labels.min() < 0 or self.labels.max() >= len(self.class_names):
            reach = f"{self.labels.min()}..{self.labels.max()}"
            last = len(self.class_names) - 1
            raise ValueError(f"'{self.directory}' has labels {reach}: expected 0..{last}")

    def __len__(self) -> int:
        return len(self.labels)

    def get(self, indices: np.ndarray, crops: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes int64 [B, T] and labels int64 [B] of images `indices` [B] in views `crops` [B]."""
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
        """Raise ValueError unless the codes were made by the tokenizer of this fingerprint."""
        if fingerprint != (made_by := self.settings.tokenizer_fingerprint):
            pair = f"tokenizer {made_by[:12]}, not by {fingerprint[:12]}"
            raise ValueError(f"'{self.directory}' was encoded by {pair}: expected them to match")

    def verify(self) -> None:
        """Read every file and raise ValueError for a shard whose sha256 is not the manifest's."""
        for shard in self.manifest.shards:
            if not is_intact(self.directory, shard):
                raise ValueError(f"'{self.directory / shard.codes}' or its labels are corrupt")

    def _open(self, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        path = self.directory / name
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if array.dtype != dtype or array.shape != shape:
                raise ValueError(f"{array.dtype} {array.shape}, expected {dtype} {shape}")
        except FileNotFoundError:
            raise FileNotFoundError(f"'{path}' is missing: its {MANIFEST} lists it") from None
        except Exception as error:  # numpy's header parser raises many kinds for broken files
            raise ValueError(f"'{path}' is corrupt or truncated: {str(error)[:200]}") from error
        return np.asarray(array)  # a plain array over the same map: np.memmap indexes slower


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `n` images in an epoch: a permutation, int64 [n], of (seed, epoch) alone."""
    return np.random.default_rng((seed, epoch, 0)).permutation(n)


def crop_choice(n: int, n_crops: int, seed: int, epoch: int) -> np.ndarray:
    """The view of each of `n` images in an epoch: int64 [n] in 0..n_crops-1, uniform."""
    return np.random.default_rng((seed, epoch, 1)).integers(n_crops, size=n)


class Batches:
    """Shuffled batches: the batch of a step is a pure function of (seed, step).

    Every epoch has its own order and choice of crops. The last, partial batch of an epoch is
    dropped. With fewer images than `batch_size`, epochs are concatenated instead.
    """

    def __init__(self, codes: PackedCodes, batch_size: int, seed: int = 0) -> None:
        self.codes, self.batch_size, self.seed = codes, batch_size, seed
        n = len(codes)
        self.images_per_epoch = n - n % batch_size if n >= batch_size else n
        self._cached: tuple[int, np.ndarray, np.ndarray] | None = None

    def batch(
        self, step: int, rank: int = 0, world_size: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """This rank's slice of a step's batch: codes int64 [b, T], labels and image indices [b].

        b = batch_size / world_size; all ranks' slices together are the batch of one process.
        """
        local = self.batch_size // world_size
        start = step * self.batch_size + rank * local
        epochs, positions = np.divmod(np.arange(start, start + local), self.images_per_epoch)
        indices, crops = np.empty((2, local), np.int64)
        for epoch in np.unique(epochs).tolist():
            if self._cached is None or self._cached[0] != epoch:
                n, seed = len(self.codes), self.seed
                choice = crop_choice(n, self.codes.n_crops, seed, epoch)
                self._cached = epoch, epoch_order(n, seed, epoch), choice
            here = epochs == epoch
            indices[here] = self._cached[1][positions[here]]
            crops[here] = self._cached[2][indices[here]]
        codes, labels = self.codes.get(indices, crops)
        return codes, labels, indices
