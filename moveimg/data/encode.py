"""Images -> packed codes, in shards: divided among ranks, and kept if the run is stopped.

Until the manifest is written, the directory also holds `progress.json` (the settings) and one
`finished-00000.json` per finished shard, with its sha256.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.functional import pil_to_tensor

from moveimg.config import ImagesConfig, Size, as_pair
from moveimg.config.run import Crops
from moveimg.data import codes as packed
from moveimg.data.codes import MANIFEST, EncodeSettings, FinishedShard, Manifest, Skipped
from moveimg.data.images import ImageSource, count_views, crop_views, open_images, report_unreadable
from moveimg.dist import all_ranks, print_rank0
from moveimg.errors import list_names, shorten, validate
from moveimg.files import lock
from moveimg.images import UnreadableImageError, normalize
from moveimg.progress import progress_bar

PROGRESS = "progress.json"
SMALL_SOURCE = 2048  # images; below it, starting worker processes costs more than it saves
MAX_WORKERS = 8


class ChangedSettingsError(ValueError):
    """The directory holds codes of other settings."""


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
) -> Manifest:
    """Encode every view of every image of `source` into the directory `out`.

    Every process of a `torchrun` job has to call this. Shards are divided among the processes, and
    have the bytes that one process would write. An interrupted run continues after its finished
    shards, on any number of processes. A finished directory of the same settings is left unchanged.
    Unreadable images are left out and listed in the manifest. `dtype` is the tokenizer's autocast
    precision, by default its own; for the other arguments see EncodeSettings.

    Raises ValueError if settings contradict each other, `out` holds other files or is in use, or no
    image can be read; OSError if `out` cannot be written.
    """
    out = Path(out)
    values = {
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "codebook_size": tokenizer.codebook_size,
        "grid": code_grid(size, tokenizer.downsample),
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
    n_shards = math.ceil(len(source) / shard_size)
    with all_ranks() as world, lock(out, "moveimg encode"):
        world.run_first(lambda: _prepare(out, settings))
        if not (out / MANIFEST).exists():
            own = range(world.rank, n_shards, world.size)
            _encode_shards(own, source, tokenizer, out, settings, device, dtype)
            world.wait()
            world.run_first(lambda: _write_manifest(out, settings, source.name, n_shards))
        world.wait()
    return packed.PackedCodes(out).manifest


def encode_splits(
    images: ImagesConfig,
    tokenizer: Any,
    out: str | Path,
    data_root: Path | None = None,
    **options: Any,
) -> dict[str, Manifest]:
    """Encode a source's train and val images into `out`/train and `out`/val.

    val images get one view, the centre of the first range. Prints the classes and the images that
    cannot be read on stderr. `options` are further arguments of encode_images.
    """
    folder = Path(images.source)
    if folder.is_dir() and Path(out).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{out} is inside the image folder {folder}: expected a folder outside it")
    device = torch.device(options.get("device", "cpu"))
    options = {"batch_size": default_batch_size(images.size, device), "size": images.size} | options

    def open_splits() -> tuple[ImageSource, ImageSource]:
        name, fraction = images.source, images.val_fraction
        train = open_images(name, "train", fraction, data_root=data_root)
        return train, open_images(name, "val", fraction, data_root=data_root)

    with all_ranks() as world:
        if world.size > 1:
            world.run_first(open_splits)  # rank 0 downloads
    train, val = open_splits()
    print_rank0(f"{len(train.class_names)} classes: {list_names(train.class_names)}")
    views: dict[str, Any] = {"crops": images.crops, "ranges": images.ranges}
    manifests = {"train": encode_images(train, tokenizer, Path(out) / "train", **views, **options)}
    views = {"ranges": images.ranges[:1]}
    manifests["val"] = encode_images(val, tokenizer, Path(out) / "val", **views, **options)
    for split, manifest in manifests.items():
        skipped = [f"{split}: {image.path}: {image.reason}" for image in manifest.skipped]
        report_unreadable(skipped, manifest.n_images + len(skipped))
    return manifests


def code_grid(size: Size, downsample: int) -> tuple[int, int]:
    """The grid (h, w) of an image's codes. Raises ValueError unless `downsample` divides `size`."""
    height, width = as_pair(size)
    if height % downsample or width % downsample:
        raise ValueError(f"size is {size}: expected a multiple of the tokenizer's {downsample}")
    return height // downsample, width // downsample


