"""The value mix of whole sequences on a CPU: each head's sum is one bag of an embedding bag.

    B batch   S positions   T = B S tokens   H heads   K width of a head   L layers
    N codes   A slots of a code   M slots a layer reads   G gates of a head: M, or M + 1

The bank stands as rows of K numbers by (code, slot, head); a token's bag for head h is its M rows
of that head, weighted by gates. No row is copied, but where classes have rows, too: then both
tables are made one. The bank's gradient does not come from the bags, which would write a row for
every token, slot and layer: as in fused_bank.py both factors of all layers are kept, and one
batched product adds them up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

NUMBERS = 2**20  # of rows of the bank's gradient that are added up at once: near the caches


def places(ids: Tensor, first: int, slots: int, every: int, heads: int) -> Tensor:
    """ids [B, S] -> the M = `slots` rows from `first` of every head, int64 [T H, M].

    `every` and `heads` are A and H. Where no row stands (-1), those of another token of the
    sequence are named: their weight is 0, and what is not finite reaches none but its own sequence.
    """
    slot = torch.arange(first, first + slots, device=ids.device)
    head = torch.arange(heads, device=ids.device)[:, None]
    named = torch.where(ids < 0, ids.amax(dim=1, keepdim=True).clamp(min=0), ids)
    start = named.flatten()[:, None, None] * every
    return ((start + slot) * heads + head).flatten(0, 1)


def bag_mix(
    table: Tensor, ids: Tensor, bags: Tensor, logits: Tensor, v: Tensor | None, gated: bool,
    carriers: tuple[Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    """As fused_mix.mix: sum_i g_i rows_i, plus (g_0) v where there is v, [B, S, H, K].

    Args:
        table: [N, A, H, K], without a gradient.
        ids: int64 [B, S], -1 where no row stands.
        bags: what `places` says of them.
        logits: [B, S, H, G]; the gates are 2 sigmoid(logits).
        v: [B, S, H, K] or None.
        gated: whether gate 0 is that of v.
        carriers: through which gradients reach the bank, or None.
    """
    gates = 2 * torch.sigmoid(logits.to(table.dtype))
    g_i = gates[..., int(gated) :] * (ids >= 0)[..., None, None]
    weights, rows = g_i.reshape(bags.shape), table.flatten(0, 2)
    sums = F.embedding_bag(bags, rows, mode="sum", per_sample_weights=weights)
    out = sums.view(*logits.shape[:3], -1).to(logits.dtype if v is None else v.dtype)
    if carriers is not None:
        out = Factors.apply(out, logits, *carriers)
    if v is None:
        return out
    return torch.addcmul(out, gates[..., :1].to(v.dtype), v) if gated else out + v


class Factors(torch.autograd.Function):
    """out as it is; its gradient and the logits reach the bank as gradients of the carriers."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, logits: Tensor, of_out: Tensor, of_logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        (logits,) = ctx.saved_tensors
        return d_out, None, d_out, logits


def bag_bank_gradient(
    outs: list[Tensor], logits: list[Tensor], ids: Tensor, firsts: list[int], gated: bool,
    shape: list[int],
) -> Tensor:  # fmt: skip
    """As fused_bank.bank_gradient: sums by code of gates (x) outs, [N, A, H, K].

    In float32, or float64 for outs of that; always in the same order.
    """
    (length, every), (heads, width) = shape, outs[0].shape[2:]
    wide = torch.promote_types(outs[0].dtype, torch.float32)
    total = torch.zeros(length, every, heads, width, dtype=wide, device=ids.device)
    ids = ids.flatten()
    tokens = (ids >= 0).nonzero()[:, 0]
    slots = logits[0].shape[-1] - gated
    for first in sorted(set(firsts)):  # the layers that read the same slots, together
        layers = [layer for layer, other in enumerate(firsts) if other == first]
        for part in tokens.split(max(1, NUMBERS // (slots * heads * width))):
            d = torch.stack([outs[n].flatten(0, 1)[part] for n in layers], dim=2)  # [t, H, L, K]
            z = torch.stack([logits[n].flatten(0, 1)[part] for n in layers], dim=-1)
            g = 2 * torch.sigmoid(z.to(wide))[:, :, int(gated) :]  # [t, H, M, L]
            with torch.autocast(ids.device.type, enabled=False):
                rows = (g @ d.to(wide)).transpose(1, 2)  # [t, M, H, K]
            total[:, first : first + slots].index_add_(0, ids[part], rows)
    return total
