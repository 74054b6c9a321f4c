"""The generator's loss: cross-entropy of codes, computed without all logits at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 2**24  # logits that are computed at a time (64 MiB in float32), at least one row


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy in nats of the logits x W^T, and the top-1 accuracy.

    x [N, D], weight [V, D], targets int64 [N]. Logits, the largest tensor of a training step, are
    computed for CHUNK / V rows at a time, together with the gradients of x and W, so the head still
    costs three matrix products. Under autocast, products use its dtype; softmax, loss and the sum
    of W's gradient use float32 (float64 for float64). The accuracy has no gradient, the loss no
    second derivative.
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
        grad_x, loss = torch.empty_like(x), torch.zeros((), dtype=wide, device=x.device)
        grad_weight = torch.zeros_like(weight, dtype=wide) if train else None
        hits, size = torch.zeros_like(loss), max(1, CHUNK // len(weight))
        for start in range(0, len(x), size):
            rows, target = x[start : start + size].to(dtype), targets[start : start + size, None]
            logits = (rows @ low.T).to(wide)
            hits += (logits.argmax(dim=1, keepdim=True) == target).sum()
            logits = logits.log_softmax(dim=1)
            loss -= logits.gather(1, target).sum()
            if grad_weight is not None:
                ones = logits.new_ones(target.shape)
                error = logits.exp_().scatter_add_(1, target, -ones).to(dtype)  # p - e
                grad_x[start : start + size] = error @ low
                grad_weight += error.T @ rows
                del error
            del logits  # before those of the next chunk
        accuracy, ctx.rows = hits / len(x), len(x)
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.mark_non_differentiable(accuracy)
        return loss / len(x), accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = (g * (grad / ctx.rows).to(g.dtype) for g in ctx.saved_tensors)
        return grad_x, grad_weight, None, None, None
