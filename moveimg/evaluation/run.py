"""`moveimg evaluate`: draw and score sample sets, and make tables of the results.

A set has the same bytes on any number of processes, interrupted or not: index i determines class
and seed of image i, and images are drawn in fixed batches by index, so that plan.json determines
the shape of every matrix product. Ranks divide the batches, and each batch is written to a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from moveimg import __version__
from moveimg.checkpoint import BUNDLED
from moveimg.config import SamplingSettings
from moveimg.data import sha256_file
from moveimg.device import hardware
from moveimg.dist import all_ranks, print_rank0
from moveimg.errors import describe
from moveimg.evaluation import extractors, metrics
from moveimg.evaluation.extractors import Extractor
from moveimg.evaluation.reference import Reference, locate, open_reference
from moveimg.evaluation.sets import ImageSet, open_set, scan_image_set, write_npz
from moveimg.files import atomic, lock, read_json, write_json
from moveimg.images import to_uint8
from moveimg.pipeline import Pipeline, resolve
from moveimg.progress import progress_bar
from moveimg.sampling import MAX_SEED
from moveimg.tables import markdown_table

REFERENCES = {"digits": "digits", "fashion": "fashion-mnist"}  # of bundled models
SHOWN: tuple[str, ...] = ("fid", "sfid", "inception_score_adm", "inception_score_shuffled")
SHOWN += ("precision", "recall", "kid", "accuracy")


def open_extractor(
    reference: str | None, classifier: Path | None, inception: Path | None, device: torch.device
) -> Extractor:
    """Load the named classifier, else the one bundled for the reference's data, else Inception."""
    if reference is not None:
        locate(reference)  # refuses an unknown reference before Inception is downloaded
    if classifier is inception is None:
        for model, source in REFERENCES.items():
            if source == (reference or "").split(":")[0]:
                classifier = BUNDLED / model / "extractor.safetensors"
    if str(classifier) == extractors.EFFICIENTNET:
        return extractors.load_efficientnet(device)
    if classifier is not None:
        return extractors.load_classifier(classifier, device)
    return extractors.load_inception(inception, device)


def make_plan(
    pipeline: Pipeline, num: int, seed: int, batch_size: int, resize: int | None, **changes: Any
) -> dict[str, Any]:
    """Return the content of plan.json: every setting that determines the bytes of a sample set."""
    if not 0 <= seed <= MAX_SEED - num + 1:
        raise ValueError(f"seed {seed}: expected a whole number in 0..{MAX_SEED - num + 1}")
    directory = resolve(pipeline.name)
    config = json.dumps(read_json(directory / "config.json")["model"], sort_keys=True)
    weights = bytes.fromhex(sha256_file(directory / "model.safetensors"))
    return {
        "model": hashlib.sha256(config.encode() + weights).hexdigest(),
        "tokenizer": pipeline.tokenizer.fingerprint,
        "n_classes": len(pipeline.class_names),
        "sampling": pipeline.settings(**changes).model_dump(mode="json"),
        "num": num,
        "seed": seed,
        "batch_size": batch_size,
        "resize": resize,
        "device": pipeline.device.type,
        "dtype": str(pipeline.generator.head.weight.dtype).removeprefix("torch."),
    }


