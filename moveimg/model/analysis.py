"""Statistics of value memories: gates, the memory's share of the values, the bank's gradients.

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

from moveimg.model.memory import ValueBank, hook_mixers, mixers_by_layer
from moveimg.model.transformer import Transformer

# A gate below NEAR_ZERO counts as closed, a gate above NEAR_TWO as fully open.
NEAR_ZERO, NEAR_TWO = 0.1, 1.9
Batches = list[tuple[Tensor, Tensor]]  # codes [B, T] and labels [B]


@dataclass(frozen=True)
class BankMap:
    """Gates and norms of the values that one layer mixes per position, float64 on the CPU.

    Attributes:
        gates: [B, S, H, G]; the first is g_0 where the layer is `gated`.
        gated: whether the layer has a gate g_0 for the standard values V.
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
        """The mean over heads of g_0, the gate of V, [B, S]; 1 in a layer without g_0."""
        return self.gates[..., 0].mean(2) if self.gated else torch.ones_like(self.kept)

    @property
    def slots(self) -> Tensor:
        """The mean over heads and slots of the slots' gates, [B, S]."""
        return self.gates[..., int(self.gated) :].mean((2, 3))


@torch.no_grad()
def compute_bank_maps(model: Transformer, codes: Tensor, labels: Tensor) -> dict[int, BankMap]:
    """The BankMap of each layer with memory, by layer index from 0, in one pass over codes [B, T].

    Position s is the input code s; the last code is only predicted, so S = T - 1.
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

    with hook_mixers(model, record):
        model(codes, labels)
    if not maps:
        raise ValueError("this model has no value memory to map")
    return maps


def compute_gate_stats(model: Transformer, batches: Batches) -> dict[int, dict[str, Any]]:
    """Gate statistics of every layer with memory, by layer number from 1, as plain data.

    gates                                   names of the G gates
    mean, spread, near_zero, near_two       per head and gate, [H, G]; shares below 0.1, above 1.9
    memory_share                            |sum_i g_i M_i| / (|g_0 V| + |sum_i g_i M_i|), by norms
    """
    sums: dict[int, Any] = defaultdict(int)  # over images and positions, [4, H, G]
    norms: dict[int, Any] = defaultdict(int)  # sums over images and positions, [2]
    for batch in batches:
        for layer, bank_map in compute_bank_maps(model, *batch).items():
            g = bank_map.gates
            each = torch.stack([g, g.square(), (g < NEAR_ZERO).double(), (g > NEAR_TWO).double()])
            sums[layer] += each.sum((1, 2))
            norms[layer] += torch.stack([bank_map.kept.sum(), bank_map.memory.sum()])
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
    """A memory whose rows are multiplied by `factor`; the gates stay unchanged."""

    def __init__(self, memory: Any, factor: float) -> None:
        super().__init__()
        self.memory, self.factor = memory, factor
        self.context = memory.context

    def gather_rows(self, *args: Any) -> Tensor | None:
        rows: Tensor | None = self.memory.gather_rows(*args)
        return None if rows is None else rows * self.factor

    def neighbours(self, *args: Any) -> Tensor:
        codes: Tensor = self.memory.neighbours(*args)
        return codes


def scale_bank(model: Transformer, factor: float) -> Transformer:
    """A copy of `model` whose memory rows are multiplied by `factor`; all weights are shared."""
    scaled = copy.copy(model)
    scaled._modules = dict(model._modules)  # else `model` would get the scaled memory, too
    scaled.memory = ScaledRows(model.memory, factor)
    return scaled


def compute_gradient_sources(model: Transformer, codes: Tensor, labels: Tensor) -> dict[str, Any]:
    """The gradient of the cross-entropy with respect to the memory's rows, by layer from 1.

    Each layer reads a separate copy of the rows, whose gradient is that layer's contribution: the
    gradient of a table used by this layer alone. The bank's gradient is the sum over layers.

    bank           norm of the gradient of the whole bank
    by_layer       norm of each layer's contribution
    cosines        cosine similarity of the contributions of each pair of layers, [L, L]
    alignment      |sum of contributions| / sum of their norms; 1: all have the same direction
    rows_updated   share of the rows with a gradient in this batch
    reads_per_row  mean reads of an updated row, over all layers
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
    by_layer: dict[int, Tensor] = {}
    for (layer, mixer), gradient in zip(mixers.items(), gradients, strict=True):
        by_slot = gradient[:, 1:].transpose(2, 3).flatten(2)  # columns ordered as in the bank
        contribution = torch.zeros_like(total).index_add_(0, rows, by_slot.flatten(0, 1).double())
        total += contribution
        width, slots = memory.value_width, mixer.slots
        by_layer[layer + 1] = contribution[:, slots.start * width : slots.stop * width].flatten()
    stacked = torch.stack(list(by_layer.values()))
    norms = stacked.norm(dim=1)
    unit = stacked / norms.clamp(min=1e-30)[:, None]
    updated = len(rows.unique())
    return {
        "bank": total.norm().item(),
        "by_layer": dict(zip(by_layer, norms.tolist(), strict=True)),
        "cosines": (unit @ unit.T).tolist(),
        "alignment": (stacked.sum(0).norm() / norms.sum().clamp(min=1e-30)).item(),
        "rows_updated": updated / count,
        "reads_per_row": len(rows) * len(by_layer) / updated,
    }
