"""Banks, rounded, read from disk, shared by codes or edited, and the statistics of inspection."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from moveimg.bank_editing import erase_rows
from moveimg.checkpoint import BUNDLED, load_generator, save_model
from moveimg.inspect import describe_row, inspect_model
from moveimg.model import Transformer, mixers_by_layer
from moveimg.model.analysis import (
    compute_bank_maps,
    compute_gate_stats,
    compute_gradient_sources,
    scale_bank,
)
from moveimg.model.bank_storage import QuantizedRows
from moveimg.pipeline import Pipeline
from moveimg.pretrained.upcycle import convert_quantize_bank
from tests.conftest import CPU, random_inputs, random_model, tiny_config, tiny_model, tiny_parts

MOVE, MLA_MOVE = "mha-move-3-class-rows-swiglu", "mla-move-3-class-rows-moe"
LAVE = "mla-lave-x1-swiglu"


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_rows_are_within_their_rounding(bits):
    weight, codes = torch.randn(300, 6 * 32), torch.randint(300, (3, 5))
    weight[7] = 0
    rows = QuantizedRows.quantize(weight, 6, bits)
    error = (rows(codes) - weight[codes]).unflatten(-1, (6, 32)).abs()
    assert (error <= 0.501 * rows.scale[codes]).all()
    assert error.max() > 0 and not rows(torch.tensor([7])).any()
    assert rows.packed.numel() * rows.packed.itemsize == weight.numel() * bits // 8
    with pytest.raises(ValueError, match=f"{bits - 1} bits and width 32"):
        QuantizedRows(10, 2, 32, bits - 1)


@pytest.mark.parametrize("bank", ["disk", "cpu"])
def test_a_bank_that_is_not_held_gives_the_same_codes_and_logits(bank, tmp_path):
    held, other = (Pipeline.from_pretrained("digits", device="cpu", bank=b) for b in (None, bank))
    codes, labels = random_inputs(held.generator.config)
    with torch.inference_mode():
        assert torch.equal(held.generator(codes, labels), other.generator(codes, labels))
    assert not any("bank" in name for name, _ in other.generator.named_parameters())
    drawn = [pipe.sample_codes([1, 8], pipe.settings(), seed=3) for pipe in (held, other)]
    assert torch.equal(*drawn)
    with pytest.raises(ValueError, match="bank"):  # its file would lack the bank
        other.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@torch.inference_mode()
def test_rounded_banks_change_logits_a_little_and_can_be_written(tmp_path):
    exact = load_generator(BUNDLED / "digits")
    inputs, errors = random_inputs(exact.config), []
    for bits in (8, 4):
        rounded = load_generator(BUNDLED / "digits", bank=f"int{bits}")(*inputs)
        convert_quantize_bank(BUNDLED / "digits", bits, tmp_path / str(bits))
        assert torch.equal(load_generator(tmp_path / str(bits))(*inputs), rounded)
        errors.append((exact(*inputs) - rounded).abs().mean())
    assert 0 < errors[0] < errors[1] < exact(*inputs).std()
    with pytest.raises(ValueError, match="bits"):
        convert_quantize_bank(tmp_path / "8", 4, tmp_path / "again")
    for directory, bank in ((tmp_path / "8", "int8"), (BUNDLED / "digits", "int3")):
        with pytest.raises(ValueError, match=bank):
            load_generator(directory, bank=bank)


def test_similar_codes_share_a_row_and_the_map_is_kept(tmp_path):
    model = random_model(
        tiny_config(memory={"kind": "move", "slots": 2, "rows": 3}), dtype=torch.float32
    )
    groups = torch.arange(11) % 3
    model.memory.cluster_codes(torch.eye(3)[groups] + 0.01 * torch.randn(11, 3))
    rows = model.memory.row_of_code
    assert torch.equal(rows[:, None] == rows, groups[:, None] == groups)
    codes, labels = random_inputs(model.config)
    gathered = model.memory.gather_rows(None, codes).transpose(2, 3).flatten(2)
    assert torch.equal(model.memory.bank(rows[codes]), gathered)
    save_model(tmp_path, tiny_parts(model))
    assert torch.equal(load_generator(tmp_path)(codes, labels), model(codes, labels))
    weights = load_file(tmp_path / "model.safetensors")
    for wrong in (-1, 3):
        weights["memory.row_of_code"][4] = wrong
        save_file(weights, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=rf"row_of_code.*{wrong}\b"):
            load_generator(tmp_path)


@pytest.mark.parametrize("memory", [{"rows": 12}, {"context": "left"}, {"context_rows": 5}])
def test_memories_that_do_not_fit_are_refused_by_name(memory):
    with pytest.raises(ValueError, match=next(reversed(memory))):
        tiny_config(memory={"kind": "move", "slots": 2} | memory)


def test_gates_start_where_the_settings_say():
    biased = Transformer(tiny_config(memory={"kind": "move", "slots": 2, "gate_bias": [-2, 1]}))
    gates = biased.layers[0].attention.mixer.gates(torch.randn(1, 3, 16))
    for found, bias in zip(gates, (-2.0, 1.0), strict=True):
        torch.testing.assert_close(found, 2 * torch.tensor(bias).sigmoid().expand_as(found))
    wide = Transformer(tiny_config(memory={"kind": "lave", "layers": "all", "router_std": 0.5}))
    assert wide.layers[0].attention.mixer.router.weight.std() > 0.3


def test_edited_banks_change_their_rows_alone_and_can_be_saved(tmp_path):
    pipe = Pipeline.from_pretrained("digits", device="cpu")
    codes, labels = random_inputs(pipe.generator.config)
    bare, off = pipe.without_rows(range(64)), scale_bank(pipe.generator, 0.0)
    with torch.inference_mode():
        assert torch.equal(bare.generator(codes, labels), off(codes, labels))
        halved = pipe.blend(bare, 0.5).generator(codes, labels)
        assert torch.equal(halved, scale_bank(pipe.generator, 0.5)(codes, labels))
        assert not torch.equal(pipe.generator(codes, labels), halved)
        one = pipe.without_rows([5])
        one.save(tmp_path / "one")
        again = load_generator(tmp_path / "one")
        assert torch.equal(again(codes, labels), one.generator(codes, labels))
    changed = (one.generator.memory.bank.weight != pipe.generator.memory.bank.weight).any(1)
    assert changed.nonzero().tolist() == [[5]]
    with pytest.raises(ValueError, match="64"):
        pipe.without_rows([64])
    with pytest.raises(ValueError, match=r"1\.5"):
        pipe.blend(bare, 1.5)
    with pytest.raises(ValueError, match="fashion"):
        pipe.blend(Pipeline.from_pretrained("fashion", device="cpu"), 0.5)
    with pytest.raises(ValueError, match="none"):
        erase_rows(random_model(tiny_config()), [0])


def pipeline(name):
    return Pipeline(tiny_parts(tiny_model(name, torch.float32)), CPU)


@pytest.mark.parametrize("name", [MOVE, MLA_MOVE, LAVE, "mha-move-2-ungated-swiglu"])
def test_gate_statistics_equal_plain_sums(name):
    model = tiny_model(name)
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
    found = compute_gate_stats(model, [(codes[:2], labels[:2]), (codes[2:], labels[2:])])
    maps = compute_bank_maps(model, codes, labels)
    assert found.keys() == {layer + 1 for layer in seen} == ({2} if name == LAVE else {1, 2})
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


@pytest.mark.parametrize("name", [MOVE, MLA_MOVE, LAVE])
def test_gradients_by_layer_add_up_to_the_banks_own(name):
    model = tiny_model(name)
    codes, labels = random_inputs(model.config, batch=4)
    found = compute_gradient_sources(model, codes, labels)
    loss = F.cross_entropy(model(codes, labels).flatten(0, 1), codes.flatten())
    (whole,) = torch.autograd.grad(loss, [model.memory.bank.weight])
    assert found["bank"] == pytest.approx(whole.norm().item())
    if name == LAVE:  # a table for the last layer alone
        assert found["by_layer"] == {2: pytest.approx(found["bank"])}
        assert found["alignment"] == pytest.approx(1)
    else:
        assert found["bank"] <= sum(found["by_layer"].values())
        assert len(found["by_layer"]) == 2 and 0 < found["alignment"] < 1


@pytest.mark.parametrize(("name", "layers"), [(MLA_MOVE, ["1", "2"]), (LAVE, ["2"])])
def test_report_has_numbers_and_plots(name, layers, tmp_path):
    with pytest.raises(ValueError, match=r"none.*swiglu"):
        inspect_model(pipeline("mha-none-swiglu"), tmp_path, num=2)
    assert not list(tmp_path.iterdir())
    inspect_model(pipeline(name), tmp_path, num=6, batch_size=4)
    report = json.loads((tmp_path / "inspection.json").read_text())
    assert report["images"] == 6
    for by_layer in (report["layers"], report["gradients"]["by_layer"]):
        assert list(by_layer) == layers  # counted from one
    assert (tmp_path / "gates.png").is_file()
    assert name != MLA_MOVE or sum(report["experts"]["1"]) == pytest.approx(1)


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
    with pytest.raises(ValueError, match="11"):
        describe_row(pipe, 11, [(codes, labels)], tmp_path)
