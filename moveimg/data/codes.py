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
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from moveimg.config import Size
from moveimg.data.crops import Crops
from moveimg.errors import validate
from moveimg.files import atomic, parse_json, read_text, write_text

MANIFEST = "manifest.json"
MANIFEST_LIMIT = 512 * 2**20  # bytes; a skipped image takes a line
MAX_CODEBOOK_SIZE = 2**16  # codes are uint16 on disk
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Record(BaseModel):
    """A frozen part of a file, unknown keys forbidden."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Shard(Record):
    """Two files: the codes and the labels of `n` images."""

    codes: Annotated[str, Field(pattern=r"^codes-\d{5,}\.npy$")]
    labels: Annotated[str, Field(pattern=r"^labels-\d{5,}\.npy$")]
    n: PositiveInt
    codes_sha256: Sha256
    labels_sha256: Sha256


class Skipped(Record):
    """An image that could not be read, and why."""

    path: str
    reason: str


class EncodeSettings(Record):
    """Everything that the bytes of the shards follow from."""

    tokenizer_fingerprint: str
    codebook_size: Annotated[int, Field(ge=1, le=MAX_CODEBOOK_SIZE)]
    grid: tuple[PositiveInt, PositiveInt] = Field(description="h and w of an image's codes")
    image_size: Size = Field(description="pixels of a square's side, or (height, width)")
    crops: Crops
    ranges: tuple[float, ...] = Field(min_length=1, description="enlargements before cropping")
    n_crops: PositiveInt = Field(description="views of an image, over all ranges")
    class_names: tuple[str, ...] = Field(min_length=1)
    source_digest: Sha256 = Field(description="of the image source, see ImageSource.digest")
    dtype: str = Field(description="precision of the tokenizer's arithmetic")
    batch_size: PositiveInt = Field(description="views per call of the tokenizer, at most")
    shard_size: PositiveInt = Field(description="images a shard is made from")


class Manifest(Record):
    """The content of manifest.json."""

    format_version: Literal[1] = 1
    source: str = Field(description="name of the image source, for people")
    settings: EncodeSettings
    n_images: PositiveInt
    shards: tuple[Shard, ...] = Field(min_length=1)
    skipped: tuple[Skipped, ...] = Field(description="unreadable images that were left out")

    @model_validator(mode="after")
    def _counts_agree(self) -> Manifest:
        total = sum(shard.n for shard in self.shards)
        if total != self.n_images:
            raise ValueError(f"n_images is {self.n_images}, but the shards hold {total}")
        return self


def read_record(path: Path, kind: type[Any]) -> Any:
    """The `Record` of a JSON file. Raises ValueError with one line that names the first fault."""
    return validate(kind, parse_json(read_text(path, MANIFEST_LIMIT), str(path)), str(path))


def write_record(path: Path, record: Record) -> None:
    """Write a record as JSON, atomically."""
    write_text(path, record.model_dump_json(indent=1) + "\n")


def read_manifest(directory: Path) -> Manifest:
    """The manifest of finished codes; FileNotFoundError where there is none."""
    if not (directory / MANIFEST).is_file():
        raise FileNotFoundError(
            f"'{directory}' holds no {MANIFEST}: expected packed codes, written by a finished "
            "`moveimg encode`"
        )
    return read_record(directory / MANIFEST, Manifest)


def write_shard(directory: Path, number: int, codes: np.ndarray, labels: np.ndarray) -> Shard:
    """Write the shard `number`: codes uint16 [n, crops, T] and labels int32 [n]."""
    names = f"codes-{number:05d}.npy", f"labels-{number:05d}.npy"
    for name, array in zip(names, (codes, labels), strict=True):
        with atomic(directory / name) as temporary:
            np.save(temporary, array)
    hashes = [sha256_file(directory / name) for name in names]
    fields = ("codes", "labels", "codes_sha256", "labels_sha256")
    return Shard(n=len(codes), **dict(zip(fields, (*names, *hashes), strict=True)))


def is_intact(directory: Path, shard: Shard) -> bool:
    """Whether both files of a shard are there, with the bytes that were written."""
    try:
        hashes = [sha256_file(directory / name) for name in (shard.codes, shard.labels)]
    except FileNotFoundError:
        return False
    return hashes == [shard.codes_sha256, shard.labels_sha256]


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class PackedCodes:
    """Read access to a packed-codes directory of N images.

    Attributes:
        manifest: the parsed manifest; settings: its settings.
        labels: int32 [N].
        n_crops, codebook_size, image_size, grid (h, w), class_names, tokenizer_fingerprint.

    Raises FileNotFoundError when the manifest or a shard is missing, ValueError when the
    manifest is malformed or a shard is not what it says. `verify` hashes every file.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory)
        self.settings = settings = self.manifest.settings
        self.n_crops = settings.n_crops
        self.codebook_size = settings.codebook_size
        self.image_size = settings.image_size
        self.grid = settings.grid
        self.class_names = list(settings.class_names)
        self.tokenizer_fingerprint = settings.tokenizer_fingerprint
        shape = (self.n_crops, settings.grid[0] * settings.grid[1])
        shards = self.manifest.shards
        self._codes = [
            _open_array(self.directory / s.codes, "uint16", (s.n, *shape)) for s in shards
        ]
        labels = [_open_array(self.directory / s.labels, "int32", (s.n,)) for s in shards]
        self.labels = np.concatenate(labels)
        self._starts = np.cumsum([0] + [shard.n for shard in shards])
        self._checked = [False] * len(shards)
        if self.labels.min() < 0 or self.labels.max() >= len(self.class_names):
            raise ValueError(
                f"'{self.directory}' has labels {self.labels.min()}..{self.labels.max()}: "
                f"expected 0..{len(self.class_names) - 1}"
            )

    def __len__(self) -> int:
        return self.manifest.n_images

    def get(self, indices: np.ndarray, crops: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes int64 [B, T] and labels int64 [B] of images `indices` [B] in views `crops` [B].

        Raises IndexError for an index outside 0..N-1 or a view outside 0..n_crops-1.
        """
        indices, crops = np.asarray(indices), np.asarray(crops)
        for name, values, end in (("image", indices, len(self)), ("crop", crops, self.n_crops)):
            if values.size and not 0 <= values.min() <= values.max() < end:
                reach = f"{values.min()}..{values.max()}"
                raise IndexError(f"{name} indices reach {reach}: expected 0..{end - 1}")
        codes = np.empty((len(indices), self._codes[0].shape[2]), np.int64)
        shard_of = np.searchsorted(self._starts, indices, side="right") - 1
        for number in np.unique(shard_of):
            self._check_values(number)
            rows = np.flatnonzero(shard_of == number)
            codes[rows] = self._codes[number][indices[rows] - self._starts[number], crops[rows]]
        return torch.from_numpy(codes), torch.from_numpy(self.labels[indices].astype(np.int64))

    def require_tokenizer(self, fingerprint: str) -> None:
        """Raise ValueError unless the codes were made by the tokenizer of this fingerprint."""
        if fingerprint != self.tokenizer_fingerprint:
            raise ValueError(
                f"'{self.directory}' was encoded by tokenizer {self.tokenizer_fingerprint[:12]}, "
                f"not by {fingerprint[:12]}: expected codes and tokenizer to match"
            )

    def verify(self) -> None:
        """Read every file and raise ValueError for a shard whose sha256 is not the manifest's."""
        for shard in self.manifest.shards:
            if not is_intact(self.directory, shard):
                raise ValueError(f"'{self.directory / shard.codes}' or its labels are corrupt")

    def _check_values(self, number: int) -> None:
        """Compare all codes of a shard with the codebook, when it is first read."""
        if self._checked[number]:
            return
        largest = int(self._codes[number].max())
        if largest >= self.codebook_size:
            raise ValueError(
                f"'{self.directory}' has code {largest}: expected less than its codebook_size "
                f"{self.codebook_size}"
            )
        self._checked[number] = True


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `n` images in an epoch: a permutation, int64 [n], of (seed, epoch) alone."""
    return np.random.default_rng((seed, epoch, 0)).permutation(n)


def crop_choice(n: int, n_crops: int, seed: int, epoch: int) -> np.ndarray:
    """The view each of `n` images shows in an epoch: int64 [n] in 0..n_crops-1, uniform."""
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
        """This rank's slice of a step's batch, b = batch_size / world_size.

        Returns codes int64 [b, T], labels int64 [b] and image indices int64 [b]. The slices of
        ranks 0, 1, ... concatenated are the batch of a single rank.
        Raises ValueError when world_size does not divide batch_size, or rank is not below it.
        """
        if self.batch_size % world_size or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size {self.batch_size} on rank {rank} of {world_size}: expected a "
                "batch_size that world_size divides, and a rank below world_size"
            )
        local = self.batch_size // world_size
        start = step * self.batch_size + rank * local
        epochs, places = np.divmod(np.arange(start, start + local), self.images_per_epoch)
        indices, crops = np.empty((2, local), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            order, choice = self._epoch(int(epoch))
            indices[here] = order[places[here]]
            crops[here] = choice[indices[here]]
        codes, labels = self.codes.get(indices, crops)
        return codes, labels, indices

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if self._cached is None or self._cached[0] != epoch:
            n = len(self.codes)
            choice = crop_choice(n, self.codes.n_crops, self.seed, epoch)
            self._cached = (epoch, epoch_order(n, self.seed, epoch), choice)
        return self._cached[1:]


def _open_array(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' is missing: its {MANIFEST} lists it")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("an archive of arrays, expected one array")
    except Exception as error:  # numpy's header parser raises many kinds for broken files
        raise ValueError(f"'{path}' is corrupt or truncated: {str(error)[:200]}") from error
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(
            f"'{path}' is {array.dtype} {list(array.shape)}: expected {dtype} {list(shape)}"
        )
    return np.asarray(array)  # a plain array over the same map: np.memmap indexes slower
