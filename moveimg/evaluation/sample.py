"""Sets of samples for evaluation: the same bytes on one process or many, stopped or not.

Image i has class and seed by its index, and images are drawn in fixed batches by index: the shape
of every matrix product follows from the plan alone. Each batch is written to a file, so a stopped
run continues with the next batch; the processes of torchrun share the batches.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from moveimg.config import SamplingSettings
from moveimg.dist import all_ranks
from moveimg.errors import shorten
from moveimg.evaluation.sets import write_npz
from moveimg.files import atomic, read_json, write_json
from moveimg.images import to_uint8
from moveimg.pipeline import Pipeline, resolve
from moveimg.progress import progress_bar
from moveimg.sampling import MAX_SEED


def make_plan(
    pipeline: Pipeline,
    num: int,
    seed: int = 0,
    batch_size: int = 100,
    resize: int | None = None,
    changes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that determines the bytes of a set of `num` images, the content of plan.json.

    Image i is drawn with seed + i, and resized to `resize` pixels (bicubic). `changes` override
    the model's sampling settings; the rounding of matrix products depends on `batch_size`.
    Raises ValueError for bad settings, or where the last image's seed exceeds 2^32 - 1.
    """
    if not 0 <= seed <= MAX_SEED - num + 1:
        raise ValueError(f"seed {seed}: expected a whole number in 0..{MAX_SEED - num + 1}")
    settings = pipeline.settings(**(changes or {})).model_dump(mode="json")
    dtype = str(pipeline.generator.head.weight.dtype).removeprefix("torch.")
    return {
        "model": model_digest(resolve(pipeline.name)),
        "tokenizer": pipeline.tokenizer.fingerprint,
        "n_classes": len(pipeline.class_names),
        "sampling": settings,
        "num": num,
        "seed": seed,
        "batch_size": batch_size,
        "resize": resize,
        "device": pipeline.device.type,
        "dtype": dtype,
    }


def model_digest(directory: Path) -> str:
    """sha256 over a model directory's generator: the model's config and its weights."""
    described = read_json(directory / "config.json")["model"]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    with (directory / "model.safetensors").open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def class_labels(indices: np.ndarray, n_classes: int) -> np.ndarray:
    """Classes int64 of images, by their indices alone.

    Each run of n_classes images holds each class once, in a random order, so that part of a set is
    as mixed as the whole set, and a longer set begins with a shorter one.
    """
    labels = np.empty(len(indices), np.int64)
    rounds, positions = np.divmod(indices, n_classes)
    for number in np.unique(rounds):
        order = np.random.default_rng((0, int(number))).permutation(n_classes)
        here = rounds == number
        labels[here] = order[positions[here]]
    return labels


def sample_set(pipeline: Pipeline, plan: dict[str, Any], folder: Path) -> Path | None:
    """Draw the images of `plan` into `folder`, which gets plan.json and samples.npz (ADM's layout).

    Batches already drawn are kept. Returns the set's path; None on every rank but 0.
    Raises ValueError where `folder` holds images of another plan.
    """
    target, parts = folder / "samples.npz", folder / "parts"
    num, batch_size = plan["num"], plan["batch_size"]
    starts = range(0, num, batch_size)
    files = {start: parts / f"part-{start:09d}.npy" for start in starts}
    with all_ranks() as ranks:
        ranks.run_first(lambda: _write_plan(folder / "plan.json", plan))
        if not target.exists():
            mine = starts[ranks.rank :: ranks.size]
            with progress_bar(len(mine) * batch_size, "sample", "image") as bar:
                for start in mine:
                    if not files[start].is_file():
                        pixels = _draw(pipeline, plan, start)
                        with atomic(files[start]) as temporary, temporary.open("wb") as file:
                            np.save(file, pixels)
                    bar.update(batch_size)
        ranks.wait()
        if ranks.rank:
            return None
    if not target.exists():
        batches = (np.load(file, allow_pickle=False) for file in files.values())
        labels = class_labels(np.arange(num), plan["n_classes"])
        write_npz(target, batches, labels)
    shutil.rmtree(parts, ignore_errors=True)
    return target


def _write_plan(path: Path, plan: dict[str, Any]) -> None:
    """Write plan.json. Raises ValueError if the folder's plan.json differs."""
    if not path.is_file():
        write_json(path, plan)
    elif (present := read_json(path)) != plan:
        have = present if isinstance(present, dict) else {}
        changes = {key: have.get(key) for key in plan if have.get(key) != plan[key]}
        raise ValueError(f"{path}: of another plan ({shorten(changes)}): choose another --out")


def _draw(pipeline: Pipeline, plan: dict[str, Any], start: int) -> np.ndarray:
    """Images uint8 [b, H, W, 3] of the batch that begins at index `start`."""
    size, side = plan["batch_size"], plan["resize"]
    indices = np.arange(start, min(start + size, plan["num"]))
    labels = class_labels(indices, plan["n_classes"]).tolist()
    settings = SamplingSettings.model_validate(plan["sampling"])
    codes = pipeline.sample_codes(labels, settings, seed=plan["seed"] + start, batch_size=size)
    # as LlamaGen resizes 384 to 256: bicubic, not antialiased, and clipped afterwards
    images = pipeline.tokenizer.decode(codes, pipeline.generator.config.grid, clip=False)
    if not torch.isfinite(images).all():
        raise ValueError(f"decoded images {start}.. are not finite")
    if side is not None and images.shape[-2:] != (side, side):
        images = F.interpolate(images.float(), (side, side), mode="bicubic")
    return to_uint8(images)