def default_batch_size(size: Size, device: torch.device) -> int:
    """Views of `size` pixels per call of the tokenizer: few on a CPU, to fit into its caches."""
    pixels = math.prod(as_pair(size))
    return 64 if device.type != "cpu" else max(1, min(64, 2 * 256**2 // pixels))


def _prepare(out: Path, settings: EncodeSettings) -> None:
    """Make `out`, or raise ValueError if it holds codes of other settings or other files."""
    out.mkdir(parents=True, exist_ok=True)
    present = settings
    if (out / MANIFEST).exists():
        present = packed.PackedCodes(out).settings
    elif any(out.glob("finished-*")):
        present = packed.load_json(out / PROGRESS, EncodeSettings)
    elif not (out / PROGRESS).exists() and any(out.glob("[!.]*")):
        raise ValueError(f"'{out}' is not empty and holds no packed codes: expected a new folder")
    changed = []
    for name, was in present:
        if was != (asked := getattr(settings, name)):
            words = f"{name} is {shorten(was, 40)} there, {shorten(asked, 40)} asked"
            changed.append("the images have changed" if name == "source_digest" else words)
    if changed:
        raise ChangedSettingsError(f"'{out}' holds codes of other settings: {'; '.join(changed)}")
    if not (out / MANIFEST).exists():
        packed.save_json(out / PROGRESS, settings)


def _find_finished(out: Path, number: int) -> FinishedShard | None:
    """A finished shard's entry, or None if its files are missing or changed."""
    path = out / f"finished-{number:05d}.json"
    entry = packed.load_json(path, FinishedShard) if path.exists() else None
    return entry if entry and (not entry.shard or packed.is_intact(out, entry.shard)) else None


def _write_manifest(out: Path, settings: EncodeSettings, name: str, n_shards: int) -> None:
    """Write the manifest once every shard is finished, and remove the files of progress."""
    entries = [entry for number in range(n_shards) if (entry := _find_finished(out, number))]
    if len(entries) < n_shards:
        raise ValueError(f"'{out}' lacks {n_shards - len(entries)} shards: run encode again")
    shards = tuple(entry.shard for entry in entries if entry.shard)
    skipped = tuple(image for entry in entries for image in entry.skipped)
    if not shards:
        raise ValueError(f"{name}: no image can be read; {skipped[0].path}: {skipped[0].reason}")
    n = sum(shard.n for shard in shards)
    manifest = Manifest(source=name, settings=settings, n_images=n, shards=shards, skipped=skipped)
    packed.save_json(out / MANIFEST, manifest)
    for path in (*out.glob("finished-*.json"), out / PROGRESS):
        path.unlink(missing_ok=True)


def _encode_shards(
    numbers: range,
    source: ImageSource,
    tokenizer: Any,
    out: Path,
    settings: EncodeSettings,
    device: str | torch.device,
    dtype: torch.dtype | None,
) -> None:
    """Encode those of the shards `numbers` that are not finished yet."""
    size, views = settings.shard_size, _Views(source, settings)
    rows = {n: range(len(source))[n * size : (n + 1) * size] for n in numbers}
    rows = {n: own for n, own in rows.items() if _find_finished(out, n) is None}
    share = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    workers = 0 if len(source) < SMALL_SOURCE else max(1, min(MAX_WORKERS, share))
    with progress_bar(sum(map(len, rows.values())), f"encode {source.name}", "image") as bar:
        for number, own in rows.items():
            made: list[tuple[np.ndarray, np.ndarray]] = []
            skipped: list[Skipped] = []
            for items in DataLoader(
                Subset(views, own),
                batch_size=max(1, settings.batch_size // settings.n_crops),
                num_workers=workers,
                collate_fn=list,
                generator=torch.Generator(),  # else it draws a seed from the global stream
            ):
                skipped += [item for item in items if isinstance(item, Skipped)]
                if readable := [item for item in items if not isinstance(item, Skipped)]:
                    pixels, labels = zip(*readable, strict=True)
                    codes = _encode_views(tokenizer, settings, torch.cat(pixels).to(device), dtype)
                    made.append((codes, np.array(labels, np.int32)))
                bar.update(len(items))
            arrays = [np.concatenate(parts) for parts in zip(*made, strict=True)]
            shard = packed.write_shard(out, number, *arrays) if made else None
            entry = FinishedShard(shard=shard, skipped=tuple(skipped))
            packed.save_json(out / f"finished-{number:05d}.json", entry)


@torch.inference_mode()
def _encode_views(
    tokenizer: Any, settings: EncodeSettings, views: torch.Tensor, dtype: torch.dtype | None
) -> np.ndarray:
    """uint8 views [b * n_crops, 3, H, W] -> codes uint16 [b, n_crops, T]."""
    low = dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(views.device.type, dtype) if low else nullcontext():
        chunks = [tokenizer.encode(normalize(part)) for part in views.split(settings.batch_size)]
    codes = torch.cat(chunks).cpu().numpy().astype(np.uint16)
    return codes.reshape(-1, settings.n_crops, codes.shape[1])


class _Views(Dataset):
    """Image index -> (uint8 views [n_crops, 3, H, W], label), or why the image is left out."""

    def __init__(self, source: ImageSource, settings: EncodeSettings) -> None:
        self.source, self.settings = source, settings

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int] | Skipped:
        settings = self.settings
        try:
            image, label = self.source[index]
        except UnreadableImageError as error:
            # A name that is not UTF-8 must not spoil the manifest.
            path = self.source.identifiers[index].encode("utf-8", "backslashreplace").decode()
            return Skipped(path=path, reason=error.args[1])
        views = crop_views(image, settings.image_size, settings.crops, settings.ranges)
        return torch.stack([pil_to_tensor(view) for view in views]), label
