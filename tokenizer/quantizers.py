"""Vectors -> codes -> vectors: the kinds of quantizer.

Letters: B batch, D codebook dimension, N codebook size, h and w the grid, n = B*h*w.

A new kind is one class with what it does otherwise than `codebook.Quantizer`, one config in
`config.py`, and one line in `QUANTIZERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokenizer.codebook import Choice, Quantizer, likeliest_codes, rows_at_once
from tokenizer.config import IBQQuantizerConfig, SimVQQuantizerConfig, VQQuantizerConfig
from tokenizer.losses import codebook_losses
from tokenizer.processes import from_first, mean


class VectorQuantizer(Quantizer):
    """Nearest codebook vector (VQ-VAE, arXiv 1711.00937) with re-seeding of dead codes.

    A code that no vector chose for `reseed_after` training steps is put onto a vector of the
    current batch. The record of use is never saved, and does not exist outside training. Where
    several processes train, each sees the use of all and takes new vectors from the first one, so
    that replicas stay equal. Parameters must be whole (not sharded) on each process.
    """

    def __init__(
        self, config: VQQuantizerConfig, codebook_size: int, codebook_dim: int, l2_normalize: bool
    ) -> None:
        super().__init__(codebook_size, codebook_dim, l2_normalize)
        self.config = config
        self.idle_steps: Tensor | None  # int64 [N], steps since each code was last chosen
        self.register_buffer("idle_steps", None, persistent=False)
        self.awaits_data = config.init_from_data
        self.register_load_state_dict_post_hook(_keep_loaded_codebook)

    def prepare(self, vectors: Tensor) -> dict[str, Tensor]:
        """Re-seed; `reseeded` is the number of codes moved."""
        return {"reseeded": self._move_dead_codes(vectors)}

    @torch.no_grad()
    def record(self, counts: Tensor) -> None:
        assert self.idle_steps is not None  # made by prepare
        self.idle_steps = torch.where(counts > 0, 0, self.idle_steps + 1)

    def training_state(self) -> dict[str, Tensor | None]:
        """How long each code was idle: not part of a tokenizer, but of when codes are moved."""
        return {"idle_steps": self.idle_steps}

    def load_training_state(self, state: Mapping[str, Tensor | None]) -> None:
        idle = state["idle_steps"]
        self.idle_steps = None if idle is None else idle.to(self.embedding.weight.device)

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
            from_first(weight)
            return torch.zeros_like(self.idle_steps[0])
        limit = self.config.reseed_after or torch.iinfo(torch.int64).max
        dead = (self.idle_steps >= limit).nonzero().flatten()
        if len(dead):
            # the same codes are dead on every process, so all of them come here together
            chosen = torch.randperm(len(vectors), device=vectors.device)[: len(dead)]
            dead = dead[: len(chosen)]
            weight[dead] = vectors[chosen].to(weight.dtype)
            self.idle_steps[dead] = 0
            from_first(weight)
            from_first(self.idle_steps)
        return torch.tensor(len(dead), device=weight.device)


class SimVectorQuantizer(Quantizer):
    """SimVQ (arXiv 2411.02038): a frozen codebook C ~ N(0, 1/D) behind one learned linear map W.

    The nearest row of C W is chosen, with VQ-VAE's losses. W moves all codes at once, so that a
    code is never left behind because nothing chose it.
    """

    def __init__(
        self, _: SimVQQuantizerConfig, codebook_size: int, codebook_dim: int, l2_normalize: bool
    ) -> None:
        super().__init__(codebook_size, codebook_dim, l2_normalize)
        self.embedding.requires_grad_(False)
        self.projection = nn.Linear(codebook_dim, codebook_dim, bias=False)

    def codebook(self) -> Tensor:
        frozen, w = self.embedding.weight, self.projection.weight
        precision = torch.promote_types(w.dtype, torch.float32)
        with torch.autocast(w.device.type, enabled=False):
            return self._normalized(F.linear(frozen.to(precision), w.to(precision)))


class IndexQuantizer(Quantizer):
    """IBQ, index back-propagation (arXiv 2412.02692).

    p = softmax(C z), and the code is its largest entry. quantized = C^T (onehot - sg(p) + p), with
    sg the stop of gradients: its value is the chosen vector, its gradient goes through p to z and
    to *every* code. Losses: `double` (quantized - z)^2, moving both sides through p; the two halves
    of VQ-VAE's; and `entropy` at temperature t, E[H(p_t)] - H(E[p_t]): each vector decided, all
    codes used. H(E[p]) is of all vectors of the batch, on all processes.
    """

    def __init__(
        self, config: IBQQuantizerConfig, codebook_size: int, codebook_dim: int, l2_normalize: bool
    ) -> None:
        super().__init__(codebook_size, codebook_dim, l2_normalize)
        self.config = config
        # VQ-VAE's two halves are weighed the other way round than there, as the authors' code does
        self.loss_weights = {
            "codebook": 0.25,
            "commitment": 1.0,
            "double": 1.0,
            "entropy": config.entropy_weight,
        }

    def assign(self, vectors: Tensor, codebook: Tensor) -> Tensor:
        return likeliest_codes(vectors, codebook)

    def choose(self, vectors: Tensor, codebook: Tensor) -> Choice:
        parts = vectors.split(rows_at_once(codebook))
        # more than one part: too much to keep for the backward pass, so it is computed again there
        again: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        with torch.autocast(vectors.device.type, enabled=False):
            results = [
                self._soft(part, codebook)
                if len(parts) == 1
                else checkpoint(self._soft, part, codebook, **again)
                for part in parts
            ]
            soft, codes, usage, undecided = zip(*results, strict=True)
            expected = torch.cat(soft)  # [n, D]
            index = torch.cat(codes)  # [n]
            chosen = F.embedding(index, codebook)  # [n, D]
            # the value is `chosen` to the bit; C as a value is moved by the chosen row alone
            quantized = chosen + (expected - expected.detach())
            mean_usage = mean(torch.stack(usage).sum(0) / len(vectors))  # [N]
            # 1e-5: an unused code has a finite gradient
            spread = -(mean_usage * (mean_usage + 1e-5).log()).sum()
            losses = {
                **codebook_losses(vectors, chosen),
                "double": F.mse_loss(quantized, vectors),
                "entropy": torch.stack(undecided).sum() / len(vectors) - spread,
            }
        return Choice(quantized, index, losses)

    def _soft(self, vectors: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For vectors [m, D]: p C [m, D], codes [m], sum of p_t [N], sum of H(p_t) []."""
        scores = vectors @ codebook.T  # [m, N]
        expected = scores.softmax(1) @ codebook.detach()
        sharp = (scores / self.config.entropy_temperature).log_softmax(1)
        p = sharp.exp()
        return expected, scores.argmax(1), p.sum(0), -(p * sharp).sum()


def _resample(vectors: Tensor, count: int) -> Tensor:
    """`count` rows out of vectors [n, D], each once before any twice, slightly shaken apart."""
    rounds = -(-count // len(vectors))
    order = [torch.randperm(len(vectors), device=vectors.device) for _ in range(rounds)]
    chosen = vectors[torch.cat(order)[:count]]
    return chosen + 0.01 * vectors.std() * torch.randn_like(chosen)


def _keep_loaded_codebook(module: nn.Module, _: object) -> None:
    assert isinstance(module, VectorQuantizer)
    module.awaits_data = False


QUANTIZERS: dict[str, Callable[[Any, int, int, bool], Quantizer]] = {
    "vq": VectorQuantizer,
    "simvq": SimVectorQuantizer,
    "ibq": IndexQuantizer,
}
