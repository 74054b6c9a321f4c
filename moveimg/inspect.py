"""The inside of a trained model: its gates, its value bank, its gradients and its experts.

B batch   S positions (without the class token's)   H heads   M slots   G gates: g_0, then slots
K width of a head   V codebook size

Functions count layers from 0, as the model does; the report, its plots and its warnings from 1.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moveimg import plots
from moveimg.data import PackedCodes
from moveimg.files import write_json
from moveimg.inspect_bank import gradient_norms, row_statistics
from moveimg.model import (
    NEAR_TWO,
    NEAR_ZERO,
    Mixing,
    MoE,
    Transformer,
    ValueBank,
    mixers_by_layer,
    record_mixing,
)
from moveimg.pipeline import Pipeline

Batches = list[tuple[Tensor, Tensor]]  # codes [B, T] and labels [B]
# Failure signs: mean gates beyond CLOSED and OPEN in more than a share MANY of the heads, more than
# MANY of the slots' gates near 2, slots with a cosine above SAME, unread codes or faded rows.
CLOSED, OPEN, MANY, SAME, UNREAD = 0.2, 1.8, 0.5, 0.9, 0.05
READS_PER_CODE = 20  # with fewer reads per code on average, an unread code says little
GRADIENT_BATCHES = 4


def inspect_model(
    pipeline: Pipeline,
    out: Path,
    codes_folder: Path | None = None,
    num: int = 256,
    batch_size: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """Write out/inspection.json and its plots; return the report.

    Args:
        pipeline: the model.
        out: the folder.
        codes_folder: packed codes to read (or a folder with val/ in it); left out, the model
            reads its own samples.
        num: images to read; fewer where there are fewer.
        batch_size: images in one batch; the gradients are those of the first four full batches.
        seed: of the samples.

    Raises ValueError for a model with neither memory nor experts, or codes of another tokenizer.
    """
    model, memory = pipeline.generator, pipeline.generator.memory
    batches = read_codes(pipeline, codes_folder, num, batch_size, seed)
    loads = _from_one(expert_loads(model, batches))
    if not isinstance(memory, ValueBank) and not loads:
        raise ValueError(
            f"memory of kind {model.config.memory.kind}, feed-forward of kind "
            f"{model.config.ffn.kind}: expected a value bank or experts"
        )
    report: dict[str, Any] = {
        "model": model.config.model_dump(mode="json"),
        "codes": "its own samples" if codes_folder is None else str(codes_folder),
        "images": sum(len(labels) for _, labels in batches),
        "class_names": pipeline.class_names,
        "experts": loads,
        "warnings": [],
    }
    if isinstance(memory, ValueBank):
        codes, labels = batches[0]
        report["layers"] = _from_one(gather_gates(model, batches))
        report["map"] = {
            layer: grid_map(gates.pop("first_image"), model.config.grid)
            for layer, gates in report["layers"].items()
        }
        report["map_index"], report["map_label"] = 0, labels[0].item()
        report["bank"] = row_statistics(memory, batches)
        # full batches only: a mean gradient's norm shrinks with the batch size
        full = [batch for batch in batches if len(batch[1]) == len(labels)]
        report["gradients"] = gradient_norms(model, full[:GRADIENT_BATCHES])
        for key in ("by_layer", "by_layer_spread"):
            report["gradients"][key] = _from_one(report["gradients"][key])
        report["warnings"] = list_warnings(report)
        plots.plot_memory(report, pipeline.decode(codes[:1])[0], out)
    write_json(out / "inspection.json", report)
    return report


def _from_one(by_layer: dict[int, Any]) -> dict[int, Any]:
    return {layer + 1: value for layer, value in by_layer.items()}


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
    pairs = zip(codes.split(batch_size), labels.split(batch_size), strict=True)
    return [(c.to(pipeline.device), label.to(pipeline.device)) for c, label in pairs]


# --- gates and experts -----------------------------------------------------------------------


@torch.no_grad()
def gather_gates(model: Transformer, batches: Batches) -> dict[int, dict[str, Any]]:
    """Gate statistics of every layer with memory, as plain data.

    mean, spread, near_zero, near_two       per head and gate, [H, G]; shares below 0.1, above 1.9
    by_class, by_position                   mean gates, heads averaged, [C + 1, G] and [S, G];
                                            None for a class that no image has
    norm_of_gated_values, norm_of_memory    mean norms of g_0 V and of sum_i g_i M_i
    norm_of_each_slot                       mean norms of g_i M_i, [M]
    memory_share                            memory's norm over the sum of the two
    first_image                             gates of the first image, heads averaged, tensor [S, G]
    """
    sums: dict[int, dict[str, Any]] = {}
    names: dict[int, list[str]] = {}
    labels = torch.empty(0)

    def record(layer: int, mixing: Mixing) -> None:
        slots = mixers_by_layer(model)[layer].slots
        names[layer] = [] if mixing.g_0 is None else ["g_0"]
        names[layer] += [f"slot {slot}" for slot in slots]
        parts = [mixing.g_i] if mixing.g_0 is None else [mixing.g_0, mixing.g_i]
        gates = torch.cat(parts, dim=-1).double()  # [B, S, H, G]
        averaged = gates.mean(2)
        of_class = F.one_hot(labels, model.config.n_classes + 1).double()  # [B, C + 1]
        kept, memory = _mixed_norms(mixing)
        each = mixing.rows.double().norm(dim=-1) * mixing.g_i.double()  # [B, S, H, M]
        new = {
            "images": len(gates),
            "mean": gates.sum((0, 1)),
            "squares": gates.square().sum((0, 1)),
            "near_zero": (gates < NEAR_ZERO).double().sum((0, 1)),
            "near_two": (gates > NEAR_TWO).double().sum((0, 1)),
            "by_class": of_class.T @ averaged.sum(1),
            "class_count": of_class.sum(0),
            "by_position": averaged.sum(0),
            "norm_of_gated_values": kept.sum(),
            "norm_of_memory": memory.sum(),
            "norm_of_each_slot": each.norm(dim=2).sum((0, 1)),
        }
        if layer in sums:
            before = sums[layer]
            sums[layer] = before | {key: before[key] + value for key, value in new.items()}
        else:
            sums[layer] = new | {"first_image": averaged[0]}

    with record_mixing(model, record):
        for codes, labels in batches:
            model(codes, labels)
    return {layer: {"gates": names[layer]} | _means(total) for layer, total in sums.items()}


def _mixed_norms(mixing: Mixing) -> tuple[Tensor, Tensor]:
    """Norms over all heads of g_0 V and of sum_i g_i M_i, float64 [B, S] each."""
    kept = mixing.values if mixing.g_0 is None else mixing.g_0 * mixing.values
    memory = torch.einsum("bshm,bshmk->bshk", mixing.g_i.double(), mixing.rows.double())
    return kept.double().flatten(2).norm(dim=-1), memory.flatten(2).norm(dim=-1)


def _means(total: dict[str, Any]) -> dict[str, Any]:
    """The sums of one layer as means, nested lists."""
    length, images = len(total["by_position"]), total["images"]
    seen = total["class_count"][:, None]
    per_class = (total["by_class"] / (seen * length).clamp(min=1)).tolist()
    of_all = ("mean", "squares", "near_zero", "near_two", "norm_of_gated_values",
              "norm_of_memory", "norm_of_each_slot")  # fmt: skip
    means = {key: total[key] / (images * length) for key in of_all}
    variance = means.pop("squares") - means["mean"].square()
    kept, memory = means["norm_of_gated_values"], means["norm_of_memory"]
    means |= {
        "spread": variance.clamp(min=0).sqrt(),
        "by_position": total["by_position"] / images,
        "memory_share": memory / (memory + kept).clamp(min=1e-12),
    }
    return {key: value.tolist() for key, value in means.items()} | {
        "by_class": [
            row if n else [None] * len(row) for row, n in zip(per_class, seen, strict=True)
        ],
        "first_image": total["first_image"],
    }


def grid_map(gates: Tensor, grid: tuple[int, int]) -> list:
    """Gates [S, G] of an image on its grid of codes, [G, h, w]; None at the last, never read."""
    flat = [[*gate, None] for gate in gates.T.tolist()]
    return [[row[i : i + grid[1]] for i in range(0, len(row), grid[1])] for row in flat]


@torch.no_grad()
def expert_loads(model: Transformer, batches: Batches) -> dict[int, list[float]]:
    """Each expert's share of the choices, of every layer with experts."""
    sums: dict[int, Tensor] = {}

    def hook(layer: int, ffn: MoE) -> Any:
        def gather(router: nn.Module, args: Any, logits: Tensor) -> None:
            chosen = logits.topk(ffn.spec.top_k, dim=-1).indices.flatten()
            load = chosen.bincount(minlength=ffn.spec.n_experts) / chosen.numel()
            sums[layer] = sums.get(layer, torch.zeros_like(load)) + load / len(batches)

        return gather

    handles = [
        ffn.expert_router.register_forward_hook(hook(layer, ffn))
        for layer, ffn in enumerate(model.feedforwards())
        if isinstance(ffn, MoE)
    ]
    try:
        for codes, labels in batches if handles else ():
            model(codes, labels)
    finally:
        for handle in handles:
            handle.remove()
    return {layer: load.tolist() for layer, load in sums.items()}


