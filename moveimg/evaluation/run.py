"""`moveimg evaluate`: a model's samples drawn, scored and written down; sweeps; references."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moveimg.checkpoint import BUNDLED
from moveimg.config import SamplingSettings
from moveimg.data import (
    ImageSource,
    Split,
    crop_views,
    drop_unreadable,
    is_named_source,
    open_images,
)
from moveimg.device import own_device
from moveimg.evaluation.classifier import load_classifier, save_classifier, train_classifier
from moveimg.evaluation.features import Extractor
from moveimg.evaluation.reference import (
    Reference,
    digest_of,
    locate,
    open_reference,
    reference_of,
    write_reference,
)
from moveimg.evaluation.results import environment, read_results, write_results
from moveimg.evaluation.sample import Plan, make_plan, sample_set
from moveimg.evaluation.scoring import check_pair, score
from moveimg.evaluation.sets import ImageSet, open_set
from moveimg.files import lock
from moveimg.pipeline import Pipeline, resolve
from moveimg.pretrained.hub import cache_directory
from moveimg.progress import progress_bar

REFERENCES = {"digits": "digits", "fashion": "fashion-mnist"}  # of the bundled models
FULL, SMALL = 50_000, 2_000  # samples by default: of published FIDs; for a small extractor
FEWEST = 4  # of which precision and recall, of three neighbours, can be taken
RESULTS = "results.json"


@dataclass(frozen=True)
class Comparison:
    """The reference of a comparison, and the feature extractor.

    Attributes:
        reference: a name, an .npz or a folder; a data set's name is its training split; None: the
            data set of a bundled model.
        extractor: a file of make_extractor; None: the bundled one of the data set, else Inception.
        inception_weights: a file in torch-fidelity's layout; None: its own.
        allowed: guards to overrule, by name.
    """

    reference: str | None = None
    extractor: Path | None = None
    inception_weights: Path | None = None
    allowed: Sequence[str] = ()


@dataclass(frozen=True)
class Sampling:
    """What is drawn: see Plan. num None: 50,000, or 2,000 with a classifier."""

    num: int | None = None
    seed: int = 0
    batch_size: int = 100
    resize: int | None = None
    png: bool = False
    changes: dict[str, Any] = field(default_factory=dict)


def features_cache() -> Path:
    """Where features and references are kept."""
    return cache_directory() / "evaluation"


def open_extractor(comparison: Comparison, device: torch.device) -> Extractor:
    """The feature extractor of a comparison; errors as of load_classifier and load_inception."""
    path = comparison.extractor
    if path is None and comparison.inception_weights is None:
        path = bundled_extractor(comparison.reference)
    if path is not None:
        if comparison.inception_weights is not None:
            raise ValueError("give either an extractor or Inception weights, one of the two")
        return load_classifier(path, device)
    from moveimg.evaluation.inception import load_inception

    return load_inception(comparison.inception_weights, device)


def bundled_extractor(reference: str | None) -> Path | None:
    """The classifier of a data set that is bundled with its model, or None."""
    for model, source in REFERENCES.items():
        path = BUNDLED / model / "extractor.safetensors"
        if reference == source and path.is_file():
            return path
    return None


def load_reference(
    comparison: Comparison, size: tuple[int, int], extractor: Extractor, cache: Path
) -> Reference:
    """The reference of a comparison; images of a data set are cut to the samples' size (H, W)."""
    assert comparison.reference is not None
    if is_named_source(comparison.reference):
        images = source_images(open_images(comparison.reference, "train"), size[0])
        return reference_of(images, extractor, cache, "train")
    return open_reference(comparison.reference, extractor, cache)


def evaluate_model(
    model: str,
    comparison: Comparison,
    sampling: Sampling,
    out: Path | None,
    device: str | None = None,
    dtype: str | None = None,
) -> tuple[dict[str, Any], Path] | None:
    """Draw a model's samples (or go on with them), score them, write results.json beside them.

    Args:
        model: a bundled name, a directory or a Hub id.
        comparison, sampling: against what, and what is drawn.
        out: folder; None: evaluation/MODEL-HASH, by the hash of the plan.
        device, dtype: as of Pipeline.from_pretrained.

    Returns:
        results and their file; None on every process but the first.
    """
    comparison = _with_default(comparison, model)
    pipeline = Pipeline.from_pretrained(model, device=own_device(device), dtype=dtype)
    extractor = open_extractor(comparison, pipeline.device)
    plan = plan_of(pipeline, model, sampling, extractor)
    folder = out or Path("evaluation") / f"{Path(model).name}-{_hash(asdict(plan))}"
    return _evaluate(pipeline, model, plan, folder, comparison, extractor, sampling.png)


