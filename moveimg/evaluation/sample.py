"""Sets of samples for evaluation: the same bytes on one process or many, and after any stop.

Image i has class and seed by its index, and images are drawn in fixed batches by index: the shape
of every matrix product follows from the plan alone. Each batch is written to a file, so a stopped
run continues with the next batch; the processes of torchrun share the batches.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from moveimg.config import SamplingSettings
from moveimg.dist import all_ranks
from moveimg.errors import shorten
from moveimg.evaluation.sets import write_npz, write_pngs
from moveimg.files import atomic, read_json, write_json
from moveimg.images import to_uint8
from moveimg.pipeline import Pipeline
from moveimg.progress import progress_bar
from moveimg.sampling import MAX_SEED

PLAN, BATCHES = "plan.json", "parts"


@dataclass(frozen=True)
class SamplePlan:
    """Everything that determines the bytes of a set; plan.json holds it.

    Attributes:
        model: sha256 of the generator's config and weights.
        tokenizer: its fingerprint.
        n_classes: classes of the model.
        sampling: the sampling settings.
        num: images.
        seed: image i is drawn with seed + i.
        batch_size: images of one batch; the rounding of matrix products depends on it.
        resize: side in pixels to resize the images to, bicubically; None: no resizing.
        device, dtype: type of the device and of the weights.
    """

    model: str
    tokenizer: str
    n_classes: int
    sampling: dict[str, Any]
    num: int
    seed: int
    batch_size: int
    resize: int | None
    device: str
    dtype: str


def make_plan(
    pipeline: Pipeline,
    model_digest: str,
    settings: SamplingSettings,
    num: int,
    seed: int = 0,
    batch_size: int = 100,
    resize: int | None = None,
) -> SamplePlan:
    """The plan of a set. Raises ValueError where the last image's seed exceeds 2^32 - 1."""
    if not 0 <= seed <= MAX_SEED - num:
        raise ValueError(f"seed {seed}: expected a whole number in 0..{MAX_SEED - num}")
    weight = next(pipeline.generator.parameters())
    return SamplePlan(
        model=model_digest,
        tokenizer=pipeline.tokenizer.fingerprint,
        n_classes=len(pipeline.class_names),
        sampling=settings.model_dump(),
        num=num,
        seed=seed,
        batch_size=batch_size,
        resize=resize,
        device=pipeline.device.type,
        dtype=str(weight.dtype).removeprefix("torch."),
    )


def class_labels(indices: np.ndarray, n_classes: int) -> np.ndarray:
    """The class of every image by its index alone, int64: balanced and mixed.

    Every n_classes images in a row hold each class once, in an order of their own, so that a
    contiguous run is as mixed as the whole and a longer set begins with a shorter one.
    """
    labels = np.empty(len(indices), np.int64)
    rounds, positions = np.divmod(indices, n_classes)
    for number in np.unique(rounds):
        order = np.random.default_rng((0, int(number))).permutation(n_classes)
        here = rounds == number
        labels[here] = order[positions[here]]
    return labels


def sample_set(
    pipeline: Pipeline, plan: SamplePlan, folder: Path, png: bool = False
) -> Path | None:
    """Draw the images of `plan` into `folder`; batches that are there already are kept.

    Args:
        pipeline: the model of the plan.
        plan: see make_plan.
        folder: gets plan.json and samples.npz (ADM's layout), or the folder samples/ of PNGs.
        png: write PNGs.

    Returns the set's path; None on every rank but 0. Raises ValueError where `folder` holds
    images of another plan.
    """
    target = folder / ("samples" if png else "samples.npz")
    with all_ranks() as ranks:
        ranks.run_first(lambda: _write_plan(folder, plan))
        if not target.exists():
            starts = range(0, plan.num, plan.batch_size)[ranks.rank :: ranks.size]
            _draw_batches(pipeline, plan, folder / BATCHES, starts, ranks.rank)
        ranks.wait()
        if ranks.rank:
            return None
    if not target.exists():
        _join(plan, folder / BATCHES, target, png)
    shutil.rmtree(folder / BATCHES, ignore_errors=True)
    return target


def _write_plan(folder: Path, plan: SamplePlan) -> None:
    """Write plan.json. Raises ValueError where the one there is of another plan."""
    path = folder / PLAN
    wanted = json.loads(json.dumps(asdict(plan)))
    if not path.is_file():
        write_json(path, wanted)
        return
    present = read_json(path)
    if not isinstance(present, dict):
        raise ValueError(f"{path}: expected the plan of a sample set (got {shorten(present)})")
    for key, value in wanted.items():
        if present.get(key) != value:
            raise ValueError(
                f"{folder}: holds samples of another plan ({key}: {shorten(present.get(key))}, "
                f"now {shorten(value)}): choose another --out"
            )


def _draw_batches(
    pipeline: Pipeline, plan: SamplePlan, folder: Path, starts: range, rank: int
) -> None:
    missing = [start for start in starts if not _batch_file(folder, start).is_file()]
    done = sum(min(plan.batch_size, plan.num - start) for start in starts if start not in missing)
    total = sum(min(plan.batch_size, plan.num - start) for start in starts)
    what = "sample" if rank == 0 else f"sample (rank {rank})"
    with progress_bar(total, what, "image", done) as bar:
        for start in missing:
            pixels = _draw(pipeline, plan, start)
            with atomic(_batch_file(folder, start)) as temporary, temporary.open("wb") as file:
                np.save(file, pixels)
            bar.update(len(pixels))


def _draw(pipeline: Pipeline, plan: SamplePlan, start: int) -> np.ndarray:
    """Images uint8 [b, H, W, 3] of the batch that begins at index `start`."""
    indices = np.arange(start, min(start + plan.batch_size, plan.num))
    labels = class_labels(indices, plan.n_classes).tolist()
    settings = SamplingSettings.model_validate(plan.sampling)
    codes = pipeline.sample_codes(
        labels, settings, seed=plan.seed + start, batch_size=plan.batch_size
    )
    # as LlamaGen resizes 384 to 256: bicubic, not antialiased, and clipped afterwards
    images = pipeline.tokenizer.decode(codes, pipeline.generator.config.grid, clip=False)
    if not torch.isfinite(images).all():
        raise ValueError(f"non-finite: decoded images {start}.. are not finite")
    if plan.resize is not None and images.shape[-2:] != (plan.resize, plan.resize):
        images = F.interpolate(images.float(), (plan.resize, plan.resize), mode="bicubic")
    return to_uint8(images)


def _join(plan: SamplePlan, folder: Path, target: Path, png: bool) -> None:
    starts = range(0, plan.num, plan.batch_size)
    missing = [start for start in starts if not _batch_file(folder, start).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder}: {len(missing)} of {len(starts)} batches are missing, the first at image "
            f"{missing[0]}: the ranks need a folder that all of them see"
        )
    batches = (np.load(_batch_file(folder, start), allow_pickle=False) for start in starts)
    labels = class_labels(np.arange(plan.num), plan.n_classes)
    if png:
        write_pngs(target, batches, labels)
    else:
        size = np.load(_batch_file(folder, 0), mmap_mode="r").shape[1:3]
        write_npz(target, batches, labels, (size[0], size[1]))


def _batch_file(folder: Path, start: int) -> Path:
    return folder / f"part-{start:09d}.npy"
