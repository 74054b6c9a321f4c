"""Views of images: ten crops from an enlarged one are LlamaGen's augmentation of codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from PIL import Image
from torchvision.transforms import functional

from moveimg.config import Size, as_pair
from moveimg.images import center_crop

Crops = Literal["center", "flip", "five", "ten"]
MAX_SIDE = 2**13  # of an image that views are cut from
VIEWS_PER_RANGE: dict[Crops, int] = {"center": 1, "flip": 2, "five": 5, "ten": 10}


def crop_views(
    image: Image.Image, size: Size, crops: Crops = "center", ranges: Sequence[float] = (1.0,)
) -> list[Image.Image]:
    """Views of `image` of (height, width) `size`, `count_views(crops, ranges)` of them.

    Each range r centre-crops to size * r pixels (rounded down, as in LlamaGen), and of that takes
    center: its centre; flip: the centre and its mirror image; five: the corners (top left, top
    right, bottom left, bottom right) and the centre; ten: the five, then their mirror images.
    Raises ValueError as count_views does, and for a side of more than MAX_SIDE pixels.
    """
    count_views(crops, ranges)
    if max(as_pair(size)) * max(ranges) > MAX_SIDE:
        raise ValueError(f"size {size} * range {max(ranges):g}: expected at most {MAX_SIDE} pixels")
    height, width = as_pair(size)
    views: list[Image.Image] = []
    for ratio in ranges:
        larger = center_crop(image, (enlarged(height, ratio), enlarged(width, ratio)))
        if crops == "five":
            views += functional.five_crop(larger, [height, width])
        elif crops == "ten":
            views += functional.ten_crop(larger, [height, width])
        else:
            centre = functional.center_crop(larger, [height, width])
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
