"""`moveimg evaluate`: sample sets drawn and scored, sweeps, references and extractors."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moveimg.checkpoint import BUNDLED
from moveimg.data import ImageSource, Split, drop_unreadable, is_named_source, open_images
from moveimg.evaluation.classifier import load_classifier, save_classifier, train_classifier
from moveimg.evaluation.features import Extractor
from moveimg.evaluation.reference import locate, open_reference, write_reference
from moveimg.evaluation.results import environment, write_results, write_sweep
from moveimg.evaluation.sample import SamplePlan, sample_set
from moveimg.evaluation.scoring import Guards, check_pair, score
from moveimg.evaluation.sets import open_set, source_images
from moveimg.files import lock
from moveimg.pipeline import Pipeline
from moveimg.pretrained.hub import cache_directory

REFERENCES = {"digits": "digits", "fashion": "fashion-mnist"}  # of the bundled models
RESULTS = "results.json"


def features_cache() -> Path:
    """The folder where features and references are cached."""
    return cache_directory() / "evaluation"


def open_extractor(
    reference: str | None,
    classifier: Path | None,
    inception_weights: Path | None,
    device: torch.device,
) -> Extractor:
    """The feature extractor of a comparison with `reference`, which is looked for first.

    `classifier` is a file of --make-extractor, or `efficientnet-lite0`. Without one it is the
    bundled classifier of a data set, else Inception with torch-fidelity's weights.
    Raises as locate, load_classifier, load_efficientnet and load_inception.
    """
    if classifier is not None and inception_weights is not None:
        raise ValueError("--extractor and --inception-weights: expected one of the two")
    if reference is not None and not is_named_source(reference):
        locate(reference, features_cache())
    for model, source in REFERENCES.items():
        if reference == source and classifier is inception_weights is None:
            classifier = BUNDLED / model / "extractor.safetensors"
    if str(classifier) == "efficientnet-lite0":
        from moveimg.evaluation.imagenet import load_efficientnet

        return load_efficientnet(device)
    if classifier is not None:
        return load_classifier(classifier, device)
    from moveimg.evaluation.inception import load_inception

    return load_inception(inception_weights, device)


def default_reference(model: str) -> str:
    """The data set of a bundled model. Raises ValueError for another model."""
    if model not in REFERENCES:
        raise ValueError(
            "give a --reference: imagenet256, an .npz of ADM's layout or a folder of real images "
            "(moveimg evaluate FOLDER --make-reference FILE makes one)"
        )
    return REFERENCES[model]


def evaluate_model(
    pipeline: Pipeline,
    plans: Sequence[SamplePlan],
    reference: str,
    extractor: Extractor,
    allowed: Sequence[str],
    out: Path | None,
    sweep: tuple[str, Sequence[float]] | None = None,
) -> tuple[list[dict[str, Any]], Path] | None:
    """Draw a model's samples (or continue to), score them, write results.json beside them.

    A sweep is a sampling setting and its values; each has a plan and a folder of its own in `out`
    (by default evaluation/MODEL-HASH, by the first plan), beside sweep.md and sweep.png.
    Returns the results, one for each plan, and their folder; None on every rank but 0.
    """
    name, (key, values) = Path(pipeline.name).name, sweep or ("", ())
    described = json.dumps(asdict(plans[0]), sort_keys=True).encode()
    parts = [name, key, hashlib.sha256(described).hexdigest()[:8]]
    root = out or Path("evaluation") / "-".join(filter(None, parts))
    height, width = (n * pipeline.tokenizer.downsample for n in pipeline.generator.config.grid)
    size = (height, width) if plans[0].resize is None else (plans[0].resize, plans[0].resize)
    cache, real, results = features_cache(), None, []
    if os.environ.get("RANK", "0") == "0":  # before the samples are drawn: it may be refused
        real = open_reference(reference, size, extractor, cache)
        check_pair(size, real, Guards(allowed))
    names = [f"{key} {value:g}" for value in values] or [name]
    for title, plan in zip(names, plans, strict=True):
        folder = root / title.replace(" ", "-") if sweep else root
        begun = time.perf_counter()
        with lock(folder, "moveimg evaluate"):
            path = sample_set(pipeline, plan, folder)
        if path is None or real is None:
            continue
        drawn = time.perf_counter()
        scored = score(open_set(path), real, extractor, cache, Guards(allowed), plan.n_classes)
        seconds = {"sampling": drawn - begun, "scoring": time.perf_counter() - drawn}
        result = {
            "name": name,
            "model": pipeline.name,
            "plan": asdict(plan),
            "reference_given": reference,
            **scored,
            **environment(pipeline.device),
            "seconds": {key: round(value, 1) for key, value in seconds.items()},
        }
        write_results(folder / RESULTS, result)
        results.append(result | {"name": title})
    if not results:
        return None
    if sweep is not None:
        write_sweep(root, key, values, results)
    return results, root


def score_files(
    samples: Path, reference: str, extractor: Extractor, allowed: Sequence[str], out: Path | None
) -> dict[str, Any]:
    """Score a set of any program: ADM's .npz or a folder of images."""
    images, cache = open_set(samples), features_cache()
    real = open_reference(reference, images.size, extractor, cache)
    scored = score(images, real, extractor, cache, Guards(allowed))
    results = {"name": samples.name, **scored, **environment(extractor.device)}
    if out is not None:
        write_results(out / RESULTS, results)
    return results


def make_reference(
    images: str, split: Split, size: tuple[int, int], extractor: Extractor, out: Path
) -> dict[str, Any]:
    """Write statistics and images of a folder or data set, cropped as ADM does, as one .npz."""
    with lock(out, "moveimg evaluate"):
        source = drop_unreadable(open_images(images, split))
        return write_reference(out, source_images(source, size), extractor, features_cache(), split)


def make_extractor(
    images: str, size: tuple[int, int], device: torch.device, out: Path, seed: int = 0
) -> float:
    """Train a small classifier on the train split of `images`; returns its val accuracy."""
    source = drop_unreadable(open_images(images, "train"))
    names = source.class_names
    held_out = drop_unreadable(open_images(images, "val"))
    if held_out.class_names != names:  # labels are compared by number below
        raise ValueError(f"{images}: the classes of the train and val splits differ")
    model = train_classifier(*_read_source(source, size), len(names), device, seed)
    pixels, labels = _read_source(held_out, size)
    batches = torch.from_numpy(pixels).permute(0, 3, 1, 2).split(256)
    predicted = torch.cat([model(batch.to(device))["logits"].argmax(1).cpu() for batch in batches])
    accuracy = float((predicted.numpy() == labels).mean())
    save_classifier(model, out, names, source.name, accuracy)
    return accuracy


def _read_source(source: ImageSource, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Centre crops uint8 [N, H, W, 3] and labels int64 [N] of a source."""
    images = source_images(source, size)
    return np.concatenate(list(images.read(256))), np.asarray(source.labels, np.int64)
