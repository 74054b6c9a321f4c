"""Square views of images, and their tensors.

The centre crop is that of ADM (Dhariwal and Nichol 2021, `center_crop_arr` in
openai/guided-diffusion); ten crops from an enlarged square are LlamaGen's augmentation of
codes (Sun et al. 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from PIL import Image
from torchvision.transforms import functional

Crops = Literal["center", "flip", "five", "ten"]
MAX_ASPECT = 16  # of a strip, before it is enlarged
MAX_SIDE = 2**13  # of a square that views are cut from
VIEWS_PER_RANGE: dict[Crops, int] = {"center": 1, "flip": 2, "five": 5, "ten": 10}


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The central size x size square of `image`, after its short side is resized to `size`.

    Halves by a box filter while the short side is at least twice `size`, then resizes
    bicubically. Smaller images are enlarged by the bicubic step. A strip is cut to its central
    part first: enlarged whole, 60,000 x 1 pixels would take gigabytes.
    """
    short, long = sorted(image.size)
    if long > MAX_ASPECT * short:
        width, height = (min(side, MAX_ASPECT * short) for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    # Rounded down as in ADM; torchvision's center_crop rounds halves to even.
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def crop_views(
    image: Image.Image, size: int, crops: Crops = "center", ranges: Sequence[float] = (1.0,)
) -> list[Image.Image]:
    """size x size views of `image`, `count_views(crops, ranges)` of them, range after range.

    Each range r centre-crops to a square of size * r pixels (rounded down, as in LlamaGen), and
    of that takes
    center: its centre; flip: the centre and its mirror image; five: the corners (top left, top
    right, bottom left, bottom right) and the centre; ten: the five, then their mirror images.
    Raises ValueError as count_views does, and for a square of more than MAX_SIDE pixels a side.
    """
    count_views(crops, ranges)
    if size * max(ranges) > MAX_SIDE:
        raise ValueError(f"size {size} * range {max(ranges):g}: expected at most {MAX_SIDE} pixels")
    views: list[Image.Image] = []
    for ratio in ranges:
        square = center_crop(image, enlarged(size, ratio))
        if crops == "five":
            views += functional.five_crop(square, [size, size])
        elif crops == "ten":
            views += functional.ten_crop(square, [size, size])
        else:
            centre = functional.center_crop(square, [size, size])
            views += [centre] if crops == "center" else [centre, functional.hflip(centre)]
    return views


def enlarged(size: int, ratio: float) -> int:
    """size * ratio rounded down; a product that only rounding puts below a whole number is it."""
    return int(size * ratio + 1e-9)


def count_views(crops: Crops, ranges: Sequence[float]) -> int:
    """The number of views that `crop_views` returns.

    Raises ValueError for crops that do not exist or ranges that cannot be cropped.
    """
    if crops not in VIEWS_PER_RANGE:
        raise ValueError(f"unknown crops {crops!r}: expected one of {', '.join(VIEWS_PER_RANGE)}")
    if not ranges or not all(1 <= ratio < float("inf") for ratio in ranges):
        raise ValueError(f"crop ranges are {list(ranges)}: expected one or more, each at least 1")
    return VIEWS_PER_RANGE[crops] * len(ranges)


def stack_views(images: Sequence[Image.Image]) -> torch.Tensor:
    """RGB images of one size -> uint8 [N, 3, H, W]."""
    return torch.stack([functional.pil_to_tensor(image) for image in images])


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 in 0..255 -> float32 in [-1, 1], any shape."""
    return pixels.float() / 127.5 - 1


def to_tensor(images: Sequence[Image.Image]) -> torch.Tensor:
    """RGB images of one size -> float32 [N, 3, H, W] in [-1, 1]."""
    return normalize(stack_views(images))
