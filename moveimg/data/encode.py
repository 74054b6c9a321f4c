"""Images -> packed codes, in shards that survive an interruption and that ranks share.

Until the manifest is written, the directory also holds `progress.json` (the settings) and one
`finished-00000.json` per whole shard, with its sha256.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from moveimg.config import ImagesConfig
from moveimg.data.codes import (
    MANIFEST,
    MAX_CODEBOOK_SIZE,
    EncodeSettings,
    Manifest,
    PackedCodes,
    Record,
    Shard,
    Skipped,
    read_record,
    sha256_file,
    write_record,
    write_shard,
)
from moveimg.data.crops import Crops, count_views, crop_views, normalize, stack_views
from moveimg.data.folders import report_classes
from moveimg.data.images import ImageSource, Split, open_images
from moveimg.dist import World, all_ranks, print_rank0
from moveimg.errors import list_names, shorten
from moveimg.files import lock
from moveimg.images import UnreadableImageError
from moveimg.progress import progress_bar

SPLITS: tuple[Split, Split] = ("train", "val")
PROGRESS = "progress.json"
SKIPPED_SHOWN = 20
SMALL_SOURCE = 2048  # images; below it, starting worker processes costs more than it saves
MAX_WORKERS = 8
# uint8 views [b * n_crops, 3, size, size], int32 labels [b], and the images left out
LoadedBatch = tuple[torch.Tensor, np.ndarray, list[Skipped]]
# uint8 views [b * n_crops, 3, H, W] -> codes uint16 [b, n_crops, T]
Encoder = Callable[[torch.Tensor], np.ndarray]


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


class ChangedSettingsError(ValueError):
    """A directory holds codes of other settings; `details` says which."""

    def __init__(self, directory: Path, details: str) -> None:
        super().__init__(
            f"'{directory}' holds codes of other settings ({details}): expected the same settings "
            "or another folder"
        )
        self.details = details


class Progress(Record):
    """The content of progress.json."""

    settings: EncodeSettings


class FinishedShard(Record):
    """A shard on disk, and the images left out of it; no shard where none could be read."""

    number: int
    shard: Shard | None
    skipped: tuple[Skipped, ...]


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

    Every process of a `torchrun` job has to call this. They share the shards, and the bytes are
    those that one process would write. An interrupted run continues after its finished shards, on
    any number of processes. A finished directory of the same settings is left unchanged.
    Unreadable images are left out and listed in the manifest.

    Args:
        size: height and width encoded, in pixels; a multiple of tokenizer.downsample.
        crops, ranges: the views of an image, see `crop_views`.
        batch_size: views per call of the tokenizer; cut by image index, whatever the workers.
        shard_size: images per shard.
        device: where the tokenizer is.
        dtype: autocast precision of the tokenizer; None leaves it at its own.
        workers: processes that crop; None means none for small sources, else up to 8.
        progress: called with (images done, images in all) of this process after each batch.

    Raises:
        ValueError: the settings do not fit each other, the directory holds something else or is in
            use, the disk has too little space, or a class has no readable image.
        OSError: `out` cannot be written.
    """
    out = Path(out)
    settings = _settings(
        source, tokenizer, size, crops, tuple(ranges), batch_size, shard_size, dtype
    )
    encode = make_encoder(tokenizer, settings, device, dtype)
    with all_ranks() as world, lock(out, "moveimg encode"):
        if not _is_finished(out, settings, len(source)):
            world.wait()
            world.run_first(lambda: _prepare(out, settings, len(source)))
            _encode_shards(source, settings, out, encode, world, device, workers, progress)
            world.wait()
            world.run_first(lambda: _finish(source, out, settings))
        world.wait()
    return PackedCodes(out).manifest


