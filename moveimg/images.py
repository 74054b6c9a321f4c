"""Image files, PIL images and tensors at the program's edge, and labelled grids."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from moveimg.files import atomic

MAX_PIXELS = 2**26  # of an image that is read; Pillow itself warns at a third more
# Formats that run Ghostscript, exist on Windows alone or are only identified by Pillow
COMMON = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # these are tried first
NOT_READ = {"EPS", "WMF", "PDF", "MPEG", "HDF5", "GRIB", "BUFR"}
MAX_ASPECT = 16  # of a strip, before it is enlarged
MAX_CAPTION = 200  # characters of a name that a grid tries to fit


def center_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The central part of `image` with (height, width) `size`, after a resize that just covers it.

    As in ADM (Dhariwal and Nichol 2021, `center_crop_arr` in openai/guided-diffusion): a box
    filter halves the image while it is at least twice as large, a bicubic step does the rest. A
    strip is cut to its central part first: enlarged whole, 60,000 x 1 pixels would take gigabytes.
    """
    height, width = size
    short, long = sorted(image.size)
    if long > MAX_ASPECT * short:
        across, down = (min(side, MAX_ASPECT * short) for side in image.size)
        left, top = (image.width - across) // 2, (image.height - down) // 2
        image = image.crop((left, top, left + across, top + down))
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    resized = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    image = image.resize(resized, Image.Resampling.BICUBIC)
    # Rounded down as in ADM; torchvision's center_crop rounds halves to even.
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def stack_views(images: Sequence[Image.Image]) -> torch.Tensor:
    """RGB images of one size -> uint8 [N, 3, H, W]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 in 0..255 -> float32 in [-1, 1], any shape."""
    return pixels.float() / 127.5 - 1


def to_tensor(images: Sequence[Image.Image]) -> torch.Tensor:
    """RGB images of one size -> float32 [N, 3, H, W] in [-1, 1]."""
    return normalize(stack_views(images))


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """float [B, 3, H, W] in [-1, 1] (clipped) -> uint8 [B, H, W, 3]."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round()
    return pixels.permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy()


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """float [B, 3, H, W] in [-1, 1] (clipped) -> RGB images."""
    return [Image.fromarray(pixels) for pixels in to_uint8(images)]


class ImageList(list[Image.Image]):
    """A list of images of one size, which a notebook shows in rows of eight."""

    def _repr_png_(self) -> bytes | None:
        if not self:
            return None
        rows = [self[i : i + 8] for i in range(0, len(self), 8)]
        return png_bytes(labelled_grid(rows, [""] * len(rows), min_side=96), {})


def labelled_grid(
    rows: Sequence[Sequence[Image.Image]], names: Sequence[str], min_side: int = 64
) -> Image.Image:
    """Rows of images of one size, each row with its name at the left.

    Images smaller than `min_side` pixels are enlarged by whole factors, without smoothing.
    """
    side = max(rows[0][0].size)
    scale = max(1, min_side // side)
    width, height = (scale * pixels for pixels in rows[0][0].size)
    gap, font = 4, ImageFont.load_default(size=max(12, height // 5))
    names = [name[:MAX_CAPTION] for name in names]
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
        for c, image in enumerate(row):
            enlarged = image.resize((width, height), Image.Resampling.NEAREST)
            grid.paste(enlarged, (margin + c * (width + gap), top))
    return grid


def png_bytes(image: Image.Image, settings: Mapping[str, Any]) -> bytes:
    """A PNG with `settings` as JSON in its text chunk `moveimg`."""
    about = PngInfo()
    about.add_text("moveimg", json.dumps(dict(settings)))
    buffer = io.BytesIO()
    image.save(buffer, format="png", pnginfo=about)
    return buffer.getvalue()


def save_png(image: Image.Image, path: str | Path, settings: Mapping[str, Any]) -> None:
    """Write png_bytes atomically."""
    with atomic(path) as temporary:
        temporary.write_bytes(png_bytes(image, settings))


class UnreadableImageError(ValueError):
    """An image that cannot be decoded; `reason` says why, the message names the image too."""

    def __init__(self, identifier: str, reason: str) -> None:
        super().__init__(f"image '{identifier}' cannot be read: {reason}")
        self.identifier, self.reason = identifier, reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.identifier, self.reason)  # it travels between processes


@cache
def image_formats() -> tuple[str, ...]:
    """The names of the formats that are read: Pillow's, without those that need other programs."""
    Image.init()
    return tuple(kind for kind in dict.fromkeys((*COMMON, *Image.ID)) if kind not in NOT_READ)


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes, lower case with a dot, of all image_formats."""
    known, formats = Image.registered_extensions(), image_formats()
    return frozenset(suffix for suffix, kind in known.items() if kind in (*formats, "MPO"))


def read_image(file: Path | BinaryIO, identifier: str, as_published: bool = False) -> Image.Image:
    """The RGB image of a file as a viewer shows it; see to_rgb.

    Args:
        identifier: names the image in errors.
        as_published: ignore EXIF, ICC profile and transparency, as ADM and LlamaGen read ImageNet;
            its reference statistics were made that way.

    Raises UnreadableImageError.
    """
    try:
        with Image.open(file, formats=image_formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
            return to_rgb(image, as_published)
    except Exception as error:  # Pillow's decoders raise many kinds for broken files
        reason = str(error)[:200].replace(str(file), identifier)
        raise UnreadableImageError(identifier, f"{type(error).__name__}: {reason}") from error


def to_rgb(image: Image.Image, as_published: bool = False) -> Image.Image:
    """An opened image as RGB: turned as EXIF says, in sRGB, transparent pixels on white.

    docs/encoding.md has the rule of every mode. Broken EXIF data and ICC profiles are ignored.
    Raises what Pillow's decoders raise.
    """
    image.load()
    profile, deep = image.info.get("icc_profile"), image.format in ("PPM", "PNG")
    if not as_published:
        with suppress(Exception):  # broken EXIF data raises many kinds
            image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        deep = deep or image.mode.startswith("I;16")
        image = Image.fromarray(_to_8_bit(np.asarray(image), deep))
    if as_published:
        return image.convert("RGB")
    alpha = None
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        alpha = rgba.getchannel("A")
        image = image.convert("L") if image.mode in ("L", "LA") else rgba.convert("RGB")
    if profile:
        image = _to_srgb(image, profile)
    image = image.convert("RGB")
    if alpha is not None:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(Image.merge("RGBA", (*image.split(), alpha)))
        image = white.convert("RGB")
    return image


def grey_to_rgb(pixels: np.ndarray) -> Image.Image:
    """An RGB image of uint8 [H, W] or [H, W, 3]."""
    return Image.fromarray(pixels).convert("RGB")


def _to_8_bit(values: np.ndarray, deep: bool) -> np.ndarray:
    """uint8 pixels of wide ones; `deep`: they are known to use 16 bits, dark as they may be."""
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and np.isfinite(high)):
        raise ValueError(f"pixel values reach from {low:g} to {high:g}, expected 0 or more")
    is_float = values.dtype.kind == "f"
    if is_float and high <= 1:
        return np.rint(values * 255).astype(np.uint8)
    if high <= 255 and (is_float or not deep):
        return values.astype(np.uint8)
    if high <= 65535 and not is_float:
        return (values >> 8).astype(np.uint8)
    raise ValueError(f"pixel values reach {high:g}, expected at most 255 (float) or 65535")


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """The image in sRGB; unchanged where its profile is broken or of another colour space."""
    from PIL import ImageCms

    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    with suppress(Exception):
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
        return converted if converted is not None else image
    return image
