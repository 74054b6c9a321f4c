"""Causal self-attention with 2D rotary positions, its value mixer and its cache.

    B batch   S positions in this call   T codes   D width   H heads   K width of a head

Position 0 is the class token, position t + 1 the code t.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moveimg.config import MHAConfig, ModelConfig


def rope_2d(
    grid: tuple[int, int], dim: int, base: float, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Rotation table [1 + T, dim / 2, 2] (cosine, sine) of a head's `dim` rotary dimensions.

    The first half of the pairs turns by the code's row, the second by its column, each with
    frequencies base^(-2i / (dim / 2)), as in LlamaGen (arXiv 2406.06525). The class token's
    entries are all zero, the cosine too: its queries and keys vanish, so what it says leaves
    position 0 through V alone.
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
    """Turn neighbouring pairs of x [B, S, H, K] by rope [S, K / 2, 2]; in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    even, odd = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)  # [B, S, H, K / 2]
    cos, sin = rope[:, None].to(wide).unbind(-1)  # [S, 1, K / 2]
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return turned.flatten(-2).to(x.dtype)


class KVCache:
    """Keys and mixed values of one layer, [B, H, length, K], filled from the left.

    What is cached is V after the mix, so the memory is paid once a position.
    """

    def __init__(self, batch: int, length: int, config: ModelConfig, like: Tensor) -> None:
        shape = (batch, config.n_head, length, config.head_dim)
        self.k = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.v = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.filled = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [B, H, S, K] behind what is there; return views of all that is filled."""
        end = self.filled + k.shape[2]
        self.k[:, :, self.filled : end] = k
        self.v[:, :, self.filled : end] = v
        self.filled = end
        return self.k[:, :, :end], self.v[:, :, :end]

    def numel_per_token(self) -> int:
        """Numbers kept for one position of one sequence."""
        return 2 * self.k.shape[1] * self.k.shape[3]


class MultiHeadAttention(nn.Module):
    """Softmax attention over K-wide heads; the mixer adds value memory to V."""

    def __init__(self, config: ModelConfig, spec: MHAConfig, mixer: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.wqkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)
        self.mixer = mixer

    @staticmethod
    def value_width(config: ModelConfig) -> int:
        """Width of the values that memory is mixed into."""
        return config.width

    @staticmethod
    def rope_dim(config: ModelConfig) -> int:
        """How many dimensions of a head carry its position."""
        return config.head_dim

    def own_flops(self, context: float) -> float:
        """Scores and weighted sums over `context` positions, beside the projections."""
        return 4 * context * self.config.width

    def make_cache(self, batch: int, length: int) -> KVCache:
        return KVCache(batch, length, self.config, self.wo.weight)

    def forward(
        self, x: Tensor, rows: Tensor | None, rope: Tensor, cache: KVCache | None = None
    ) -> Tensor:
        """x [B, S, D], rows [B, S, M, D], rope [S, K / 2, 2] -> [B, S, D].

        With a cache, S is 1, or the cache is empty.
        """
        qkv = self.wqkv(x).unflatten(-1, (3, self.config.n_head, -1))
        q, k, v = qkv.unbind(2)  # [B, S, H, K]
        v = self.mixer(x, v, rows)
        q, k = rotate(q, rope), rotate(k, rope)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # [B, H, S, K]
        if cache is not None:
            k, v = cache.append(k, v)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
        return self.wo(out.transpose(1, 2).flatten(-2))


ATTENTIONS: dict[str, Any] = {"mha": MultiHeadAttention}
