"""Inspection: the statistics against plain sums."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from moveimg.checkpoint import ModelParts
from moveimg.config import SamplingSettings
from moveimg.inspect import describe_row, inspect_model
from moveimg.model import mixers_by_layer
from moveimg.model.analysis import bank_maps, gather_gates, gradient_sources, scale_bank
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
    assert all(not m.share.any() for m in bank_maps(scale_bank(model, 0.0), codes, labels).values())
    assert torch.equal(model(codes, labels), before)
    with pytest.raises(ValueError, match="no value memory"):
        bank_maps(built("mha-none-swiglu"), codes, labels)


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_gradients_by_layer_add_up_to_the_banks_own(name):
    model = built(name)
    codes, labels = random_inputs(model.config, batch=4)
    found = gradient_sources(model, codes, labels)
    loss = F.cross_entropy(model(codes, labels).flatten(0, 1), codes.flatten())
    (whole,) = torch.autograd.grad(loss, [model.memory.bank.weight])
    assert found["bank"] == pytest.approx(whole.norm().item())
    if "lave" in name:  # a table for the last layer alone
        assert found["by_layer"] == {2: pytest.approx(found["bank"])}
        assert found["alignment"] == pytest.approx(1)
    else:
        assert found["bank"] <= sum(found["by_layer"].values())
        assert len(found["by_layer"]) == 2 and 0 < found["alignment"] < 1


def pipeline(name):
    model = built(name, torch.float32)
    parts = ModelParts(model, tiny_tokenizer(), NAMES, SamplingSettings())
    return Pipeline(parts, torch.device("cpu"))


@pytest.mark.parametrize("name", [MLA_MOVE, "mha-lave-x1-swiglu"])
def test_report_has_numbers_and_plots(name, tmp_path):
    inspect_model(pipeline(name), tmp_path, num=6, batch_size=4)
    report = json.loads((tmp_path / "inspection.json").read_text())
    assert report["images"] == 6
    layers = ["1", "2"] if "move" in name else ["2"]  # counted from one
    for by_layer in (report["layers"], report["gradients"]["by_layer"]):
        assert list(by_layer) == layers
    assert (tmp_path / "gates.png").is_file()
    if "moe" in name:
        assert sum(report["experts"]["1"]) == pytest.approx(1)


def test_models_without_memory_or_experts_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none.*swiglu"):
        inspect_model(pipeline("mha-none-swiglu"), tmp_path, num=2)
    assert not list(tmp_path.iterdir())


def test_the_report_on_a_row_is_the_difference_that_its_rows_make(tmp_path):
    pipe = pipeline(MOVE)
    codes, labels = random_inputs(pipe.generator.config, batch=4)
    code = int(codes[0, 0])
    found = describe_row(pipe, code, [(codes[:3], labels[:3]), (codes[3:], labels[3:])], tmp_path)
    at = (codes[:, :-1] == code).nonzero()
    with torch.no_grad():
        before = pipe.generator(codes, labels).softmax(-1)
        pipe.generator.memory.bank.weight[code] = 0
        after = pipe.generator(codes, labels).softmax(-1)
    pairs = [(before[i, t + 1], after[i, t + 1]) for i, t in at]
    kl = torch.stack([(p * (p / q).log()).sum() for p, q in pairs]).mean()
    changes = torch.stack([p - q for p, q in pairs]).mean(0)
    assert found["positions"] == len(at) and found["kl"] == pytest.approx(kl.item(), rel=1e-4)
    assert found["raised"][0] == (int(changes.argmax()), pytest.approx(changes.max().item(), 1e-4))
    assert found["lowered"][0][0] == int(changes.argmin())
    assert len(found["gates"]) == 2 and (tmp_path / f"row-{code}.png").is_file()
    for wrong in (-1, 11):
        with pytest.raises(ValueError, match=str(wrong)):
            describe_row(pipe, wrong, [(codes, labels)], tmp_path)
