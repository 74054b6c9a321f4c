"""The rows of a value bank: their reads, their norms, and the gradients that reach them.

M slots   V codebook size   K width of a slot's row
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moveimg.model import Transformer, ValueBank, mixers_by_layer

Batches = list[tuple[Tensor, Tensor]]  # codes [B, T] and labels [B]
FADED = 0.1  # a row has faded below this share of its slot's median norm


@torch.no_grad()
def row_statistics(memory: ValueBank, batches: Batches, shown: int = 1000) -> dict[str, Any]:
    """Reads and norms of the bank's rows.

    A code is unread when it never came up for a look-up in `batches`. A row has faded when its norm
    is below a tenth of its slot's median: weight decay shrinks rows that no gradient reaches.
    `similarity` is the mean cosine of two slots' rows of one code, [M, M].
    Raises ValueError for a bank that does not have one row per code.
    """
    if memory.bank.num_embeddings != memory.config.codebook_size:
        raise ValueError(
            f"a bank of {memory.bank.num_embeddings} rows for {memory.config.codebook_size} codes: "
            "expected one row per code"
        )
    weight = memory.bank.weight.unflatten(-1, (memory.slots, -1)).double()  # [V, M, K]
    read = torch.cat([codes[:, :-1].flatten().cpu() for codes, _ in batches])  # not the last code
    reads = read.bincount(minlength=len(weight))
    norms = weight.norm(dim=-1)  # [V, M]
    directions = F.normalize(weight, dim=-1)
    unread = (reads == 0).nonzero().flatten().tolist()
    return {
        "rows": len(weight),
        "codes_read": len(read),
        "unread": len(unread),
        "unread_codes": unread[:shown],
        "faded": (norms < FADED * norms.median(dim=0).values).double().mean(0).tolist(),
        "norm_mean": norms.mean(0).tolist(),
        "norm_spread": norms.std(0).tolist(),
        "similarity": (torch.einsum("vmk,vnk->mn", directions, directions) / len(weight)).tolist(),
        "reads": reads.tolist(),
    }


def gradient_norms(model: Transformer, batches: Batches) -> dict[str, Any]:
    """Norms of the cross-entropy's gradient with respect to the bank, by the layer it comes from.

    Each layer gets rows of its own (equal in value), so their gradient is that layer's part alone:
    what a local table there would get. A shared bank gets the sum over layers. That sum's norm
    over the sum of norms, `alignment`, is 1 where all layers pull the same way.

    Numbers are means over batches; their `_spread` is the standard deviation over batches (0 for
    one batch).
    """
    measured = [_gradient_norms(model, *batch) for batch in batches]
    layers = list(measured[0][0])
    by_layer = torch.tensor([list(norms.values()) for norms, _ in measured], dtype=torch.float64)
    bank = torch.tensor([total for _, total in measured], dtype=torch.float64)
    numbers = {
        "bank": bank,
        "largest_layer": by_layer.amax(1),
        "bank_over_largest_layer": bank / by_layer.amax(1).clamp(min=1e-30),
        "alignment": bank / by_layer.sum(1).clamp(min=1e-30),
    }
    report: dict[str, Any] = {
        "by_layer": dict(zip(layers, by_layer.mean(0).tolist(), strict=True)),
        "by_layer_spread": dict(zip(layers, _deviation(by_layer).tolist(), strict=True)),
    }
    for name, values in numbers.items():
        report[name], report[f"{name}_spread"] = values.mean().item(), _deviation(values).item()
    return report | {"images": sum(len(labels) for _, labels in batches), "batches": len(batches)}


def _deviation(values: Tensor) -> Tensor:
    return values.std(0) if len(values) > 1 else torch.zeros_like(values[0])


def _gradient_norms(
    model: Transformer, codes: Tensor, labels: Tensor
) -> tuple[dict[int, float], float]:
    """Of one batch: the norm from each layer, and that of their sum."""
    memory, leaves = model.memory, {}
    assert isinstance(memory, ValueBank)

    def hook(layer: int) -> Any:
        def replace(mixer: nn.Module, args: tuple[Tensor, Tensor, Any]) -> tuple:
            leaves[layer] = args[2].detach().requires_grad_()
            return args[0], args[1], leaves[layer]

        return replace

    mixers = mixers_by_layer(model)
    handles = [mixer.register_forward_pre_hook(hook(layer)) for layer, mixer in mixers.items()]
    try:
        with torch.enable_grad():
            loss = F.cross_entropy(model(codes, labels).flatten(0, 1), codes.flatten())
            gradients = torch.autograd.grad(loss, list(leaves.values()))
    finally:
        for handle in handles:
            handle.remove()
    weight = memory.bank.weight
    total = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    norms = {}
    for layer, gradient in zip(leaves, gradients, strict=True):
        by_slot = gradient[:, 1:].transpose(2, 3).flatten(2)  # in the order of the bank's columns
        part = torch.zeros_like(total)
        part.index_add_(0, codes[:, :-1].flatten(), by_slot.flatten(0, 1).to(part.dtype))
        norms[layer] = part.norm().item()
        total += part
    return norms, total.norm().item()
