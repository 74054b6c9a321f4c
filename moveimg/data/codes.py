"""Packed codes: a directory of memory-mapped shards, and batches drawn from it.

- manifest.json: what the codes are (`Manifest`); written last, so its presence means done
- codes-00000.npy, ...: uint16 [n, crops, T], T = h*w codes in raster order
- labels-00000.npy, ...: int32 [n]
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from moveimg.data.manifest import MANIFEST, read_manifest, sha256_file

_ROWS_CHECKED = 64  # images whose codes are compared with codebook_size on opening


class PackedCodes:
    """Read access to a packed-codes directory of N images.

    manifest: the parsed manifest; settings: its settings
    labels: int32 [N]
    n_crops, codebook_size, image_size, grid (h, w), class_names, tokenizer_fingerprint

    Raises FileNotFoundError when the manifest or a shard is missing, ValueError when the
    manifest is malformed or a shard is not what it says. `verify` reads everything.
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

        n_codes = settings.grid[0] * settings.grid[1]
        labels, self._codes = [], []
        for shard in self.manifest.shards:
            path = self.directory / shard.codes
            self._codes.append(_open_array(path, "uint16", (shard.n, self.n_crops, n_codes)))
            labels.append(_open_array(self.directory / shard.labels, "int32", (shard.n,)))
        self.labels = np.concatenate(labels)
        self._starts = np.cumsum([0] + [shard.n for shard in self.manifest.shards])
        self._check_values()

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
        """Read every file and raise ValueError for one whose sha256 is not the manifest's."""
        for shard in self.manifest.shards:
            for name, expected in (
                (shard.codes, shard.codes_sha256),
                (shard.labels, shard.labels_sha256),
            ):
                found = sha256_file(self.directory / name)
                if found != expected:
                    raise ValueError(
                        f"'{self.directory / name}' is corrupt: sha256 {found[:12]}, expected "
                        f"{expected[:12]}"
                    )

    def _check_values(self) -> None:
        n_classes = len(self.class_names)
        if self.labels.min() < 0 or self.labels.max() >= n_classes:
            raise ValueError(
                f"'{self.directory}' has labels {self.labels.min()}..{self.labels.max()}: "
                f"expected 0..{n_classes - 1}"
            )
        largest = int(self._codes[0][:_ROWS_CHECKED].max())
        if largest >= self.codebook_size:
            raise ValueError(
                f"'{self.directory}' has code {largest}: expected less than its codebook_size "
                f"{self.codebook_size}"
            )


# --- batches -------------------------------------------------------------------------------


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `n` images in an epoch: a permutation, int64 [n], of (seed, epoch) alone."""
    return np.random.default_rng((seed, epoch, 0)).permutation(n)


def crop_choice(n: int, n_crops: int, seed: int, epoch: int) -> np.ndarray:
    """The view each of `n` images shows in an epoch: int64 [n] in 0..n_crops-1, uniform."""
    return np.random.default_rng((seed, epoch, 1)).integers(n_crops, size=n)


class Batches:
    """Shuffled batches: the batch of a step is a pure function of (seed, step).

    Every epoch has its own order and choice of crops. The last, partial batch of an epoch is
    dropped. With fewer images than `batch_size`, epochs are strung together instead.

    Raises ValueError for a batch_size below 1 or a negative seed.
    """

    def __init__(self, codes: PackedCodes, batch_size: int, seed: int = 0) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: expected at least 1")
        if seed < 0:
            raise ValueError(f"seed is {seed}: expected at least 0")
        self.codes, self.batch_size, self.seed = codes, batch_size, seed
        n = len(codes)
        self.images_per_epoch = n - n % batch_size if n >= batch_size else n
        self._cached: tuple[int, np.ndarray, np.ndarray] | None = None

    def batch(
        self, step: int, rank: int = 0, world_size: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """This rank's slice of a step's batch, b = batch_size / world_size.

        Returns codes int64 [b, T], labels int64 [b] and image indices int64 [b]. The slices of
        ranks 0, 1, ... in a row are the batch of one rank alone.
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
    except (ValueError, EOFError) as error:
        raise ValueError(f"'{path}' is corrupt or truncated: {error}") from error
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(
            f"'{path}' is {array.dtype} {list(array.shape)}: expected {dtype} {list(shape)}"
        )
    return np.asarray(array)  # a plain array over the same map: np.memmap indexes slower
