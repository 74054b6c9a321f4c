"""The loss of the output head without all of its logits.

    N rows   D width   V codebook size

Logits are the largest tensor of a training step: 16,384 numbers a code, several times over in the
loss and on its way back. Here they are made for some rows at a time, and what the way back needs of
them, the gradients of x and of the head, is computed while they are there. So the head costs three
matrix products, as it always does, and none is done again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 2**24  # logits that exist at a time, at the most (64 MiB in float32); a row at the least


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the logits x W^T, averaged over rows, and how often the target is likeliest.

    Products are computed in autocast's type where that is on; softmax, loss and the sum of the
    head's gradient over chunks in float32 (float64 for float64). No second derivatives.

    Args:
        x: [N, D]; N at least 1.
        weight: the head's [V, D].
        targets: int64 [N] in 0..V-1.

    Returns:
        the mean loss in nats, and the share of rows whose largest logit is the target's (no
        gradient): scalars.
    """
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
    return _LinearCrossEntropy.apply(x, weight, targets, dtype, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    """With p the softmax of a row and e its target's unit vector: dL/dlogits = (p - e) / N."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, train: bool
    ) -> tuple[Tensor, Tensor]:
        low, wide = weight.to(dtype), torch.promote_types(dtype, torch.float32)
        for_x, for_weight = (train and needed for needed in ctx.needs_input_grad[:2])
        grad_x = torch.empty_like(x) if for_x else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if for_weight else None
        loss, hits = (torch.zeros((), dtype=wide, device=x.device) for _ in range(2))
        size = max(1, CHUNK // len(weight))
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            rows = x[part].to(dtype)
            nats, right, error = _chunk(rows, low, targets[part, None], for_x or for_weight)
            loss, hits = loss + nats, hits + right
            if grad_x is not None:
                grad_x[part] = error @ low
            if grad_weight is not None:
                grad_weight += error.T @ rows
            del error  # before the next chunk's logits are made
        accuracy = hits / len(x)
        ctx.rows = len(x)
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.mark_non_differentiable(accuracy)
        return loss / len(x), accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad / ctx.rows
        grad_x, grad_weight = (
            None if g is None else g * scale.to(g.dtype) for g in ctx.saved_tensors
        )
        return grad_x, grad_weight, None, None, None


def _chunk(
    rows: Tensor, weight: Tensor, target: Tensor, train: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """rows [n, D], weight [V, D], target [n, 1] -> sums of nats and of hits, p - e [n, V].

    Without `train` the last is something else.
    """
    logits = rows @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    hits = (logits.argmax(dim=1, keepdim=True) == target).sum()
    logits = logits.log_softmax(dim=1)
    nats = -logits.gather(1, target).sum()
    if train:
        logits.exp_().scatter_add_(1, target, -logits.new_ones(target.shape))
    return nats, hits, logits.to(rows.dtype)