def class_labels(indices: Sequence[int], n_classes: int) -> np.ndarray:
    """Return int64 classes by image index; each n_classes indices in a row have all classes."""
    rounds = {i // n_classes for i in indices}
    orders = {n: np.random.default_rng((0, n)).permutation(n_classes) for n in rounds}
    return np.array([orders[i // n_classes][i % n_classes] for i in indices], np.int64)


def sample_set(pipeline: Pipeline, plan: dict[str, Any], folder: Path) -> Path | None:
    """Draw the missing images of `plan`; returns the path of samples.npz, None on ranks > 0."""
    target, batch_size = folder / "samples.npz", plan["batch_size"]
    starts = range(0, plan["num"], batch_size)
    files = {start: folder / f"parts/part-{start:09d}.npy" for start in starts}

    def write_plan() -> None:
        path = folder / "plan.json"
        if not path.is_file():
            write_json(path, plan)
        elif read_json(path) != plan:
            raise ValueError(f"{path} has another model or settings: expected another --out")

    with all_ranks() as ranks:
        ranks.run_on_rank0(write_plan)
        mine = [] if target.exists() else starts[ranks.rank :: ranks.size]
        with progress_bar(len(mine) * batch_size, "sample", "image") as bar:
            for start in mine:
                if not files[start].is_file():
                    pixels = _draw(pipeline, plan, start)
                    with atomic(files[start]) as temporary:
                        np.save(temporary, pixels)
                bar.update(batch_size)
        ranks.wait()
    if ranks.rank:
        return None
    if not target.exists():
        batches = (np.load(file, allow_pickle=False) for file in files.values())
        write_npz(target, batches, class_labels(range(plan["num"]), plan["n_classes"]))
    shutil.rmtree(folder / "parts", ignore_errors=True)
    return target


def _draw(pipeline: Pipeline, plan: dict[str, Any], start: int) -> np.ndarray:
    """Draw the batch of images uint8 [b, H, W, 3] that begins at index `start`."""
    size, side = plan["batch_size"], plan["resize"]
    labels = class_labels(range(start, min(start + size, plan["num"])), plan["n_classes"]).tolist()
    settings = SamplingSettings.model_validate(plan["sampling"])
    codes = pipeline.sample_codes(labels, settings, seed=plan["seed"] + start, batch_size=size)
    # resized as LlamaGen resizes 384 to 256: bicubic, no antialiasing, clipped afterwards
    images = pipeline.tokenizer.decode(codes, pipeline.generator.config.grid, clip=False)
    if not torch.isfinite(images).all():
        raise ValueError(f"images from index {start} on: expected finite pixels")
    if side is not None and images.shape[-2:] != (side, side):
        images = F.interpolate(images.float(), (side, side), mode="bicubic")
    return to_uint8(images)


def evaluate_model(
    pipeline: Pipeline, plan: dict[str, Any], reference: str, extractor: Extractor, out: Path | None
) -> dict[str, Any] | None:
    """Draw and score a model's samples in `out`; returns the results, None on ranks > 0."""
    name, side = Path(pipeline.name).name, plan["resize"]
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    folder = out or Path("evaluation") / f"{name}-{digest[:8]}"
    if os.environ.get("RANK", "0") == "0":  # a bad reference is refused before drawing
        size = (side, side) if side else pipeline.image_size
        real = open_reference(reference, size, extractor)
    with lock(folder, "moveimg evaluate"):
        path = sample_set(pipeline, plan, folder)
    if path is None:
        return None
    about = {"name": name, "model": pipeline.name, "plan": plan}
    results = score(open_set(path), real, extractor, pipeline.class_names, about, folder)
    print_rank0(f"-> {folder}/")
    return results


def score(
    images: ImageSet,
    real: Reference,
    extractor: Extractor,
    class_names: list[str] | None,
    about: dict[str, Any],
    out: Path | None,
) -> dict[str, Any]:
    """Score a sample set; returns results that begin with `about`, and writes out/results.json.

    The set's labels index `class_names`, by default the classifier's classes.
    """
    digest, duplicates = scan_image_set(images)
    features = extractors.extract(images, digest, extractor)
    warnings, count, width = [], images.count, features["fid"].shape[1]
    numbers: dict[str, Any] = {
        role: metrics.frechet_distance(metrics.compute_statistics(features[role]), statistics)
        for role, statistics in real.statistics.items()
    }
    if "sfid" in features:  # Inception: IS is defined by its classes
        numbers |= metrics.inception_scores(features["logits"])
    if real.features is not None:
        numbers |= metrics.precision_recall(features["fid"], real.features)
        numbers |= metrics.kernel_distance(features["fid"], real.features)
    numbers["distinct"] = 1 - duplicates / count
    if (known := extractor.class_names) is not None and images.labels is not None:
        names = class_names or known
        if {*names} <= {*known} and images.labels.max() < len(names):
            requested = np.array([known.index(name) for name in names])[images.labels]
            numbers["accuracy"] = float((features["logits"].argmax(1) == requested).mean())
        else:
            warnings.append("no accuracy: the classifier lacks some of the samples' classes")
    if count <= width:
        warnings.append(f"{count} images for {width} features: the covariance is singular")
    elif count < 50_000 and "sfid" in features:
        warnings.append(f"{count} images: published FIDs use 50,000 and are lower")
    if duplicates:
        warnings.append(f"{duplicates} of {count} images equal an earlier one: is a seed reused?")
    compared = None if real.features is None else len(real.features)
    results = {
        **about,
        "metrics": numbers,
        "samples": {"count": count, "size": images.size, "sha256": digest},
        "reference": {"name": real.name, "sha256": real.digest, "images": compared},
        "extractor": {
            "space": extractor.space,
            "sha256": extractor.fingerprint,
            "held_out_accuracy": extractor.held_out,
        },
        "warnings": warnings,
        "versions": {"moveimg": __version__, "torch-fidelity": version("torch-fidelity")},
        "hardware": hardware(extractor.device),
    }
    if out is not None:
        write_json(out / "results.json", results)
    return results


def read_results(path: Path) -> dict[str, Any]:
    """Read a results.json. Raises ValueError if `moveimg evaluate` did not write the file."""
    results = read_json(path)
    try:
        _row(results)
    except Exception as error:  # another program's JSON
        raise ValueError(f"{path}: not results of moveimg evaluate ({describe(error)})") from None
    return results


def results_table(results: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table with a row per result, without empty columns."""
    rows = [_row(result) for result in results]
    columns = ("name", "images", *SHOWN, "settings", "reference", "feature space")
    return markdown_table(rows, [c for c in columns if any(row.get(c) for row in rows)])


def _row(result: dict[str, Any]) -> dict[str, str]:
    row = {"name": result["name"], "images": f"{result['samples']['count']:,}"}
    numbers = {key: result["metrics"].get(key) for key in SHOWN}
    row |= {key: f"{value:.4g}" for key, value in numbers.items() if value is not None}
    if plan := result.get("plan"):  # the guidance scale, and settings that are not defaults
        default = SamplingSettings().model_dump() | {"cfg_scale": None}
        changed = {k: v for k, v in plan["sampling"].items() if v != default.get(k)}
        row["settings"] = ", ".join(f"{k} {v}".removesuffix(".0") for k, v in changed.items())
    row["reference"] = result["reference"]["name"].rsplit("/", 1)[-1]
    return row | {"feature space": result["extractor"]["space"]}