# --- maps of one image, for the demo ---------------------------------------------------------


@dataclass(frozen=True)
class BankMap:
    """What one layer mixes into its values at each position, heads averaged.

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
    """The map of every layer with memory, of codes int64 [B, T] with labels [B].

    Position s belongs to code s; the last code is never read, so S = T - 1.
    Raises ValueError for a model without value memory.
    """
    maps: dict[int, BankMap] = {}

    def record(layer: int, mixing: Mixing) -> None:
        kept, memory = _mixed_norms(mixing)
        share = (memory / (kept + memory).clamp(min=1e-12)).float()
        g_0 = torch.ones_like(share) if mixing.g_0 is None else mixing.g_0.float().mean((2, 3))
        maps[layer] = BankMap(share.cpu(), g_0.cpu(), mixing.g_i.float().mean((2, 3)).cpu())

    with record_mixing(model, record):
        model(codes, labels)
    if not maps:
        raise ValueError("this model has no value memory to map")
    return maps


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


# --- warnings --------------------------------------------------------------------------------


def list_warnings(report: dict[str, Any]) -> list[str]:
    """The failure signs in a report, a line each."""
    lines = []
    largest: dict[str, float] = {}  # mean gate of each slot, over layers and heads
    for layer, gates in report["layers"].items():
        lines += [f"layer {layer}: {sign}" for sign in _layer_signs(gates)]
        for name, values in zip(gates["gates"], zip(*gates["mean"], strict=True), strict=True):
            if name != "g_0":
                largest[name] = max(largest.get(name, 0.0), *values)
    lines += [
        f"{name}: idle (largest mean gate of all layers and heads {gate:.2f})"
        for name, gate in largest.items()
        if gate < CLOSED
    ]
    return lines + _bank_signs(report["bank"])


def _layer_signs(gates: dict[str, Any]) -> list[str]:
    gated = gates["gates"][0] == "g_0"
    means = torch.tensor(gates["mean"])  # [H, G]
    closed = means[:, int(gated) :].amax(1) < CLOSED  # [H]
    heads, signs = len(means), []
    ignored = closed & (means[:, 0] > OPEN) if gated else torch.zeros_like(closed)
    if ignored.sum() > MANY * heads:
        signs.append(f"memory ignored by {ignored.sum()} of {heads} heads (g_0 open, slots closed)")
    elif closed.sum() > MANY * heads:
        signs.append(f"all slots closed in {closed.sum()} of {heads} heads")
    if gated and (low := (means[:, 0] < CLOSED).sum()) > MANY * heads:
        signs.append(f"context suppressed in {low} of {heads} heads (g_0 below {CLOSED})")
    near_two = torch.tensor(gates["near_two"])[:, int(gated) :].mean()
    if near_two > MANY:
        signs.append(f"slot gates saturated ({near_two:.0%} are near 2)")
    return signs


def _bank_signs(bank: dict[str, Any]) -> list[str]:
    signs = []
    enough = bank["codes_read"] >= READS_PER_CODE * bank["rows"]
    if enough and bank["unread"] > UNREAD * bank["rows"]:
        signs.append(f"{bank['unread']} of {bank['rows']} codes not read in these images")
    if (share := max(bank["faded"])) > UNREAD:
        signs.append(f"{share:.0%} of a slot's rows have faded to a tenth of its median norm")
    for i, row in enumerate(bank["similarity"]):
        for j in range(i):
            if row[j] > SAME:
                signs.append(f"slots {j} and {i} hold the same (cosine {row[j]:.2f}): one is idle")
    return signs
