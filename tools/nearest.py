"""Compare samples with their nearest training images, to see whether a model copies.

    python -m tools.nearest fashion fashion-mnist --num 1000 --out nearest.png

Distances are root mean squares over pixels in 0..255. For comparison, the distances of held-out
images to the training images are printed, too.
"""

from pathlib import Path

import numpy as np
import torch
import typer
from torch import Tensor

from moveimg import Pipeline
from moveimg.data import evenly_spaced, open_images
from moveimg.evaluation.sets import source_images
from moveimg.images import draw_grid, to_pil
from moveimg.tables import markdown_table


def find_nearest(images: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distance and the row of each image's nearest training image, [N] each."""
    rows = images.flatten(1)
    distances = [torch.cdist(rows, part) for part in training.flatten(1).split(10_000)]
    best = torch.cat(distances, dim=1).min(dim=1)
    return best.values / rows.shape[1] ** 0.5, best.indices


def main(
    model: str, source: str, val_fraction: float = typer.Option(None, help="as in the config"),
    num: int = 1000, seed: int = 0, out: Path = Path("nearest.png"),
) -> None:  # fmt: skip
    """Print the distances of samples and of held-out images to the training images."""
    pipeline = Pipeline.from_pretrained(model, device="cpu")
    sets = {}
    for split in ("train", "val"):
        images = source_images(open_images(source, split, val_fraction), pipeline.image_size)
        sets[split] = torch.from_numpy(np.concatenate(list(images.read(1000)))).float()
    held_out = sets["val"][evenly_spaced(len(sets["val"]), num)]
    drawn = pipeline.sample([i % len(pipeline.class_names) for i in range(num)], seed=seed)
    samples = torch.from_numpy(np.stack([np.asarray(image) for image in drawn])).float()
    (near, rows), (new, _) = (find_nearest(images, sets["train"]) for images in (samples, held_out))
    share = lambda nearer: f"{nearer.float().mean():.1%}"  # noqa: E731
    table = [
        {
            "images": images,
            "mean": f"{distances.mean():.1f}",
            "median": f"{distances.median():.1f}",
            "nearer than the median held-out image": share(distances < new.median()),
            "nearer than 99 % of them": share(distances < new.quantile(0.01)),
        }
        for images, distances in (("samples", near), ("held-out images", new))
    ]
    print(markdown_table(table))
    shown = to_pil(sets["train"][rows[:20]].permute(0, 3, 1, 2) / 127.5 - 1)
    draw_grid([drawn[:20], shown], ["sample", "nearest"]).save(out)


if __name__ == "__main__":
    typer.run(main)
