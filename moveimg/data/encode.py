"""Images -> packed codes, in shards that survive an interruption."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from moveimg.config import ImagesConfig
from moveimg.data.codes import PackedCodes
from moveimg.data.crops import count_views, normalize
from moveimg.data.images import ImageSource, Split, open_images
from moveimg.data.loading import LoadedBatch, cut_batches, load_views
from moveimg.data.manifest import (
    MANIFEST,
    MAX_CODEBOOK_SIZE,
    Crops,
    EncodeSettings,
    Manifest,
    Record,
    Shard,
    Skipped,
    read_record,
    sha256_file,
    write_record,
    write_shard,
)
from moveimg.progress import progress_bar

PROGRESS = "progress.json"
SPLITS: tuple[Split, Split] = ("train", "val")


class Tokenizer(Protocol):
    """What encoding needs of a tokenizer."""

    @property
    def codebook_size(self) -> int: ...

    @property
    def downsample(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """float32 [B, 3, H, W] in [-1, 1] -> int64 [B, h*w]."""


class FinishedShard(Record):
    """A shard on disk, and the images left out of it; no shard where none could be read."""

    number: int
    shard: Shard | None
    skipped: tuple[Skipped, ...]


class Progress(Record):
    """The content of progress.json: what an interrupted run leaves to the next."""

    settings: EncodeSettings
    finished: tuple[FinishedShard, ...] = ()


def encode_images(
    source: ImageSource,
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    size: int,
    crops: Crops = "center",
    ranges: Sequence[float] = (1.0,),
    batch_size: int = 64,
    shard_size: int = 4096,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], Any] | None = None,
) -> Manifest:
    """Encode every view of every image of `source` into the directory `out`.

    size: height and width encoded, in pixels; a multiple of tokenizer.downsample
    crops, ranges: the views of an image, see `moveimg.data.crops.crop_views`
    batch_size: views per call of the tokenizer; cut by image index, whatever the workers
    shard_size: images per shard
    device: where the tokenizer lives
    dtype: autocast precision of the tokenizer; None leaves it at its own
    workers: processes that crop; None means none for small sources, else up to 8
    progress: called with (images done, images in all) after each batch

    An interrupted run goes on after its finished shards. A finished directory of the same
    settings is left as it is. Unreadable images are left out and listed in the manifest.

    Raises ValueError for settings that do not fit each other, a directory that holds something
    else, or a source with no readable image; OSError where `out` cannot be written.
    """
    out = Path(out)
    settings = _settings(
        source, tokenizer, size, crops, tuple(ranges), batch_size, shard_size, dtype
    )
    if (out / MANIFEST).exists():
        manifest = PackedCodes(out).manifest
        _require_same(out, manifest.settings, settings)
        return manifest
    finished = _resume(out, settings)
    total = len(source)
    blocks = [range(i, min(i + shard_size, total)) for i in range(0, total, shard_size)]
    todo = {number: block for number, block in enumerate(blocks) if number not in finished}
    done = total - sum(len(block) for block in todo.values())

    def advance(n: int) -> None:
        nonlocal done
        done += n
        if progress:
            progress(done, total)

    loader = load_views(source, settings, todo.values(), device, workers)
    encode = _encoder(tokenizer, settings, device, dtype)
    for number, block in todo.items():
        batches = islice(loader, len(cut_batches(block, settings)))
        finished[number] = _encode_shard(out, number, batches, encode, advance)
        _record(out, settings, finished)
    return _finish(source, out, settings, [finished[number] for number in range(len(blocks))])


def encode_splits(
    images: ImagesConfig, tokenizer: Tokenizer, out: str | Path, **options: Any
) -> dict[str, Manifest]:
    """Encode a source's train and val images into `out`/train and `out`/val.

    images: the source, its size and its views; val images get one view, the centre of the
        first range
    options: further arguments of encode_images

    Errors as of open_images and encode_images.
    """
    folder = Path(images.source)
    if folder.is_dir() and Path(out).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{out} lies in the image folder {folder}: expected another place")
    sources = {split: open_images(images.source, split) for split in SPLITS}
    manifests: dict[str, Manifest] = {}
    views: dict[Split, tuple[Crops, tuple[float, ...]]] = {
        "train": (images.crops, images.ranges),
        "val": ("center", images.ranges[:1]),
    }
    for split, (crops, ranges) in views.items():
        source = sources[split]
        with progress_bar(len(source), f"encode {split}", "image") as bar:
            manifests[split] = encode_images(
                source,
                tokenizer,
                Path(out) / split,
                size=images.size,
                crops=crops,
                ranges=ranges,
                progress=partial(_advance, bar),
                **options,
            )
    return manifests


def _advance(bar: tqdm, done: int, total: int) -> None:
    bar.update(done - bar.n)


def _settings(
    source: ImageSource,
    tokenizer: Tokenizer,
    size: int,
    crops: Crops,
    ranges: tuple[float, ...],
    batch_size: int,
    shard_size: int,
    dtype: torch.dtype | None,
) -> EncodeSettings:
    if tokenizer.codebook_size > MAX_CODEBOOK_SIZE:
        raise ValueError(
            f"codebook_size is {tokenizer.codebook_size}: packed codes hold at most "
            f"{MAX_CODEBOOK_SIZE} (uint16)"
        )
    if size < 1 or size % tokenizer.downsample:
        raise ValueError(
            f"size is {size}: expected a multiple of the tokenizer's downsample "
            f"{tokenizer.downsample}"
        )
    if batch_size < 1 or shard_size < 1:
        raise ValueError(
            f"batch_size is {batch_size} and shard_size {shard_size}: expected both at least 1"
        )
    side = size // tokenizer.downsample
    return EncodeSettings(
        tokenizer_fingerprint=tokenizer.fingerprint,
        codebook_size=tokenizer.codebook_size,
        grid=(side, side),
        image_size=size,
        crops=crops,
        ranges=ranges,
        n_crops=count_views(crops, ranges),
        class_names=tuple(source.class_names),
        source_digest=source.digest(),
        dtype=str(dtype).removeprefix("torch.") if dtype else "unchanged",
        batch_size=batch_size,
        shard_size=shard_size,
    )


# --- resuming and finishing ----------------------------------------------------------------


def _record(out: Path, settings: EncodeSettings, finished: dict[int, FinishedShard]) -> None:
    entries = tuple(finished[number] for number in sorted(finished))
    write_record(out / PROGRESS, Progress(settings=settings, finished=entries))


def _resume(out: Path, settings: EncodeSettings) -> dict[int, FinishedShard]:
    """Make `out` ready; return the shards to keep of an interrupted run, by number."""
    out.mkdir(parents=True, exist_ok=True)
    finished = {entry.number: entry for entry in _intact_shards(out, settings)}
    _record(out, settings, finished)
    return finished


def _intact_shards(out: Path, settings: EncodeSettings) -> list[FinishedShard]:
    """The finished shards of an interrupted run whose bytes are still what was written."""
    path = out / PROGRESS
    if not path.exists():
        if any(not entry.name.startswith(".") for entry in out.iterdir()):
            raise ValueError(
                f"'{out}' is not empty and holds no packed codes: expected a new or empty folder"
            )
        return []
    before = read_record(path, Progress)
    if any(entry.shard for entry in before.finished):
        _require_same(out, before.settings, settings)
    elif before.settings != settings:
        return []
    return [
        entry for entry in before.finished if entry.shard is None or _is_intact(out, entry.shard)
    ]


def _is_intact(out: Path, shard: Shard) -> bool:
    with suppress(FileNotFoundError):
        return (
            sha256_file(out / shard.codes) == shard.codes_sha256
            and sha256_file(out / shard.labels) == shard.labels_sha256
        )
    return False


def _require_same(out: Path, there: EncodeSettings, asked: EncodeSettings) -> None:
    differences = [
        f"{name} {_shorten(getattr(there, name))} there, {_shorten(getattr(asked, name))} asked"
        for name in EncodeSettings.model_fields
        if getattr(there, name) != getattr(asked, name)
    ]
    if differences:
        raise ValueError(
            f"'{out}' holds codes of other settings ({'; '.join(differences)}): expected the "
            "same settings or another folder"
        )


def _shorten(value: object, most: int = 40) -> str:
    text = str(value)
    return text if len(text) <= most else text[:12] + "..."


def _finish(
    source: ImageSource, out: Path, settings: EncodeSettings, finished: list[FinishedShard]
) -> Manifest:
    shards = tuple(entry.shard for entry in finished if entry.shard)
    skipped = tuple(image for entry in finished for image in entry.skipped)
    if not shards:
        (out / PROGRESS).unlink()
        with suppress(OSError):
            out.rmdir()
        first = f": {skipped[0].path} ({skipped[0].reason})" if skipped else ""
        raise ValueError(f"{source.name}: none of {len(source)} images could be read{first}")
    manifest = Manifest(
        source=source.name,
        settings=settings,
        n_images=sum(shard.n for shard in shards),
        shards=shards,
        skipped=skipped,
    )
    write_record(out / MANIFEST, manifest)
    (out / PROGRESS).unlink()
    return manifest


# --- encoding ------------------------------------------------------------------------------


def _encode_shard(
    out: Path,
    number: int,
    batches: Iterable[LoadedBatch],
    encode: Callable[[torch.Tensor], np.ndarray],
    advance: Callable[[int], None],
) -> FinishedShard:
    codes: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    skipped: list[Skipped] = []
    for views, batch_labels, unreadable in batches:
        skipped += unreadable
        if len(batch_labels):
            codes.append(encode(views))
            labels.append(batch_labels)
        advance(len(batch_labels) + len(unreadable))
    shard = None
    if codes:
        shard = write_shard(out, number, np.concatenate(codes), np.concatenate(labels))
    return FinishedShard(number=number, shard=shard, skipped=tuple(skipped))


def _encoder(
    tokenizer: Tokenizer,
    settings: EncodeSettings,
    device: str | torch.device,
    dtype: torch.dtype | None,
) -> Callable[[torch.Tensor], np.ndarray]:
    """A function: uint8 views [b * n_crops, 3, H, W] -> codes uint16 [b, n_crops, T]."""
    n_codes = settings.grid[0] * settings.grid[1]
    autocast = torch.autocast(torch.device(device).type, dtype) if dtype else nullcontext()

    @torch.inference_mode()
    def encode(views: torch.Tensor) -> np.ndarray:
        parts = []
        for chunk in views.split(settings.batch_size):
            with autocast:
                codes = tokenizer.encode(normalize(chunk.to(device, non_blocking=True)))
            if codes.shape != (len(chunk), n_codes):
                raise ValueError(
                    f"the tokenizer gave codes {list(codes.shape)} for {len(chunk)} images: "
                    f"expected {[len(chunk), n_codes]}"
                )
            parts.append(codes.cpu().numpy())
        found = np.concatenate(parts)
        if found.min() < 0 or found.max() >= settings.codebook_size:
            raise ValueError(
                f"the tokenizer gave codes {found.min()}..{found.max()}: expected "
                f"0..{settings.codebook_size - 1}"
            )
        return found.astype(np.uint16).reshape(-1, settings.n_crops, n_codes)

    return encode
