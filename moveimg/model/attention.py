"""Causal self-attention, multi-head (MHA) and latent (MLA), with 2D rotary positions and KV cache.

    B batch   S positions in this call   L positions of a cache   T codes   D width   H heads
    K width of a head   C width of MLA's latent (kv_rank)   R width of its rotary key (rope_dim)

Position 0 is the class token, position t + 1 is code t.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moveimg.config.model import MHAConfig, MLAConfig, ModelConfig
from moveimg.model.memory import Mixer, PassThrough, Rows

Index = int | Tensor  # index of the next cache entry; see LayerCache


def rope_2d(
    grid: tuple[int, int], dim: int, base: float, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Rotation table [1 + T, dim / 2, 2] (cosine, sine) of a head's `dim` rotary dimensions.

    The angles of the first half of the pairs follow from the code's row, those of the second half
    from its column, with frequencies base^(-2i / (dim / 2)) (LlamaGen, arXiv 2406.06525). As in
    LlamaGen, the class token's cosines and sines are all zero.
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
    """Rotate neighbouring pairs of x [B, S, H, K] by rope [S, K / 2, 2], in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    pairs = x.to(wide).view(*x.shape[:-1], -1, 2)  # [B, S, H, K / 2, 2]
    rope = rope[:, None].to(wide)  # [S, 1, K / 2, 2]
    eager = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if eager and not any(n % 2 for n in (pairs.storage_offset(), *pairs.stride()[:-1])):
        # one kernel, not eight (a quarter of a small training step); compilers fuse the else branch
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope))
    else:
        (even, odd), (cos, sin) = pairs.unbind(-1), rope.unbind(-1)
        rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return rotated.flatten(-2).to(x.dtype)


class LayerCache:
    """The KV cache of one layer: tensors [..., L, width]; values are cached after mixing memory in.

    An int index means a growing cache: attention reads the entries written so far. A tensor index
    [1] means a static cache: all steps have the same shapes, and a mask hides unwritten entries.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def update(self, index: Index, *new: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Write S entries [..., S, width] from `index` on; return all entries and their mask.

        The mask, bool [1, L], hides unwritten entries of a static cache; a growing cache has none.
        """
        length = new[0].shape[-2]
        pairs = zip(self.tensors, new, strict=True)
        if not isinstance(index, Tensor):
            for cached, entry in pairs:
                cached[..., index : index + length, :] = entry
            return [cached[..., : index + length, :] for cached in self.tensors], None
        where = index if length == 1 else index + torch.arange(length, device=index.device)
        entries = [cached.index_copy_(-2, where, entry.to(cached.dtype)) for cached, entry in pairs]
        return entries, torch.arange(entries[0].shape[-2], device=index.device)[None] <= index

    def numel_per_token(self) -> int:
        """Cached elements per position of one sequence."""
        return sum(t.numel() // (t.shape[0] * t.shape[-2]) for t in self.tensors)


class MultiHeadAttention(nn.Module):
    """Multi-head attention; the mixer of site `value` mixes value memory into V."""

    def __init__(self, config: ModelConfig, spec: MHAConfig, mixers: dict[str, Mixer]) -> None:
        super().__init__()
        self.config = config
        self.wqkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)
        self.mixer = mixers["value"]

    @staticmethod
    def sites(config: ModelConfig) -> dict[str, int]:
        """Where memory can be mixed in, and the width of the values there."""
        return {"value": config.width}

    @staticmethod
    def rope_dim(config: ModelConfig) -> int:
        """Rotary dimensions of a head."""
        return config.head_dim

    def own_flops(self, context: float) -> float:
        """FLOPs per token of scores and weighted sums over `context` positions."""
        return 4 * context * self.config.width

    def make_cache(self, batch: int, length: int, like: Tensor) -> LayerCache:
        """A cache of keys and mixed values, [B, H, length, K] each."""
        shape = (batch, self.config.n_head, length, self.config.head_dim)
        return LayerCache(like.new_zeros(shape), like.new_zeros(shape))

    def forward(
        self, x: Tensor, rows: Rows, rope: Tensor, cache: LayerCache | None = None, index: Index = 0
    ) -> Tensor:
        """x, rows [B, S, H, M, K], rope [S, K / 2, 2] -> [B, S, D].

        With a cache, S is 1 (decoding step), or the S positions are the first positions (prefill).
        """
        heads, mask = self.config.n_head, None
        qk, v = self.wqkv(x).unflatten(-1, (3 * heads, -1)).split((2 * heads, heads), dim=2)
        v = self.mixer(x, v, rows)  # [B, S, H, K]
        q, k = rotate(qk, rope).chunk(2, dim=2)  # both in one kernel
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # [B, H, S, K]
        causal = x.shape[1] > 1
        if cache is not None:
            entries, written = cache.update(index, k, v)
            if not causal:
                (k, v), mask = entries, written  # [B, H, L, K]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.wo(out.transpose(1, 2).flatten(-2))


class MultiHeadLatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

    All heads share one latent, c = norm(x W_DKV), and one rotary key k_R = rope(x W_KR): the score
    of head h is (q_h . W_UK_h c + q_R,h . k_R) / sqrt(K + R). MoVE is mixed into c, in H chunks,
    after its norm and before the up-projection (arXiv 2601.22887); the cache holds mix(c) and k_R.

    Teacher forcing up-projects keys and values. Decoding does not: W_UK is absorbed into the query,
    and W_UV is applied to the weighted sum of latents, which gives the same result.
    """

    unpacked = ("wkv_up",)  # decoding reads W_UK and W_UV from this weight

    def __init__(self, config: ModelConfig, spec: MLAConfig, mixers: dict[str, Mixer]) -> None:
        super().__init__()
        self.config, self.spec, width = config, spec, config.width
        query_width = config.n_head * (config.head_dim + spec.rope_dim)
        self.wq: nn.Module = nn.Linear(width, query_width, bias=False)
        if spec.q_rank is not None:
            low_rank = OrderedDict[str, nn.Module](
                down=nn.Linear(width, spec.q_rank, bias=False),
                norm=nn.RMSNorm(spec.q_rank, eps=config.norm_eps),
                up=nn.Linear(spec.q_rank, query_width, bias=False),
            )
            self.wq = nn.Sequential(low_rank)
        self.wkv_down = nn.Linear(width, spec.kv_rank + spec.rope_dim, bias=False)
        self.kv_norm = nn.RMSNorm(spec.kv_rank, eps=config.norm_eps)
        self.wkv_up = nn.Linear(spec.kv_rank, 2 * width, bias=False)  # heads of (key, value)
        self.wo = nn.Linear(width, width, bias=False)
        self.latent_mixer = mixers.get("latent", PassThrough())
        self.value_mixer = mixers.get("value", PassThrough())

    @staticmethod
    def sites(config: ModelConfig) -> dict[str, int]:
        """Where memory can be mixed in, and the width of the values there."""
        return {"latent": config.attention.kv_rank, "value": config.width}  # type: ignore[union-attr]

    @staticmethod
    def rope_dim(config: ModelConfig) -> int:
        """Width of a query's rotary part and of the rotary key that all heads share."""
        return config.attention.rope_dim  # type: ignore[union-attr]

    def own_flops(self, context: float) -> float:
        """FLOPs per token of scores and weighted sums over `context` up-projected positions."""
        return 2 * context * (2 * self.config.width + self.config.n_head * self.spec.rope_dim)

    def decoding_flops(self, context: float) -> float:
        """FLOPs per decoded token of scores and weighted sums over `context` latents."""
        heads, rank = self.config.n_head, self.spec.kv_rank
        values = self.value_mixer.value_width or heads * rank
        return 2 * context * (heads * (rank + self.spec.rope_dim) + values)

    def make_cache(self, batch: int, length: int, like: Tensor) -> LayerCache:
        """A cache of latents and rotary keys [B, length, C + R].

        A layer whose values are mixed with memory (LaVE) also caches them, [B, H, length, K].
        """
        joint = like.new_zeros(batch, length, self.spec.kv_rank + self.spec.rope_dim)
        if not self.value_mixer.value_width:
            return LayerCache(joint)
        shape = (batch, self.config.n_head, length, self.config.head_dim)
        return LayerCache(joint, like.new_zeros(shape))

    def forward(
        self, x: Tensor, rows: Rows, rope: Tensor, cache: LayerCache | None = None, index: Index = 0
    ) -> Tensor:
        """x, rows [B, S, H, M, C / H or K], rope [S, R / 2, 2] -> [B, S, D]; S as in MHA."""
        heads, spec = self.config.n_head, self.spec
        q = self.wq(x).unflatten(-1, (heads, -1))  # [B, S, H, K + R]
        q, q_rope = q.split([self.config.head_dim, spec.rope_dim], dim=-1)
        latent, key = self.wkv_down(x).split([spec.kv_rank, spec.rope_dim], dim=-1)
        latent = self.kv_norm(latent)  # [B, S, C]
        if self.latent_mixer.value_width:
            chunks = latent.unflatten(-1, (heads, -1))  # [B, S, H, C / H]
            latent = self.latent_mixer(x, chunks, rows).flatten(-2)
        q_rope, key = rotate(q_rope, rope), rotate(key[:, :, None], rope)  # key [B, S, 1, R]
        unfold = cache is None or x.shape[1] > 1
        if unfold:
            k, v = self.wkv_up(latent).unflatten(-1, (heads, 2, -1)).unbind(-2)  # [B, S, H, K]
            k = torch.cat([k, key.to(k.dtype).expand(-1, -1, heads, -1)], dim=-1)
            q, v = torch.cat([q, q_rope], dim=-1), self.value_mixer(x, v, rows)
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # [B, H, S, ...]
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        elif self.value_mixer.value_width:
            v = torch.einsum("bsc,hkc->bshk", latent, self._up()[1])
            v = self.value_mixer(x, v, rows).transpose(1, 2)
        if cache is not None:
            joint, mixed = torch.cat([latent, key[:, :, 0]], dim=-1), self.value_mixer.value_width
            entries, mask = cache.update(index, joint, *([v] if mixed else []))
            if not unfold:
                out = self._absorbed(q, q_rope, mask, *entries)
        return self.wo(out.flatten(-2))

    def _up(self) -> tuple[Tensor, ...]:
        """W_UK and W_UV, [H, K, C] each."""
        return self.wkv_up.weight.unflatten(0, (self.config.n_head, 2, -1)).unbind(1)

    def _absorbed(
        self, q: Tensor, q_rope: Tensor, mask: Tensor | None, joint: Tensor, *values: Tensor
    ) -> Tensor:
        """Attention over cached latents: q [B, 1, H, K], q_rope [B, 1, H, R] -> [B, 1, H, K]."""
        up_k, up_v = self._up()
        q = torch.cat([torch.einsum("bshk,hkc->bshc", q, up_k), q_rope], dim=-1)
        scores = torch.einsum("bshc,blc->bhsl", q, joint)
        scores = scores / math.sqrt(self.config.head_dim + self.spec.rope_dim)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.softmax(dim=-1, dtype=wide).to(joint.dtype)  # [B, H, 1, L]
        if values:
            return torch.einsum("bhsl,bhlk->bshk", weights, values[0])
        latent = torch.einsum("bhsl,blc->bshc", weights, joint[..., : self.spec.kv_rank])
        return torch.einsum("bshc,hkc->bshk", latent, up_v)


ATTENTIONS: dict[str, Any] = {"mha": MultiHeadAttention, "mla": MultiHeadLatentAttention}
