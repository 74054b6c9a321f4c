"""Completing and editing images: some codes are kept, and the other codes are drawn.

B images   h x w grid of codes, T = h w   H x W pixels

Codes are drawn in raster order, each given all codes before it. Where the kept codes come first (an
upper part of the image), this samples exactly from p(drawn | kept). Otherwise a drawn code ignores
the kept codes after it; `resample` corrects this by Metropolis-Hastings steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import index

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from moveimg.config import SamplingSettings
from moveimg.errors import shorten
from moveimg.images import center_crop
from moveimg.model import Transformer
from moveimg.sampling import UNKNOWN, code_log_probs, guidance_scales, keep_top, sample_codes

HALVES = ("top", "bottom", "left", "right")
BLOCK = 4  # codes proposed together by `resample`; longer blocks are accepted too rarely

Area = str | int | Sequence[int] | Image.Image | np.ndarray


def area_pixels(area: Area, size: tuple[int, int], downsample: int) -> Tensor:
    """The pixels of an area (see Pipeline.complete) of an image of `size` (H, W), bool [H, W].

    The area of a mask is its pixels above half its maximum, after the image's crop.
    Raises ValueError for an area of another form, or outside the image.
    """
    height, width = size
    if isinstance(area, Image.Image | np.ndarray):
        mask = np.asarray(area.convert("L") if isinstance(area, Image.Image) else area)
        if mask.ndim != 2 or not mask.size or not np.isfinite(mask).all():
            raise ValueError(f"mask {list(mask.shape)}: expected finite numbers [H, W]")
        whole = Image.fromarray(np.where(mask > mask.max() / 2, 255, 0).astype(np.uint8))
        return torch.from_numpy(np.array(center_crop(whole, size))) > 127
    row, column = (side // downsample // 2 * downsample for side in size)  # halves of whole codes
    boxes = [(0, 0, width, row), (0, row, width, height)]
    boxes += [(0, 0, column, height), (column, 0, width, height)]
    try:
        if isinstance(area, str):
            left, top, right, bottom = boxes[HALVES.index(area)]
        elif isinstance(area, Sequence):
            left, top, right, bottom = (index(side) for side in area)  # type: ignore[arg-type]
        else:
            left, top, right, bottom = 0, 0, width, index(area) * downsample
    except (TypeError, ValueError):
        raise ValueError(
            f"area {shorten(area)}: expected {', '.join(HALVES)}, a number of rows of codes, a box "
            "of four pixels, or a mask"
        ) from None
    if not (0 <= left <= right <= width and 0 <= top <= bottom <= height):
        raise ValueError(f"area {shorten(area)}: expected it within {width} x {height} pixels")
    inside = torch.zeros(size, dtype=torch.bool)
    inside[top:bottom, left:right] = True
    return inside


def composite(original: Tensor, decoded: Tensor, hole: Tensor, downsample: int) -> Tensor:
    """Images [B, 3, H, W] with `decoded` pixels in the hole (bool [h, w]), `original` outside.

    The pixels are blended over a quarter of a code's side on each side of the seam.
    """
    mask = F.interpolate(hole[None, None].to(decoded), original.shape[-2:])
    if reach := downsample // 4:
        padded = F.pad(mask, (reach,) * 4, mode="replicate")
        mask = F.avg_pool2d(padded, 2 * reach + 1, stride=1)
    return torch.where(mask > 0, torch.lerp(original, decoded, mask), original)


@torch.inference_mode()
def resample(
    generator: Transformer,
    labels: Tensor,
    codes: Tensor,
    hole: Tensor,
    settings: SamplingSettings,
    rng: Sequence[torch.Generator],
) -> Iterator[tuple[slice, Tensor]]:
    """One pass of Metropolis-Hastings over the blocks of a hole (bool [T]), in raster order.

    Yields each block's positions and the codes [B, T] after it. A block of up to 4 codes is drawn
    again given the codes before it, and accepted with probability
    min(1, q(codes after | new block) / q(codes after | old block)), where q is the sampling
    distribution: guidance, temperature and, for drawn codes only, top-k and top-p. With many
    passes, the hole's distribution converges to the normalised product of q over all codes.
    Raises ValueError for temperature 0.
    """
    if settings.temperature == 0:
        raise ValueError("temperature 0: expected above 0 for resampling passes")
    scales = guidance_scales(settings, codes.shape[1])

    def filter_hole(logits: Tensor) -> Tensor:  # [B, T, V]; keep_top takes rows
        drawn = keep_top(logits.flatten(0, 1), settings.top_k, settings.top_p).view_as(logits)
        return torch.where(hole[:, None], drawn, logits)

    def log_probs(codes: Tensor) -> Tensor:
        return code_log_probs(generator, codes, labels, scales, settings.temperature, filter_hole)

    current = log_probs(codes)
    for block in cut_blocks(hole, generator.config.grid[1]):
        known = codes.clone()
        known[:, block] = UNKNOWN
        proposal = sample_codes(generator, labels, settings, rng, known)
        proposed = log_probs(proposal)
        draws = [torch.rand((), generator=g, dtype=torch.float64, device=g.device) for g in rng]
        uniforms = torch.stack(draws)
        ratio = (proposed - current)[:, block.stop :].sum(dim=1)
        accept = (uniforms.to(ratio.device).log() < ratio)[:, None]
        codes = torch.where(accept, proposal, codes)
        current = torch.where(accept, proposed, current)
        yield block, codes


def cut_blocks(hole: Tensor, width: int) -> list[slice]:
    """Runs of at most BLOCK codes of bool [T], each within one row of `width` codes."""
    blocks: list[slice] = []
    for position in hole.nonzero()[:, 0].tolist():
        last = blocks[-1] if blocks else slice(0, 0)
        if last.stop == position and position % width and last.stop - last.start < BLOCK:
            blocks[-1] = slice(last.start, position + 1)
        else:
            blocks.append(slice(position, position + 1))
    return blocks