def sweep(
    model: str,
    comparison: Comparison,
    sampling: Sampling,
    key: str,
    values: Sequence[float],
    out: Path | None,
    device: str | None = None,
    dtype: str | None = None,
) -> tuple[list[dict[str, Any]], Path] | None:
    """evaluate_model for several values of a sampling setting; finished values are read back.

    Each value has a folder of its own in `out`. Writes sweep.md and sweep.png. Returns the results
    and the folder; None on every process but the first.
    """
    comparison = _with_default(comparison, model)
    pipeline = Pipeline.from_pretrained(model, device=own_device(device), dtype=dtype)
    extractor = open_extractor(comparison, pipeline.device)
    if key not in SamplingSettings.model_fields:
        known = ", ".join(SamplingSettings.model_fields)
        raise ValueError(f"--sweep {key}: expected one of {known}")
    changed = [{**sampling.changes, key: value} for value in values]
    plans = [plan_of(pipeline, model, replace(sampling, changes=c), extractor) for c in changed]
    root = out or Path("evaluation") / f"{Path(model).name}-{key}-{_hash(asdict(plans[0]))}"
    digest = None  # of a reference that may have changed since its name was given last
    if comparison.reference is not None and not is_named_source(comparison.reference):
        digest = digest_of(locate(comparison.reference, features_cache()))
    found = []
    for value, plan in zip(values, plans, strict=True):
        folder = root / f"{key}-{value:g}"
        one = _finished(folder, plan, comparison, digest, extractor)
        if one is None:
            both = _evaluate(pipeline, model, plan, folder, comparison, extractor, sampling.png)
            one = both[0] if both else None
        if one is not None:
            found.append({**one, "name": f"{key} {value:g}"})
    if not found:
        return None
    from moveimg.evaluation.plots import write_sweep

    write_sweep(root, key, list(values), found)
    return found, root


def score_files(
    samples: Path, comparison: Comparison, device: torch.device, out: Path | None
) -> dict[str, Any]:
    """Score a set of any program: ADM's .npz or a folder of images."""
    if comparison.reference is None:
        raise ValueError("--samples needs a --reference to compare with")
    images = open_set(samples)
    extractor = open_extractor(comparison, device)
    reference = load_reference(comparison, images.size, extractor, features_cache())
    found = score(images, reference, extractor, features_cache(), None, comparison.allowed)
    results = {"name": samples.name, **found, **environment(device)}
    if out is not None:
        write_results(out / RESULTS, results)
    return results


def plan_of(pipeline: Pipeline, model: str, sampling: Sampling, extractor: Extractor) -> Plan:
    """The plan of a model's samples; the settings are its sampling.json with the changes."""
    num = sampling.num or (FULL if extractor.class_names is None else SMALL)
    if num < FEWEST:  # told now, not after they are drawn
        raise ValueError(f"too-few-samples: {num} images: expected {FEWEST} or more")
    settings = pipeline.settings(**sampling.changes)
    digest = model_digest(resolve(model))
    return make_plan(
        pipeline, digest, settings, num, sampling.seed, sampling.batch_size, sampling.resize
    )


def model_digest(directory: Path) -> str:
    """sha256 over a model directory's generator: the model's config and its weights."""
    described = json.loads((directory / "config.json").read_text(encoding="utf-8"))["model"]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    with (directory / "model.safetensors").open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def source_images(source: ImageSource, size: int, ratio: float = 1.0) -> ImageSet:
    """The centre crops of a source as a set, cut when they are read."""

    def read(count: int) -> Any:
        for start in range(0, len(source), count):
            rows = range(start, min(start + count, len(source)))
            views = [crop_views(source[i][0], size, "center", (ratio,))[0] for i in rows]
            yield np.stack([np.asarray(view) for view in views])

    labels = np.asarray(source.labels, np.int64)
    return ImageSet(source.name, (len(source), size, size), labels, read)


