"""Images -> packed codes, in shards that ranks share and that survive an interruption."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from moveimg.config import ImagesConfig, Size, as_pair
from moveimg.data import shards
from moveimg.data.codes import (
    EncodeSettings,
    Manifest,
    PackedCodes,
    Shard,
    Skipped,
    write_shard,
)
from moveimg.data.crops import Crops, count_views, crop_views
from moveimg.data.folders import report_classes
from moveimg.data.images import (
    ImageSource,
    Split,
    is_named_source,
    open_images,
    report_unreadable,
)
from moveimg.dist import all_ranks, print_rank0
from moveimg.errors import validate
from moveimg.files import lock
from moveimg.images import UnreadableImageError, normalize, stack_views
from moveimg.progress import progress_bar
from moveimg.tables import format_bytes

SPLITS: tuple[Split, Split] = ("train", "val")
SMALL_SOURCE = 2048  # images; below it, starting worker processes costs more than it saves
MAX_WORKERS = 8
# uint8 views [b * n_crops, 3, H, W], int32 labels [b], and the images left out
LoadedBatch = tuple[torch.Tensor, np.ndarray, list[Skipped]]
# uint8 views [b * n_crops, 3, H, W] -> codes uint16 [b, n_crops, T]
Encoder = Callable[[torch.Tensor], np.ndarray]


def encode_images(
    source: ImageSource,
    tokenizer: Any,
    out: str | Path,
    *,
    size: Size,
    crops: Crops = "center",
    ranges: Sequence[float] = (1.0,),
    batch_size: int = 64,
    shard_size: int = 4096,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    workers: int | None = None,
    every_class: bool = True,
    progress: Callable[[int, int], Any] | None = None,
) -> Manifest:
    """Encode every view of every image of `source` into the directory `out`.

    Every process of a `torchrun` job has to call this. They share the shards, and the bytes are
    those that one process would write. An interrupted run continues after its finished shards, on
    any number of processes. A finished directory of the same settings is left unchanged.
    Unreadable images are left out and listed in the manifest.

    Args:
        tokenizer: has encode(images), codebook_size, downsample and fingerprint.
        size: pixels of a square's side, or (height, width); multiples of tokenizer.downsample.
        crops, ranges: the views of an image, see `crop_views`.
        batch_size: views per call of the tokenizer; cut by image index, whatever the workers.
        shard_size: images per shard.
        device: where the tokenizer is.
        dtype: autocast precision of the tokenizer; None leaves it at its own.
        workers: processes that crop; None means none for small sources, else up to 8.
        every_class: refuse a source of which a class has no readable image.
        progress: called with (images done, images in all) of this process after each batch.

    Raises:
        ValueError: the settings do not fit each other, the directory holds something else or is in
            use, the disk has too little space, or a class has no readable image.
        OSError: `out` cannot be written.
    """
    out = Path(out)
    grid = code_grid(size, tokenizer.downsample)
    values = {
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "codebook_size": tokenizer.codebook_size,
        "grid": grid,
        "image_size": size,
        "crops": crops,
        "ranges": tuple(ranges),
        "n_crops": count_views(crops, ranges),
        "class_names": tuple(source.class_names),
        "source_digest": source.digest(),
        "dtype": str(dtype).removeprefix("torch.") if dtype else "unchanged",
        "batch_size": batch_size,
        "shard_size": shard_size,
    }
    settings = validate(EncodeSettings, values, "encode")
    encode = make_encoder(tokenizer, settings, device, dtype)
    with all_ranks() as world, lock(out, "moveimg encode"):
        if not shards.is_finished(out, settings, len(source)):
            world.wait()
            world.run_first(lambda: shards.prepare_directory(out, settings, len(source)))
            numbers = range(shards.count_shards(settings, len(source)))[world.rank :: world.size]
            _encode_shards(source, settings, out, numbers, encode, device, workers, progress)
            world.wait()
            world.run_first(lambda: shards.write_manifest(out, settings, source, every_class))
        world.wait()
    return PackedCodes(out).manifest


def encode_splits(
    images: ImagesConfig,
    tokenizer: Any,
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
    options.setdefault(
        "batch_size", default_batch_size(images.size, torch.device(options.get("device", "cpu")))
    )
    sources = _open_splits(images, data_root)
    report_classes(sources["train"])
    views: dict[Split, tuple[Crops, tuple[float, ...]]] = {
        "train": (images.crops, images.ranges),
        "val": ("center", images.ranges[:1]),
    }
    manifests: dict[str, Manifest] = {}
    for split, (crops, ranges) in views.items():
        n, n_views = len(sources[split]), count_views(crops, ranges)
        images_, views_ = (f"{k:,} {noun}{'' if k == 1 else 's'}" for k, noun in
                           ((n, "image"), (n_views, "view")))  # fmt: skip
        n_codes = math.prod(code_grid(images.size, tokenizer.downsample))
        size = format_bytes(shards.codes_bytes(n, n_views, n_codes))
        print_rank0(f"{split}: {images_} x {views_} x {n_codes} codes, {size}")
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
                every_class=split == "train",
                progress=advance,
                **options,
            )
        skipped = [f"{image.path}: {image.reason}" for image in manifests[split].skipped]
        report_unreadable(skipped, n)
    return manifests


def code_grid(size: Size, downsample: int) -> tuple[int, int]:
    """The grid (h, w) of an image's codes. Raises ValueError for a size that cannot be cut so."""
    height, width = as_pair(size)
    if min(height, width) < 1 or height % downsample or width % downsample:
        raise ValueError(f"size is {size}: expected a multiple of the tokenizer's {downsample}")
    return height // downsample, width // downsample


