"""Print how far the evaluation is from torch-fidelity called directly, and from float64 NumPy.

Prints the tables of docs/evaluation.md: random Inception weights in torch-fidelity's file layout,
real images of digits, and three sets against them.

    python -m tools.evaluation_agreement --images 32
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch_fidelity

from moveimg.data import open_images
from moveimg.evaluation.features import Extractor, extract
from moveimg.evaluation.inception import NAME, SPATIAL, load_inception
from moveimg.evaluation.metrics import KID_SUBSET
from moveimg.evaluation.reference import reference_of
from moveimg.evaluation.scoring import compute
from moveimg.evaluation.sets import scan_image_set, source_images
from tests import reference_metrics as plain

Scores = dict[str, float]


def constructed_sets(images: int) -> dict[str, np.ndarray]:
    """Real digits, and three sets to compare with them: the same, brighter ones, and noise."""
    real = next(iter(source_images(open_images("digits", "train"), (32, 32)).read(images)))
    bright = (real.astype(np.int64) + 40).clip(0, 255).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, real.shape, dtype=np.uint8)
    return {"real": real, "identical": real, "shifted": bright, "disjoint": noise}


def ours(samples: np.ndarray, real: np.ndarray, extractor: Extractor, cache: Path) -> Scores:
    reference = reference_of(plain.array_set("real", real), extractor, cache, "train")
    images = plain.array_set("samples", samples)
    features = extract(images, scan_image_set(images).digest, extractor, cache)
    return compute(features, reference)


def theirs(name: str, samples: np.ndarray, real: np.ndarray, weights: Path) -> Scores:
    """torch_fidelity.calculate_metrics, twice: by default, and FID of the registered layer."""
    common = {
        "input1": plain.Tensors(samples), "input2": plain.Tensors(real),
        "cuda": False, "verbose": False,
        "feature_extractor_weights_path": str(weights), "save_cpu_ram": True,
        "cache_root": str(weights.parent), "input2_cache_name": "real",
        "input1_cache_name": "real" if name == "identical" else name,
    }  # fmt: skip
    found = torch_fidelity.calculate_metrics(
        **common, feature_extractor="inception-v3-compat", isc=True, fid=True, kid=True, prc=True,
        kid_subset_size=min(KID_SUBSET, len(samples)),
    )  # fmt: skip
    spatial = torch_fidelity.calculate_metrics(
        **common, feature_extractor=NAME, fid=True, feature_layer_fid=SPATIAL
    )
    return {
        "fid": found["frechet_inception_distance"],
        "sfid": spatial["frechet_inception_distance"],
        "inception_score_shuffled": found["inception_score_mean"],
        "inception_score_shuffled_std": found["inception_score_std"],
        "precision": found["precision"],
        "recall": found["recall"],
        "kid": found["kernel_inception_distance_mean"],
        "kid_std": found["kernel_inception_distance_std"],
    }


def in_float64(samples: np.ndarray, real: np.ndarray, extractor: Extractor, cache: Path) -> Scores:
    """Of the same float32 features; the network itself stays in float32."""
    x, y = (
        extract(images, scan_image_set(images).digest, extractor, cache)
        for images in (plain.array_set("samples", samples), plain.array_set("real", real))
    )
    kid, kid_std = plain.kid(x["fid"], y["fid"], min(KID_SUBSET, len(x["fid"])))
    shuffled, deviation = plain.scores_shuffled(x["logits"])
    precision, recall = plain.precision_recall(x["fid"], y["fid"])
    return {
        "fid": plain.frechet(x["fid"], y["fid"]),
        "sfid": plain.frechet(x["sfid"], y["sfid"]),
        "inception_score_shuffled": shuffled,
        "inception_score_shuffled_std": deviation,
        "inception_score_adm": plain.score_adm(x["logits"]),
        "precision": precision,
        "recall": recall,
        "kid": kid,
        "kid_std": kid_std,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=32, help="of each set, 10 or more")
    count = parser.parse_args().images
    with tempfile.TemporaryDirectory() as folder:
        weights, cache = Path(folder) / "inception.pth", Path(folder)
        plain.random_inception(weights)
        extractor = load_inception(weights, torch.device("cpu"))
        sets = constructed_sets(count)
        real = sets.pop("real")
        for name, samples in sets.items():
            mine = ours(samples, real, extractor, cache)
            others: list[tuple[str, Callable[[], Scores]]] = [
                ("torch-fidelity", partial(theirs, name, samples, real, weights)),
                ("float64 NumPy", partial(in_float64, samples, real, extractor, cache)),
            ]
            found = {label: call() for label, call in others}
            print(f"\n{name}, {count} images\n")
            print("| | value | to torch-fidelity | to float64 NumPy |\n| --- | --- | --- | --- |")
            for key in found["float64 NumPy"]:
                cells = [
                    f"{abs(mine[key] - scores[key]):.1e}" if key in scores else "-"
                    for scores in found.values()
                ]
                print(f"| {key} | {mine[key]:.6g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
