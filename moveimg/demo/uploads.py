"""Uploaded images: data URIs of bounded size."""

from __future__ import annotations

import base64
import io
import warnings

from PIL import Image

from moveimg.demo.requests import MAX_UPLOAD
from moveimg.images import to_rgb

MAX_PIXELS = 40_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


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
