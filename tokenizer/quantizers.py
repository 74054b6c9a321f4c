"""Vectors -> codes -> vectors.

Letters: B batch, D codebook dimension, N codebook size, h and w the grid, n = B*h*w.

A quantizer is a module with `lookup`, `embed` and `forward` as in `VectorQuantizer`. A new kind is
one class, one config in `config.py`, and one line in `QUANTIZERS`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.config import VQQuantizerConfig
from tokenizer.losses import codebook_losses

_SCORES_AT_ONCE = 2**24
"""Elements of the score matrix held at once (64 MiB in float32)."""


class QuantizerOutput(NamedTuple):
    """What a training step needs from a quantizer."""

    quantized: Tensor
    """[B, D, h, w]; its gradient reaches the encoder unchanged (straight-through)."""
    codes: Tensor
    """int64 [B, h*w], raster order."""
    losses: dict[str, Tensor]
    """Unweighted scalars, see `tokenizer.losses`."""
    stats: dict[str, Tensor]
    """Scalars to log: `usage`, `perplexity`, and in training `reseeded`."""


def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the codebook vector at the smallest Euclidean distance.

    |v - e|^2 = |v|^2 - 2 (v.e - |e|^2 / 2), so the nearest code has the largest v.e - |e|^2 / 2.
    Scores are formed for some rows at a time: all of n x N would be gigabytes.

    Args:
        vectors: [n, D].
        codebook: [N, D], same dtype and device.

    Returns:
        int64 [n]; the lowest index where several are equally near.
    """
    bias = codebook.square().sum(1) / -2  # [N]
    rows = max(1, _SCORES_AT_ONCE // len(codebook))
    # autocast would round the scores to 8 bits of mantissa
    with torch.autocast(vectors.device.type, enabled=False):
        parts = [
            torch.addmm(bias, part, codebook.T).argmax(1)  # [rows, N] -> [rows]
            for part in vectors.split(rows)
        ]
    return torch.cat(parts)


def code_statistics(counts: Tensor) -> dict[str, Tensor]:
    """How evenly codes are used.

    Args:
        counts: [N], how often each code occurred: `codes.flatten().bincount(minlength=N)`.

    Returns:
        `usage`, the fraction of codes that occurred, and `perplexity`, exp of the entropy of their
        frequencies (1 to N).
    """
    frequency = counts.float() / counts.sum().clamp(min=1)  # [N]
    entropy = -torch.special.xlogy(frequency, frequency).sum()
    return {"usage": (counts > 0).float().mean(), "perplexity": entropy.exp()}


class VectorQuantizer(nn.Module):
    """Nearest codebook vector (VQ-VAE, arXiv 1711.00937) with re-seeding of dead codes.

    A code that no vector chose for `reseed_after` training steps is put onto a vector of the
    current batch. The record of use is never saved, and does not exist outside training. With
    torch.distributed running, every process sees the use of all, and takes new vectors from
    rank 0, so that replicas stay equal. Parameters must be whole (not sharded) on each process.
    """

    def __init__(
        self, config: VQQuantizerConfig, codebook_size: int, codebook_dim: int, l2_normalize: bool
    ) -> None:
        super().__init__()
        self.config = config
        self.l2_normalize = l2_normalize
        self.embedding = nn.Embedding(codebook_size, codebook_dim)
        nn.init.normal_(self.embedding.weight, std=codebook_dim**-0.5)
        self.idle_steps: Tensor | None  # int64 [N], steps since each code was last chosen
        self.register_buffer("idle_steps", None, persistent=False)
        self.awaits_data = config.init_from_data
        self.register_load_state_dict_post_hook(_keep_loaded_codebook)

    def codebook(self) -> Tensor:
        """[N, D] vectors as compared and decoded, in float32 or better."""
        weight = self.embedding.weight
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return F.normalize(weight, dim=1) if self.l2_normalize else weight

    def lookup(self, z: Tensor) -> Tensor:
        """Codes of encoder outputs: [B, D, h, w] -> int64 [B, h*w], raster order."""
        codes = nearest_codes(self._vectors(z), self.codebook())
        return codes.view(z.shape[0], -1)

    def embed(self, codes: Tensor) -> Tensor:
        """Vectors of codes: int64 [...] -> [..., D]."""
        return F.embedding(codes, self.codebook())

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize z [B, D, h, w]. In training mode this also looks after the codebook."""
        vectors = self._vectors(z)  # [n, D]
        stats: dict[str, Tensor] = {}
        if self.training:
            stats["reseeded"] = self._move_dead_codes(vectors.detach())
        codebook = self.codebook()
        codes = nearest_codes(vectors.detach(), codebook.detach())  # [n]
        counts = codes.bincount(minlength=len(codebook))
        if self.training:
            self._record_use(counts)
        chosen = F.embedding(codes, codebook)  # [n, D]
        quantized = vectors + (chosen - vectors).detach()
        b, _, h, w = z.shape
        return QuantizerOutput(
            quantized.view(b, h, w, -1).permute(0, 3, 1, 2).contiguous().to(z.dtype),
            codes.view(b, h * w),
            codebook_losses(vectors, chosen),
            stats | code_statistics(counts),
        )

    def _vectors(self, z: Tensor) -> Tensor:
        """[B, D, h, w] -> [n, D] in the form that is compared, in float32 or better."""
        precise = z.to(torch.promote_types(z.dtype, torch.float32))
        vectors = precise.permute(0, 2, 3, 1).flatten(0, 2)
        return F.normalize(vectors, dim=1) if self.l2_normalize else vectors

    @torch.no_grad()
    def _move_dead_codes(self, vectors: Tensor) -> Tensor:
        """Put unused codes onto vectors [n, D] of this batch; the number moved.

        Runs before the codebook is read, so that autograd never sees a changed one.
        """
        weight = self.embedding.weight
        if self.idle_steps is None:
            self.idle_steps = torch.zeros(len(weight), dtype=torch.int64, device=weight.device)
        if self.awaits_data:
            self.awaits_data = False
            weight.copy_(_resample(vectors, len(weight)))
            _broadcast(weight)
            return torch.zeros_like(self.idle_steps[0])
        limit = self.config.reseed_after or torch.iinfo(torch.int64).max
        dead = (self.idle_steps >= limit).nonzero().flatten()
        if len(dead):
            # the same codes are dead on every process, so all of them come here together
            chosen = torch.randperm(len(vectors), device=vectors.device)[: len(dead)]
            dead = dead[: len(chosen)]
            weight[dead] = vectors[chosen].to(weight.dtype)
            self.idle_steps[dead] = 0
            _broadcast(weight)
            _broadcast(self.idle_steps)
        return torch.tensor(len(dead), device=weight.device)

    @torch.no_grad()
    def _record_use(self, counts: Tensor) -> None:
        assert self.idle_steps is not None  # made by _move_dead_codes
        if dist.is_available() and dist.is_initialized():
            counts = counts.clone()
            dist.all_reduce(counts)
        self.idle_steps = torch.where(counts > 0, 0, self.idle_steps + 1)


def _resample(vectors: Tensor, count: int) -> Tensor:
    """`count` rows out of vectors [n, D], each once before any twice, slightly shaken apart."""
    rounds = -(-count // len(vectors))
    order = [torch.randperm(len(vectors), device=vectors.device) for _ in range(rounds)]
    chosen = vectors[torch.cat(order)[:count]]
    return chosen + 0.01 * vectors.std() * torch.randn_like(chosen)


def _broadcast(tensor: Tensor) -> None:
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(tensor.detach(), src=0)


def _keep_loaded_codebook(module: nn.Module, _: object) -> None:
    assert isinstance(module, VectorQuantizer)
    module.awaits_data = False


QUANTIZERS: dict[str, type[VectorQuantizer]] = {"vq": VectorQuantizer}
