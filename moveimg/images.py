"""Image files, conversions between PIL images and tensors, and labelled grids."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from moveimg.files import atomic

MAX_PIXELS = 2**26  # largest image that is read; Pillow warns from 4/3 of it on
MAX_ASPECT = 16  # images of a larger aspect ratio are cropped before resizing
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
SUFFIXES = {".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff",
            ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif"}  # fmt: skip


def center_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize `image` to cover (height, width) `size`, and crop the image around its centre.

    As in ADM (Dhariwal and Nichol 2021, `center_crop_arr` in openai/guided-diffusion): a box
    filter halves the image while it is at least twice as large, then a bicubic filter resizes it.
    """
    height, width = size
    longest = MAX_ASPECT * min(image.size)
    if max(image.size) > longest:  # resizing 60,000 x 1 pixels would need gigabytes
        image = _crop(image, min(image.width, longest), min(image.height, longest))
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    resized = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    return _crop(image.resize(resized, Image.Resampling.BICUBIC), width, height)


def _crop(image: Image.Image, width: int, height: int) -> Image.Image:
    # Rounds down as ADM does; torchvision's center_crop rounds halves to even.
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """Map pixels in 0..255, of any shape, to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_tensor(images: Sequence[Image.Image]) -> torch.Tensor:
    """Convert RGB images of one size to float32 [N, 3, H, W] in [-1, 1]."""
    pixels = np.stack([np.asarray(image) for image in images])
    return normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2))


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Clip float images [B, 3, H, W] to [-1, 1] and convert them to uint8 [B, H, W, 3]."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round()
    return pixels.permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy()


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """Clip float images [B, 3, H, W] to [-1, 1] and convert them to RGB images."""
    return [Image.fromarray(pixels) for pixels in to_uint8(images)]


class ImageList(list[Image.Image]):
    """A list of images of one size, which a notebook shows in rows of eight."""

    def _repr_png_(self) -> bytes | None:
        rows = [self[i : i + 8] for i in range(0, len(self), 8)]
        return encode_png(draw_grid(rows, [""] * len(rows)), {}) if rows else None


def draw_grid(rows: Sequence[Sequence[Image.Image]], names: Sequence[str]) -> Image.Image:
    """Draw rows of images of one size, each row with a name at the left; enlarges small images."""
    scale = max(1, 64 // max(rows[0][0].size))
    width, height = (scale * pixels for pixels in rows[0][0].size)
    gap, font = 4, ImageFont.load_default(size=max(12, height // 5))
    names = [name if len(name) < 25 else name[:23] + "…" for name in names]
    margin = int(max(font.getlength(name) for name in names)) + gap * (3 if any(names) else 1)
    size = (margin + max(map(len, rows)) * (width + gap), gap + len(rows) * (height + gap))
    grid = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(grid)
    for top, row, name in zip(range(gap, size[1], height + gap), rows, names, strict=True):
        pen.text((gap, top + height // 2), name, fill="black", font=font, anchor="lm")
        for column, image in enumerate(row):
            enlarged = image.resize((width, height), Image.Resampling.NEAREST)
            grid.paste(enlarged, (margin + column * (width + gap), top))
    return grid


def encode_png(image: Image.Image, settings: Mapping[str, Any]) -> bytes:
    """Encode a PNG with `settings` as JSON in the text chunk `moveimg`."""
    about, buffer = PngInfo(), io.BytesIO()
    about.add_text("moveimg", json.dumps(dict(settings)))
    image.save(buffer, format="png", pnginfo=about)
    return buffer.getvalue()


def save_png(image: Image.Image, path: str | Path, settings: Mapping[str, Any]) -> None:
    """Write an image as a PNG with `settings`, atomically (see encode_png)."""
    with atomic(path) as temporary:
        temporary.write_bytes(encode_png(image, settings))


class UnreadableImageError(ValueError):
    """An image cannot be decoded; `args` are the image's identifier and the reason."""

    def __str__(self) -> str:
        return f"image '{self.args[0]}' cannot be read: {self.args[1]}"


def read_image(file: Path | BinaryIO, identifier: str, as_published: bool = False) -> Image.Image:
    """Read a file as an RGB image. Raises UnreadableImageError with `identifier` and the reason.

    as_published: ignore EXIF and transparency, as ADM and LlamaGen do for ImageNet.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
            return to_rgb(image, as_published)
    except Exception as error:  # Pillow's decoders raise many kinds for broken files
        reason = str(error)[:200].replace(str(file), identifier)
        raise UnreadableImageError(identifier, f"{type(error).__name__}: {reason}") from error


def to_rgb(image: Image.Image, as_published: bool = False) -> Image.Image:
    """Convert an opened image to RGB, turned as EXIF says, with transparent pixels on white."""
    image.load()
    deep = image.format in ("PPM", "PNG") or image.mode.startswith("I;16")  # dark ones, too
    if not as_published:
        with suppress(Exception):  # broken EXIF data raises many kinds
            image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        values = np.asarray(image)
        if image.mode == "F" or not 0 <= values.min() <= values.max() <= 65535:
            raise ValueError(f"pixels of mode {image.mode}: expected integers in 0..65535")
        image = Image.fromarray((values >> (8 if deep or values.max() > 255 else 0)).astype("u1"))
    if image.has_transparency_data and not as_published:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")
