"""`moveimg evaluate`: sample sets drawn and scored, sweeps, references and extractors."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
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
from moveimg.evaluation.results import environment, read_results, write_results, write_sweep
from moveimg.evaluation.sample import SamplePlan, make_plan, sample_set
from moveimg.evaluation.scoring import check_pair, score
from moveimg.evaluation.sets import ImageSet, open_set
from moveimg.files import lock, read_json
from moveimg.pipeline import Pipeline, resolve
from moveimg.pretrained.hub import cache_directory
from moveimg.progress import progress_bar

REFERENCES = {"digits": "digits", "fashion": "fashion-mnist"}  # of the bundled models
FULL, SMALL = 50_000, 2_000  # default samples: of published FIDs; with a classifier
FEWEST = 4  # needed for precision and recall of three neighbours
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
    """The sample set to draw: see SamplePlan. num None: 50,000, or 2,000 with a classifier."""

    num: int | None = None
    seed: int = 0
    batch_size: int = 100
    resize: int | None = None
    png: bool = False
    changes: dict[str, Any] = field(default_factory=dict)


def features_cache() -> Path:
    """The folder where features and references are cached."""
    return cache_directory() / "evaluation"


def open_extractor(comparison: Comparison, device: torch.device) -> Extractor:
    """The feature extractor of a comparison; errors as of load_classifier and load_inception."""
    path = comparison.extractor
    if path is not None and comparison.inception_weights is not None:
        raise ValueError("--extractor and --inception-weights: expected one of the two")
    if path is None and comparison.inception_weights is None:
        for model, source in REFERENCES.items():
            bundled = BUNDLED / model / "extractor.safetensors"
            if comparison.reference == source and bundled.is_file():
                path = bundled
    if path is not None:
        return load_classifier(path, device)
    from moveimg.evaluation.inception import load_inception

    return load_inception(comparison.inception_weights, device)


def load_reference(
    comparison: Comparison, size: tuple[int, int], extractor: Extractor, cache: Path
) -> Reference:
    """The reference of a comparison; images of a data set are cropped to the samples' (H, W)."""
    assert comparison.reference is not None
    if is_named_source(comparison.reference):
        images = source_images(open_images(comparison.reference, "train"), size[0])
        return reference_of(images, extractor, cache, "train")
    return open_reference(comparison.reference, extractor, cache)


class _Evaluator:
    """A model, a comparison and its extractor, loaded once for one evaluation or a sweep."""

    def __init__(
        self, model: str, comparison: Comparison, device: str | None, dtype: str | None
    ) -> None:
        self.model = model
        self.comparison = _with_default_reference(comparison, model)
        self.pipeline = Pipeline.from_pretrained(model, device=own_device(device), dtype=dtype)
        self.extractor = open_extractor(self.comparison, self.pipeline.device)

    def make_plan(self, sampling: Sampling) -> SamplePlan:
        """The plan of the model's samples; its settings are sampling.json with the changes."""
        num = sampling.num or (FULL if self.extractor.class_names is None else SMALL)
        if num < FEWEST:  # refused before the images are drawn
            raise ValueError(f"too-few-samples: {num} images: expected {FEWEST} or more")
        settings = self.pipeline.settings(**sampling.changes)
        digest = model_digest(resolve(self.model))
        return make_plan(
            self.pipeline,
            digest,
            settings,
            num,
            sampling.seed,
            sampling.batch_size,
            sampling.resize,
        )

    def evaluate(self, plan: SamplePlan, folder: Path, png: bool) -> dict[str, Any] | None:
        """Draw and score the plan's images and write results.json; None on every rank but 0."""
        cache, allowed = features_cache(), self.comparison.allowed
        size, reference = image_size(self.pipeline, plan), None
        if os.environ.get("RANK", "0") == "0":  # before the samples are drawn: it may be refused
            reference = load_reference(self.comparison, size, self.extractor, cache)
            check_pair(size, reference, allowed)
        begun = time.perf_counter()
        with lock(folder, "moveimg evaluate"):
            path = sample_set(self.pipeline, plan, folder, png)
        if path is None or reference is None:
            return None
        drawn = time.perf_counter()
        scored = score(open_set(path), reference, self.extractor, cache, plan.n_classes, allowed)
        seconds = {"sampling": drawn - begun, "scoring": time.perf_counter() - drawn}
        results = {
            "name": Path(self.model).name,
            "model": self.model,
            "plan": asdict(plan),
            "reference_given": self.comparison.reference,
            **scored,
            **environment(self.pipeline.device),
            "seconds": {key: round(value, 1) for key, value in seconds.items()},
        }
        write_results(folder / RESULTS, results)
        return results

    def read_finished(
        self, folder: Path, plan: SamplePlan, digest: str | None
    ) -> dict[str, Any] | None:
        """Results in `folder` of the same plan, extractor and reference (of sha256 `digest`)."""
        if not (folder / RESULTS).is_file():
            return None
        results = read_results(folder / RESULTS)
        same = (
            results["plan"] == json.loads(json.dumps(asdict(plan)))
            and results.get("reference_given") == self.comparison.reference
            and digest in (None, results["reference"]["sha256"])
            and results["extractor"]["sha256"] == self.extractor.fingerprint
        )
        return results if same else None


