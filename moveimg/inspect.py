"""Reports on a trained model: its gates, its bank's gradients and rows, and its experts.

Reports and plots count layers from 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moveimg import plots
from moveimg.data import PackedCodes, evenly_spaced
from moveimg.files import write_json
from moveimg.images import save_png
from moveimg.model import MoE, Transformer, ValueBank
from moveimg.model.analysis import (
    Batches,
    compute_bank_maps,
    compute_gate_stats,
    compute_gradient_sources,
)
from moveimg.pipeline import Pipeline


def inspect_model(
    pipeline: Pipeline,
    out: Path,
    codes_folder: Path | None = None,
    num: int = 256,
    batch_size: int = 32,
    seed: int = 0,
    row: int | None = None,
) -> dict[str, Any]:
    """Write out/inspection.json and gates.png; return the report.

    The model reads `num` images of packed codes (or of val/ in their folder), or else of its own
    samples. Gradients are those of the first batch. `row` adds a report on the rows of one code.

    Raises ValueError for a model with neither memory nor experts, codes of another tokenizer, or a
    code that does not occur.
    """
    model = pipeline.generator
    batches = load_batches(pipeline, codes_folder, num, batch_size, seed)
    report: dict[str, Any] = {
        "model": model.config.model_dump(mode="json"),
        "codes": "its own samples" if codes_folder is None else str(codes_folder),
        "images": sum(len(labels) for _, labels in batches),
        "experts": expert_loads(model, batches),
    }
    if isinstance(model.memory, ValueBank):
        report["layers"] = compute_gate_stats(model, batches)
        if isinstance(model.memory.bank, nn.Embedding):  # a quantized bank has no gradient
            report["gradients"] = compute_gradient_sources(model, *batches[0])
        plots.plot_gates(report["layers"], out)
        if row is not None:
            report["row"] = describe_row(pipeline, row, batches, out)
    elif not report["experts"]:
        raise ValueError(
            f"memory of kind {model.config.memory.kind}, feed-forward of kind "
            f"{model.config.ffn.kind}: expected a value bank or experts"
        )
    write_json(out / "inspection.json", report)
    return report


def load_batches(
    pipeline: Pipeline, folder: Path | None, num: int, batch_size: int, seed: int
) -> Batches:
    """Batches (codes, labels): evenly spaced packed codes, or samples of the model."""
    if folder is None:
        classes = [i % len(pipeline.class_names) for i in range(num)]
        settings = pipeline.settings()
        drawn = pipeline.sample_codes(classes, settings, seed=seed, batch_size=batch_size)
        codes, labels = drawn.clone(), torch.tensor(classes)  # a clone can have gradients again
    else:
        packed = PackedCodes(folder / "val" if (folder / "val").is_dir() else folder)
        packed.require_tokenizer(pipeline.tokenizer.fingerprint)
        picked = np.array(evenly_spaced(len(packed), num))
        codes, labels = packed.get(picked, 0 * picked)
    codes, labels = codes.to(pipeline.device), labels.to(pipeline.device)
    return list(zip(codes.split(batch_size), labels.split(batch_size), strict=True))


@torch.no_grad()
def describe_row(
    pipeline: Pipeline, code: int, batches: Batches, out: Path, top: int = 8
) -> dict[str, Any]:
    """Statistics of one code's rows at the positions where this code is the input.

    Writes out/row-CODE.png, an image decoded from this code at every position.

    row            the bank's row of the code; `shared_with`: the other codes of that row
    gates          mean gate of g_0 (1 where there is none) and of the slots, by layer
    kl             mean KL(p with rows || p without rows) of the next code, in nats
    raised         codes whose mean probability the rows raise most, with the differences
    lowered        codes whose mean probability the rows lower most, with the differences

    Raises ValueError for a code outside the codebook, or not in the batches.
    """
    model, memory = pipeline.generator, pipeline.generator.memory
    size = model.config.codebook_size
    if not 0 <= code < size:
        raise ValueError(f"row {code}: expected a code in 0..{size - 1}")
    assert isinstance(memory, ValueBank)
    bare = pipeline.without_rows([code]).generator
    gates: dict[int, list[Any]] = {}
    divergence, changes, count = 0.0, torch.zeros(size, device=pipeline.device), 0
    for codes, labels in batches:
        at = codes[:, :-1] == code
        if not (occurrences := int(at.sum())):
            continue
        count += occurrences
        with_rows, without = (m(codes, labels)[:, 1:][at].log_softmax(-1) for m in (model, bare))
        divergence += (with_rows.exp() * (with_rows - without)).sum().item()
        changes += (with_rows.exp() - without.exp()).sum(0)
        for layer, bank_map in compute_bank_maps(model, codes, labels).items():
            means = torch.stack([bank_map.g_0[at.cpu()], bank_map.slots[at.cpu()]])
            gates.setdefault(layer + 1, []).append(means.sum(1))
    if not count:
        raise ValueError(f"row {code}: expected a code in the images read; try a larger --num")
    order = (changes / count).sort(descending=True)
    ranked = list(zip(order.indices.tolist(), order.values.tolist(), strict=True))
    row = memory.row_indices(torch.tensor(code, device=pipeline.device))
    everyone = memory.row_indices(torch.arange(size, device=pipeline.device))
    painted = torch.full((1, model.config.seq_len), code, device=pipeline.device)
    save_png(pipeline.decode(painted)[0], out / f"row-{code}.png", {"code": code})
    return {
        "code": code,
        "row": int(row),
        "shared_with": [c for c in (everyone == row).nonzero()[:, 0].tolist() if c != code],
        "positions": count,
        "gates": {layer: (sum(sums) / count).tolist() for layer, sums in gates.items()},
        "kl": divergence / count,
        "raised": ranked[:top],
        "lowered": ranked[: -top - 1 : -1],
    }


@torch.no_grad()
def expert_loads(model: Transformer, batches: Batches) -> dict[int, list[float]]:
    """Each expert's share of the routed tokens, by MoE layer."""
    experts = {i: ffn for i, ffn in enumerate(model.feedforwards(), 1) if isinstance(ffn, MoE)}
    loads: dict[int, list[Any]] = {i: [] for i in experts}
    for ffn in experts.values():
        ffn.training = True  # MoE sets `load` in train mode only
    for codes, labels in batches if experts else ():
        model(codes, labels)
        for i, ffn in experts.items():
            loads[i].append(ffn.load)
    for ffn in experts.values():
        ffn.training, ffn.auxiliary = False, None
    return {i: torch.stack(of_layer).mean(0).tolist() for i, of_layer in loads.items()}
