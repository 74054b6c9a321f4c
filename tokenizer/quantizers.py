"""Vectors -> codes -> vectors: VQ, SimVQ and IBQ.

B batch size   D codebook dimension   N codebook size   h, w grid of codes   n = B*h*w vectors
A new kind is one subclass of `Quantizer`, its name in config.py, and one line in `QUANTIZERS`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moveimg.dist import broadcast_from_rank0, reduce_mean, reduce_sum
from tokenizer.config import QuantizerConfig

MAX_SCORES = 2**24  # elements of the score matrix [n, N] in memory at once: 64 MiB in float32
Losses = dict[str, Tensor]


class TrainingOutput(NamedTuple):
    """The result of a training pass of a quantizer, or of a whole tokenizer."""

    output: Tensor  # quantized vectors [B, D, h, w], or images [B, C, H, W], not clamped
    codes: Tensor  # int64 [B, h*w], raster order
    losses: Losses  # unweighted scalars; `loss_weights` has a weight for a quantizer's
    stats: dict[str, Tensor]  # scalars to log


class Quantizer(nn.Module):
    """VQ (VQ-VAE, arXiv 1711.00937): nearest code vector, straight-through gradients, re-seeding.

    A code that no vector chose for `reseed_after` training steps moves onto a vector of the batch.
    With several processes usage is counted over all, and new vectors come from the first one, so
    that replicas stay equal. Other kinds override what differs, and do not re-seed.
    """

    nearest = True  # else the largest dot product
    generator: torch.Generator | None = None  # of re-seeding; torch's default one if None
    idle_steps: Tensor | None = None  # int64 [N], training steps since each code was last chosen

    def __init__(self, config: QuantizerConfig, size: int, dim: int, l2_normalize: bool) -> None:
        super().__init__()
        self.config, self.l2_normalize = config, l2_normalize
        self.loss_weights = {"codebook": 1.0, "commitment": 0.25}  # LlamaGen's; VQ-VAE's beta
        self.embedding = nn.Embedding(size, dim)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        self.reseeds = config.kind == "vq"
        self.awaits_data = self.reseeds and config.init_from_data
        self.register_load_state_dict_post_hook(
            lambda module, _: setattr(module, "awaits_data", False)
        )

    def codebook(self) -> Tensor:
        """The code vectors [N, D] as compared and decoded, in float32 or better."""
        return self._normalize(_at_least_float32(self.embedding.weight))

    def lookup(self, z: Tensor) -> Tensor:
        """Codes int64 [B, h*w] in raster order of encoder outputs [B, D, h, w]."""
        return self.assign(self._flatten(z), self.codebook()).view(z.shape[0], -1)

    def embed(self, codes: Tensor) -> Tensor:
        """Vectors [..., D] of codes int64 [...]."""
        return F.embedding(codes, self.codebook())

    def forward(self, z: Tensor) -> TrainingOutput:
        """Quantize z [B, D, h, w]; in training mode also re-seed unused codes."""
        vectors, stats = self._flatten(z), {}  # [n, D]
        if self.reseeds and self.training:  # before autograd reads the codebook
            stats["reseeded"] = self._reseed(vectors.detach())
        codebook = self.codebook()
        quantized, codes, losses = self.quantize(vectors, codebook)
        counts = codes.bincount(minlength=len(codebook))
        counts = reduce_sum(counts) if self.training else counts
        if "reseeded" in stats and self.idle_steps is not None:
            self.idle_steps = torch.where(counts > 0, 0, self.idle_steps + 1)
        b, _, h, w = z.shape
        quantized = quantized.view(b, h, w, -1).permute(0, 3, 1, 2).contiguous().to(z.dtype)
        stats |= code_statistics(counts)
        return TrainingOutput(quantized, codes.view(b, h * w), losses, stats)

    def assign(self, vectors: Tensor, codebook: Tensor) -> Tensor:
        """Codes int64 [n] of vectors [n, D]: the best score, the lowest index among equals."""
        # autocast would round the scores to 8 bits of mantissa
        with torch.autocast(vectors.device.type, enabled=False):
            # |v - e|^2 = |v|^2 - 2 (v.e - |e|^2 / 2)
            bias = codebook.square().sum(1) * (-0.5 if self.nearest else 0.0)  # [N]
            chunks = vectors.split(max(1, MAX_SCORES // len(codebook)))
            return torch.cat([torch.addmm(bias, x, codebook.T).argmax(1) for x in chunks])

    def quantize(self, vectors: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Losses]:
        """Quantized vectors [n, D] with gradients, codes [n] and losses, of vectors [n, D]."""
        codes = self.assign(vectors.detach(), codebook.detach())
        chosen = F.embedding(codes, codebook)  # [n, D]
        return vectors + (chosen - vectors).detach(), codes, codebook_losses(vectors, chosen)

    @torch.no_grad()
    def _reseed(self, vectors: Tensor) -> Tensor:
        """Move unused codes onto vectors [n, D] of the batch; returns how many."""
        weight, limit = self.embedding.weight, self.config.reseed_after or 2**62
        if self.idle_steps is None:
            self.idle_steps = torch.zeros(len(weight), dtype=torch.int64, device=weight.device)
        dead = (self.idle_steps >= limit).nonzero().flatten()[: len(vectors)]
        if self.awaits_data:  # each vector once before any twice, plus a little noise
            shuffled = [self._shuffle(vectors) for _ in range(0, len(weight), len(vectors))]
            noise = vectors.new_empty(weight.shape).normal_(generator=self.generator)
            weight.copy_(torch.cat(shuffled)[: len(weight)] + 0.01 * vectors.std() * noise)
        elif len(dead):
            weight[dead] = self._shuffle(vectors)[: len(dead)].to(weight.dtype)
            self.idle_steps[dead] = 0
        if self.awaits_data or len(dead):  # on every process alike
            broadcast_from_rank0(weight)
            broadcast_from_rank0(self.idle_steps)
        self.awaits_data = False
        return torch.tensor(len(dead), device=weight.device)

    def _shuffle(self, vectors: Tensor) -> Tensor:
        n, device = len(vectors), vectors.device
        return vectors[torch.randperm(n, device=device, generator=self.generator)]

    def _flatten(self, z: Tensor) -> Tensor:
        """[B, D, h, w] -> vectors [n, D] as compared, in float32 or better."""
        return self._normalize(_at_least_float32(z).permute(0, 2, 3, 1).flatten(0, 2))

    def _normalize(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=1) if self.l2_normalize else vectors


class SimVectorQuantizer(Quantizer):
    """SimVQ (arXiv 2411.02038): nearest row of C W, C ~ N(0, 1/D) frozen, W [D, D] learned.

    Its authors' code adds a bias to the paper's C W; there is none here.
    """

    def __init__(self, config: QuantizerConfig, size: int, dim: int, l2_normalize: bool) -> None:
        super().__init__(config, size, dim, l2_normalize)
        self.embedding.requires_grad_(False)
        self.projection = nn.Linear(dim, dim, bias=False)

    def codebook(self) -> Tensor:
        c, w = self.embedding.weight, self.projection.weight
        with torch.autocast(w.device.type, enabled=False):
            return self._normalize(F.linear(_at_least_float32(c), _at_least_float32(w)))


class IndexQuantizer(Quantizer):
    """IBQ (arXiv 2412.02692): the largest dot product, with a gradient to every code.

    Ind = onehot(argmax p) + (p - sg[p]) with p = softmax(v C^T), and z_q = Ind^T C. The entropy
    loss E[H(p_t)] - H(E[p_t]), with p_t of temperature t, makes single choices sure and their mean
    even; the mean is over the vectors of all processes.
    """

    nearest = False

    def __init__(self, config: QuantizerConfig, *sizes: Any) -> None:
        super().__init__(config, *sizes)
        # VQ-VAE's two weights are swapped, as in the authors' code
        self.loss_weights = {"codebook": 0.25, "commitment": 1.0, "double": 1.0}
        self.loss_weights["entropy"] = config.entropy_weight

    def quantize(self, vectors: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Losses]:
        with torch.autocast(vectors.device.type, enabled=False):
            scores = vectors @ codebook.T  # [n, N]
            codes = scores.argmax(1)
            chosen = F.embedding(codes, codebook)  # [n, D]
            expected = scores.softmax(1) @ codebook.detach()
            quantized = chosen + (expected - expected.detach())  # the value is `chosen` to the bit
            log_p = (scores / self.config.entropy_temperature).log_softmax(1)
            p = log_p.exp()
            mean_p = reduce_mean(p.mean(0))  # [N]
            # 1e-5 keeps the gradient of an unused code finite
            usage_entropy = -(mean_p * (mean_p + 1e-5).log()).sum()
            losses = codebook_losses(vectors, chosen)
            losses["double"] = F.mse_loss(quantized, vectors)
            losses["entropy"] = -(p * log_p).sum(1).mean() - usage_entropy
        return quantized, codes, losses


QUANTIZERS = {"vq": Quantizer, "simvq": SimVectorQuantizer, "ibq": IndexQuantizer}


def codebook_losses(vectors: Tensor, chosen: Tensor) -> Losses:
    """VQ-VAE's equation 3, unweighted, for vectors [n, D] and the vectors of their codes."""
    return {
        "codebook": F.mse_loss(chosen, vectors.detach()),  # moves codes to vectors
        "commitment": F.mse_loss(vectors, chosen.detach()),  # moves vectors to codes
    }


def code_statistics(counts: Tensor) -> dict[str, Tensor]:
    """`usage` and `perplexity` of codes, from the number of times each occurred [N]."""
    frequency = counts.float() / counts.sum().clamp(min=1)  # [N]
    entropy = -torch.special.xlogy(frequency, frequency).sum()
    return {"usage": (counts > 0).float().mean(), "perplexity": entropy.exp()}


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