def evaluate_model(
    model: str,
    comparison: Comparison,
    sampling: Sampling,
    out: Path | None,
    device: str | None = None,
    dtype: str | None = None,
) -> tuple[dict[str, Any], Path] | None:
    """Draw a model's samples (or continue to), score them, write results.json beside them.

    Args:
        model: a bundled name, a directory or a Hub id.
        comparison, sampling: the reference and extractor, and the set to draw.
        out: folder; None: evaluation/MODEL-HASH, by the hash of the plan.
        device, dtype: as of Pipeline.from_pretrained.

    Returns the results and their file; None on every rank but 0.
    """
    evaluator = _Evaluator(model, comparison, device, dtype)
    plan = evaluator.make_plan(sampling)
    folder = out or Path("evaluation") / f"{Path(model).name}-{_hash(plan)}"
    results = evaluator.evaluate(plan, folder, sampling.png)
    return None if results is None else (results, folder / RESULTS)


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
    and the folder; None on every rank but 0.
    """
    if key not in SamplingSettings.model_fields:
        known = ", ".join(SamplingSettings.model_fields)
        raise ValueError(f"--sweep {key}: expected one of {known}")
    evaluator = _Evaluator(model, comparison, device, dtype)
    changes = [{**sampling.changes, key: value} for value in values]
    plans = [evaluator.make_plan(replace(sampling, changes=change)) for change in changes]
    root = out or Path("evaluation") / f"{Path(model).name}-{key}-{_hash(plans[0])}"
    reference, digest = evaluator.comparison.reference, None
    if reference is not None and not is_named_source(reference):
        digest = digest_of(locate(reference, features_cache()))  # the file may have changed
    rows = []
    for value, plan in zip(values, plans, strict=True):
        folder = root / f"{key}-{value:g}"
        results = evaluator.read_finished(folder, plan, digest)
        results = results or evaluator.evaluate(plan, folder, sampling.png)
        if results is not None:
            rows.append({**results, "name": f"{key} {value:g}"})
    if not rows:
        return None
    write_sweep(root, key, list(values), rows)
    return rows, root


def score_files(
    samples: Path, comparison: Comparison, device: torch.device, out: Path | None
) -> dict[str, Any]:
    """Score a set of any program: ADM's .npz or a folder of images."""
    if comparison.reference is None:
        raise ValueError("--samples needs a --reference to compare with")
    images = open_set(samples)
    extractor = open_extractor(comparison, device)
    reference = load_reference(comparison, images.size, extractor, features_cache())
    scored = score(images, reference, extractor, features_cache(), None, comparison.allowed)
    results = {"name": samples.name, **scored, **environment(device)}
    if out is not None:
        write_results(out / RESULTS, results)
    return results


