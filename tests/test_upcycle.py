"""Dense models that get a memory, and runs that start from another model; on digits, tiny."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moveimg.checkpoint import ModelParts, load_generator, load_model, load_tokenizer, save_model
from moveimg.config import SamplingSettings
from moveimg.data.sources import DIGITS as CLASS_NAMES
from moveimg.model import Transformer
from moveimg.pretrained.upcycle import convert_quantize_bank, convert_upcycle, upcycle
from moveimg.sampling import image_rngs, sample_codes
from moveimg.training.generator import break_symmetry, start_from, train_generator
from tests import conftest
from tests.conftest import (
    CPU,
    VARIANTS,
    random_inputs,
    random_model,
    tiny_config,
    tiny_model,
    tiny_parts,
)
from tests.test_training import newest_state, train_config

MOVE = {"kind": "move", "slots": 3}
LAVE = {"kind": "lave", "layers": "all"}
SHARED = conftest.MORE_MEMORIES["move-2-shared-above"]
MEMORIES = [MOVE | {"class_rows": True}, {"kind": "lave"}, LAVE, SHARED]
SIZES = {"n_layer": 2, "n_head": 2, "width": 16}
DIGITS = {**SIZES, "codebook_size": 16, "grid": [4, 4], "n_classes": 10}


def assert_same_logits(a, b):
    codes, labels = random_inputs(a.config)
    with torch.no_grad():
        assert torch.equal(a(codes, labels), b(codes, labels))
        decoded = [conftest.decode_all(model, codes, labels) for model in (a, b)]
        if a.config.attention.kind == "mla":  # where LaVE caches values, not latents alone
            torch.testing.assert_close(*decoded)
        else:
            assert torch.equal(*decoded)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_do_not_change_in_any_bit(memory, dtype):
    dense = random_model(tiny_config(width=64, n_head=4), dtype=dtype)
    model = upcycle(dense, memory)
    assert_same_logits(model, dense)
    break_symmetry(model)  # as training starts
    assert_same_logits(model, dense)
    labels, settings = torch.tensor([1, 3]), SamplingSettings(cfg_scale=1.5)
    drawn = [sample_codes(m, labels, settings, image_rngs([0, 1])) for m in (dense, model)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("name", [name for name in VARIANTS if "-none-" in name])
def test_every_dense_variant_can_be_upcycled(name):
    for memory in (MOVE, LAVE):
        assert_same_logits(upcycle(tiny_model(name), memory), tiny_model(name))


def test_slots_of_a_zero_memory_learn_apart():
    codes, labels = random_inputs(tiny_config(), batch=8)
    model = upcycle(random_model(tiny_config()), MOVE)
    break_symmetry(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        model(codes, labels, loss=True)[0].backward()
        optimizer.step()
    slots = model.memory.bank.weight.unflatten(1, (3, -1))
    assert (slots[:, 0] - slots[:, 1]).abs().max() > 1e-3


def test_convert_upcycle_makes_a_model_directory(tmp_path):
    dense = random_model(tiny_config(), dtype=torch.float32)
    save_model(tmp_path / "dense", replace(tiny_parts(dense, top_k=3), about={"step": 7}))
    convert_upcycle(tmp_path / "dense", SHARED, tmp_path / "out")
    loaded = load_model(tmp_path / "out")
    assert loaded.class_names == conftest.NAMES and loaded.sampling.top_k == 3
    assert loaded.about == {"source": "upcycled", "from": "dense", "before": {"step": 7}}
    assert_same_logits(loaded.generator, dense)
    expected = Transformer(loaded.generator.config).memory
    expected.cluster_codes(conftest.tiny_tokenizer().quantize.codebook())
    assert torch.equal(loaded.generator.memory.row_of_code, expected.row_of_code)
    for source, settings, value in (
        ("dense", {"kind": "none"}, "none"),
        ("dense", {"kind": "move", "slots": 2**63 - 1}, str(2**63 - 1)),
        ("out", MOVE, "move to"),
    ):
        with pytest.raises(ValueError, match=value):
            convert_upcycle(tmp_path / source, settings, tmp_path / "y")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "out"]


def save_start(tokenizer, folder, names=CLASS_NAMES, **changes):
    """A model with random weights for the digits' codes, as a directory."""
    model = random_model(
        tiny_config(**DIGITS | {"n_classes": len(names)} | changes), dtype=torch.float32
    )
    save_model(folder, ModelParts(model, tokenizer, list(names), SamplingSettings()))
    return model


