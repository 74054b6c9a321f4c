"""Where a model uses its bank, what its tokenizer keeps of an image, and how likely images are."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from moveimg.demo.jobs import Row
from moveimg.demo.models import Models
from moveimg.demo.uploads import read_upload
from moveimg.images import to_pil, to_tensor
from moveimg.inspect import bank_maps
from moveimg.likelihood import Likelihood, code_log_probs
from moveimg.pipeline import Pipeline

CLASSES = 8  # scored in one step


def map_bank(row: Row, models: Models) -> tuple[Image.Image, list[dict[str, Any]]]:
    """Return the first image of a finished row, and how each layer uses the bank in it.

    Of each layer: `layer` (its number, from 1), `share` (the bank's share of what the layer mixes
    into its values, [h, w] in 0..1), `gates` (mean gate of the slots / (that + g_0), [h, w]), and
    the mean gates `g_0` and `slots`. The model never reads the last code of an image: NaN.

    Raises ValueError for a model without a bank.
    """
    if not models.describe(row.model).has_bank:
        raise ValueError(f"{row.model} has no value memory, so there is nothing to map")
    pipeline = models.get(row.model)
    codes = torch.tensor(row.codes[:1], device=pipeline.device)  # type: ignore[index]
    labels = torch.tensor(row.labels[:1], device=pipeline.device)
    grid, layers = pipeline.generator.config.grid, []
    for layer, maps in sorted(bank_maps(pipeline.generator, codes, labels).items()):
        share, own, slots = (_on_grid(part[0], grid) for part in (maps.share, maps.g_0, maps.slots))
        gates = slots / np.maximum(slots + own, 1e-12)
        g_0, mean = float(np.nanmean(own)), float(np.nanmean(slots))
        layers.append(
            {"layer": layer + 1, "share": share, "gates": gates, "g_0": g_0, "slots": mean}
        )
    return pipeline.decode(codes)[0], layers


def _on_grid(values: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """[T - 1] -> [h, w] with NaN in the last place."""
    flat = np.full(grid[0] * grid[1], np.nan, dtype=np.float32)
    flat[:-1] = values.numpy()
    return flat.reshape(grid)


@dataclass(frozen=True)
class Reconstruction:
    """An image before and after the tokenizer.

    Attributes:
        before, after: images of one size.
        codes: [h, w].
        colours: the codes as an image of h x w pixels; close codes have similar colours.
        mse: mean squared error, pixels in [-1, 1].
        psnr: 10 log10(2^2 / mse), in dB.
    """

    before: Image.Image
    after: Image.Image
    codes: np.ndarray
    colours: Image.Image
    mse: float
    psnr: float


def reconstruct(data: str, name: str, models: Models) -> Reconstruction:
    """Send the centre of an uploaded image through a model's tokenizer and back."""
    image = read_upload(data)
    pipeline = models.get(name)
    before, grid = pipeline.crop(image), pipeline.generator.config.grid
    pixels = to_tensor([before])  # [1, 3, H, W]
    codes = pipeline.tokenizer.encode(pixels.to(pipeline.device))
    decoded = pipeline.tokenizer.decode(codes, grid).cpu()
    mse = (decoded - pixels).double().square().mean().item()
    board = codes.cpu().reshape(grid).numpy()
    colours = Image.fromarray(code_colours(pipeline)[board])
    psnr = 10 * math.log10(4 / mse) if mse else math.inf
    return Reconstruction(before, to_pil(decoded)[0], board, colours, mse, psnr)


@dataclass(frozen=True)
class Score:
    """An image of h x w codes and its likelihood given each class: log_probs [C, h w]."""

    image: Image.Image
    grid: tuple[int, int]
    likelihood: Likelihood

    def best(self, count: int = 10) -> list[tuple[int, float, float]]:
        """Return (label, probability, nats per code) of the likeliest classes; equal priors."""
        shares, nats = self.likelihood.total.softmax(0), self.likelihood.nats_per_code
        return [(i, shares[i].item(), nats[i].item()) for i in nats.argsort()[:count].tolist()]

    def nats(self, label: int) -> np.ndarray:
        """Return the nats of each code given a class, [h, w]."""
        return -self.likelihood.log_probs[label].view(self.grid).numpy()


def score(
    data: str, name: str, models: Models, stop: threading.Event
) -> Iterator[tuple[int, int] | Score]:
    """Score an uploaded image; yields (classes done, all classes) and at last the Score."""
    pipeline = models.get(name)
    image = pipeline.crop(read_upload(data))
    codes, parts = pipeline.encode([image]), []
    labels = torch.arange(len(pipeline.class_names), device=pipeline.device)
    for batch in labels.split(CLASSES):
        if stop.is_set():
            return
        repeated = codes.expand(len(batch), -1)
        parts.append(code_log_probs(pipeline.decoder, repeated, batch).cpu())
        yield int(batch[-1]) + 1, len(labels)
    likelihood = Likelihood(torch.cat(parts), image.width * image.height)
    yield Score(image, pipeline.generator.config.grid, likelihood)


def code_colours(pipeline: Pipeline) -> np.ndarray:
    """Return a colour per code, uint8 [V, 3]: the codebook's first three principal components."""
    vectors = pipeline.tokenizer.quantize.codebook().detach().cpu().double()  # [V, D]
    vectors = vectors - vectors.mean(0)
    _, _, axes = torch.linalg.svd(vectors, full_matrices=False)
    axes = axes[:3] * axes[:3].sum(1, keepdim=True).sign()  # the same sign each time
    flat = torch.zeros(len(vectors), 3, dtype=torch.float64)
    flat[:, : len(axes)] = vectors @ axes.T
    low, high = flat.quantile(0.02, 0), flat.quantile(0.98, 0)
    scaled = ((flat - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)
    return (40 + 200 * scaled).round().to(torch.uint8).numpy()


def heat_map(values: np.ndarray, low: float = 0.0, high: float = 1.0) -> Image.Image:
    """Return values [h, w] as an image of h x w pixels in viridis; grey where they are NaN."""
    from matplotlib import colormaps

    scaled = (values - low) / max(high - low, 1e-9)
    colours: Any = np.asarray(colormaps["viridis"](np.nan_to_num(scaled)))[..., :3]
    colours[np.isnan(values)] = 0.5
    return Image.fromarray((colours * 255).round().astype(np.uint8))
