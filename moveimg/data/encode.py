"""Encoding of images to packed codes, in shards that ranks divide and that survive interruptions.

Each finished shard has a manifest, `finished-00000.json`, until manifest.json replaces all of them.
"""

from __future__ import annotations

import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor

from moveimg.config import ImagesConfig, Size, as_pair
from moveimg.data import codes as packed
from moveimg.data.codes import MANIFEST, EncodeSettings, Manifest, PackedCodes, Shard, Skipped
from moveimg.data.images import ImageSource, count_views, crop_views, report_unreadable
from moveimg.data.sources import open_images
from moveimg.dist import all_ranks, print_rank0
from moveimg.errors import list_names, shorten, validate
from moveimg.files import lock, write_text
from moveimg.images import UnreadableImageError, normalize
from moveimg.progress import progress_bar

SMALL_SOURCE = 2048  # images; below it, starting worker processes costs more than it saves
MAX_WORKERS = 8


def encode_images(
    source: ImageSource,
    tokenizer: Any,
    out: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    **views: Any,
) -> Manifest:
    """Encode every view of every image of `source` into the directory `out`.

    All processes of a `torchrun` job must call this function, which divides the shards among them.
    An interrupted run resumes after its finished shards, on any number of processes, and writes the
    same bytes. Unreadable images are left out and listed in the manifest. `dtype` is the autocast
    dtype (default: no autocast); `views` are image_size and, optionally, crops, ranges, batch_size
    and shard_size of EncodeSettings.
    Raises ValueError if settings contradict each other, `out` holds other files or is in use, or no
    image can be read; OSError if `out` cannot be written.
    """
    if not len(source):
        raise ValueError(f"{source.name}: expected at least one image to encode (got none)")
    out = Path(out)
    values = {
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "codebook_size": tokenizer.codebook_size,
        "grid": code_grid(views["image_size"], tokenizer.downsample),
        "n_crops": count_views(views.get("crops", "center"), views.get("ranges", (1.0,))),
        "class_names": tuple(source.class_names),
        "source_digest": source.digest(),
        "dtype": str(dtype).removeprefix("torch.") if dtype else "unchanged",
    }
    settings = validate(EncodeSettings, values | views, "encode")
    low = dtype in (torch.bfloat16, torch.float16)
    autocast = torch.autocast(torch.device(device).type, dtype, enabled=low)

    def encode(views: torch.Tensor) -> list[torch.Tensor]:
        with torch.inference_mode(), autocast:
            parts = views.to(device).split(settings.batch_size)
            return [tokenizer.encode(normalize(part)).cpu() for part in parts]

    with all_ranks() as world, lock(out, "moveimg encode"):
        world.run_on_rank0(lambda: _prepare(out, settings))
        if not (out / MANIFEST).exists():
            size, n = settings.shard_size, len(source)
            own = range(world.rank, math.ceil(n / size), world.size)
            missing = [number for number in own if _find_finished(out, number) is None]
            total = sum(min(size, n - number * size) for number in missing)
            with progress_bar(total, f"encode {source.name}", "image") as bar:
                for number in missing:
                    _encode_shard(number, source, settings, encode, out, bar)
            world.wait()
            world.run_on_rank0(lambda: _write_manifest(out, math.ceil(n / size)))
        world.wait()
    return PackedCodes(out).manifest


def count_workers(images: int) -> int:
    """Return the number of processes that load a source's images: 0 for a small source."""
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return 0 if images < SMALL_SOURCE else max(1, min(MAX_WORKERS, cores))


