"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) with value memory.

    B batch   S positions in this call   L positions so far   D width   H heads   K width of a head
    C width of the latent (kv_rank)   R width of the rotary key (rope_dim)

Keys and values of all heads are unfolded from one latent, c = norm(x W_DKV), and one rotary key
k_R = rope(x W_KR) stands beside the heads' own: the score of head h is
(q_h . W_UK_h c + q_R,h . k_R) / sqrt(K + R). MoVE is mixed into c after its norm and before the
up-projection (arXiv 2601.22887), with c cut into H chunks: c' = mix(c). The norm comes first, as in
DeepSeek-V2 (MoVE's paper is silent). So memory changes keys and values and not the rotary key, and
the cache holds c' and k_R alone.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moveimg.config.model import MLAConfig, ModelConfig
from moveimg.model.memory import Mixer, PassThrough, Rows
from moveimg.model.rope import rotate, visible_positions


class LatentCache(nn.Module):
    """Mixed latent and rotary key of one layer, [B, length, C + R], filled from the left.

    A layer with memory at its values (LaVE) also keeps the term added to them, [B, H, length, K],
    and where g_0 gates them, g_0 [B, H, length]: neither can be had from the latent. `position`
    makes the cache static, see KVCache.
    """

    def __init__(
        self, batch: int, length: int, config: ModelConfig, width: int, mixer: Mixer,
        like: Tensor, position: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        heads, added = config.n_head, mixer.value_width
        self.joint = nn.Buffer(like.new_zeros(batch, length, width))
        shape = (batch, heads, length, added // heads)
        self.added = nn.Buffer(like.new_zeros(shape)) if added else None
        self.g_0 = nn.Buffer(like.new_zeros(batch, heads, length)) if mixer.gate_standard else None
        self.filled, self.position = 0, position

    def append(
        self, joint: Tensor, g_0: Tensor | None, added: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Write joint [B, S, C + R], g_0 [B, S, H, 1], added [B, S, H, K] after the filled part.

        Returns [B, L, C + R], [B, H, L], [B, H, L, K] of the positions that are to be read, and
        the mask of a static cache.
        """
        begin = self.filled
        if self.position is None:
            self.filled += joint.shape[1]
        new = (joint, None if g_0 is None else g_0[..., 0].transpose(1, 2),
               None if added is None else added.transpose(1, 2))  # fmt: skip
        views: list[Tensor | None] = []
        for dim, buffer, values in zip(
            (1, 2, 2), (self.joint, self.g_0, self.added), new, strict=True
        ):
            if buffer is None or values is None:
                views.append(None)
            elif self.position is not None:
                views.append(buffer.index_copy_(dim, self.position, values.to(buffer.dtype)))
            else:
                buffer.narrow(dim, begin, joint.shape[1]).copy_(values)
                views.append(buffer.narrow(dim, 0, self.filled))
        assert views[0] is not None
        mask = None
        if self.position is not None:
            mask = visible_positions(self.position, self.joint.shape[1])
        return views[0], views[1], views[2], mask

    def numel_per_token(self) -> int:
        """Numbers kept per position of one sequence."""
        buffers = (self.joint, self.added, self.g_0)
        return sum(
            b.numel() // (b.shape[0] * self.joint.shape[1]) for b in buffers if b is not None
        )


class MultiHeadLatentAttention(nn.Module):
    """Softmax attention whose keys and values are unfolded from a latent.

    The teacher-forced pass unfolds them. Decoding never does: W_UK is absorbed into the query and
    W_UV applied to the weighted sum of latents, which is the same sum in another order.

    Args:
        config: the transformer's config.
        spec: ranks.
        mixers: by site, those of `sites`: latent (before the up-projection) or value (after it).
    """

    def __init__(self, config: ModelConfig, spec: MLAConfig, mixers: dict[str, Mixer]) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        query_width = config.n_head * (config.head_dim + spec.rope_dim)
        self.wq: nn.Module = nn.Linear(config.width, query_width, bias=False)
        if spec.q_rank is not None:
            low_rank = OrderedDict[str, nn.Module](
                down=nn.Linear(config.width, spec.q_rank, bias=False),
                norm=nn.RMSNorm(spec.q_rank, eps=config.norm_eps),
                up=nn.Linear(spec.q_rank, query_width, bias=False),
            )
            self.wq = nn.Sequential(low_rank)
        self.wkv_down = nn.Linear(config.width, spec.kv_rank + spec.rope_dim, bias=False)
        self.kv_norm = nn.RMSNorm(spec.kv_rank, eps=config.norm_eps)
        self.wkv_up = nn.Linear(spec.kv_rank, 2 * config.width, bias=False)  # heads of (key, value)
        self.wo = nn.Linear(config.width, config.width, bias=False)
        self.latent_mixer = mixers.get("latent", PassThrough())
        self.value_mixer = mixers.get("value", PassThrough())

    absorbed = ("wkv_up",)  # decoding multiplies queries and sums by its halves

    @staticmethod
    def sites(config: ModelConfig) -> dict[str, int]:
        """The sites where memory can be mixed in, with their widths."""
        return {"latent": config.attention.kv_rank, "value": config.width}  # type: ignore[union-attr]

    @staticmethod
    def rope_dim(config: ModelConfig) -> int:
        """Width of the rotary part of a query, and of the one rotary key."""
        return config.attention.rope_dim  # type: ignore[union-attr]

    def own_flops(self, context: float) -> float:
        """Scores and weighted sums over `context` positions, heads unfolded."""
        return 2 * context * (2 * self.config.width + self.config.n_head * self.spec.rope_dim)

    def decoding_flops(self, context: float) -> float:
        """The same in the latent, as decoding does it; the projections cost what they cost."""
        spec, heads = self.spec, self.config.n_head
        latent = heads * (2 * spec.kv_rank + spec.rope_dim)
        return 2 * context * (latent + self.value_mixer.value_width)

    def make_cache(
        self, batch: int, length: int, like: Tensor, position: Tensor | None = None
    ) -> LatentCache:
        width = self.spec.kv_rank + self.spec.rope_dim
        return LatentCache(batch, length, self.config, width, self.value_mixer, like, position)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, S, D] -> queries [B, S, H (K + R)], latent and rotary key, what a router sees."""
        return self.wq(x), self.wkv_down(x), x

    def forward(
        self, x: Tensor, rows: Rows, rope: Tensor, cache: LatentCache | None = None
    ) -> Tensor:
        """x [B, S, D], rows [B, S, H, M, C/H or K], rope [S, R / 2, 2] -> [B, S, D]."""
        heads, spec = self.config.n_head, self.spec
        q, joint, x = self.project(x)
        q = q.unflatten(-1, (heads, -1))  # [B, S, H, K + R]
        q, q_rope = q.split([self.config.head_dim, spec.rope_dim], dim=-1)
        latent, key = joint.split([spec.kv_rank, spec.rope_dim], dim=-1)
        latent = self.kv_norm(latent)  # [B, S, C]
        if not isinstance(self.latent_mixer, PassThrough):  # cut into a chunk a head
            chunks = latent.unflatten(-1, (heads, -1))  # [B, S, H, C / H]
            latent = self.latent_mixer(x, chunks, rows).flatten(-2)
        q_rope, key = rotate(q_rope, rope), rotate(key[:, :, None], rope)  # key [B, S, 1, R]
        if cache is None:
            out = self._unfolded(x, rows, torch.cat([q, q_rope], dim=-1), latent, key)
        else:
            g_0, added = self.value_mixer.parts(x, rows)
            filled = cache.append(torch.cat([latent, key[:, :, 0]], dim=-1), g_0, added)
            out = self._absorbed(q, q_rope, *filled)
        return self.wo(out.flatten(-2))

    def _unfolded(self, x: Tensor, rows: Rows, q: Tensor, latent: Tensor, key: Tensor) -> Tensor:
        """Keys and values of every head: q [B, S, H, K + R], latent [B, S, C] -> [B, S, H, K]."""
        k, v = self.wkv_up(latent).unflatten(-1, (self.config.n_head, 2, -1)).unbind(-2)
        v = self.value_mixer(x, v, rows)
        k = torch.cat([k, key.to(k.dtype).expand(-1, -1, self.config.n_head, -1)], dim=-1)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # [B, H, S, K + R or K]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def _absorbed(
        self, q: Tensor, q_rope: Tensor, joint: Tensor, g_0: Tensor | None, added: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """q [B, S, H, K], q_rope [B, S, H, R], views of the cache -> [B, S, H, K]."""
        up = self.wkv_up.weight.unflatten(0, (self.config.n_head, 2, -1))  # [H, 2, K, C]
        up_k, up_v = up.unbind(1)
        q = torch.cat([torch.einsum("bshk,hkc->bshc", q, up_k), q_rope], dim=-1)
        scores = torch.einsum("bshc,blc->bhsl", q, joint)
        scores = scores / math.sqrt(self.config.head_dim + self.spec.rope_dim)
        new, length = scores.shape[-2:]
        if new > 1:  # the last `new` positions see those up to themselves
            mask = torch.ones(new, length, dtype=torch.bool, device=q.device).tril(length - new)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.softmax(dim=-1, dtype=wide).to(joint.dtype)  # [B, H, S, L]
        gated = weights if g_0 is None else weights * g_0[:, :, None]
        latent = torch.einsum("bhsl,blc->bshc", gated, joint[..., : self.spec.kv_rank])
        out = torch.einsum("bshc,hkc->bshk", latent, up_v)
        if added is not None:
            out = out + torch.einsum("bhsl,bhlk->bshk", weights, added)
        return out
