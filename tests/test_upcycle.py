"""Dense models that get a memory, and runs that start from another model; on digits, tiny."""

from __future__ import annotations

import pytest
import torch

from moveimg.checkpoint import ModelParts, load_generator, load_model, load_tokenizer, save_model
from moveimg.config import SamplingSettings
from moveimg.data.images import DIGITS as CLASS_NAMES
from moveimg.pretrained.upcycle import convert_upcycle, upcycle
from moveimg.sampling import image_rngs, sample_codes
from moveimg.training.generator import break_symmetry, start_from, train_generator
from tests import conftest
from tests.conftest import ATTENTIONS, FEEDFORWARDS, decode_all, lively, random_inputs, tiny_config
from tests.test_pipeline import tiny_tokenizer
from tests.test_training import CPU, newest_state, train_config

MEMORIES = {name: m for name, m in conftest.MEMORIES.items() if m["kind"] != "none"}
MEMORIES |= {"lave-all": {"kind": "lave", "layers": "all"}}
MOVE = {"kind": "move", "slots": 3}
SIZES = {"n_layer": 2, "n_head": 2, "width": 16}
DIGITS = {**SIZES, "codebook_size": 16, "grid": [4, 4], "n_classes": 10}


@pytest.fixture(params=MEMORIES)
def memory(request):
    return MEMORIES[request.param]


def assert_same_logits(a, b):
    codes, labels = random_inputs(a.config)
    with torch.no_grad():
        assert torch.equal(a(codes, labels), b(codes, labels))
        decoded = [decode_all(model, codes, labels) for model in (a, b)]
        if a.config.attention.kind == "mla":  # where LaVE caches values, not latents alone
            torch.testing.assert_close(*decoded)
        else:
            assert torch.equal(*decoded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_do_not_change_in_any_bit(memory, dtype):
    dense = lively(tiny_config(width=64, n_head=4), dtype=dtype)
    model = upcycle(dense, memory)
    assert_same_logits(model, dense)
    break_symmetry(model)  # as training starts
    assert_same_logits(model, dense)
    labels, settings = torch.tensor([1, 3]), SamplingSettings(cfg_scale=1.5)
    drawn = [sample_codes(m, labels, settings, image_rngs([0, 1])) for m in (dense, model)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("ffn", FEEDFORWARDS)
def test_every_dense_variant_can_be_upcycled(attention, ffn, memory):
    dense = lively(tiny_config(attention=ATTENTIONS[attention], ffn=FEEDFORWARDS[ffn]))
    assert_same_logits(upcycle(dense, memory), dense)


@pytest.mark.parametrize("broken", [False, True])
def test_slots_of_a_zero_memory_stay_equal_unless_symmetry_is_broken(broken):
    codes, labels = random_inputs(tiny_config(), batch=8)
    model = upcycle(lively(tiny_config()), MOVE)
    if broken:
        break_symmetry(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(5):
        logits = model(codes, labels).flatten(0, 1)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, codes.flatten()).backward()
        optimizer.step()
    slots = model.memory.bank.weight.unflatten(1, (3, -1))
    difference = (slots[:, 0] - slots[:, 1]).abs().max()
    assert slots.std() > 1e-3 and (difference > 1e-3 if broken else difference < 1e-9)


def test_convert_upcycle_makes_a_model_directory(tmp_path, memory):
    dense = lively(tiny_config(), dtype=torch.float32)
    parts = ModelParts(dense, tiny_tokenizer(), list("abcde"), SamplingSettings(top_k=3))
    save_model(tmp_path / "dense", parts, {"step": 7})
    convert_upcycle(tmp_path / "dense", memory, tmp_path / "out")
    loaded = load_model(tmp_path / "out")
    assert loaded.generator.config.memory.kind == memory["kind"]
    assert loaded.class_names == list("abcde") and loaded.sampling.top_k == 3
    assert loaded.about == {"source": "upcycled", "from": "dense", "before": {"step": 7}}
    assert_same_logits(loaded.generator, dense)
    for source, settings, value in (
        ("dense", {"kind": "none"}, "none"),
        ("dense", {"kind": "mov"}, "'none', 'lave', 'move'"),
        ("dense", "move", "memory"),
        ("dense", {"kind": "move", "slots": 9223372036854775807}, "9223372036854775807"),
        ("out", MOVE, f"{memory['kind']} to"),
    ):
        with pytest.raises(ValueError, match=value):
            convert_upcycle(tmp_path / source, settings, tmp_path / "y")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "out"]


def save_start(tokenizer, folder, names=CLASS_NAMES, **changes):
    """A lively model for the digits' codes, as a directory."""
    model = lively(tiny_config(**DIGITS | {"n_classes": len(names)} | changes), dtype=torch.float32)
    save_model(folder, ModelParts(model, tokenizer, list(names), SamplingSettings()), {})
    return model


@pytest.mark.parametrize("train", ["memory", "all"])
def test_what_learns(digits, tmp_path, memory, train):
    save_start(load_tokenizer(digits / "tokenizer", CPU), tmp_path / "dense")
    convert_upcycle(tmp_path / "dense", memory, tmp_path / "start")
    files = {p: p.read_bytes() for p in (tmp_path / "start").rglob("*") if p.is_file()}
    changes = {"model": SIZES, "init_from": tmp_path / "start", "steps": 4, "train": train}
    train_generator(train_config(digits, tmp_path / "out", **changes), CPU)
    before, after = (load_generator(tmp_path / d).state_dict() for d in ("start", "out"))
    learning = [n for n in after if train == "all" or n.startswith("memory.") or ".router." in n]
    for name, value in after.items():
        assert torch.equal(value, before[name]) != (name in learning), name
    assert files == {p: p.read_bytes() for p in files}  # the start is left alone
    moments = [key for key in newest_state(tmp_path / "out") if key.endswith(".exp_avg")]
    assert len(moments) == len(learning)


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
        ({"grid": [2, 8]}, {}, r"model.grid is \(4, 4\).* \(2, 8\)"),
        ({}, {"norm_eps": 1e-6}, "model.norm_eps is 1e-06.* 1e-05"),
        ({}, {"ffn": {"kind": "swiglu", "hidden": 24}}, "model.ffn is .*24.* None"),
        ({}, {"memory": MOVE}, "moveimg convert upcycle"),
        ({"memory": MOVE}, {"memory": MOVE | {"slots": 2}}, "'slots': 2.* 'slots': 3"),
        ({"memory": MOVE}, {"memory": {"kind": "none"}}, "'none'"),
    ],
)
def test_other_settings_are_refused_naming_both(tmp_path, there, here, value):
    save_start(tiny_tokenizer(16), tmp_path / "m", **there)
    with pytest.raises(ValueError, match=value) as error:
        start_from(tmp_path / "m", tiny_config(**DIGITS | here), CLASS_NAMES)
    assert "\n" not in str(error.value)