def _encode_shard(
    number: int, source: ImageSource, settings: EncodeSettings, encode: Any, out: Path, bar: Any
) -> None:
    """Encode a shard, and write it and its manifest."""
    rows: Any = range(len(source))[number * settings.shard_size :][: settings.shard_size]
    codes: list[torch.Tensor] = []
    labels: list[int] = []
    skipped: list[Skipped] = []
    for views, more, unreadable in DataLoader(
        rows,
        batch_size=max(1, settings.batch_size // settings.n_crops),
        num_workers=count_workers(len(source)),
        collate_fn=partial(_read_views, source, settings),
        generator=torch.Generator(),  # else its seed comes from torch's global random stream
    ):
        codes += encode(views) if views is not None else []
        labels += more
        skipped += unreadable
        bar.update(len(more) + len(unreadable))
    shards: tuple[Shard, ...] = ()
    if labels:
        array = torch.cat(codes).numpy().astype(np.uint16)
        array = array.reshape(len(labels), settings.n_crops, -1)
        shards = (packed.write_shard(out, number, array, np.array(labels, np.int32)),)
    about: dict[str, Any] = {"source": source.name, "settings": settings, "n_images": len(labels)}
    finished = Manifest(**about, shards=shards, skipped=tuple(skipped))
    write_text(out / f"finished-{number:05d}.json", finished.model_dump_json(indent=1) + "\n")


def _read_views(
    source: ImageSource, settings: EncodeSettings, rows: list[int]
) -> tuple[torch.Tensor | None, list[int], list[Skipped]]:
    """Return uint8 views [b * n_crops, 3, H, W] and labels of `rows`, and unreadable images."""
    views: list[torch.Tensor] = []
    labels, skipped = [], []
    for row in rows:
        try:
            image, label = source[row]
        except UnreadableImageError as error:
            # JSON cannot hold a file name that is not UTF-8
            path = source.identifiers[row].encode("utf-8", "backslashreplace").decode()
            skipped.append(Skipped(path=path, reason=error.args[1]))
            continue
        cut = crop_views(image, settings.image_size, settings.crops, settings.ranges)
        views += map(pil_to_tensor, cut)
        labels.append(label)
    return torch.stack(views) if views else None, labels, skipped


def _prepare(out: Path, settings: EncodeSettings) -> None:
    """Create `out`. Raises ValueError if it holds codes of other settings, or other files."""
    out.mkdir(parents=True, exist_ok=True)
    stored = [*out.glob(MANIFEST), *out.glob("finished-*.json")]
    names = {path.name.partition("-")[0] for path in out.glob("[!.]*")}
    if not stored and not names <= {"codes", "labels"}:
        raise ValueError(f"'{out}' is not empty and holds no packed codes: expected a new folder")
    differing = [
        f"{name} was {shorten(was, 40)}, now {shorten(getattr(settings, name), 40)}"
        if name != "source_digest"
        else "the images have changed"
        for name, was in (packed.load_manifest(stored[0]).settings if stored else ())
        if was != getattr(settings, name)
    ]
    if differing:
        raise ValueError(f"'{out}' holds codes of other settings: {'; '.join(differing)}")


def _find_finished(out: Path, number: int) -> Manifest | None:
    """Return the manifest of a finished shard, or None if its files are missing or changed."""
    path = out / f"finished-{number:05d}.json"
    finished = packed.load_manifest(path) if path.exists() else None
    for shard in finished.shards if finished else ():
        for name, digest in (
            (shard.codes, shard.codes_sha256),
            (shard.labels, shard.labels_sha256),
        ):
            if not (out / name).is_file() or packed.sha256_file(out / name) != digest:
                return None
    return finished


def _write_manifest(out: Path, n_shards: int) -> None:
    """Merge the manifests of all shards into manifest.json, and delete them."""
    parts = [part for number in range(n_shards) if (part := _find_finished(out, number))]
    if len(parts) < n_shards:
        raise ValueError(f"'{out}' lacks {n_shards - len(parts)} shards: run moveimg encode again")
    skipped = tuple(image for part in parts for image in part.skipped)
    shards = tuple(shard for part in parts for shard in part.shards)
    if not shards:
        first = f"{skipped[0].path}: {skipped[0].reason}"
        raise ValueError(f"{parts[0].source}: no image can be read; {first}")
    merged = {"n_images": sum(s.n for s in shards), "shards": shards, "skipped": skipped}
    manifest = parts[0].model_copy(update=merged)
    write_text(out / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
    for path in out.glob("finished-*.json"):
        path.unlink()


def encode_splits(
    images: ImagesConfig,
    tokenizer: Any,
    out: str | Path,
    data_root: Path | None = None,
    **options: Any,
) -> dict[str, Manifest]:
    """Encode all views of the train split into `out`/train, and one view of val into `out`/val.

    Prints the classes and unreadable images on stderr. `options` are arguments of encode_images.
    """
    folder, out = Path(images.source), Path(out)
    if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{out} is inside the image folder {folder}: expected a folder outside it")
    batch_size = default_batch_size(images.size, torch.device(options.get("device", "cpu")))
    options = {"batch_size": batch_size, "image_size": images.size} | options
    with all_ranks() as world, world.rank0_first():  # rank 0 downloads
        train, val = (
            open_images(images.source, split, images.val_fraction, data_root)
            for split in ("train", "val")
        )
    print_rank0(f"{len(train.class_names)} classes: {list_names(train.class_names)}")
    options |= {"crops": images.crops, "ranges": images.ranges}
    manifests = {"train": encode_images(train, tokenizer, out / "train", **options)}
    options |= {"crops": "center", "ranges": images.ranges[:1]}
    manifests["val"] = encode_images(val, tokenizer, out / "val", **options)
    for split, manifest in manifests.items():
        skipped = [f"{split}: {image.path}: {image.reason}" for image in manifest.skipped]
        report_unreadable(skipped, manifest.n_images + len(skipped))
    return manifests


def code_grid(size: Size, downsample: int) -> tuple[int, int]:
    """Return the grid (h, w) of an image's codes. ValueError unless `downsample` divides `size`."""
    height, width = as_pair(size)
    if height % downsample or width % downsample:
        raise ValueError(f"size is {size}: expected a multiple of {downsample}, pixels per code")
    return height // downsample, width // downsample


def default_batch_size(size: Size, device: torch.device) -> int:
    """Return the number of views per tokenizer call: few on a CPU, to fit into its caches."""
    pixels = math.prod(as_pair(size))
    return 64 if device.type != "cpu" else max(1, min(64, 2 * 256**2 // pixels))