def model_digest(directory: Path) -> str:
    """sha256 over a model directory's generator: the model's config and its weights."""
    described = read_json(directory / "config.json")["model"]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    with (directory / "model.safetensors").open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def source_images(source: ImageSource, size: int, ratio: float = 1.0) -> ImageSet:
    """The centre crops of a source as a set, cropped as they are read."""

    def read(count: int) -> Iterator[np.ndarray]:
        for start in range(0, len(source), count):
            rows = range(start, min(start + count, len(source)))
            views = [crop_views(source[i][0], size, "center", (ratio,))[0] for i in rows]
            yield np.stack([np.asarray(view) for view in views])

    labels = np.asarray(source.labels, np.int64)
    return ImageSet(source.name, (len(source), size, size), labels, read)


def make_reference(
    images: str, split: Split, size: int, comparison: Comparison, device: torch.device, out: Path
) -> dict[str, Any]:
    """Write statistics and images of a folder or data set, cropped as ADM does, as one .npz."""
    with lock(out, "moveimg evaluate"):
        images_of_split = source_images(drop_unreadable(open_images(images, split)), size)
        extractor = open_extractor(comparison, device)
        return write_reference(out, images_of_split, extractor, features_cache(), split)


def make_extractor(images: str, size: int, device: torch.device, out: Path, seed: int = 0) -> float:
    """Train a small classifier on the train split of `images`; returns its val accuracy."""
    source = drop_unreadable(open_images(images, "train"))
    names = source.class_names
    held_out = drop_unreadable(open_images(images, "val"))
    if held_out.class_names != names:  # labels are compared by number below
        raise ValueError(f"{images}: the classes of the train and val splits differ")
    model = train_classifier(*_read_source(source, size), len(names), device, seed)
    pixels, labels = _read_source(held_out, size)
    right = 0
    for start in range(0, len(pixels), 256):
        batch = torch.from_numpy(pixels[start : start + 256]).permute(0, 3, 1, 2).to(device)
        predicted = model(batch)["logits"].argmax(1).cpu().numpy()
        right += int((predicted == labels[start : start + 256]).sum())
    save_classifier(model, out, names, source.name, right / len(labels))
    return right / len(labels)


def _read_source(source: ImageSource, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Centre crops uint8 [N, size, size, 3] and labels int64 [N] of a source."""
    pixels = np.empty((len(source), size, size, 3), np.uint8)
    start = 0
    with progress_bar(len(source), f"read {source.name}", "image") as bar:
        for batch in source_images(source, size).read(256):
            pixels[start : start + len(batch)] = batch
            start += len(batch)
            bar.update(len(batch))
    return pixels, np.asarray(source.labels, np.int64)


def image_size(pipeline: Pipeline, plan: SamplePlan) -> tuple[int, int]:
    """(H, W) of a plan's images."""
    if plan.resize is not None:
        return plan.resize, plan.resize
    height, width = pipeline.generator.config.grid
    return height * pipeline.tokenizer.downsample, width * pipeline.tokenizer.downsample


def _with_default_reference(comparison: Comparison, model: str) -> Comparison:
    if comparison.reference is None:
        if model not in REFERENCES:
            raise ValueError(
                "give a --reference: imagenet256, an .npz of ADM's layout or a folder of real "
                "images (moveimg evaluate FOLDER --make-reference FILE makes one)"
            )
        return replace(comparison, reference=REFERENCES[model])
    if not is_named_source(comparison.reference):
        locate(comparison.reference, features_cache())  # refused before the model is loaded
    return comparison


def _hash(plan: SamplePlan) -> str:
    return hashlib.sha256(json.dumps(asdict(plan), sort_keys=True).encode()).hexdigest()[:8]
