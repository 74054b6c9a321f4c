"""The inside of a trained model: its gates, its value bank, its gradients and its experts.

B batch   S positions (without the class token's)   H heads   G gates: g_0, then slots

Reports and plots count layers from 1.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moveimg import plots
from moveimg.data import PackedCodes
from moveimg.files import write_json
from moveimg.model import MoE, Transformer, ValueBank, mixers_by_layer, record_mixing
from moveimg.pipeline import Pipeline

# A gate below the first counts as closed, one above the second as fully open.
NEAR_ZERO, NEAR_TWO = 0.1, 1.9
Batches = list[tuple[Tensor, Tensor]]  # codes [B, T] and labels [B]


def inspect_model(
    pipeline: Pipeline,
    out: Path,
    codes_folder: Path | None = None,
    num: int = 256,
    batch_size: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """Write out/inspection.json and gates.png; return the report.

    The model reads `num` images of packed codes (or of val/ in their folder), or else of its own
    samples. Gradients are those of the first batch.

    Raises ValueError for a model with neither memory nor experts, or codes of another tokenizer.
    """
    model = pipeline.generator
    batches = read_codes(pipeline, codes_folder, num, batch_size, seed)
    report: dict[str, Any] = {
        "model": model.config.model_dump(mode="json"),
        "codes": "its own samples" if codes_folder is None else str(codes_folder),
        "images": sum(len(labels) for _, labels in batches),
        "experts": expert_loads(model, batches),
    }
    if isinstance(model.memory, ValueBank):
        report["layers"] = gather_gates(model, batches)
        report["gradients"] = gradient_norms(model, *batches[0])
        plots.plot_gates(report["layers"], out)
    elif not report["experts"]:
        raise ValueError(
            f"memory of kind {model.config.memory.kind}, feed-forward of kind "
            f"{model.config.ffn.kind}: expected a value bank or experts"
        )
    write_json(out / "inspection.json", report)
    return report


def read_codes(
    pipeline: Pipeline, folder: Path | None, num: int, batch_size: int, seed: int
) -> Batches:
    """Batches of codes and labels on the pipeline's device, spread over the folder's images."""
    if folder is None:
        classes = [i % len(pipeline.class_names) for i in range(num)]
        settings = pipeline.settings()
        drawn = pipeline.sample_codes(classes, settings, seed=seed, batch_size=batch_size)
        codes, labels = drawn.clone(), torch.tensor(classes)  # a clone can have gradients again
    else:
        packed = PackedCodes(folder / "val" if (folder / "val").is_dir() else folder)
        packed.require_tokenizer(pipeline.tokenizer.fingerprint)
        picked = torch.linspace(0, len(packed) - 1, min(num, len(packed))).long().numpy()
        codes, labels = packed.get(picked, 0 * picked)
    codes, labels = codes.to(pipeline.device), labels.to(pipeline.device)
    return list(zip(codes.split(batch_size), labels.split(batch_size), strict=True))


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


@torch.no_grad()
def expert_loads(model: Transformer, batches: Batches) -> dict[int, list[float]]:
    """Each expert's share of the choices, of every layer with experts."""
    experts = {i: ffn for i, ffn in enumerate(model.feedforwards(), 1) if isinstance(ffn, MoE)}
    loads: dict[int, list[Any]] = {i: [] for i in experts}
    for ffn in experts.values():
        ffn.training = True  # it keeps its load
    for codes, labels in batches if experts else ():
        model(codes, labels)
        for i, ffn in experts.items():
            loads[i].append(ffn.load)
    for ffn in experts.values():
        ffn.training, ffn.auxiliary = False, None
    return {i: torch.stack(found).mean(0).tolist() for i, found in loads.items()}


class EmptyRows(nn.Module):
    """A memory whose rows are all zero: gates still apply to the layers' own values."""

    def __init__(self, memory: Any) -> None:
        super().__init__()
        self.memory = memory

    def rows(self, labels: Tensor | None, codes: Tensor | None) -> Tensor | None:
        rows = self.memory.rows(labels, codes)
        return None if rows is None else torch.zeros_like(rows)


def without_bank(model: Transformer) -> Transformer:
    """The same model with every slot at zero. It shares all weights; `model` does not change."""
    bare = copy.copy(model)
    bare._modules = dict(model._modules)  # else the new memory below would become `model`'s, too
    bare.memory = EmptyRows(model.memory)
    return bare


def gradient_norms(model: Transformer, codes: Tensor, labels: Tensor) -> dict[str, Any]:
    """Norms of the cross-entropy's gradient with respect to the bank, by the layer it comes from.

    Each layer gets rows of its own (equal in value), so their gradient is that layer's part alone:
    what a local table there would get. A shared bank gets the sum over layers. That sum's norm
    over the sum of norms, `alignment`, is 1 where all layers pull the same way.
    """
    leaves: list[Tensor] = []

    def replace(mixer: nn.Module, args: tuple[Tensor, Tensor, Any]) -> tuple:
        leaves.append(args[2].detach().requires_grad_())
        return args[0], args[1], leaves[-1]

    mixers, weight = mixers_by_layer(model), model.memory.bank.weight
    handles = [mixer.register_forward_pre_hook(replace) for mixer in mixers.values()]
    try:
        with torch.enable_grad():
            loss = F.cross_entropy(model(codes, labels).flatten(0, 1), codes.flatten())
            gradients = torch.autograd.grad(loss, leaves)
    finally:
        for handle in handles:
            handle.remove()
    total = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    norms: dict[int, float] = {}
    for layer, gradient in zip(mixers, gradients, strict=True):
        by_slot = gradient[:, 1:].transpose(2, 3).flatten(2)  # in the order of the bank's columns
        part = torch.zeros_like(total)
        part.index_add_(0, codes[:, :-1].flatten(), by_slot.flatten(0, 1).to(part.dtype))
        norms[layer + 1] = part.norm().item()
        total += part
    bank = total.norm().item()
    return {"bank": bank, "by_layer": norms, "alignment": bank / max(sum(norms.values()), 1e-30)}
