"""What value memories do: gates, the memory's share of the values, and the bank's gradients.

B batch   S positions (without the class token's)   H heads   G gates: g_0, then slots
"""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moveimg.model.memory import ValueBank, mixers_by_layer, record_mixing
from moveimg.model.transformer import Transformer

# A gate below the first counts as closed, one above the second as fully open.
NEAR_ZERO, NEAR_TWO = 0.1, 1.9
Batches = list[tuple[Tensor, Tensor]]  # codes [B, T] and labels [B]


@dataclass(frozen=True)
class BankMap:
    """What one layer mixes into its values at each position, float64 on the CPU.

    Attributes:
        gates: [B, S, H, G]; the first is g_0 where the layer is `gated`.
        gated: whether the layer has a gate of its own values.
        kept, memory: norms over all heads of g_0 V and of sum_i g_i M_i, [B, S].
    """

    gates: Tensor
    gated: bool
    kept: Tensor
    memory: Tensor

    @property
    def share(self) -> Tensor:
        """|sum_i g_i M_i| / (|g_0 V| + |sum_i g_i M_i|), [B, S] in 0..1."""
        return self.memory / (self.kept + self.memory).clamp(min=1e-12)

    @property
    def g_0(self) -> Tensor:
        """The gate of the layer's own values, heads averaged, [B, S]; 1 where there is none."""
        return self.gates[..., 0].mean(2) if self.gated else torch.ones_like(self.kept)

    @property
    def slots(self) -> Tensor:
        """The mean gate of the slots, [B, S]."""
        return self.gates[..., int(self.gated) :].mean((2, 3))


@torch.no_grad()
def bank_maps(model: Transformer, codes: Tensor, labels: Tensor) -> dict[int, BankMap]:
    """The map of every layer (from 0) with memory, of codes int64 [B, T] with labels [B].

    Position s belongs to code s; the last code is never read, so S = T - 1.
    Raises ValueError for a model without value memory.
    """
    maps: dict[int, BankMap] = {}

    def record(layer: int, g_0: Tensor | None, *others: Tensor) -> None:
        g_i, values, rows = (part.double() for part in others)
        memory = torch.einsum("bshm,bshmk->bshk", g_i, rows)
        gates = g_i if g_0 is None else torch.cat([g_0.double(), g_i], dim=-1)
        kept = values if g_0 is None else g_0.double() * values
        norms = (part.flatten(2).norm(dim=-1).cpu() for part in (kept, memory))
        maps[layer] = BankMap(gates.cpu(), g_0 is not None, *norms)

    with record_mixing(model, record):
        model(codes, labels)
    if not maps:
        raise ValueError("this model has no value memory to map")
    return maps


def gather_gates(model: Transformer, batches: Batches) -> dict[int, dict[str, Any]]:
    """Gate statistics of every layer with memory, as plain data.

    gates                                   names of the G gates
    mean, spread, near_zero, near_two       per head and gate, [H, G]; shares below 0.1, above 1.9
    memory_share                            mean norm of sum_i g_i M_i over its sum with g_0 V's
    """
    sums: dict[int, Any] = defaultdict(int)  # over images and positions, [4, H, G]
    norms: dict[int, Any] = defaultdict(int)  # likewise, [2]
    for batch in batches:
        for layer, found in bank_maps(model, *batch).items():
            g = found.gates
            each = torch.stack([g, g.square(), (g < NEAR_ZERO).double(), (g > NEAR_TWO).double()])
            sums[layer] += each.sum((1, 2))
            norms[layer] += torch.stack([found.kept.sum(), found.memory.sum()])
    count = sum(len(labels) for _, labels in batches) * (model.config.seq_len - 1)
    report = {}
    for layer, mixer in mixers_by_layer(model).items():
        mean, square, near_zero, near_two = sums[layer] / count
        kept, memory = norms[layer].tolist()
        names = [f"slot {slot}" for slot in mixer.slots]
        report[layer + 1] = {
            "gates": ["g_0", *names] if mixer.gate_standard else names,
            "mean": mean.tolist(),
            "spread": (square - mean.square()).clamp(min=0).sqrt().tolist(),
            "near_zero": near_zero.tolist(),
            "near_two": near_two.tolist(),
            "memory_share": memory / max(memory + kept, 1e-12),
        }
    return report


