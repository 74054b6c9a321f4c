"""Tensors <-> pictures at the program's edge, and labelled grids of pictures."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
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