@pytest.mark.parametrize(("train", "memory"), [("memory", MOVE), ("memory", LAVE), ("all", MOVE)])
def test_what_learns(digits, tmp_path, memory, train):
    save_start(load_tokenizer(digits / "tokenizer", CPU), tmp_path / "dense")
    convert_upcycle(tmp_path / "dense", memory, tmp_path / "start")
    changes = {"model": SIZES, "init_from": tmp_path / "start", "steps": 4, "train": train}
    train_generator(train_config(digits, tmp_path / "out", **changes), CPU)
    before, after = (load_generator(tmp_path / d).state_dict() for d in ("start", "out"))
    learning = [n for n in after if train == "all" or n.startswith("memory.") or ".router." in n]
    for name, value in after.items():
        assert torch.equal(value, before[name]) != (name in learning), name
    moments = [key for key in newest_state(tmp_path / "out") if key.endswith(".exp_avg")]
    assert len(moments) == len(learning)


def test_a_quantized_bank_is_not_trained_on(digits, tmp_path):
    tokenizer = load_tokenizer(digits / "tokenizer", CPU)
    save_start(tokenizer, tmp_path / "start", memory=MOVE)
    convert_quantize_bank(tmp_path / "start", 8, tmp_path / "int8")
    changes = {"model": SIZES, "init_from": tmp_path / "int8", "steps": 4}
    with pytest.raises(ValueError, match="bits 8"):
        train_generator(train_config(digits, tmp_path / "out", **changes), CPU)


def test_other_classes_get_a_new_label_table(digits, tmp_path, capsys):
    memory, tokenizer = MOVE | {"class_rows": True}, load_tokenizer(digits / "tokenizer", CPU)
    before = save_start(tokenizer, tmp_path / "m", names="abc", memory=memory).state_dict()
    after = start_from(tmp_path / "m", tiny_config(**DIGITS, memory=memory), CLASS_NAMES)
    assert "3" in capsys.readouterr().err
    for name, value in after.state_dict().items():
        if name in ("label_embedding.weight", "memory.class_bank.weight"):
            assert value.shape[0] == 11 and 0.01 < value[:-1].std() < 0.03
            assert torch.equal(value[-1], before[name][-1])  # the null label's
        else:
            assert torch.equal(value, before[name])
    changes = {"model": SIZES, "init_from": tmp_path / "m", "train": "memory"}
    with pytest.raises(ValueError, match="classes"):
        train_generator(train_config(digits, tmp_path / "o", **changes), CPU)


@pytest.mark.parametrize(
    ("there", "here", "value"),
    [
        ({"width": 32}, {}, "model.width is 16.* 32"),
        ({}, {"norm_eps": 1e-6}, "model.norm_eps is 1e-06.* 1e-05"),
        ({}, {"memory": MOVE}, "moveimg convert upcycle"),
        ({"memory": MOVE}, {"memory": MOVE | {"slots": 2}}, "'slots': 2.* 'slots': 3"),
        ({"memory": MOVE}, {"memory": {"kind": "none"}}, "'none'"),
    ],
)
def test_other_settings_are_refused_naming_both(tmp_path, there, here, value):
    save_start(conftest.tiny_tokenizer(16), tmp_path / "m", **there)
    with pytest.raises(ValueError, match=value) as error:
        start_from(tmp_path / "m", tiny_config(**DIGITS | here), CLASS_NAMES)
    assert "\n" not in str(error.value)
