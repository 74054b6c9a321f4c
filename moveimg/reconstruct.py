"""Images through a tokenizer and back: the error, and how evenly its codes are used."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image

import tokenizer as vq
from moveimg.data.crops import crop_views, to_tensor
from moveimg.data.images import ImageSource
from moveimg.pictures import labelled_grid, to_pil

BATCH, SHOWN = 64, 10


@dataclass(frozen=True)
class Reconstruction:
    """How well a tokenizer gives images back.

    Attributes:
        images: how many were tried.
        mse: mean squared error, pixels in [-1, 1].
        psnr: 10 log10(2^2 / mse), in dB.
        usage: share of the codes that occurred.
        perplexity: exp of the entropy of their frequencies, 1 to codebook_size.
    """

    images: int
    mse: float
    psnr: float
    usage: float
    perplexity: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def reconstruct(
    source: ImageSource, tokenizer: vq.AutoencoderTokenizer, size: int, ratio: float = 1.0
) -> tuple[Reconstruction, Image.Image]:
    """Encode and decode the centre `size` pixels of every image of `source`.

    Returns the figures, and a picture of the first images above their reconstructions.
    """
    grid = (size // tokenizer.downsample,) * 2
    errors, shown = [], list[list[Image.Image]]()
    counts = torch.zeros(tokenizer.codebook_size, dtype=torch.int64)
    for start in range(0, len(source), BATCH):
        rows = range(start, min(start + BATCH, len(source)))
        views = [crop_views(source[i][0], size, "center", (ratio,))[0] for i in rows]
        images = to_tensor(views)
        codes = tokenizer.encode(images)
        decoded = tokenizer.decode(codes, (grid[0], grid[1])).cpu()
        errors.append((decoded - images).square().flatten(1).mean(1))
        counts += codes.flatten().bincount(minlength=tokenizer.codebook_size).cpu()
        if not shown:
            shown = [to_pil(images[:SHOWN]), to_pil(decoded[:SHOWN])]
    mse = torch.cat(errors).double().mean().item()
    stats = {key: value.item() for key, value in vq.code_statistics(counts).items()}
    psnr = 10 * math.log10(4 / mse) if mse else math.inf
    result = Reconstruction(images=len(source), mse=mse, psnr=psnr, **stats)
    return result, labelled_grid(shown, ["image", "decoded"])
