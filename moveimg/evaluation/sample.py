"""Sets of samples for evaluation: the same bytes on one process or many, and after any stop.

Image i has class and seed by its index, and images are drawn in fixed batches by index: the shape
of every matrix product follows from the plan alone. A batch is a file, so a stopped run goes on
where it was; processes of torchrun take turns at the batches.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from moveimg.config import SamplingSettings
from moveimg.dist import all_ranks
from moveimg.evaluation.writing import write_npz, write_pngs
from moveimg.files import atomic, read_json, write_text
from moveimg.images import to_uint8
from moveimg.pipeline import Pipeline
from moveimg.progress import progress_bar
from moveimg.sampling import MAX_SEED

PLAN, PARTS = "plan.json", "parts"


@dataclass(frozen=True)
class Plan:
    """Everything that the bytes of a set follow from.

    Attributes:
        model: sha256 of the generator's config and weights.
        tokenizer: its fingerprint.
        n_classes: classes of the model.
        sampling: the sampling settings.
        num: images.
        seed: image i is drawn with seed + i.
        batch_size: images drawn side by side; it decides how products round.
        resize: pixels of a side the images are brought to, bicubically; None leaves them.
        device, dtype: type of device and of numbers.
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
) -> Plan:
    """The plan of a set. Raises ValueError for a seed whose last image is beyond 2^32 - 1."""
    if not 0 <= seed <= MAX_SEED - num:
        raise ValueError(f"seed {seed}: expected a whole number in 0..{MAX_SEED - num}")
    weight = next(pipeline.generator.parameters())
    return Plan(
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
    """The class of every image by its index, int64: balanced, mixed, and of the index alone.

    Every n_classes images in a row hold each class once, in an order of their own, so that a
    contiguous run is as mixed as the whole and a longer set begins with a shorter one.
    """
    labels = np.empty(len(indices), np.int64)
    rounds, places = np.divmod(indices, n_classes)
    for turn in np.unique(rounds):
        order = np.random.default_rng((0, int(turn))).permutation(n_classes)
        here = rounds == turn
        labels[here] = order[places[here]]
    return labels


def sample_set(pipeline: Pipeline, plan: Plan, folder: Path, png: bool = False) -> Path | None:
    """Draw the images of `plan` into `folder`; what is there already is kept.

    Args:
        pipeline: the model of the plan.
        plan: see make_plan.
        folder: gets plan.json and samples.npz (ADM's layout), or the folder samples/ of PNGs.
        png: write PNGs.

    Returns the set's path; None on every process but the first. Raises ValueError where `folder`
    holds another plan's images.
    """
    target = folder / ("samples" if png else "samples.npz")
    with all_ranks() as ranks:
        ranks.run_first(lambda: _claim(folder, plan))
        if not target.exists():
            starts = range(0, plan.num, plan.batch_size)[ranks.rank :: ranks.size]
            _draw_parts(pipeline, plan, folder / PARTS, starts, ranks.rank)
        ranks.wait()
        if ranks.rank:
            return None
    if not target.exists():
        _join(plan, folder / PARTS, target, png)
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    return target


def _claim(folder: Path, plan: Plan) -> None:
    """Write the plan, or make sure that the one there is the same."""
    path = folder / PLAN
    wanted = json.loads(json.dumps(asdict(plan)))
    if path.is_file():
        found = read_json(path)
        for key, value in wanted.items():
            if found.get(key) != value:
                raise ValueError(
                    f"{folder}: holds samples of another plan ({key}: {found.get(key)}, now "
                    f"{value}): choose another --out"
                )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(wanted, indent=2) + "\n")


def _draw_parts(pipeline: Pipeline, plan: Plan, parts: Path, starts: range, rank: int) -> None:
    missing = [start for start in starts if not _part(parts, start).is_file()]
    done = sum(min(plan.batch_size, plan.num - start) for start in starts if start not in missing)
    total = sum(min(plan.batch_size, plan.num - start) for start in starts)
    what = "sample" if rank == 0 else f"sample (process {rank})"
    with progress_bar(total, what, "image", done) as bar:
        for start in missing:
            pixels = _draw(pipeline, plan, start)
            with atomic(_part(parts, start)) as temporary, temporary.open("wb") as file:
                np.save(file, pixels)
            bar.update(len(pixels))


def _draw(pipeline: Pipeline, plan: Plan, start: int) -> np.ndarray:
    """Images uint8 [b, H, W, 3] of the batch that begins at index `start`."""
    indices = np.arange(start, min(start + plan.batch_size, plan.num))
    labels = class_labels(indices, plan.n_classes).tolist()
    settings = SamplingSettings.model_validate(plan.sampling)
    codes = pipeline.sample_codes(
        labels, settings, seed=plan.seed + start, batch_size=plan.batch_size
    )
    # as LlamaGen brings 384 to 256: bicubic, not antialiased, and clipped only then
    images = pipeline.tokenizer.decode(codes, pipeline.generator.config.grid, clip=False)
    if not torch.isfinite(images).all():
        raise ValueError(f"non-finite: the tokenizer's pictures of images {start}.. are not finite")
    if plan.resize is not None and images.shape[-2:] != (plan.resize, plan.resize):
        images = F.interpolate(images.float(), (plan.resize, plan.resize), mode="bicubic")
    return to_uint8(images)


def _join(plan: Plan, parts: Path, target: Path, png: bool) -> None:
    starts = range(0, plan.num, plan.batch_size)
    missing = [start for start in starts if not _part(parts, start).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{parts}: {len(missing)} of {len(starts)} parts are missing, the first at image "
            f"{missing[0]}: the processes need a folder that all of them see"
        )

    def read() -> Iterator[np.ndarray]:
        for start in starts:
            yield np.load(_part(parts, start), allow_pickle=False)

    labels = class_labels(np.arange(plan.num), plan.n_classes)
    if png:
        write_pngs(target, read(), labels)
    else:
        size = np.load(_part(parts, 0), mmap_mode="r").shape[1:3]
        write_npz(target, read(), labels, (size[0], size[1]))


def _part(parts: Path, start: int) -> Path:
    return parts / f"part-{start:09d}.npy"
