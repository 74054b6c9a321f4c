"""Banks: rows that are rounded, read from disk, shared by codes, of pairs of codes, or edited."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from moveimg.bank_editing import erase_rows
from moveimg.checkpoint import BUNDLED, ModelParts, load_generator, save_model
from moveimg.config import SamplingSettings
from moveimg.model import Transformer
from moveimg.model.analysis import scale_bank
from moveimg.model.bank import DiskRows, QuantizedRows
from moveimg.pipeline import Pipeline
from moveimg.pretrained.upcycle import convert_quantize_bank
from moveimg.sampling import image_rngs, sample_codes
from tests.conftest import lively, random_inputs, tiny_config
from tests.test_pipeline import NAMES, tiny_tokenizer


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_rows_are_within_their_rounding(bits):
    weight, codes = torch.randn(300, 6 * 32), torch.randint(300, (3, 5))
    weight[7] = 0
    rows = QuantizedRows.of(weight, 6, bits)
    error = (rows(codes) - weight[codes]).unflatten(-1, (6, 32)).abs()
    assert (error <= 0.501 * rows.scale[codes]).all()
    assert error.max() > 0 and not rows(torch.tensor([7])).any()
    assert rows.packed.numel() * rows.packed.itemsize == weight.numel() * bits // 8


@pytest.mark.parametrize(("bits", "width"), [(3, 32), (4, 31)])
def test_other_bits_and_odd_widths_are_refused(bits, width):
    with pytest.raises(ValueError, match=f"{bits} bits and width {width}"):
        QuantizedRows(10, 2, width, bits)


@pytest.mark.parametrize("bank", ["disk", "cpu"])
def test_a_bank_that_is_not_held_gives_the_same_codes_and_logits(bank):
    resident, other = (load_generator(BUNDLED / "fashion", bank=kind) for kind in (None, bank))
    codes, labels = torch.randint(1024, (2, 64)), torch.tensor([1, 8])
    with torch.inference_mode():
        assert torch.equal(resident(codes, labels), other(codes, labels))
    assert not any("bank" in name for name, _ in other.named_parameters())
    pipelines = [Pipeline.from_pretrained("digits", device="cpu", bank=k) for k in (None, bank)]
    drawn = [sample_codes(p.decoder, labels, p.sampling, image_rngs([0, 1])) for p in pipelines]
    assert torch.equal(*drawn)


def test_a_quantized_bank_changes_logits_a_little():
    codes, labels = torch.randint(1024, (2, 64)), torch.tensor([1, 8])
    with torch.inference_mode():
        exact, *rounded = (
            load_generator(BUNDLED / "fashion", bank=kind)(codes, labels)
            for kind in (None, "int8", "int4")
        )
    errors = [(exact - other).abs().mean() for other in rounded]
    assert 0 < errors[0] < errors[1] < exact.std()


def test_unknown_forms_models_without_bank_and_other_tensors_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'int3'"):
        load_generator(BUNDLED / "digits", bank="int3")
    save_file({"a": torch.zeros(3, 2, dtype=torch.int64)}, tmp_path / "x.safetensors")
    for name in ("a", "b"):
        with pytest.raises(ValueError, match=f"'{name}'"):
            DiskRows(tmp_path / "x.safetensors", name)


def shared(**memory):
    """A small model whose codes share rows, and its neighbours."""
    return lively(tiny_config(memory={"kind": "move", "slots": 2} | memory), dtype=torch.float32)


def test_as_many_rows_as_codes_are_the_plain_bank():
    models = [shared(**options) for options in ({}, {"rows": 11})]
    states = [model.state_dict() for model in models]
    assert states[0].keys() == states[1].keys()
    codes, labels = random_inputs(models[0].config)
    assert torch.equal(*(model(codes, labels) for model in models))


def test_similar_codes_share_a_row_and_the_map_is_kept(tmp_path):
    model = shared(rows=3)
    groups = torch.arange(11) % 3
    model.memory.share_rows(torch.eye(3)[groups] + 0.01 * torch.randn(11, 3))
    rows = model.memory.row_of_code
    assert torch.equal(rows[:, None] == rows, groups[:, None] == groups)
    codes, labels = random_inputs(model.config)
    similar = (codes + 3) % 11
    assert torch.equal(
        model.memory.bank(rows[codes]), model.memory.rows(None, codes).transpose(2, 3).flatten(2)
    )
    save_model(tmp_path / "m", ModelParts(model, tiny_tokenizer(), NAMES, SamplingSettings()), {})
    again = load_generator(tmp_path / "m")
    assert torch.equal(again.memory.row_of_code, rows) and rows.unique().numel() == 3
    assert not torch.equal(model(codes, labels), model(similar, labels))
    weights = load_file(tmp_path / "m/model.safetensors")
    for wrong in (-1, 3):
        weights["memory.row_of_code"][4] = wrong
        save_file(weights, tmp_path / "m/model.safetensors")
        with pytest.raises(ValueError, match=rf"row_of_code.*{wrong}\b"):
            load_generator(tmp_path / "m")


@pytest.mark.parametrize(
    "memory",
    [
        {"rows": 12},
        {"rows": 0},
        {"context": "left"},
        {"context_rows": 5},
        {"context": "left", "context_rows": 0},
        {"context_rows": 5, "context": "right"},
    ],
)
def test_memories_that_do_not_fit_are_refused_by_name(memory):
    with pytest.raises(ValueError, match=next(reversed(memory))):
        tiny_config(memory={"kind": "move", "slots": 2} | memory)


@pytest.mark.parametrize(("context", "first"), [("left", [0, 4, 8]), ("above", [0, 1, 2, 3])])
def test_pairs_have_no_neighbour_at_the_edge(context, first):
    model = shared(context=context, context_rows=50)
    codes, _ = random_inputs(model.config)
    found = model.memory.neighbours(codes, torch.arange(12))
    step = 1 if context == "left" else 4
    for i in range(12):
        assert torch.equal(found[:, i], torch.full((3,), 11) if i in first else codes[:, i - step])


def test_gates_start_where_the_settings_say():
    biased = Transformer(tiny_config(memory={"kind": "move", "slots": 2, "gate_bias": [-2, 1]}))
    g_0, g_i = biased.layers[0].attention.mixer.gates(torch.randn(1, 3, 16))
    low, high = (2 * torch.sigmoid(torch.tensor(x)) for x in (-2.0, 1.0))
    torch.testing.assert_close(g_0, low.expand_as(g_0))
    torch.testing.assert_close(g_i, high.expand_as(g_i))
    wide = Transformer(tiny_config(memory={"kind": "lave", "layers": "all", "router_std": 0.5}))
    assert wide.layers[0].attention.mixer.router.weight.std() > 0.3


def test_a_converted_bank_is_the_one_rounded_at_loading(tmp_path):
    for bits in (8, 4):
        convert_quantize_bank(BUNDLED / "digits", bits, tmp_path / str(bits))
        converted, rounded = (
            load_generator(tmp_path / str(bits)),
            load_generator(BUNDLED / "digits", bank=f"int{bits}"),
        )
        codes, labels = random_inputs(converted.config)
        with torch.inference_mode():
            assert torch.equal(converted(codes, labels), rounded(codes, labels))
    with pytest.raises(ValueError, match="bits"):
        convert_quantize_bank(tmp_path / "8", 4, tmp_path / "again")
    with pytest.raises(ValueError, match="int8"):
        load_generator(tmp_path / "8", bank="int8")


def test_edited_banks_change_their_rows_alone_and_can_be_saved(tmp_path):
    pipe = Pipeline.from_pretrained("digits", device="cpu")
    codes, labels = random_inputs(pipe.generator.config)
    bare = pipe.without_rows(range(64))
    off = scale_bank(pipe.generator, 0.0)
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
    dense = lively(tiny_config(), dtype=torch.float32)
    with pytest.raises(ValueError, match="none"):
        erase_rows(dense, [0])
