"""Looking into a model: where it leans on its bank, and what its tokenizer keeps of an image."""

from __future__ import annotations

import base64
import io
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageCms, ImageOps

from apps.demo_parts.drawing import Row
from apps.demo_parts.models import Models

if TYPE_CHECKING:
    from moveimg.pipeline import Pipeline

MAX_UPLOAD = 8 * 2**20  # bytes of a file
MAX_PIXELS = 40_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


@dataclass(frozen=True)
class LayerMap:
    """One layer's use of the bank in one picture.

    Attributes:
        layer: its number, from 1.
        share: the bank's share of what the layer mixes into its values, [h, w] in 0..1.
        gates: mean gate of the slots / (that + g_0), [h, w] in 0..1.
        g_0, slots: the mean gates, in 0..2.

    The last code of a picture is never read by the model: NaN stands there.
    """

    layer: int
    share: np.ndarray
    gates: np.ndarray
    g_0: float
    slots: float


def bank_of(row: Row, models: Models) -> Iterator[tuple[Image.Image, list[LayerMap]]]:
    """A row's first picture, which is drawn already, and its maps, first layer first; one item.

    Raises ValueError for a model without a bank.
    """
    import torch

    from moveimg.inspect import bank_maps

    if not models.describe(row.model).has_bank:
        raise ValueError(f"{row.model} has no value memory, so there is nothing to map")
    pipeline = models.get(row.model)
    codes = torch.as_tensor(row.codes[:1], device=pipeline.device)
    labels = torch.tensor(row.labels[:1], device=pipeline.device)
    maps = bank_maps(pipeline.generator, codes, labels)
    grid = pipeline.generator.config.grid
    layers = []
    for layer, found in sorted(maps.items()):
        share, own, slots = (
            _on_grid(part[0], grid) for part in (found.share, found.g_0, found.slots)
        )
        gates = slots / np.maximum(slots + own, 1e-12)
        layers.append(
            LayerMap(layer + 1, share, gates, float(np.nanmean(own)), float(np.nanmean(slots)))
        )
    yield pipeline.decode(codes)[0], layers


def _on_grid(values: Any, grid: tuple[int, int]) -> np.ndarray:
    """[T - 1] -> [h, w], the last place empty."""
    flat = np.full(grid[0] * grid[1], np.nan, dtype=np.float32)
    flat[:-1] = values.numpy()
    return flat.reshape(grid)


def heat(values: np.ndarray, low: float, high: float) -> Image.Image:
    """A map [h, w] as a picture of h x w pixels in matplotlib's viridis; grey where it is NaN."""
    from matplotlib import colormaps

    scaled = (values - low) / max(high - low, 1e-9)
    colours = np.asarray(colormaps["viridis"](np.nan_to_num(scaled)))[..., :3]
    colours[np.isnan(values)] = 0.5
    return Image.fromarray((colours * 255).round().astype(np.uint8))


@dataclass(frozen=True)
class Reconstructed:
    """An image before and after the tokenizer.

    Attributes:
        before, after: pictures of one size.
        codes: [h, w].
        colours: the codes as a picture of h x w pixels; codes that lie close look alike.
        mse: mean squared error, pixels in [-1, 1].
        psnr: 10 log10(2^2 / mse), in dB.
        distinct: how many different codes there are.
    """

    before: Image.Image
    after: Image.Image
    codes: np.ndarray
    colours: Image.Image
    mse: float
    psnr: float
    distinct: int


class TooManyPixels(ValueError):
    """An upload beyond MAX_PIXELS; the message is for the visitor."""


def read_upload(data: str) -> Image.Image:
    """The RGB image in a data URI or in bare base64, as a browser shows it.

    Turned as its EXIF says, transparent parts white, colours of a profile brought to sRGB.

    Raises ValueError, in words for the visitor, for anything but a picture of bounded size.
    """
    if not isinstance(data, str) or not data:
        raise ValueError("no image given: choose a file")
    from moveimg.images import to_rgb

    encoded = data.split(",", 1)[-1] if data.startswith("data:") else data
    if len(encoded) > MAX_UPLOAD * 4 / 3 + 8:
        raise ValueError(f"the file is larger than {MAX_UPLOAD // 2**20} MB")
    try:
        raw = base64.b64decode(re.sub(r"\s", "", encoded), validate=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(raw), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise TooManyPixels(
                    f"the image has {image.width} x {image.height} pixels: expected at most "
                    f"{MAX_PIXELS // 10**6} million"
                )
            image.draft("RGB", (2048, 2048))  # JPEGs are decoded no larger than is of use
            return to_rgb(_in_srgb(image))
    except TooManyPixels:
        raise
    except Exception:  # Pillow's decoders raise many kinds for broken files
        kinds = ", ".join(FORMATS)
        raise ValueError(f"this is not an image that can be read (expected {kinds})") from None


def _in_srgb(image: Image.Image) -> Image.Image:
    """Colours of an embedded profile (phones write Display P3) brought to sRGB."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK"):
        return image
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        wanted = "RGBA" if image.mode == "RGBA" else "RGB"
        turned = ImageOps.exif_transpose(image)
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(turned, given, srgb, outputMode=wanted) or image
    except (ImageCms.PyCMSError, OSError):  # a broken profile: its numbers are taken as they are
        return image


def reconstruct(image: Image.Image, name: str | None, models: Models) -> Iterator[Reconstructed]:
    """Take the centre of an image through a model's tokenizer and back; one item."""
    import torch

    from moveimg.images import to_pil

    pipeline = models.get(name)
    grid, factor = pipeline.generator.config.grid, pipeline.tokenizer.downsample
    before = _centre(image, grid[1] * factor, grid[0] * factor)
    pixels = torch.from_numpy(np.array(before)).permute(2, 0, 1)[None].float() / 127.5 - 1
    codes = pipeline.tokenizer.encode(pixels)
    decoded = pipeline.tokenizer.decode(codes, grid).cpu()
    mse = (decoded - pixels).double().square().mean().item()
    board = codes.cpu().reshape(grid).numpy()
    yield Reconstructed(
        before=before,
        after=to_pil(decoded)[0],
        codes=board,
        colours=Image.fromarray(code_colours(pipeline)[board]),
        mse=mse,
        psnr=10 * math.log10(4 / mse) if mse else math.inf,
        distinct=len(np.unique(board)),
    )


def _centre(image: Image.Image, width: int, height: int) -> Image.Image:
    if width != height:
        return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    from moveimg.data import center_crop

    return center_crop(image, width)  # as images are cut for training


def code_colours(pipeline: Pipeline) -> np.ndarray:
    """A colour for each code, uint8 [V, 3]: the codebook's first three principal components."""
    import torch

    vectors = pipeline.tokenizer.quantize.codebook().detach().cpu().double()  # [V, D]
    vectors = vectors - vectors.mean(0)
    _, _, axes = torch.linalg.svd(vectors, full_matrices=False)
    axes = axes[:3] * axes[:3].sum(1, keepdim=True).sign()  # an axis points the same way each time
    flat = torch.zeros(len(vectors), 3, dtype=torch.float64)
    flat[:, : len(axes)] = vectors @ axes.T
    low, high = flat.quantile(0.02, 0), flat.quantile(0.98, 0)
    scaled = ((flat - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)
    return (40 + 200 * scaled).round().to(torch.uint8).numpy()
