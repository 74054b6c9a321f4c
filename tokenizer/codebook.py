"""What all quantizers share: a codebook, the code of a vector, and how codes are used.

Letters: B batch, D codebook dimension, N codebook size, h and w the grid, n = B*h*w.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.losses import CODEBOOK_WEIGHTS, codebook_losses
from tokenizer.processes import total

SCORES_AT_ONCE = 2**24
"""Elements of the score matrix held at once (64 MiB in float32)."""


class QuantizerOutput(NamedTuple):
    """What a training step needs from a quantizer."""

    quantized: Tensor
    """[B, D, h, w]; its gradient reaches the encoder."""
    codes: Tensor
    """int64 [B, h*w], raster order."""
    losses: dict[str, Tensor]
    """Unweighted scalars, weighed by the quantizer's `loss_weights`."""
    stats: dict[str, Tensor]
    """Scalars to log: `usage`, `perplexity`, and what else the quantizer has to say."""


class Choice(NamedTuple):
    """Vectors [n, D] once they are quantized."""

    quantized: Tensor
    """[n, D], with a gradient to the vectors."""
    codes: Tensor
    """int64 [n]."""
    losses: dict[str, Tensor]
    """Unweighted scalars."""


class Quantizer(nn.Module):
    """Nearest vector of a codebook, with straight-through gradients (VQ-VAE, arXiv 1711.00937).

    A kind overrides what it does otherwise: `codebook` (the vectors), `assign` (which one a vector
    gets), `choose` (gradients and losses), `prepare` and `record` (what training keeps).
    """

    loss_weights: Mapping[str, float] = CODEBOOK_WEIGHTS
    """A weight for every loss that `forward` gives."""

    def __init__(self, codebook_size: int, codebook_dim: int, l2_normalize: bool) -> None:
        super().__init__()
        self.l2_normalize = l2_normalize
        self.embedding = nn.Embedding(codebook_size, codebook_dim)
        nn.init.normal_(self.embedding.weight, std=codebook_dim**-0.5)

    def codebook(self) -> Tensor:
        """[N, D] vectors as compared and decoded, in float32 or better."""
        return self._normalized(_precise(self.embedding.weight))

    def lookup(self, z: Tensor) -> Tensor:
        """Codes of encoder outputs: [B, D, h, w] -> int64 [B, h*w], raster order."""
        return self.assign(self._vectors(z), self.codebook()).view(z.shape[0], -1)

    def embed(self, codes: Tensor) -> Tensor:
        """Vectors of codes: int64 [...] -> [..., D]."""
        return F.embedding(codes, self.codebook())

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantize z [B, D, h, w]. In training mode this also looks after the codebook."""
        vectors = self._vectors(z)  # [n, D]
        stats = self.prepare(vectors.detach()) if self.training else {}
        codebook = self.codebook()
        quantized, codes, losses = self.choose(vectors, codebook)
        counts = codes.bincount(minlength=len(codebook))
        if self.training:
            counts = total(counts)
            self.record(counts)
        b, _, h, w = z.shape
        return QuantizerOutput(
            quantized.view(b, h, w, -1).permute(0, 3, 1, 2).contiguous().to(z.dtype),
            codes.view(b, h * w),
            losses,
            stats | code_statistics(counts),
        )

    def assign(self, vectors: Tensor, codebook: Tensor) -> Tensor:
        """Codes int64 [n] of vectors [n, D], codebook [N, D]."""
        return nearest_codes(vectors, codebook)

    def choose(self, vectors: Tensor, codebook: Tensor) -> Choice:
        """Quantize vectors [n, D] by a codebook [N, D], with gradients and losses for training."""
        codes = self.assign(vectors.detach(), codebook.detach())  # [n]
        chosen = F.embedding(codes, codebook)  # [n, D]
        quantized = vectors + (chosen - vectors).detach()
        return Choice(quantized, codes, codebook_losses(vectors, chosen))

    def prepare(self, vectors: Tensor) -> dict[str, Tensor]:
        """Before a training batch's vectors [n, D] are quantized; scalars to log."""
        return {}

    def record(self, counts: Tensor) -> None:
        """After a training batch, in which code i occurred counts[i] times, on all processes."""

    def training_state(self) -> dict[str, Tensor | None]:
        """What resuming a training needs and no tokenizer file holds."""
        return {}

    def load_training_state(self, state: Mapping[str, Tensor | None]) -> None:
        """Take back what `training_state` gave; other keys are left alone."""

    def _vectors(self, z: Tensor) -> Tensor:
        """[B, D, h, w] -> [n, D] in the form that is compared, in float32 or better."""
        return self._normalized(_precise(z).permute(0, 2, 3, 1).flatten(0, 2))

    def _normalized(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=1) if self.l2_normalize else vectors


def nearest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the codebook vector at the smallest Euclidean distance.

    |v - e|^2 = |v|^2 - 2 (v.e - |e|^2 / 2), so the nearest code has the largest v.e - |e|^2 / 2.

    Args:
        vectors: [n, D].
        codebook: [N, D], same dtype and device.

    Returns:
        int64 [n]; the lowest index where several are equally near.
    """
    return _best_codes(vectors, codebook, codebook.square().sum(1) / -2)


def likeliest_codes(vectors: Tensor, codebook: Tensor) -> Tensor:
    """As nearest_codes, but the largest dot product v.e."""
    return _best_codes(vectors, codebook, codebook.new_zeros(len(codebook)))


def rows_at_once(codebook: Tensor) -> int:
    """Vectors whose scores are formed together: all of n x N would be gigabytes."""
    return max(1, SCORES_AT_ONCE // len(codebook))


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


def _best_codes(vectors: Tensor, codebook: Tensor, bias: Tensor) -> Tensor:
    # autocast would round the scores to 8 bits of mantissa
    with torch.autocast(vectors.device.type, enabled=False):
        parts = [
            torch.addmm(bias, part, codebook.T).argmax(1)  # [rows, N] -> [rows]
            for part in vectors.split(rows_at_once(codebook))
        ]
    return torch.cat(parts)


def _precise(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
