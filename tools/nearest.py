"""Compare a model's samples with their nearest training images: does it copy?

    python -m tools.nearest fashion fashion-mnist --num 1000 --out nearest.png

Distances are root mean squares over pixels in 0..255. As a yardstick, images of the source's test
or validation split are compared with the training images in the same way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

from moveimg import Pipeline
from moveimg.data import Split, open_images
from moveimg.evaluation.sets import source_images
from moveimg.images import labelled_grid, to_pil
from moveimg.tables import markdown_table

SHOWN = 20


def read_pixels(source: str, split: Split, size: tuple[int, int], share: float | None) -> Tensor:
    """A split's images as float32 [N, H, W, 3] in 0..255."""
    images = source_images(open_images(source, split, share), size)
    return torch.from_numpy(np.concatenate(list(images.read(1000)))).float()


def find_nearest(images: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    """Distance and row of the nearest training image of each image, [N] each."""
    rows, distances = images.flatten(1), []
    for part in training.flatten(1).split(10_000):
        distances.append(torch.cdist(rows, part))
    best = torch.cat(distances, dim=1).min(dim=1)
    return best.values / rows.shape[1] ** 0.5, best.indices


def main(
    model: Annotated[str, typer.Argument(help="a model")],
    source: Annotated[str, typer.Argument(help="the images that it was trained on")],
    val_fraction: Annotated[float | None, typer.Option(help="as in the model's config")] = None,
    num: Annotated[int, typer.Option(help="samples, every class in turn")] = 1000,
    seed: Annotated[int, typer.Option(help="image i is drawn with seed + i")] = 0,
    out: Annotated[Path, typer.Option(help="samples above their nearest images")] = Path(
        "nearest.png"
    ),
) -> None:
    """Print the distances of samples and of held-out images to the training images."""
    pipeline = Pipeline.from_pretrained(model, device="cpu")
    size, names = pipeline.image_size, pipeline.class_names
    training = read_pixels(source, "train", size, val_fraction)
    held_out = read_pixels(source, "val", size, val_fraction)
    drawn = pipeline.sample([i % len(names) for i in range(num)], seed=seed)
    samples = torch.from_numpy(np.stack([np.asarray(image) for image in drawn])).float()
    near, rows = find_nearest(samples, training)
    new, _ = find_nearest(held_out[torch.linspace(0, len(held_out) - 1, num).long()], training)
    table = []
    for images, distances in (("samples", near), ("held-out images", new)):
        nearer, nearest = (distances < new.quantile(q) for q in (0.5, 0.01))
        table.append(
            {
                "images": images,
                "mean": f"{distances.mean():.1f}",
                "median": f"{distances.median():.1f}",
                "nearer than the median held-out image": f"{nearer.float().mean():.0%}",
                "nearer than 99 % of them": f"{nearest.float().mean():.1%}",
            }
        )
    print(markdown_table(table))
    shown = training[rows[:SHOWN]].permute(0, 3, 1, 2) / 127.5 - 1
    labelled_grid([drawn[:SHOWN], to_pil(shown)], ["sample", "nearest"]).save(out)


if __name__ == "__main__":
    typer.run(main)