def default_batch_size(size: Size, device: torch.device) -> int:
    """The number of views of `size` pixels per call of the tokenizer.

    An accelerator wants many. What a CPU computes should stay near its caches: two views at 256
    pixels were measured no slower than eight.
    """
    pixels = math.prod(as_pair(size))
    return 64 if device.type != "cpu" else max(1, min(64, 2 * 256**2 // pixels))


def make_encoder(
    tokenizer: Any,
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


def _open_splits(images: ImagesConfig, data_root: Path | None) -> dict[Split, ImageSource]:
    def open_both() -> dict[Split, ImageSource]:
        fraction = images.val_fraction
        return {
            split: open_images(images.source, split, fraction, data_root=data_root)
            for split in SPLITS
        }

    if is_named_source(images.source):
        with all_ranks() as world:
            if world.size > 1:  # the first process downloads
                world.run_first(open_both)
    return open_both()


# --- shards --------------------------------------------------------------------------------


def _encode_shards(
    source: ImageSource,
    settings: EncodeSettings,
    out: Path,
    numbers: Iterable[int],
    encode: Encoder,
    device: str | torch.device,
    workers: int | None,
    progress: Callable[[int, int], Any] | None,
) -> None:
    """Encode those of the shards `numbers` that are not whole yet."""
    step = settings.shard_size
    blocks = {
        number: range(number * step, min((number + 1) * step, len(source)))
        for number in numbers
        if shards.find_intact_shard(out, number) is None
    }
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
        shard: Shard | None = None
        if codes:
            shard = write_shard(out, number, np.concatenate(codes), np.concatenate(labels))
        shards.finish_shard(out, number, shard, skipped)


class _Views(Dataset):
    """Image index -> (uint8 views [n_crops, 3, H, W], label), or why it is left out."""

    def __init__(self, source: ImageSource, settings: EncodeSettings) -> None:
        self.source, self.settings = source, settings

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int] | Skipped:
        settings, reason = self.settings, ""
        try:
            image, label = self.source[index]
            views = crop_views(image, settings.image_size, settings.crops, settings.ranges)
            return stack_views(views), label
        except UnreadableImageError as error:
            reason = error.reason
        except MemoryError as error:
            reason = f"too large: {error}"
        # a name that is not UTF-8 must not spoil the manifest
        path = self.source.identifiers[index].encode("utf-8", "backslashreplace").decode()
        return Skipped(path=path, reason=reason)


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
