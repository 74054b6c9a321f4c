"""Where a model uses its bank, and what its tokenizer keeps of an image."""

from __future__ import annotations

import base64
import io
import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from moveimg.data import center_crop, to_tensor
from moveimg.demo.jobs import Row
from moveimg.demo.models import Models
from moveimg.demo.requests import MAX_UPLOAD
from moveimg.images import to_pil, to_rgb
from moveimg.inspect import bank_maps
from moveimg.pipeline import Pipeline

MAX_PIXELS = 40_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


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


def read_upload(data: str) -> Image.Image:
    """Return the RGB image in a data URI or in bare base64, as a browser shows it.

    Raises ValueError, in words for the visitor, for anything but an image of bounded size.
    """
    if not data:
        raise ValueError("there is no image: choose a file")
    encoded = data.split(",", 1)[-1] if data.startswith("data:") else data
    if len(encoded) > MAX_UPLOAD * 4 / 3 + 8:
        raise ValueError(f"the file is larger than {MAX_UPLOAD // 2**20} MB")
    pixels = 0
    try:
        raw = base64.b64decode("".join(encoded.split()), validate=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(raw), formats=FORMATS)
            pixels = image.width * image.height
            if pixels <= MAX_PIXELS:
                image.draft("RGB", (2048, 2048))  # decodes no more of a JPEG than is of use
                return to_rgb(image)
    except Exception:  # Pillow's decoders raise many kinds of errors for broken files
        expected = ", ".join(FORMATS)
        raise ValueError(f"this is not an image that can be read (expected {expected})") from None
    raise ValueError(
        f"the image has {image.width} x {image.height} pixels: expected at most "
        f"{MAX_PIXELS // 10**6} million"
    )


def reconstruct(data: str, name: str, models: Models) -> Reconstruction:
    """Send the centre of an uploaded image through a model's tokenizer and back."""
    image = read_upload(data)
    pipeline = models.get(name)
    grid, factor = pipeline.generator.config.grid, pipeline.tokenizer.downsample
    height, width = grid[0] * factor, grid[1] * factor
    if width == height:
        before = center_crop(image, width)  # as images are cropped for training
    else:
        before = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    pixels = to_tensor([before])  # [1, 3, H, W]
    codes = pipeline.tokenizer.encode(pixels.to(pipeline.device))
    decoded = pipeline.tokenizer.decode(codes, grid).cpu()
    mse = (decoded - pixels).double().square().mean().item()
    board = codes.cpu().reshape(grid).numpy()
    colours = Image.fromarray(code_colours(pipeline)[board])
    psnr = 10 * math.log10(4 / mse) if mse else math.inf
    return Reconstruction(before, to_pil(decoded)[0], board, colours, mse, psnr)


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
