"""Inspection: the statistics against plain sums, and models built to show known signs."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from moveimg import plots
from moveimg.checkpoint import ModelParts
from moveimg.config import SamplingSettings
from moveimg.inspect import (
    bank_maps,
    count_reads,
    gather_gates,
    gradient_norms,
    inspect_model,
    list_warnings,
    without_bank,
)
from moveimg.model import mixers_by_layer
from moveimg.pipeline import Pipeline
from tests.conftest import VARIANTS, lively, random_inputs, tiny_config
from tests.test_pipeline import NAMES, tiny_tokenizer

MOVE, MLA_MOVE = "mha-move-3-class-rows-swiglu", "mla-move-3-class-rows-moe"
WITH_MEMORY = [MOVE, MLA_MOVE, "mla-lave-x1-swiglu"]


def built(name, dtype=torch.float64):
    return lively(tiny_config(**VARIANTS[name]), dtype=dtype)


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_gate_statistics_equal_plain_sums(name):
    model = built(name)
    codes, labels = random_inputs(model.config, batch=5)
    mixers, seen = mixers_by_layer(model), {}
    handles = [
        m.register_forward_hook(lambda m, a, out, layer=layer: seen.update({layer: (a, out)}))
        for layer, m in mixers.items()
    ]
    with torch.no_grad():
        model(codes, labels)
    for handle in handles:
        handle.remove()
    found = gather_gates(model, [(codes[:2], labels[:2]), (codes[2:], labels[2:])])
    maps = bank_maps(model, codes, labels)
    assert found.keys() == {layer + 1 for layer in seen}
    for layer, ((x, v, _), mixed) in seen.items():
        mixer, stats = mixers[layer], found[layer + 1]
        gates = 2 * torch.sigmoid(mixer.router(x))[:, 1:].unflatten(-1, (2, -1))  # [B, S, H, G]
        gates, v, mixed = gates.detach(), v[:, 1:], mixed[:, 1:]
        flat = gates.flatten(0, 1).numpy()
        np.testing.assert_allclose(stats["mean"], flat.mean(0))
        np.testing.assert_allclose(stats["spread"], flat.std(0), rtol=1e-6)
        np.testing.assert_allclose(stats["near_zero"], (flat < 0.1).mean(0))
        np.testing.assert_allclose(stats["near_two"], (flat > 1.9).mean(0))
        torch.testing.assert_close(maps[layer].gates, gates)
        assert len(stats["gates"]) == flat.shape[-1]
        kept = gates[..., :1] * v if mixer.gate_standard else v
        kept, memory = (part.flatten(2).norm(dim=-1) for part in (kept, mixed - kept))  # [B, S]
        share = memory.mean() / (memory.mean() + kept.mean())
        assert stats["memory_share"] == pytest.approx(share.item())
        torch.testing.assert_close(maps[layer].share, memory / (memory + kept))
        torch.testing.assert_close(maps[layer].slots, gates[..., -len(mixer.slots) :].mean((2, 3)))


def test_model_without_its_bank_mixes_nothing_in():
    model = built(MOVE)
    codes, labels = random_inputs(model.config)
    before = model(codes, labels)
    assert all(not m.share.any() for m in bank_maps(without_bank(model), codes, labels).values())
    assert torch.equal(model(codes, labels), before)
    with pytest.raises(ValueError, match="no value memory"):
        bank_maps(built("mha-none-swiglu"), codes, labels)


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_gradients_by_layer_add_up_to_the_banks_own(name):
    model = built(name)
    codes, labels = random_inputs(model.config, batch=4)
    found = gradient_norms(model, [(codes, labels)])
    loss = F.cross_entropy(model(codes, labels).flatten(0, 1), codes.flatten())
    (whole,) = torch.autograd.grad(loss, [model.memory.bank.weight])
    assert found["bank"] == pytest.approx(whole.norm().item())
    if "lave" in name:  # a table for the last layer alone
        assert found["by_layer"] == {2: pytest.approx(found["bank"])}
        assert found["alignment"] == pytest.approx(1)
    else:
        assert found["bank"] <= sum(found["by_layer"].values())
        assert len(found["by_layer"]) == 2 and 0 < found["alignment"] < 1


def test_gradient_norms_are_means_over_batches():
    model = built(MOVE)
    batches = [random_inputs(model.config, seed=seed) for seed in range(3)]
    found = gradient_norms(model, batches)
    alone = [gradient_norms(model, [batch]) for batch in batches]
    assert found["batches"] == 3
    for key in ("bank", "alignment"):
        values = [one[key] for one in alone]
        assert found[key] == pytest.approx(np.mean(values))
        assert found[f"{key}_spread"] == pytest.approx(np.std(values, ddof=1)) != 0
        assert alone[0][f"{key}_spread"] == 0
    layer = [one["by_layer"][1] for one in alone]
    assert found["by_layer"][1] == pytest.approx(np.mean(layer))
    assert found["by_layer_spread"][1] == pytest.approx(np.std(layer, ddof=1))


def test_reads_are_counted():
    model = built(MOVE)
    codes = torch.arange(12).view(1, 12) % 5  # codes 5.. are never read
    found = count_reads(model.memory, [(codes, torch.tensor([0]))])
    assert found == {"reads": [3, 2, 2, 2, 2, *[0] * 6], "unread": 6}  # the last is not looked up


def pipeline(model):
    parts = ModelParts(model, tiny_tokenizer(), NAMES, SamplingSettings())
    return Pipeline(parts, torch.device("cpu"))


@pytest.mark.parametrize("name", [MLA_MOVE, "mha-lave-x1-swiglu"])
def test_report_has_numbers_and_plots(name, tmp_path):
    inspect_model(pipeline(built(name, torch.float32)), tmp_path, num=6, batch_size=4)
    report = json.loads((tmp_path / "inspection.json").read_text())
    assert report["images"] == 6
    assert report["gradients"]["batches"] == 1  # the second one is smaller
    layers = ["1", "2"] if "move" in name else ["2"]  # counted from one
    for by_layer in (report["layers"], report["gradients"]["by_layer"]):
        assert list(by_layer) == layers
    plotted = {path.name for path in tmp_path.glob("*.png")}
    assert plotted == {"gates.png", "gradients.png"}
    if "moe" in name:
        assert sum(report["experts"]["1"]) == pytest.approx(1)


def test_models_without_memory_or_experts_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none.*swiglu"):
        inspect_model(pipeline(built("mha-none-swiglu", torch.float32)), tmp_path, num=2)
    assert not list(tmp_path.iterdir())


def test_gates_made_constant_show_their_sign(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "plot_memory", lambda *_: None)
    model = built(MOVE, torch.float32)
    assert not inspect_model(pipeline(model), tmp_path, num=5)["warnings"]
    with torch.no_grad():
        for mixer in mixers_by_layer(model).values():
            weight = mixer.router.weight.zero_().unflatten(0, (2, 4))
            weight[:, 0, 0], weight[:, 1:, 0] = 0, -9
        for block in model.layers:
            block.attention_norm.register_forward_hook(lambda m, a, out: torch.ones_like(out))
    lines = inspect_model(pipeline(model), tmp_path, num=5)["warnings"]
    assert [line[:8] for line in lines if "all slots closed" in line] == ["layer 1:", "layer 2:"]


def layer(heads, near_two=0.0, gates=("g_0", "slot 0", "slot 1")):
    """A layer's part of a report, of mean gates [H][G]."""
    return {"gates": list(gates), "mean": heads, "near_two": [[near_two] * len(gates)] * len(heads)}


