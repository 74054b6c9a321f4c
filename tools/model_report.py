"""Measure how good a model's samples are, by a classifier that sees real images alone.

    python tools/model_report.py digits --images digits --per-class 100

Prints JSON: the share of samples that show their class (and of real held-out images), of distinct
samples and of those equal to a training image in codes; the distance to the nearest training image
(of samples and of held-out images, RMS over pixels in 0..255); the held-out loss.
"""

from __future__ import annotations

import json

import numpy as np
import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from moveimg.data import open_images
from moveimg.evaluation.classifier import train_classifier
from moveimg.images import center_crop, to_tensor, to_uint8
from moveimg.pipeline import Pipeline

BATCH = 100


def load_split(images: str, split: str, size: int, limit: int) -> tuple[Tensor, Tensor]:
    """Return centre crops float [N, 3, S, S] in [-1, 1] and labels [N], spread over a split."""
    source = open_images(images, split)  # type: ignore[arg-type]
    rows = np.linspace(0, len(source) - 1, min(limit, len(source))).round().astype(int)
    views = to_tensor([center_crop(source[int(i)][0], (size, size)) for i in rows])
    return views, torch.from_numpy(source.labels[rows]).long()


def nearest_distance(images: Tensor, train: Tensor) -> float:
    """Return the mean RMS distance, in grey levels of 255, to the nearest training image."""
    flat, known = images.flatten(1), train.flatten(1)
    nearest = torch.cat([torch.cdist(part, known).min(1).values for part in flat.split(BATCH)])
    return nearest.mean().item() / flat.shape[1] ** 0.5 * 127.5


@torch.inference_mode()
def held_out_loss(pipeline: Pipeline, codes: Tensor, labels: Tensor) -> float:
    """Return nats per code under teacher forcing."""
    losses = [
        F.cross_entropy(pipeline.generator(c, y).flatten(0, 1).float(), c.flatten()).item() * len(c)
        for c, y in zip(codes.split(BATCH), labels.split(BATCH), strict=True)
    ]
    return sum(losses) / len(codes)


def report(
    model: str, images: str, per_class: int, limit: int, quantize: str | None
) -> dict[str, object]:
    """Return the figures of `per_class` samples of each class; image i is drawn with seed i."""
    pipeline = Pipeline.from_pretrained(model, quantize=quantize)
    size = pipeline.generator.config.grid[0] * pipeline.tokenizer.downsample
    (train, train_labels), (val, val_labels) = (
        load_split(images, split, size, limit) for split in ("train", "val")
    )
    n_classes = len(pipeline.class_names)
    pixels = to_uint8(train)
    classifier = train_classifier(pixels, train_labels.numpy(), n_classes, torch.device("cpu"))

    def encode(views: Tensor) -> Tensor:
        return torch.cat([pipeline.tokenizer.encode(part) for part in views.split(BATCH)])

    def recognise(views: Tensor) -> Tensor:
        grey_levels = (views.clamp(-1, 1) + 1) * 127.5
        parts = [classifier(part)["logits"].argmax(1) for part in grey_levels.split(BATCH)]
        return torch.cat(parts)

    labels, settings = torch.arange(n_classes).repeat_interleave(per_class), pipeline.settings()
    codes = pipeline.sample_codes(labels.tolist(), settings, batch_size=BATCH).cpu()
    samples = torch.cat([pipeline.tokenizer.decode(part).cpu() for part in codes.split(BATCH)])
    hits = recognise(samples) == labels
    drawn = [tuple(row) for row in codes.tolist()]
    known = {tuple(row) for row in encode(train).tolist()}
    return {
        "model": model, "images": images, "samples": len(labels),
        "recognised": hits.float().mean().item(),
        "recognised_by_class": hits.view(n_classes, -1).float().mean(1).tolist(),
        "held_out_images_recognised": (recognise(val) == val_labels).float().mean().item(),
        "distinct": len(set(drawn)) / len(drawn),
        "equal_to_a_training_image": len([row for row in drawn if row in known]) / len(drawn),
        "distance_to_training_images": nearest_distance(samples, train),
        "distance_of_held_out_images": nearest_distance(val, train),
        "held_out_nats_per_code": held_out_loss(pipeline, encode(val), val_labels),
        "settings": settings.model_dump(),
    }  # fmt: skip


def main(
    model: str,
    images: str = typer.Option(..., help="what it was trained on: a name or a folder"),
    per_class: int = typer.Option(100, min=1, help="samples of each class"),
    limit: int = typer.Option(10_000, min=1, help="images of each split"),
    quantize: str = typer.Option(None, help="int8: matrices of 8 bits"),
) -> None:
    print(json.dumps(report(model, images, per_class, limit, quantize), indent=2))


if __name__ == "__main__":
    typer.run(main)