class ScaledRows(nn.Module):
    """A memory whose rows are multiplied by `share`; gates still apply to the layers' values."""

    def __init__(self, memory: Any, share: float) -> None:
        super().__init__()
        self.memory, self.share = memory, share
        self.context = memory.context

    def rows(self, *args: Any) -> Tensor | None:
        rows: Tensor | None = self.memory.rows(*args)
        return None if rows is None else rows * self.share

    def neighbours(self, *args: Any) -> Tensor:
        found: Tensor = self.memory.neighbours(*args)
        return found


def scale_bank(model: Transformer, share: float) -> Transformer:
    """The same model with every slot times `share`. It shares all weights with `model`."""
    scaled = copy.copy(model)
    scaled._modules = dict(model._modules)  # else the new memory below would become `model`'s, too
    scaled.memory = ScaledRows(model.memory, share)
    return scaled


def gradient_sources(model: Transformer, codes: Tensor, labels: Tensor) -> dict[str, Any]:
    """The gradient of the cross-entropy with respect to the memory's rows, by layer.

    Each layer gets rows of its own (equal in value), so their gradient is that layer's part alone:
    what a local table there would get. A shared bank gets the sum over layers.

    bank           norm of the gradient of the whole bank
    by_layer       norm of each layer's part
    cosines        between the parts of every two layers, [L, L]
    alignment      norm of the sum of the parts over the sum of their norms; 1: all pull one way
    rows_updated   share of the rows with a gradient in this batch
    reads_per_row  times that an updated row was read, by all layers
    """
    leaves: list[Tensor] = []

    def replace(mixer: nn.Module, args: tuple[Tensor, Tensor, Any]) -> tuple:
        leaves.append(args[2].detach().requires_grad_())
        return args[0], args[1], leaves[-1]

    memory: Any = model.memory
    assert isinstance(memory, ValueBank)
    mixers = mixers_by_layer(model)
    handles = [mixer.register_forward_pre_hook(replace) for mixer in mixers.values()]
    try:
        with torch.enable_grad():
            loss = F.cross_entropy(model(codes, labels).flatten(0, 1), codes.flatten())
            gradients = torch.autograd.grad(loss, leaves)
    finally:
        for handle in handles:
            handle.remove()
    rows, count = memory.row_indices(codes[:, :-1]).flatten(), memory.n_rows
    total = torch.zeros(count, memory.slots * memory.value_width, device=codes.device).double()
    parts: dict[int, Tensor] = {}
    for (layer, mixer), gradient in zip(mixers.items(), gradients, strict=True):
        by_slot = gradient[:, 1:].transpose(2, 3).flatten(2)  # in the order of the bank's columns
        part = torch.zeros_like(total).index_add_(0, rows, by_slot.flatten(0, 1).double())
        total += part
        width, slots = memory.value_width, mixer.slots
        parts[layer + 1] = part[:, slots.start * width : slots.stop * width].flatten()
    stacked = torch.stack(list(parts.values()))
    norms = stacked.norm(dim=1)
    unit = stacked / norms.clamp(min=1e-30)[:, None]
    updated = len(rows.unique())
    return {
        "bank": total.norm().item(),
        "by_layer": dict(zip(parts, norms.tolist(), strict=True)),
        "cosines": (unit @ unit.T).tolist(),
        "alignment": (stacked.sum(0).norm() / norms.sum().clamp(min=1e-30)).item(),
        "rows_updated": updated / count,
        "reads_per_row": len(rows) * len(parts) / updated,
    }
