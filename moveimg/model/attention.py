"""Causal self-attention with 2D rotary positions, its value mixer and its cache.

    B batch   S positions in this call   T codes   D width   H heads   K width of a head

Position 0 is the class token, position t + 1 the code t.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moveimg.config.model import MHAConfig, ModelConfig
from moveimg.model.memory import Mixer, Rows
from moveimg.model.mla import MultiHeadLatentAttention
from moveimg.model.rope import rotate, visible_positions


@contextmanager
def without_cudnn_sdpa(device: torch.device) -> Iterator[None]:
    """Disable cuDNN's attention on CUDA, which makes a new plan for each number of keys.

    torch prefers it on GPUs of capability 9 and 10, and every decoding step has one key more. The
    switch is the process's: it applies to other threads meanwhile.
    """
    if device.type != "cuda" or not torch.backends.cuda.cudnn_sdp_enabled():
        yield
        return
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


class KVCache(nn.Module):
    """Keys and mixed values of one layer, [B, H, length, K], filled from the left.

    V is cached after the mix, so the memory costs its reads once per position.

    With `position`, an int64 tensor [1] that all layers share, the cache is static: every step
    reads its full length under a mask, so that all steps have the same shapes.
    """

    def __init__(
        self, batch: int, length: int, config: ModelConfig, like: Tensor,
        position: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        shape = (batch, config.n_head, length, config.head_dim)
        self.k = nn.Buffer(like.new_zeros(shape))
        self.v = nn.Buffer(like.new_zeros(shape))
        self.filled, self.position = 0, position

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Write k, v [B, H, S, K] after the filled part; return keys, values and their mask."""
        if self.position is not None:
            self.k.index_copy_(2, self.position, k)
            self.v.index_copy_(2, self.position, v)
            return self.k, self.v, visible_positions(self.position, self.k.shape[2])
        begin, self.filled = self.filled, self.filled + k.shape[2]
        self.k[:, :, begin : self.filled] = k
        self.v[:, :, begin : self.filled] = v
        return self.k[:, :, : self.filled], self.v[:, :, : self.filled], None

    def numel_per_token(self) -> int:
        """Numbers kept per position of one sequence."""
        return 2 * self.k.shape[1] * self.k.shape[3]


class MultiHeadAttention(nn.Module):
    """Softmax attention over K-wide heads; the mixer adds value memory to V.

    Args:
        config: the transformer's config.
        spec: no settings.
        mixers: by site, those of `sites`; what is mixed into the values.
    """

    def __init__(self, config: ModelConfig, spec: MHAConfig, mixers: dict[str, Mixer]) -> None:
        super().__init__()
        self.config = config
        self.wqkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)
        self.mixer = mixers["value"]

    @staticmethod
    def sites(config: ModelConfig) -> dict[str, int]:
        """The sites where memory can be mixed in, with their widths."""
        return {"value": config.width}

    @staticmethod
    def rope_dim(config: ModelConfig) -> int:
        """Rotary dimensions per head."""
        return config.head_dim

    def own_flops(self, context: float) -> float:
        """Scores and weighted sums over `context` positions, beside the projections."""
        return 4 * context * self.config.width

    def make_cache(
        self, batch: int, length: int, like: Tensor, position: Tensor | None = None
    ) -> KVCache:
        return KVCache(batch, length, self.config, like, position)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, S, D] -> queries, keys and values [B, S, 3 D], and the router's input."""
        return self.wqkv(x), x

    def forward(self, x: Tensor, rows: Rows, rope: Tensor, cache: KVCache | None = None) -> Tensor:
        """x [B, S, D], rows [B, S, H, M, K], rope [S, K / 2, 2] -> [B, S, D].

        With a cache, S is 1, or the cache is empty.
        """
        heads = self.config.n_head
        qkv, routed = self.project(x)
        qk, v = qkv.unflatten(-1, (3 * heads, -1)).split((2 * heads, heads), dim=2)
        v = self.mixer(routed, v, rows)  # [B, S, H, K]
        q, k = rotate(qk, rope).chunk(2, dim=2)  # both in one kernel
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # [B, H, S, K]
        mask = None
        if cache is not None:
            k, v, mask = cache.append(k, v)
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=q.shape[2] > 1)
        return self.wo(out.transpose(1, 2).flatten(-2))


ATTENTIONS: dict[str, Any] = {"mha": MultiHeadAttention, "mla": MultiHeadLatentAttention}
