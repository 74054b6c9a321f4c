"""Positions: the 2D rotary table of the grid, the rotation, and the mask of a static cache.

B batch   S positions in this call   T codes   H heads   K width of a head
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope_2d(
    grid: tuple[int, int], dim: int, base: float, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Rotation table [1 + T, dim / 2, 2] (cosine, sine) of a head's `dim` rotary dimensions.

    The first half of the pairs turns by the code's row, the second by its column, each with
    frequencies base^(-2i / (dim / 2)), as in LlamaGen (arXiv 2406.06525). The class token's
    entries are all zero, the cosine too: its queries and keys vanish, and class information
    leaves position 0 through V alone.
    """
    half = dim // 2
    frequencies = 1.0 / base ** (torch.arange(0, half, 2, device=device).to(dtype) / half)
    rows, columns = (torch.arange(n, device=device).to(dtype) for n in grid)
    by_row = torch.outer(rows, frequencies)[:, None].expand(-1, grid[1], -1)  # [h, w, dim / 4]
    by_column = torch.outer(columns, frequencies)[None].expand(grid[0], -1, -1)
    angles = torch.cat([by_row, by_column], dim=-1).flatten(0, 1)  # [T, dim / 2]
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return torch.cat([torch.zeros_like(table[:1]), table])


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate neighbouring pairs of x [B, S, H, K] by rope [S, K / 2, 2]; in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    pairs = x.to(wide).view(*x.shape[:-1], -1, 2)  # [B, S, H, K / 2, 2]
    rope = rope[:, None].to(wide)  # [S, 1, K / 2, 2]
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and _even(pairs):
        # One kernel instead of eight: a quarter of a small model's training step. Compilers fuse
        # the real form below by themselves, and cannot generate code for complex numbers.
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope))
    else:
        (even, odd), (cos, sin) = pairs.unbind(-1), rope.unbind(-1)
        turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return turned.flatten(-2).to(x.dtype)


def _even(pairs: Tensor) -> bool:
    """Whether pairs [..., 2] are laid out in memory as complex numbers are."""
    return not any(n % 2 for n in (pairs.storage_offset(), *pairs.stride()[:-1]))


def visible_positions(position: Tensor, length: int) -> Tensor:
    """The mask [1, 1, 1, length] of the positions up to `position` [1], inclusive."""
    return (torch.arange(length, device=position.device) <= position)[None, None, None]
