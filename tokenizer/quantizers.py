"""Vectors -> codes -> vectors: VQ, SimVQ and IBQ.

B batch size   D codebook dimension   N codebook size   h, w grid of codes   n = B*h*w vectors
A new kind is one subclass of `Quantizer`, one config in config.py, and one line in `QUANTIZERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moveimg.dist import broadcast_from_rank0, reduce_mean, reduce_sum
from tokenizer.losses import codebook_losses

MAX_SCORES = 2**24  # elements of the score matrix [n, N] in memory at once: 64 MiB in float32


class Quantized(NamedTuple):
    """The result of a quantizer's training pass."""

    vectors: Tensor  # [B, D, h, w]; its gradient reaches the encoder
    codes: Tensor  # int64 [B, h*w], raster order
    losses: dict[str, Tensor]  # unweighted scalars; `loss_weights` has a weight for each
    stats: dict[str, Tensor]  # scalars to log


class Quantizer(nn.Module):
    """VQ (VQ-VAE, arXiv 1711.00937): nearest code vector, straight-through gradients, re-seeding.

    A code that no vector chose for `reseed_after` training steps moves onto a vector of the batch.
    With several processes usage is counted over all, and new vectors come from the first one, so
    that replicas stay equal. Other kinds override what differs, and do not re-seed.

    Attributes:
        loss_weights: of the quantizer's losses; commitment is VQ-VAE's beta, the rest LlamaGen's.
        idle_steps: int64 [N], training steps since each code was last chosen, kept for resuming.
    """

    nearest = True  # else the largest dot product
    generator: torch.Generator | None = None  # of re-seeding; torch's default one if None

    def __init__(self, config: Any, size: int, dim: int, l2_normalize: bool) -> None:
        super().__init__()
        self.config, self.l2_normalize = config, l2_normalize
        self.loss_weights = {"codebook": 1.0, "commitment": 0.25}
        self.embedding = nn.Embedding(size, dim)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        self.reseeds = config.kind == "vq"
        self.awaits_data = self.reseeds and config.init_from_data
        self.idle_steps: Tensor | None = None
        self.register_load_state_dict_post_hook(_keep_loaded_codebook)

    def codebook(self) -> Tensor:
        """The code vectors [N, D] as compared and decoded, in float32 or better."""
        return self._normalize(_at_least_float32(self.embedding.weight))

    def lookup(self, z: Tensor) -> Tensor:
        """Codes int64 [B, h*w] in raster order of encoder outputs [B, D, h, w]."""
        return self.assign(self._flatten(z), self.codebook()).view(z.shape[0], -1)

    def embed(self, codes: Tensor) -> Tensor:
        """Vectors [..., D] of codes int64 [...]."""
        return F.embedding(codes, self.codebook())

    def forward(self, z: Tensor) -> Quantized:
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
        return Quantized(quantized, codes.view(b, h * w), losses, stats | code_statistics(counts))

    def assign(self, vectors: Tensor, codebook: Tensor) -> Tensor:
        """Codes int64 [n] of vectors [n, D]: the best score, the lowest index among equals."""
        # autocast would round the scores to 8 bits of mantissa
        with torch.autocast(vectors.device.type, enabled=False):
            # |v - e|^2 = |v|^2 - 2 (v.e - |e|^2 / 2)
            bias = codebook.square().sum(1) * (-0.5 if self.nearest else 0.0)  # [N]
            chunks = split_vectors(vectors, codebook)
            return torch.cat([torch.addmm(bias, x, codebook.T).argmax(1) for x in chunks])

    def quantize(
        self, vectors: Tensor, codebook: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Quantized vectors [n, D] with gradients, codes [n] and losses, of vectors [n, D]."""
        codes = self.assign(vectors.detach(), codebook.detach())
        chosen = F.embedding(codes, codebook)  # [n, D]
        return vectors + (chosen - vectors).detach(), codes, codebook_losses(vectors, chosen)

    @torch.no_grad()
    def _reseed(self, vectors: Tensor) -> Tensor:
        """Move unused codes onto vectors [n, D] of the batch; returns how many."""
        weight = self.embedding.weight
        if self.idle_steps is None:
            self.idle_steps = torch.zeros(len(weight), dtype=torch.int64, device=weight.device)
        if self.awaits_data:
            self.awaits_data = False
            weight.copy_(_sample_rows(vectors, len(weight), self.generator))
            broadcast_from_rank0(weight)
            return torch.zeros_like(self.idle_steps[0])
        limit = self.config.reseed_after or torch.iinfo(torch.int64).max
        dead = (self.idle_steps >= limit).nonzero().flatten()
        if len(dead):  # on every process alike
            chosen = _permutation(vectors, self.generator)[: len(dead)]
            dead = dead[: len(chosen)]
            weight[dead] = vectors[chosen].to(weight.dtype)
            self.idle_steps[dead] = 0
            broadcast_from_rank0(weight)
            broadcast_from_rank0(self.idle_steps)
        return torch.tensor(len(dead), device=weight.device)

    def _flatten(self, z: Tensor) -> Tensor:
        """[B, D, h, w] -> vectors [n, D] as compared, in float32 or better."""
        return self._normalize(_at_least_float32(z).permute(0, 2, 3, 1).flatten(0, 2))

    def _normalize(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=1) if self.l2_normalize else vectors


class SimVectorQuantizer(Quantizer):
    """SimVQ (arXiv 2411.02038): nearest row of C W, C ~ N(0, 1/D) frozen, W [D, D] learned.

    W moves all codes at once. Its authors' code adds a bias to the paper's C W; there is none here.
    """

    def __init__(self, config: Any, size: int, dim: int, l2_normalize: bool) -> None:
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

    def __init__(self, config: Any, *sizes: Any) -> None:
        super().__init__(config, *sizes)
        # VQ-VAE's two weights are swapped, as in the authors' code
        self.loss_weights = {"codebook": 0.25, "commitment": 1.0, "double": 1.0}
        self.loss_weights["entropy"] = config.entropy_weight

    def quantize(
        self, vectors: Tensor, codebook: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        chunks, choose = split_vectors(vectors, codebook), self._choose
        if len(chunks) > 1:  # too much to keep for the backward pass: computed again there
            choose = partial(checkpoint, choose, use_reentrant=False, preserve_rng_state=False)
        with torch.autocast(vectors.device.type, enabled=False):
            results = [choose(chunk, codebook) for chunk in chunks]
            soft, codes, usage, entropy = zip(*results, strict=True)
            expected, index = torch.cat(soft), torch.cat(codes)  # [n, D], [n]
            chosen = F.embedding(index, codebook)  # [n, D]
            quantized = chosen + (expected - expected.detach())  # the value is `chosen` to the bit
            mean_usage = reduce_mean(torch.stack(usage).sum(0) / len(vectors))  # [N]
            # 1e-5 keeps the gradient of an unused code finite
            usage_entropy = -(mean_usage * (mean_usage + 1e-5).log()).sum()
            losses = codebook_losses(vectors, chosen)
            losses["double"] = F.mse_loss(quantized, vectors)
            losses["entropy"] = torch.stack(entropy).sum() / len(vectors) - usage_entropy
        return quantized, index, losses

    def _choose(self, vectors: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For vectors [m, D]: p C [m, D], codes [m], sum of p_t [N], sum of H(p_t) []."""
        scores = vectors @ codebook.T  # [m, N]
        expected = scores.softmax(1) @ codebook.detach()
        log_p = (scores / self.config.entropy_temperature).log_softmax(1)
        p = log_p.exp()
        return expected, scores.argmax(1), p.sum(0), -(p * log_p).sum()


QUANTIZERS: dict[str, Callable[[Any, int, int, bool], Quantizer]] = {
    "vq": Quantizer,
    "simvq": SimVectorQuantizer,
    "ibq": IndexQuantizer,
}


def code_statistics(counts: Tensor) -> dict[str, Tensor]:
    """How evenly codes are used, from the number of times each occurred [N].

    `usage` is the fraction that occurred; `perplexity` exp of the entropy of the frequencies.
    """
    frequency = counts.float() / counts.sum().clamp(min=1)  # [N]
    entropy = -torch.special.xlogy(frequency, frequency).sum()
    return {"usage": (counts > 0).float().mean(), "perplexity": entropy.exp()}


def split_vectors(vectors: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
    """Vectors [n, D] in chunks whose scores fit into memory."""
    return vectors.split(max(1, MAX_SCORES // len(codebook)))


def _sample_rows(vectors: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """`count` rows of vectors [n, D], each once before any twice, plus a little noise."""
    rounds = -(-count // len(vectors))
    order = torch.cat([_permutation(vectors, generator) for _ in range(rounds)])
    noise = vectors.new_empty(count, vectors.shape[1]).normal_(generator=generator)
    return vectors[order[:count]] + 0.01 * vectors.std() * noise


def _permutation(vectors: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randperm(len(vectors), device=vectors.device, generator=generator)


def _keep_loaded_codebook(module: Any, _: object) -> None:
    module.awaits_data = False


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
