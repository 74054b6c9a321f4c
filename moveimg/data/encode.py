"""Images -> packed codes, in shards that survive an interruption and may be made side by side."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from moveimg.config import ImagesConfig
from moveimg.data import resume
from moveimg.data.codes import PackedCodes
from moveimg.data.crops import count_views
from moveimg.data.images import ImageSource, Split, open_images
from moveimg.data.loading import cut_batches, load_views
from moveimg.data.manifest import (
    MANIFEST,
    MAX_CODEBOOK_SIZE,
    Crops,
    EncodeSettings,
    Manifest,
    write_record,
)
from moveimg.data.ranks import Ranks, all_ranks
from moveimg.data.shards import Tokenizer, encode_shard, make_encoder
from moveimg.device import pick_dtype
from moveimg.progress import progress_bar

SPLITS: tuple[Split, Split] = ("train", "val")
_SKIPPED_SHOWN = 20


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
    progress: called with (images done, images in all) of this process after each batch

    Every process of a `torchrun` job has to call this. They share the shards, and the bytes are
    those that one process would write. It returns when the manifest is there.

    An interrupted run goes on after its finished shards, on any number of processes. A finished
    directory of the same settings is left as it is. Unreadable images are left out and listed in
    the manifest.

    Raises ValueError for settings that do not fit each other, a directory that holds something
    else, too little space on the disk, or a source with no readable image; OSError where `out`
    cannot be written.
    """
    out = Path(out)
    settings = _settings(
        source, tokenizer, size, crops, tuple(ranges), batch_size, shard_size, dtype
    )
    encode = make_encoder(tokenizer, settings, device, dtype)
    with all_ranks() as ranks:
        manifest = resume.finished_manifest(out, settings)
        ranks.wait()
        if manifest is not None:
            return manifest
        ranks.first(lambda: _prepare(out, settings, len(source)))
        blocks = _share(out, settings, len(source), ranks)
        loader = load_views(source, settings, blocks.values(), device, workers)
        done, total = 0, sum(len(block) for block in blocks.values())

        def advance(n: int) -> None:
            nonlocal done
            done += n
            if progress:
                progress(done, total)

        for number, block in blocks.items():
            batches = islice(loader, len(cut_batches(block, settings)))
            resume.record(out, encode_shard(out, number, batches, encode, advance))
        ranks.wait()
        ranks.first(lambda: _finish(source, out, settings))
    return PackedCodes(out).manifest


def encode_splits(
    images: ImagesConfig, tokenizer: Tokenizer, out: str | Path, **options: Any
) -> dict[str, Manifest]:
    """Encode a source's train and val images into `out`/train and `out`/val.

    images: the source, its size and its views; val images get one view, the centre of the
        first range
    options: further arguments of encode_images; dtype is bfloat16 on CUDA unless given, and
        batch_size what default_batch_size says

    Says on stderr how much will be written, and which images could not be read.
    Errors as of open_images and encode_images.
    """
    folder = Path(images.source)
    if folder.is_dir() and Path(out).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{out} lies in the image folder {folder}: expected another place")
    device = torch.device(options.get("device", "cpu"))
    if "dtype" not in options and device.type == "cuda":
        options["dtype"] = pick_dtype(None, device)
    options.setdefault("batch_size", default_batch_size(images.size, device))
    sources = {split: open_images(images.source, split) for split in SPLITS}
    views: dict[Split, tuple[Crops, tuple[float, ...]]] = {
        "train": (images.crops, images.ranges),
        "val": ("center", images.ranges[:1]),
    }
    first = os.environ.get("RANK", "0") == "0"  # else every process would say the same
    say = partial(print, file=sys.stderr) if first else str
    manifests: dict[str, Manifest] = {}
    for split, (crops, ranges) in views.items():
        side, n_views = images.size // tokenizer.downsample, count_views(crops, ranges)
        n = len(sources[split])
        say(
            f"{split}: {n:,} images x {n_views} views x {side * side} codes, "
            f"{codes_bytes(n, n_views, side * side) / 1e9:.3g} GB"
        )
        with progress_bar(n, f"encode {split}", "image") as bar:
            manifests[split] = encode_images(
                sources[split],
                tokenizer,
                Path(out) / split,
                size=images.size,
                crops=crops,
                ranges=ranges,
                progress=partial(_advance, bar),
                **options,
            )
        for line in _skipped(Path(out) / split, manifests[split]):
            say(line)
    return manifests


def default_batch_size(size: int, device: torch.device) -> int:
    """How many views of `size` pixels a side the tokenizer is best given at once.

    An accelerator wants many. What a CPU computes should stay near its caches: two views at 256
    pixels were measured no slower than eight.
    """
    return 64 if device.type != "cpu" else max(1, min(64, 2 * 256**2 // size**2))


def codes_bytes(n_images: int, n_views: int, n_codes: int) -> int:
    """Bytes of packed codes on disk: two a code, four a label."""
    return n_images * (n_views * n_codes * 2 + 4)


def _advance(bar: tqdm, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


def _skipped(out: Path, manifest: Manifest) -> list[str]:
    """What to say of the images that were left out."""
    skipped = manifest.skipped
    if not skipped:
        return []
    total = manifest.n_images + len(skipped)
    head = (
        f"warning: {len(skipped)} of {total} images cannot be read and are left out "
        f"(all are listed in {out / MANIFEST})"
    )
    return [head, *(f"  {image.path}: {image.reason}" for image in skipped[:_SKIPPED_SHOWN])]


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


def _share(out: Path, settings: EncodeSettings, n_images: int, ranks: Ranks) -> dict[int, range]:
    """The image indices of this process's shards that are not whole yet, by shard number."""
    step = settings.shard_size
    numbers = range(_n_shards(settings, n_images))[ranks.rank :: ranks.size]
    return {
        number: range(number * step, min((number + 1) * step, n_images))
        for number in numbers
        if resume.intact(out, number) is None
    }


def _n_shards(settings: EncodeSettings, n_images: int) -> int:
    return -(-n_images // settings.shard_size)


def _prepare(out: Path, settings: EncodeSettings, n_images: int) -> None:
    resume.prepare(out, settings)
    n_codes = settings.grid[0] * settings.grid[1]
    there = sum(path.stat().st_size for path in out.glob("*.npy"))
    needed = codes_bytes(n_images, settings.n_crops, n_codes) - there
    free = shutil.disk_usage(out).free
    if needed > free:
        raise ValueError(
            f"'{out}' needs {needed / 1e9:.3g} GB for the codes: its disk has {free / 1e9:.3g} GB "
            "free"
        )


def _finish(source: ImageSource, out: Path, settings: EncodeSettings) -> None:
    """Write the manifest of shards that are all finished; ValueError where they are all empty."""
    numbers = range(_n_shards(settings, len(source)))
    finished = [entry for n in numbers if (entry := resume.recorded(out, n)) is not None]
    shards = tuple(entry.shard for entry in finished if entry.shard)
    skipped = tuple(image for entry in finished for image in entry.skipped)
    if not shards:
        resume.forget(out)
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
    resume.forget(out)
