"""Image files, PIL images and tensors at the program's edge, and labelled grids."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from moveimg.files import atomic


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """float [B, 3, H, W] in [-1, 1] (clipped) -> uint8 [B, H, W, 3]."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round()
    return pixels.permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy()


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """float [B, 3, H, W] in [-1, 1] (clipped) -> RGB pictures."""
    return [Image.fromarray(pixels) for pixels in to_uint8(images)]


def labelled_grid(
    rows: Sequence[Sequence[Image.Image]], names: Sequence[str], min_side: int = 64
) -> Image.Image:
    """Rows of pictures of one size, each row with its name at the left.

    Pictures smaller than `min_side` pixels are enlarged by whole factors, without smoothing.
    """
    side = max(rows[0][0].size)
    scale = max(1, min_side // side)
    width, height = (scale * pixels for pixels in rows[0][0].size)
    gap, font = 4, ImageFont.load_default(size=max(12, height // 5))
    widest = max(font.getlength(name) for name in names)
    margin = int(min(widest, 3 * width)) + 3 * gap if any(names) else gap
    columns = max(len(row) for row in rows)
    size = (margin + columns * (width + gap), gap + len(rows) * (height + gap))
    grid = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(grid)
    for r, (row, name) in enumerate(zip(rows, names, strict=True)):
        top = gap + r * (height + gap)
        while name and font.getlength(name) > 3 * width:
            name = name.removesuffix("…")[:-1] + "…"
        pen.text((gap, top + height // 2), name, fill="black", font=font, anchor="lm")
        for c, picture in enumerate(row):
            enlarged = picture.resize((width, height), Image.Resampling.NEAREST)
            grid.paste(enlarged, (margin + c * (width + gap), top))
    return grid


def png_bytes(picture: Image.Image, settings: Mapping[str, Any]) -> bytes:
    """A PNG with `settings` as JSON in its text chunk `moveimg`."""
    about = PngInfo()
    about.add_text("moveimg", json.dumps(dict(settings)))
    buffer = io.BytesIO()
    picture.save(buffer, format="png", pnginfo=about)
    return buffer.getvalue()


def save_png(picture: Image.Image, path: str | Path, settings: Mapping[str, Any]) -> None:
    """Write png_bytes atomically."""
    with atomic(path) as temporary:
        temporary.write_bytes(png_bytes(picture, settings))


class UnreadableImageError(ValueError):
    """An image that cannot be decoded; `reason` says why, the message names the image too."""

    def __init__(self, identifier: str, reason: str) -> None:
        super().__init__(f"image '{identifier}' cannot be read: {reason}")
        self.identifier, self.reason = identifier, reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.identifier, self.reason)  # it travels between processes


def read_image(file: Path | BinaryIO, identifier: str, as_published: bool = False) -> Image.Image:
    """The picture as a viewer shows it: turned as its EXIF says, transparent parts white.

    as_published: leave EXIF and transparency alone, as ADM and LlamaGen read ImageNet; its
        reference statistics were made that way

    Raises UnreadableImageError.
    """
    try:
        with Image.open(file) as image:
            return to_rgb(image, as_published)
    except Exception as error:  # Pillow's decoders raise many kinds for broken files
        reason = str(error).replace(str(file), identifier)
        raise UnreadableImageError(identifier, f"{type(error).__name__}: {reason}") from error


def to_rgb(image: Image.Image, as_published: bool = False) -> Image.Image:
    """An opened picture as RGB; see read_image. Raises what Pillow's decoders raise.

    Grey of 16 bits keeps its upper 8 (Pillow would clip it, which turns most of it white).
    """
    if image.mode.startswith("I;16"):
        image = grey_to_rgb((np.asarray(image) >> 8).astype(np.uint8))
    if as_published:
        return image.convert("RGB")
    image = ImageOps.exif_transpose(image)
    return (_on_white(image) if image.has_transparency_data else image).convert("RGB")


def grey_to_rgb(pixels: np.ndarray) -> Image.Image:
    """uint8 [H, W] -> an RGB image."""
    return Image.fromarray(pixels).convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white
