"""One image file -> RGB pixels."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps


class UnreadableImageError(ValueError):
    """An image that cannot be decoded; `reason` says why, the message names the image too."""

    def __init__(self, identifier: str, reason: str) -> None:
        super().__init__(f"image '{identifier}' cannot be read: {reason}")
        self.identifier, self.reason = identifier, reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.identifier, self.reason)  # it travels between processes


def decode_rgb(file: Path | BinaryIO, identifier: str, as_published: bool = False) -> Image.Image:
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
    """An opened picture as RGB; see decode_rgb. Raises what Pillow's decoders raise.

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