GOOD, IGNORED, SHUT = [1.0, 0.9, 0.8], [1.9, 0.1, 0.0], [1.0, 0.1, 0.1]
BANK = {"reads": [100] * 10, "unread": 0}


@pytest.mark.parametrize(
    ("layers", "bank", "expected"),
    [
        ([layer([GOOD, GOOD])], {}, []),
        # two heads of three, whatever the third does to the average
        ([layer([IGNORED, SHUT, [0.0, 2.0, 2.0]])], {}, ["layer 1: 67% .* all slots closed"]),
        ([layer([IGNORED, GOOD])], {}, []),  # half is not most
        ([layer([[0.1, 1, 1], [0.1, 1, 1], [2, 1, 1]])], {}, ["layer 1: 67% .* closed g_0"]),
        # idle in all layers and heads, or not
        ([layer([[1, 1, 0.1]] * 2), layer([[1, 1, 0.19]] * 2)], {}, ["slot 1: idle .*0.19"]),
        ([layer([[1, 1, 0.1]] * 2), layer([[1, 1, 0.1], [1, 1, 0.3]])], {}, []),
        ([layer([[1.0]], gates=["slot 0"]), layer([[0.1]], gates=["slot 1"])], {},
         ["layer 2: 100% .* all slots closed", "slot 1: idle"]),
        ([layer([GOOD, GOOD], near_two=0.6)], {}, ["layer 1: 60% .* near 2"]),
        ([layer([GOOD, GOOD], near_two=0.4)], {}, []),
        ([layer([GOOD])], {"unread": 2}, ["2 of 10 codes not read"]),
        ([layer([GOOD])], {"unread": 2, "reads": [10] * 10}, []),  # too few reads to tell
    ],
)  # fmt: skip
def test_each_sign_has_its_line(layers, bank, expected):
    lines = list_warnings({"layers": dict(enumerate(layers, 1)), "bank": BANK | bank})
    assert len(lines) == len(expected), lines
    for line, part in zip(lines, expected, strict=True):
        assert re.search(part, line), line