def encode_splits(
    images: ImagesConfig,
    tokenizer: Tokenizer,
    out: str | Path,
    data_root: Path | None = None,
    **options: Any,
) -> dict[str, Manifest]:
    """Encode a source's train and val images into `out`/train and `out`/val.

    Prints on stderr how much will be written, the classes, and which images could not be read.
    Errors as of open_images and encode_images.

    Args:
        images: the source, its size and its views; val images get one view, the centre of the
            first range.
        data_root: folder of downloaded data sets.
        options: further arguments of encode_images; batch_size is default_batch_size's if left out.
    """
    folder = Path(images.source)
    if folder.is_dir() and Path(out).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{out} is inside the image folder {folder}: expected another place")
    device = torch.device(options.get("device", "cpu"))
    options.setdefault("batch_size", default_batch_size(images.size, device))
    sources = {
        split: open_images(images.source, split, images.val_fraction, data_root=data_root)
        for split in SPLITS
    }
    report_classes(sources["train"])
    views: dict[Split, tuple[Crops, tuple[float, ...]]] = {
        "train": (images.crops, images.ranges),
        "val": ("center", images.ranges[:1]),
    }
    manifests: dict[str, Manifest] = {}
    for split, (crops, ranges) in views.items():
        n, n_views = len(sources[split]), count_views(crops, ranges)
        n_codes = (images.size // tokenizer.downsample) ** 2
        gigabytes = codes_bytes(n, n_views, n_codes) / 1e9
        print_rank0(
            f"{split}: {n:,} images x {n_views} views x {n_codes} codes, {gigabytes:.3g} GB"
        )
        with progress_bar(n, f"encode {split}", "image") as bar:

            def advance(done: int, total: int, bar: Any = bar) -> None:
                bar.total = total
                bar.update(done - bar.n)

            manifests[split] = encode_images(
                sources[split],
                tokenizer,
                Path(out) / split,
                size=images.size,
                crops=crops,
                ranges=ranges,
                progress=advance,
                **options,
            )
        _report_skipped(Path(out) / split, manifests[split])
    return manifests


def default_batch_size(size: int, device: torch.device) -> int:
    """The number of views of `size` x `size` pixels per call of the tokenizer.

    An accelerator wants many. What a CPU computes should stay near its caches: two views at 256
    pixels were measured no slower than eight.
    """
    return 64 if device.type != "cpu" else max(1, min(64, 2 * 256**2 // size**2))


def codes_bytes(n_images: int, n_views: int, n_codes: int) -> int:
    """Bytes of packed codes on disk: two per code, four per label."""
    return n_images * (n_views * n_codes * 2 + 4)


def make_encoder(
    tokenizer: Tokenizer,
    settings: EncodeSettings,
    device: str | torch.device,
    dtype: torch.dtype | None,
) -> Encoder:
    """The function from views to codes; it raises ValueError for codes outside the codebook.

    Raises ValueError for a dtype that autocast does not have.
    """
    if dtype == torch.float64:
        raise ValueError("dtype float64: expected float32 or bfloat16")
    n_codes = settings.grid[0] * settings.grid[1]
    low = dtype in (torch.bfloat16, torch.float16)

    @torch.inference_mode()
    def encode(views: torch.Tensor) -> np.ndarray:
        batches = []
        autocast = torch.autocast(torch.device(device).type, dtype) if low else nullcontext()
        for chunk in views.split(settings.batch_size):
            with autocast:
                batches.append(tokenizer.encode(normalize(chunk.to(device, non_blocking=True))))
        codes = torch.cat(batches).cpu().numpy()
        if codes.shape != (len(views), n_codes):
            raise ValueError(
                f"the tokenizer gave codes {list(codes.shape)} for {len(views)} images: "
                f"expected {[len(views), n_codes]}"
            )
        if codes.min() < 0 or codes.max() >= settings.codebook_size:
            raise ValueError(
                f"the tokenizer gave codes {codes.min()}..{codes.max()}: expected "
                f"0..{settings.codebook_size - 1}"
            )
        return codes.astype(np.uint16).reshape(-1, settings.n_crops, n_codes)

    return encode


# --- reading images ------------------------------------------------------------------------


class _Views(Dataset):
    """Image index -> (uint8 views [n_crops, 3, size, size], label), or why it is left out."""

    def __init__(self, source: ImageSource, settings: EncodeSettings) -> None:
        self.source, self.settings = source, settings

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int] | Skipped:
        settings = self.settings
        try:
            image, label = self.source[index]
            views = crop_views(image, settings.image_size, settings.crops, settings.ranges)
        except UnreadableImageError as error:
            # a name that is not UTF-8 must not spoil the manifest
            path = error.identifier.encode("utf-8", "backslashreplace").decode()
            return Skipped(path=path, reason=error.reason)
        except MemoryError as error:
            return Skipped(path=str(self.source.identifiers[index]), reason=f"too large: {error}")
        return stack_views(views), label


def _collate(items: list[tuple[torch.Tensor, int] | Skipped]) -> LoadedBatch:
    skipped = [item for item in items if isinstance(item, Skipped)]
    readable = [item for item in items if not isinstance(item, Skipped)]
    views = torch.cat([item[0] for item in readable]) if readable else torch.empty(0)
    return views, np.array([item[1] for item in readable], np.int32), skipped


def _cut_batches(block: range, settings: EncodeSettings) -> list[range]:
    """Cut a shard's image indices into batches of about settings.batch_size views."""
    step = max(1, settings.batch_size // settings.n_crops)
    return [block[i : i + step] for i in range(0, len(block), step)]


def _load_views(
    source: ImageSource,
    settings: EncodeSettings,
    blocks: Iterable[range],
    device: str | torch.device,
    workers: int | None,
) -> Iterator[LoadedBatch]:
    if workers is None:
        share = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        workers = 0 if len(source) < SMALL_SOURCE else max(1, min(MAX_WORKERS, share))
    batches = (list(rows) for block in blocks for rows in _cut_batches(block, settings))
    return iter(
        DataLoader(
            _Views(source, settings),
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=torch.device(device).type == "cuda",
            generator=torch.Generator(),  # else it draws a seed from the global stream
        )
    )


# --- shards --------------------------------------------------------------------------------


def _encode_shards(
    source: ImageSource,
    settings: EncodeSettings,
    out: Path,
    encode: Encoder,
    world: World,
    device: str | torch.device,
    workers: int | None,
    progress: Callable[[int, int], Any] | None,
) -> None:
    """Encode this rank's shards that are not whole yet."""
    step, blocks = settings.shard_size, {}
    for number in range(_n_shards(settings, len(source)))[world.rank :: world.size]:
        if _intact_shard(out, number) is None:
            blocks[number] = range(number * step, min((number + 1) * step, len(source)))
    loader = _load_views(source, settings, blocks.values(), device, workers)
    done, total = 0, sum(len(block) for block in blocks.values())
    for number, block in blocks.items():
        codes: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        skipped: list[Skipped] = []
        for views, batch_labels, unreadable in islice(loader, len(_cut_batches(block, settings))):
            skipped += unreadable
            if len(batch_labels):
                codes.append(encode(views))
                labels.append(batch_labels)
            done += len(batch_labels) + len(unreadable)
            if progress:
                progress(done, total)
        shard = None
        if codes:
            shard = write_shard(out, number, np.concatenate(codes), np.concatenate(labels))
        entry = FinishedShard(number=number, shard=shard, skipped=tuple(skipped))
        write_record(_finished_path(out, number), entry)


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


def _n_shards(settings: EncodeSettings, n_images: int) -> int:
    return -(-n_images // settings.shard_size)


def _finished_path(out: Path, number: int) -> Path:
    return out / f"finished-{number:05d}.json"


def _is_finished(out: Path, settings: EncodeSettings, n_images: int) -> bool:
    """Whether `out` holds finished codes of these settings; ValueError for other settings."""
    if not (out / MANIFEST).exists():
        return False
    manifest = PackedCodes(out).manifest
    added = n_images - manifest.n_images - len(manifest.skipped)
    _require_same(out, manifest.settings, settings, added)
    return True


def _prepare(out: Path, settings: EncodeSettings, n_images: int) -> None:
    """Make `out` ready for its first or its next shard."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / PROGRESS
    if path.exists():
        before = read_record(path, Progress).settings
        if any(out.glob("codes-*.npy")):
            _require_same(out, before, settings, 0)
    elif any(not entry.name.startswith(".") for entry in out.iterdir()):
        raise ValueError(
            f"'{out}' is not empty and holds no packed codes: expected a new or empty folder"
        )
    write_record(path, Progress(settings=settings))
    n_codes = settings.grid[0] * settings.grid[1]
    present = sum(path.stat().st_size for path in out.glob("*.npy"))
    needed = codes_bytes(n_images, settings.n_crops, n_codes) - present
    free = shutil.disk_usage(out).free
    if needed > free:
        raise ValueError(
            f"'{out}' needs {needed / 1e9:.3g} GB for the codes: its disk has {free / 1e9:.3g} GB"
        )


def _intact_shard(out: Path, number: int) -> FinishedShard | None:
    """The entry of a finished shard whose bytes are still those that were written."""
    path = _finished_path(out, number)
    if not path.exists():
        return None
    entry = read_record(path, FinishedShard)
    if (shard := entry.shard) is None:
        return entry
    with suppress(FileNotFoundError):
        hashes = sha256_file(out / shard.codes), sha256_file(out / shard.labels)
        if hashes == (shard.codes_sha256, shard.labels_sha256):
            return entry
    return None


def _finish(source: ImageSource, out: Path, settings: EncodeSettings) -> None:
    """Write the manifest, once every shard that the settings imply is whole."""
    entries = [_intact_shard(out, n) for n in range(_n_shards(settings, len(source)))]
    if None in entries:
        number = entries.index(None)
        raise ValueError(f"'{out}': shard {number} is missing or damaged: run the command again")
    finished = [entry for entry in entries if entry is not None]
    shards = tuple(entry.shard for entry in finished if entry.shard)
    skipped = tuple(image for entry in finished for image in entry.skipped)
    if not shards:
        _remove_progress(out)
        with suppress(OSError):
            out.rmdir()
        first = f": {skipped[0].path} ({skipped[0].reason})" if skipped else ""
        raise ValueError(f"{source.name}: none of {len(source)} images could be read{first}")
    labels = np.unique(np.concatenate([np.load(out / shard.labels) for shard in shards]))
    if absent := set(range(len(source.class_names))) & set(source.labels.tolist()) - set(labels):
        names = list_names(source.class_names[label] for label in sorted(absent))
        raise ValueError(f"{source.name}: no image of these classes could be read: {names}")
    manifest = Manifest(
        source=source.name,
        settings=settings,
        n_images=sum(shard.n for shard in shards),
        shards=shards,
        skipped=skipped,
    )
    write_record(out / MANIFEST, manifest)
    _remove_progress(out)


def _remove_progress(out: Path) -> None:
    for path in (*out.glob("finished-*.json"), out / PROGRESS):
        path.unlink(missing_ok=True)


def _require_same(out: Path, present: EncodeSettings, asked: EncodeSettings, added: int) -> None:
    """Raise ChangedSettingsError that names, in the user's words, the settings that differ."""
    change = f"{abs(added)} image{'s were' if abs(added) > 1 else ' was'}"
    images = f"{change} {'added' if added > 0 else 'removed'}" if added else "images have changed"
    differences = [
        images
        if name == "source_digest"
        else f"{name} is {shorten(getattr(present, name), 40)} there, "
        f"{shorten(getattr(asked, name), 40)} asked"
        for name in EncodeSettings.model_fields
        if getattr(present, name) != getattr(asked, name)
    ]
    if differences:
        raise ChangedSettingsError(out, "; ".join(differences))


def _report_skipped(out: Path, manifest: Manifest) -> None:
    skipped = manifest.skipped
    if skipped:
        total = manifest.n_images + len(skipped)
        print_rank0(
            f"warning: {len(skipped)} of {total} images cannot be read and are left out "
            f"(all are listed in {out / MANIFEST})"
        )
    for image in skipped[:SKIPPED_SHOWN]:
        print_rank0(f"  {image.path}: {image.reason}")
