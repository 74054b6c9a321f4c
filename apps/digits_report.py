"""How good a model of the digits is, by a judge that never saw it.

An SVM trained on the real 8 x 8 training digits says which digit a sample shows. Beside that:
how many samples are distinct, how many repeat the codes of a training image, and the held-out loss.

    python apps/digits_report.py                                  # the bundled model
    python apps/digits_report.py --quantize int8                  # what 8 bits cost
    python apps/digits_report.py --model runs/digits-move --codes runs/digits-codes
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.svm import SVC
from torch.nn import functional as F

import tokenizer as vq
from moveimg.data import crop_views, open_images, to_tensor
from moveimg.data.images import digits_arrays
from moveimg.errors import describe
from moveimg.images import to_uint8
from moveimg.pipeline import Pipeline


def judge() -> SVC:
    """An RBF support vector machine on the 1,437 training digits, pixels in 0..1, [N, 64]."""
    images, labels = digits_arrays("train")[:2]
    return SVC(gamma="scale", C=10).fit(images.reshape(len(images), -1) / 255, labels)


def to_8x8(images: torch.Tensor, ratio: float) -> np.ndarray:
    """images [B, 3, 32, 32] in [-1, 1] -> the digits' own 8 x 8 pixels in 0..1, [B, 64].

    Undoes the enlargement they were trained at: `ratio` is the crop range, and the border that
    it cut off is black in the scans.
    """
    grey = torch.from_numpy(to_uint8(images)).float().mean(-1)[:, None] / 255  # [B, 1, 32, 32]
    side = round(grey.shape[-1] * ratio)
    border = (side - grey.shape[-1]) // 2
    padded = torch.nn.functional.pad(grey, (border,) * 4)
    small = torch.nn.functional.interpolate(padded, size=(8, 8), mode="area")
    return small.flatten(1).numpy()


def training_codes(tokenizer: vq.AutoencoderTokenizer, codes: Path | None) -> set[tuple[int, ...]]:
    """The codes of every training image: of all its views if packed, else of its centre."""
    if codes is not None:
        shards = sorted((codes / "train").glob("codes-*.npy"))
        rows = np.concatenate([np.load(path) for path in shards]).astype(int)
        return set(map(tuple, rows.reshape(-1, rows.shape[-1]).tolist()))
    source = open_images("digits", "train")
    views = [crop_views(source[i][0], 32)[0] for i in range(len(source))]
    found = [tokenizer.encode(part) for part in to_tensor(views).split(128)]
    return set(map(tuple, torch.cat(found).tolist()))


@torch.inference_mode()
def held_out_loss(pipeline: Pipeline, ratio: float) -> float:
    """Nats a code of the held-out digits' centre views, by the model as it is sampled."""
    source, losses = open_images("digits", "val"), []
    for start in range(0, len(source), 90):
        part = [source[i] for i in range(start, min(start + 90, len(source)))]
        views = to_tensor([crop_views(image, 32, ranges=(ratio,))[0] for image, _ in part])
        codes = pipeline.tokenizer.encode(views.to(pipeline.device))
        labels = torch.tensor([label for _, label in part], device=codes.device)
        logits = pipeline.decoder(codes, labels)
        losses.append(F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none"))
    return torch.cat(losses).mean().item()


def report(
    model: str, per_class: int, codes: Path | None, ratio: float, seed: int = 0,
    quantize: str | None = None, **changes: Any,
) -> dict:  # fmt: skip
    """The figures of `per_class` samples of each class, image i drawn with seed + i."""
    pipeline = Pipeline.from_pretrained(model, quantize=quantize)
    settings = pipeline.settings(**changes)
    labels = [label for label in range(10) for _ in range(per_class)]
    begun = time.perf_counter()
    sampled = pipeline.sample_codes(labels, settings, seed=seed, batch_size=100)
    seconds = time.perf_counter() - begun
    images = torch.cat([pipeline.tokenizer.decode(part) for part in sampled.split(100)])
    svm = judge()
    hits = svm.predict(to_8x8(images.cpu(), ratio)) == np.array(labels)
    drawn = list(map(tuple, sampled.tolist()))
    known = training_codes(pipeline.tokenizer, codes)
    real, real_labels = digits_arrays("val")[:2]
    return {
        "samples": len(labels),
        "recognised": float(hits.mean()),
        "recognised_by_class": hits.reshape(10, -1).mean(1).round(3).tolist(),
        "real_validation_digits_recognised": svm.score(real.reshape(-1, 64) / 255, real_labels),
        "held_out_nats_a_code": held_out_loss(pipeline, ratio),
        "distinct": len(set(drawn)) / len(drawn),
        "equal_to_a_training_image": sum(row in known for row in drawn) / len(drawn),
        "seconds": round(seconds, 1),
        "settings": settings.model_dump(),
    }


def main() -> None:
    """Print the report as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="digits", help="a bundled name or a model directory")
    parser.add_argument("--per-class", type=int, default=100, help="samples of each class")
    parser.add_argument("--codes", type=Path, help="packed codes: compare with all their views")
    parser.add_argument("--ratio", type=float, default=1.0, help="the crop range trained at")
    parser.add_argument("--seed", type=int, default=0, help="of the first sample")
    parser.add_argument("--quantize", help="int8: matrices of 8 bits")
    parser.add_argument("--cfg-scale", type=float, help="instead of the model's own")
    parser.add_argument("--temperature", type=float, help="instead of the model's own")
    given = parser.parse_args()
    changes: dict[str, Any] = {
        "quantize": given.quantize,
        "cfg_scale": given.cfg_scale,
        "temperature": given.temperature,
    }
    try:
        figures = report(
            given.model, given.per_class, given.codes, given.ratio, given.seed, **changes
        )
    except (ValueError, OSError) as error:
        parser.error(describe(error))
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
