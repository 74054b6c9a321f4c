"""Where in a picture each layer leans on the value bank, and a model without its bank.

B batch   S positions with a code read (the last code never is, so S = T - 1)   H heads   M slots
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moveimg.inspection.gates import hooked, mixers
from moveimg.model import GatedMixer, Transformer


@dataclass(frozen=True)
class BankMap:
    """What one layer mixes into its values, position by position; heads averaged.

    Attributes:
        share: |sum_i g_i M_i| / (|g_0 V| + |sum_i g_i M_i|), norms over all heads, [B, S] in 0..1.
        g_0: the gate of the layer's own values, [B, S]; 1 where the layer has no such gate.
        slots: the mean gate of the slots, [B, S].
    """

    share: Tensor
    g_0: Tensor
    slots: Tensor


@torch.no_grad()
def bank_maps(model: Transformer, codes: Tensor, labels: Tensor) -> dict[int, BankMap]:
    """The map of every layer that mixes a bank in, of codes int64 [B, T] with labels [B].

    Position s belongs to code s. Raises ValueError for a model without a value memory.
    """
    found: dict[int, BankMap] = {}

    def hook(layer: int) -> Any:
        def gather(mixer: GatedMixer, args: tuple[Tensor, Tensor, Tensor]) -> None:
            # no code stands at the class token's
            x, v, rows = (part[:, 1:] for part in args)
            g_0, g_i = mixer.gates(x)
            _, memory = mixer.parts(x, rows)
            kept = (v if g_0 is None else g_0 * v).float().flatten(2).norm(dim=-1)  # [B, S]
            added = memory.float().flatten(2).norm(dim=-1)
            own = torch.ones_like(kept) if g_0 is None else g_0.float().mean((2, 3))
            share = added / (kept + added).clamp(min=1e-12)
            found[layer] = BankMap(share.cpu(), own.cpu(), g_i.float().mean((2, 3)).cpu())

        return gather

    present = mixers(model)
    if not present:
        raise ValueError("this model has no value memory, so there is nothing to map")
    handles = [mixer.register_forward_pre_hook(hook(layer)) for layer, mixer in present.items()]
    with hooked(handles):
        model(codes, labels)
    return found


class EmptyRows(nn.Module):
    """A memory whose rows are all zero: gates still apply to the layers' own values."""

    def __init__(self, memory: Any) -> None:
        super().__init__()
        self.memory = memory

    def rows(self, labels: Tensor | None, codes: Tensor | None) -> Tensor | None:
        rows = self.memory.rows(labels, codes)
        return None if rows is None else torch.zeros_like(rows)


def without_bank(model: Transformer) -> Transformer:
    """The same model with every slot at zero. It shares all weights; `model` is not touched."""
    bare = copy.copy(model)
    bare._modules = dict(model._modules)  # else replacing the memory below would reach `model`
    bare.memory = EmptyRows(model.memory)
    return bare
