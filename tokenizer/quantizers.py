"""Quantizers, from encoder outputs to codes and code vectors: VQ, SimVQ and IBQ.

B batch size   D codebook dimension   N codebook size   h, w grid of codes   n = B*h*w vectors
A new kind needs a subclass of `Quantizer`, its name in config.py, and a line in `QUANTIZERS`.
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
    """The output of `forward`, of a quantizer or of a tokenizer."""

    output: Tensor  # quantized vectors [B, D, h, w], or images [B, C, H, W], not clamped
    codes: Tensor  # int64 [B, h*w], raster order
    losses: Losses  # unweighted scalars; weights: Quantizer.loss_weights
    stats: dict[str, Tensor]  # scalars to log


class Quantizer(nn.Module):
    """VQ (VQ-VAE, arXiv 1711.00937): nearest code vector, straight-through gradients, re-seeding.

    A code unused for `reseed_after` training steps is reset to an encoder output of the batch.
    Usage is counted over all processes, and rank 0 broadcasts the new vectors, so that replicas
    stay equal. Subclasses do not re-seed.
    """

    nearest = True  # False: the code of the largest dot product
    generator: torch.Generator | None = None  # for re-seeding; None: torch's default generator
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
        """Return the code vectors [N, D], of unit length if l2_normalize, in float32 or float64."""
        return self._normalize(_at_least_float32(self.embedding.weight))

    def lookup(self, z: Tensor) -> Tensor:
        """Return the codes int64 [B, h*w], in raster order, of encoder outputs [B, D, h, w]."""
        return self.assign(self._flatten(z), self.codebook()).view(z.shape[0], -1)

    def embed(self, codes: Tensor) -> Tensor:
        """Return the code vectors [..., D] of codes int64 [...]."""
        return F.embedding(codes, self.codebook())

    def forward(self, z: Tensor) -> TrainingOutput:
        """Quantize z [B, D, h, w]; in training mode also re-seed unused codes."""
        vectors, stats = self._flatten(z), {}  # [n, D]
        if self.reseeds and self.training:  # changes the codebook: must precede its use
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
        """Return the best code int64 [n] for each vector [n, D]; of equal codes the lowest."""
        # autocast would round the scores to 8 bits of mantissa
        with torch.autocast(vectors.device.type, enabled=False):
            # |v - e|^2 = |v|^2 - 2 (v.e - |e|^2 / 2)
            bias = codebook.square().sum(1) * (-0.5 if self.nearest else 0.0)  # [N]
            chunks = vectors.split(max(1, MAX_SCORES // len(codebook)))
            return torch.cat([torch.addmm(bias, x, codebook.T).argmax(1) for x in chunks])

    def quantize(self, vectors: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Losses]:
        """Quantize vectors [n, D]; returns [n, D] with gradients, codes [n] and losses."""
        codes = self.assign(vectors.detach(), codebook.detach())
        chosen = F.embedding(codes, codebook)  # [n, D]
        return vectors + (chosen - vectors).detach(), codes, codebook_losses(vectors, chosen)

    @torch.no_grad()
    def _reseed(self, vectors: Tensor) -> Tensor:
        """Reset unused codes to random `vectors` [n, D]; returns the number of these codes."""
        weight, limit = self.embedding.weight, self.config.reseed_after or 2**62
        if self.idle_steps is None:
            self.idle_steps = torch.zeros(len(weight), dtype=torch.int64, device=weight.device)
        dead = (self.idle_steps >= limit).nonzero().flatten()[: len(vectors)]
        if self.awaits_data:  # noise makes repeated vectors differ
            shuffled = [self._shuffle(vectors) for _ in range(0, len(weight), len(vectors))]
            noise = vectors.new_empty(weight.shape).normal_(generator=self.generator)
            weight.copy_(torch.cat(shuffled)[: len(weight)] + 0.01 * vectors.std() * noise)
        elif len(dead):
            weight[dead] = self._shuffle(vectors)[: len(dead)].to(weight.dtype)
            self.idle_steps[dead] = 0
        if self.awaits_data or len(dead):  # true on all processes or none
            broadcast_from_rank0(weight)
            broadcast_from_rank0(self.idle_steps)
        self.awaits_data = False
        return torch.tensor(len(dead), device=weight.device)

    def _shuffle(self, vectors: Tensor) -> Tensor:
        n, device = len(vectors), vectors.device
        return vectors[torch.randperm(n, device=device, generator=self.generator)]

    def _flatten(self, z: Tensor) -> Tensor:
        """Flatten [B, D, h, w] to vectors [n, D], normalized as the codebook."""
        return self._normalize(_at_least_float32(z).permute(0, 2, 3, 1).flatten(0, 2))

    def _normalize(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=1) if self.l2_normalize else vectors


class SimVectorQuantizer(Quantizer):
    """SimVQ (arXiv 2411.02038): nearest row of C W, C ~ N(0, 1/D) frozen, W [D, D] learned.

    The authors' code adds a bias to C W; this class follows the paper, which has none.
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
    loss E[H(p_t)] - H(E[p_t]), with p_t of temperature t, makes each assignment confident and the
    use of codes uniform; the mean E[p_t] is over the vectors of all processes.
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
            quantized = chosen + (expected - expected.detach())  # equals `chosen` exactly
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
    """Return equation 3 of VQ-VAE, unweighted, for vectors [n, D] and their code vectors."""
    return {
        "codebook": F.mse_loss(chosen, vectors.detach()),  # moves code vectors
        "commitment": F.mse_loss(vectors, chosen.detach()),  # moves encoder outputs
    }


def code_statistics(counts: Tensor) -> dict[str, Tensor]:
    """Return `usage`, the share of codes that occur, and `perplexity`, from code counts [N]."""
    frequency = counts.float() / counts.sum().clamp(min=1)  # [N]
    entropy = -torch.special.xlogy(frequency, frequency).sum()
    return {"usage": (counts > 0).float().mean(), "perplexity": entropy.exp()}


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
