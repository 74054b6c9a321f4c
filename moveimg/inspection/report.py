"""Everything about a model's inside as plain data, with warnings in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moveimg.data import PackedCodes
from moveimg.files import write_json
from moveimg.inspection import plots
from moveimg.inspection.bank import gradient_norms, row_statistics
from moveimg.inspection.gates import LayerGates, expert_loads, gather_gates
from moveimg.model import ValueBank
from moveimg.pipeline import Pipeline

# Failure signs: mean gates beyond these in more than half of the heads; more than half of the
# slots' gates near 2; slots that point the same way; unread codes or faded rows.
CLOSED, OPEN, MANY, SAME, UNREAD = 0.2, 1.8, 0.5, 0.9, 0.05
GRADIENT_BATCHES = 4
READS_A_CODE = 20  # with fewer reads a code on average, an unread code says little


def inspect_model(
    pipeline: Pipeline,
    out: Path,
    codes_folder: Path | None = None,
    num: int = 256,
    batch_size: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """Write out/inspection.json and PNGs; return what stands in the JSON.

    Args:
        pipeline: the model.
        out: the folder.
        codes_folder: packed codes to read (or a folder with val/ in it); left out, the model
            reads codes that it draws itself.
        num: images to read; fewer where there are fewer.
        batch_size: images at a time; the gradients are those of the first four batches.
        seed: of the draws.

    Raises ValueError for a model with neither memory nor experts, or codes that are not its own.
    """
    model, memory = pipeline.generator, pipeline.generator.memory
    batches = read_codes(pipeline, codes_folder, num, batch_size, seed)
    loads = expert_loads(model, batches)
    if not isinstance(memory, ValueBank) and not loads:
        raise ValueError(
            f"memory of kind {model.config.memory.kind}, feed-forward of kind "
            f"{model.config.ffn.kind}: neither a value bank nor experts to look into"
        )
    source = "its own samples" if codes_folder is None else str(codes_folder)
    report: dict[str, Any] = {
        "model": model.config.model_dump(mode="json"), "codes": source,
        "images": sum(len(labels) for _, labels in batches),
        "class_names": pipeline.class_names, "experts": loads, "warnings": [],
    }  # fmt: skip
    if loads:
        plots.save(plots.expert_shares(loads), out / "experts.png")
    if isinstance(memory, ValueBank):
        gates = gather_gates(model, batches)
        report["layers"] = {layer: found.as_dict() for layer, found in gates.items()}
        report["map"] = {
            layer: grid_map(found, model.config.grid) for layer, found in gates.items()
        }
        # The first batch's first image: the first of the folder, or of the draws.
        codes, labels = batches[0]
        report["map_index"], report["map_label"] = 0, labels[0].item()
        report["bank"] = row_statistics(memory, batches)
        full = [
            batch for batch in batches if len(batch[1]) == len(labels)
        ]  # norms shrink with size
        report["gradients"] = gradient_norms(model, full[:GRADIENT_BATCHES])
        report["warnings"] = warnings(report)
        plots.plot_memory(report, pipeline.decode(codes[:1])[0], out)
    write_json(out / "inspection.json", report)
    return report


def read_codes(
    pipeline: Pipeline, folder: Path | None, num: int, batch_size: int, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Batches of codes [B, T] and labels [B] on the pipeline's device."""
    if folder is None:
        classes = [i % len(pipeline.class_names) for i in range(num)]
        settings = pipeline.settings()
        drawn = pipeline.sample_codes(classes, settings, seed=seed, batch_size=batch_size)
        codes, labels = drawn.clone(), torch.tensor(classes)  # a clone may have gradients again
    else:
        inside = folder / "val"
        packed = PackedCodes(inside if inside.is_dir() else folder)
        packed.require_tokenizer(pipeline.tokenizer.fingerprint)
        picked = torch.linspace(0, len(packed) - 1, min(num, len(packed))).long().numpy()
        codes, labels = packed.get(picked, 0 * picked)
    where = pipeline.device
    pairs = zip(codes.split(batch_size), labels.split(batch_size), strict=True)
    return [(c.to(where), label.to(where)) for c, label in pairs]


def grid_map(found: LayerGates, grid: tuple[int, int]) -> list:
    """Gates of the first image where its codes stand, [G, h, w]; None at the last, never read."""
    gates = found.maps[0]  # [S, G]
    padded = torch.cat([gates, gates.new_full((1, gates.shape[1]), torch.nan)])
    rows = padded.T.unflatten(-1, grid).tolist()
    return [[[None if v != v else v for v in row] for row in plane] for plane in rows]


def warnings(report: dict[str, Any]) -> list[str]:
    """The failure signs that show, a line each."""
    found = []
    largest: dict[str, float] = {}  # mean gate of each slot, over layers and heads
    for layer, gates in report["layers"].items():
        found += [f"layer {layer}: {sign}" for sign in layer_signs(gates)]
        for name, values in zip(gates["gates"], zip(*gates["mean"], strict=True), strict=True):
            if name != "g_0":
                largest[name] = max(largest.get(name, 0.0), *values)
    found += [
        f"{name}: idle (largest mean gate of all layers and heads {gate:.2f})"
        for name, gate in largest.items()
        if gate < CLOSED
    ]
    return found + bank_signs(report["bank"])


def layer_signs(gates: dict[str, Any]) -> list[str]:
    """Failure signs in the gates of one layer, as of LayerGates.as_dict."""
    gated = gates["gates"][0] == "g_0"
    means = torch.tensor(gates["mean"])  # [H, G]
    slots = means[:, 1:] if gated else means
    closed = slots.amax(1) < CLOSED  # [H]
    heads, found = len(means), []
    ignored = closed & (means[:, 0] > OPEN) if gated else torch.zeros_like(closed)
    if ignored.sum() > MANY * heads:
        found.append(f"memory ignored by {ignored.sum()} of {heads} heads (g_0 open, slots closed)")
    elif closed.sum() > MANY * heads:
        found.append(f"all slots closed in {closed.sum()} of {heads} heads")
    if gated and (low := (means[:, 0] < CLOSED).sum()) > MANY * heads:
        found.append(f"context suppressed in {low} of {heads} heads (g_0 below {CLOSED})")
    near_two = torch.tensor(gates["near_two"])[:, int(gated) :].mean()
    if near_two > MANY:
        found.append(f"slot gates saturated ({near_two:.0%} are near 2)")
    return found


def bank_signs(bank: dict[str, Any]) -> list[str]:
    """Failure signs in the bank's rows, as of row_statistics."""
    found = []
    enough = bank["codes_read"] >= READS_A_CODE * bank["rows"]
    if enough and bank["unread"] > UNREAD * bank["rows"]:
        found.append(f"{bank['unread']} of {bank['rows']} codes not read in these images")
    if max(bank["faded"]) > UNREAD:
        share = max(bank["faded"])
        found.append(f"{share:.0%} of a slot's rows have faded to a tenth of its median norm")
    for i, row in enumerate(bank["similarity"]):
        for j in range(i):
            if row[j] > SAME:
                found.append(f"slots {j} and {i} hold the same (cosine {row[j]:.2f}): one is idle")
    return found
