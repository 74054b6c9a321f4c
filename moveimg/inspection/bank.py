"""The memory's rows: which are read, how large they are, and what gradient reaches them.

V codebook size   M slots of a code in all   W width of a value
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moveimg.inspection.gates import hooked, mixers
from moveimg.model import GatedMixer, Transformer, ValueBank

FADED = 0.1  # a row is faded below this share of its slot's median norm


@torch.no_grad()
def row_statistics(
    memory: ValueBank, batches: list[tuple[Tensor, Tensor]], shown: int = 1000
) -> dict[str, Any]:
    """Reads and norms of the bank's rows.

    A code is unread when it never came up to be looked up in `batches` (others may hold it), and
    a row faded when its norm is below a tenth of its slot's median: weight decay shrinks rows that
    no gradient reaches.
    `similarity` is the mean cosine of two slots' rows of one code, [M, M].
    Raises ValueError for a bank whose rows are not a code's each.
    """
    if memory.bank.num_embeddings != memory.config.codebook_size:
        raise ValueError(
            f"a bank of {memory.bank.num_embeddings} rows for {memory.config.codebook_size} codes: "
            "only one with a row a code can be looked into"
        )
    weight = memory.bank.weight.unflatten(-1, (memory.slots, -1)).double()  # [V, M, W]
    reads = torch.zeros(len(weight), dtype=torch.int64)
    for codes, _ in batches:  # the last code of an image is never looked up
        reads += codes[:, :-1].flatten().cpu().bincount(minlength=len(weight))
    norms = weight.norm(dim=-1)  # [V, M]
    directions = weight / norms[..., None].clamp(min=1e-12)
    similarity = torch.einsum("vmw,vnw->mn", directions, directions) / len(weight)
    unread = (reads == 0).nonzero().flatten().tolist()
    return {
        "rows": len(weight),
        "codes_read": int(reads.sum()),
        "unread": len(unread),
        "unread_codes": unread[:shown],
        "faded": (norms < FADED * norms.median(dim=0).values).double().mean(0).tolist(),
        "norm_mean": norms.mean(0).tolist(),
        "norm_spread": norms.std(0).tolist(),
        "similarity": similarity.tolist(),
        "reads": reads.tolist(),
    }


def gradient_norms(model: Transformer, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Norm of the cross-entropy's gradient with respect to the memory, by the layer it comes from.

    Each layer is handed rows of its own (equal in value), so what reaches them is that layer's
    part alone: what a local table there would get. A shared bank gets the sum over layers. That
    sum's norm over the sum of norms, `alignment`, is 1 where all layers pull the same way.

    Numbers are means over the batches of codes [B, T] and labels [B], each with a `_spread` beside
    it: the standard deviation over batches (of the sample; 0 for one).
    """
    found = [_gradient_norms(model, *batch) for batch in batches]
    layers = list(found[0][0])
    by_layer = torch.tensor([list(norms.values()) for norms, _ in found], dtype=torch.float64)
    bank = torch.tensor([whole for _, whole in found], dtype=torch.float64)
    of_all = {
        "bank": bank,
        "largest_layer": by_layer.amax(1),
        "bank_over_largest_layer": bank / by_layer.amax(1).clamp(min=1e-30),
        "alignment": bank / by_layer.sum(1).clamp(min=1e-30),
    }
    report: dict[str, Any] = {
        "by_layer": dict(zip(layers, by_layer.mean(0).tolist(), strict=True)),
        "by_layer_spread": dict(zip(layers, _deviation(by_layer).tolist(), strict=True)),
    }
    for name, values in of_all.items():
        report[name], report[f"{name}_spread"] = values.mean().item(), _deviation(values).item()
    return report | {"images": sum(len(labels) for _, labels in batches), "batches": len(batches)}


def _deviation(values: Tensor) -> Tensor:
    """Standard deviation over the first dimension; 0 for one value."""
    return values.std(0) if len(values) > 1 else torch.zeros_like(values[0])


def _gradient_norms(
    model: Transformer, codes: Tensor, labels: Tensor
) -> tuple[dict[int, float], float]:
    """Of one batch: the norm from each layer, and that of their sum."""
    memory = model.memory
    assert isinstance(memory, ValueBank)
    leaves: dict[int, Tensor] = {}

    def hook(layer: int) -> Any:
        def replace(mixer: GatedMixer, args: tuple[Tensor, Tensor, Tensor]) -> tuple:
            leaves[layer] = args[2].detach().requires_grad_()
            return args[0], args[1], leaves[layer]

        return replace

    handles = [m.register_forward_pre_hook(hook(layer)) for layer, m in mixers(model).items()]
    with hooked(handles), torch.enable_grad():
        loss = F.cross_entropy(model(codes, labels).flatten(0, 1), codes.flatten())
        gradients = torch.autograd.grad(loss, list(leaves.values()))
    before = codes[:, :-1].flatten()
    weight = memory.bank.weight
    wide = torch.promote_types(weight.dtype, torch.float32)  # bfloat16 would lose what is added
    total = torch.zeros_like(weight, dtype=wide)
    norms = {}
    for layer, gradient in zip(leaves, gradients, strict=True):
        part = torch.zeros_like(total)
        by_slot = gradient[:, 1:].transpose(2, 3).flatten(2)  # as the table stores them
        part.index_add_(0, before, by_slot.flatten(0, 1).to(part.dtype))
        norms[layer] = part.norm().item()
        total += part
    return norms, total.norm().item()