def make_reference(
    images: str, split: Split, size: int, comparison: Comparison, device: torch.device, out: Path
) -> dict[str, Any]:
    """Statistics and images of a folder (or a data set), cut as ADM cuts them, as one .npz."""
    source = drop_unreadable(open_images(images, split))
    extractor = open_extractor(comparison, device)
    return write_reference(out, source_images(source, size), extractor, features_cache(), split)


def make_extractor(images: str, size: int, device: torch.device, out: Path, seed: int = 0) -> float:
    """Train a small classifier on the train split of `images`; returns its val accuracy."""
    real = drop_unreadable(open_images(images, "train"))
    pixels, labels = _in_memory(real, size)
    names = real.class_names
    model = train_classifier(pixels, labels, len(names), device, seed)
    held_pixels, held_labels = _in_memory(drop_unreadable(open_images(images, "val")), size)
    hits = []
    for start in range(0, len(held_pixels), 256):
        batch = torch.from_numpy(held_pixels[start : start + 256]).permute(0, 3, 1, 2)
        predicted = model(batch.to(device))["logits"].argmax(1).cpu().numpy()
        hits.append(predicted == held_labels[start : start + 256])
    accuracy = float(np.concatenate(hits).mean())
    save_classifier(model, out, names, real.name, accuracy)
    return accuracy


def _in_memory(source: ImageSource, size: int) -> tuple[np.ndarray, np.ndarray]:
    with progress_bar(len(source), f"read {source.name}", "image") as bar:
        parts = []
        for part in source_images(source, size).read(256):
            parts.append(part)
            bar.update(len(part))
    return np.concatenate(parts), np.asarray(source.labels, np.int64)


def _evaluate(
    pipeline: Pipeline,
    model: str,
    plan: Plan,
    folder: Path,
    comparison: Comparison,
    extractor: Extractor,
    png: bool,
) -> tuple[dict[str, Any], Path] | None:
    size = image_size(pipeline, plan)
    reference = None
    if os.environ.get("RANK", "0") == "0":  # before the long work: it may be refused
        reference = load_reference(comparison, size, extractor, features_cache())
        check_pair(size, reference, comparison.allowed)
    begun = time.perf_counter()
    with lock(folder, "moveimg evaluate"):
        path = sample_set(pipeline, plan, folder, png)
    if path is None or reference is None:
        return None
    drawn = time.perf_counter()
    images = open_set(path)
    found = score(
        images, reference, extractor, features_cache(), plan.n_classes, comparison.allowed
    )
    spent = {"sampling": drawn - begun, "scoring": time.perf_counter() - drawn}
    results = {
        "name": Path(model).name,
        "model": model,
        "plan": asdict(plan),
        "reference_given": comparison.reference,
        **found,
        **environment(pipeline.device),
        "seconds": {key: round(value, 1) for key, value in spent.items()},
    }
    write_results(folder / RESULTS, results)
    return results, folder / RESULTS


def _finished(
    folder: Path, plan: Plan, comparison: Comparison, digest: str | None, extractor: Extractor
) -> dict[str, Any] | None:
    """The results in `folder`, if they are of this plan, reference (and its sha256), extractor."""
    path = folder / RESULTS
    if not path.is_file():
        return None
    found = read_results(path)
    same = (
        found.get("plan") == json.loads(json.dumps(asdict(plan)))
        and found.get("reference_given") == comparison.reference
        and digest in (None, found["reference"]["sha256"])
        and found["extractor"]["sha256"] == extractor.fingerprint
    )
    return found if same else None


def image_size(pipeline: Pipeline, plan: Plan) -> tuple[int, int]:
    """(H, W) of the images that a plan makes."""
    if plan.resize is not None:
        return plan.resize, plan.resize
    height, width = pipeline.generator.config.grid
    return height * pipeline.tokenizer.downsample, width * pipeline.tokenizer.downsample


def _with_default(comparison: Comparison, model: str) -> Comparison:
    if comparison.reference is not None:
        if not is_named_source(comparison.reference):
            locate(comparison.reference, features_cache())
        return comparison
    if model not in REFERENCES:
        raise ValueError(
            "give a --reference: imagenet256, an .npz of ADM's layout or a folder of real images "
            "(moveimg evaluate FOLDER --make-reference FILE makes one)"
        )
    return replace(comparison, reference=REFERENCES[model])


def _hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:8]
