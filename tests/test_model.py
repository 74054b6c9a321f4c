"""The transformer against a float64 reference, and its invariants."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml
from torch.nn import functional as F

from moveimg.config import ModelConfig
from moveimg.model import GatedMixer, Transformer
from moveimg.model.attention import ATTENTIONS
from moveimg.model.feedforward import FEEDFORWARDS
from moveimg.model.memory import MEMORIES
from moveimg.rng import Dropout
from tests import conftest, reference
from tests.conftest import (
    PAIRED,
    VARIANTS,
    VARIED,
    random_inputs,
    random_model,
    tiny_config,
    tiny_model,
)

CONFIGS = Path(__file__).parents[1] / "configs"
NO_DROPOUT = {"token_dropout": 0.0, "resid_dropout": 0.0, "ffn_dropout": 0.0}
pairs = pytest.mark.parametrize("name", PAIRED)


@pytest.mark.parametrize(
    ("slot", "classes"),
    [("attention", ATTENTIONS), ("memory", MEMORIES), ("ffn", FEEDFORWARDS)],
)
def test_every_kind_has_a_class_a_test_a_reference_and_a_config(slot, classes):
    field, table = ModelConfig.model_fields[slot], {"ffn": "feedforward", "memory": "memorie"}
    kinds = {option.model_fields["kind"].default for option in get_args(field.annotation)}
    table = f"{table.get(slot, slot)}s".upper()
    assert kinds == set(classes) == set(getattr(reference, table))
    assert kinds == {settings["kind"] for settings in getattr(conftest, table).values()}
    models = [yaml.safe_load(path.read_text()).get("model", {}) for path in CONFIGS.glob("*.yaml")]
    assert kinds - {field.default.kind} <= {m.get(slot, {}).get("kind") for m in models}


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_the_float64_reference_and_those_of_cached_decoding(name):
    model = tiny_model(name)
    codes, labels = random_inputs(model.config)
    with torch.no_grad():
        logits, decoded = model(codes, labels), conftest.decode_all(model, codes, labels)
    assert logits.std() > 0.1  # not trivially equal
    torch.testing.assert_close(decoded, logits, rtol=1e-12, atol=1e-12)
    for i in range(len(labels)):
        expected = torch.from_numpy(reference.reference_logits(model, codes[i], labels[i]))
        torch.testing.assert_close(logits[i], expected, rtol=1e-10, atol=1e-10)


@pairs
def test_later_codes_never_change_earlier_logits(name):
    model = tiny_model(name)
    codes, labels = random_inputs(model.config)
    with torch.no_grad():
        before = model(codes, labels)
        for t in range(model.config.seq_len):
            changed = codes.clone()
            changed[:, t] = (changed[:, t] + 1) % model.config.codebook_size
            after = model(changed, labels)
            # within rounding: experts sort their tokens in another order now
            torch.testing.assert_close(before[:, : t + 1], after[:, : t + 1], rtol=0, atol=1e-11)
            assert t == 11 or not torch.equal(before[:, t + 1], after[:, t + 1])


@pytest.mark.parametrize("name", VARIED)
def test_gradients_reach_every_parameter(name):
    model = tiny_model(name)
    codes, labels = random_inputs(model.config, batch=8)
    model(codes, labels).square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key


@pairs
def test_train_and_eval_mode_differ_in_dropout_alone(name):
    still = tiny_model(name, **NO_DROPOUT)
    codes, labels = random_inputs(still.config)
    assert torch.equal(still.eval()(codes, labels), still.train()(codes, labels))
    for rate in NO_DROPOUT:
        model = tiny_model(name, **(NO_DROPOUT | {rate: 0.5}))
        assert not torch.equal(model.eval()(codes, labels), model.train()(codes, labels)), rate


@pairs
def test_initial_values(name):
    model = Transformer(tiny_config(**VARIANTS[name]))
    assert not model.head.weight.any()
    mixers = [m for m in model.modules() if isinstance(m, GatedMixer)]
    assert not any(mixer.router.weight.any() for mixer in mixers)
    for key, parameter in model.named_parameters():
        if "bank" in key or "embedding" in key or "wqkv" in key:
            assert 0.015 < parameter.std() < 0.025, key


def loss_and_gradients(model, codes, labels, chunked):
    model.zero_grad()
    torch.manual_seed(0)  # of dropout
    if chunked:
        loss, accuracy = model(codes, labels, loss=True)
    else:
        logits = model(codes, labels)
        loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
        accuracy = (logits.argmax(-1) == codes).to(loss.dtype).mean()
    (3 * loss).backward()
    return [loss.detach(), accuracy, *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("chunk", [1, 50, 2**24])
def test_the_chunked_loss_has_the_value_and_gradients_of_the_plain_one(chunk, monkeypatch):
    monkeypatch.setattr("moveimg.model.loss.CHUNK", chunk)
    model = random_model(tiny_config(memory={"kind": "move", "slots": 2})).train()
    inputs = random_inputs(model.config)
    expected, got = (loss_and_gradients(model, *inputs, chunked) for chunked in (False, True))
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-9)
    model.head.requires_grad_(False)
    model(*inputs, loss=True)[0].backward()  # with a frozen head, too


def test_autocast_casts_the_rows_once_and_keeps_float32_gradients():
    model = random_model(tiny_config(memory={"kind": "move", "slots": 3}), dtype=torch.float32)
    codes, labels = random_inputs(model.config)
    model(codes, labels, loss=True)[0].backward()
    exact = model.memory.bank.weight.grad.clone()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.memory.gather_rows(labels, codes).dtype == torch.bfloat16
        model(codes, labels, loss=True)[0].backward()
    rounded = model.memory.bank.weight.grad
    assert rounded.dtype == torch.float32 and 0 < (rounded - exact).norm() < 0.1 * exact.norm()


def test_the_auxiliary_loss_exists_in_train_mode_alone_and_is_returned_once():
    model = tiny_model("mha-none-moe")
    codes, labels = random_inputs(model.config)
    model(codes, labels)
    assert model.auxiliary_loss() == 0 and model.expert_load() is None
    model.train()(codes, labels)
    torch.testing.assert_close(model.expert_load().sum(-1), torch.ones(2))
    loss = model.auxiliary_loss()
    assert loss > 2 * 0.01 * 0.5 and loss.requires_grad
    assert model.auxiliary_loss() == 0
    model(codes, labels)
    copy.deepcopy(model.eval())  # a graph could not be copied
    assert model.auxiliary_loss() == 0


def test_experts_are_chosen_in_float32_under_autocast(monkeypatch):
    ffn = tiny_model("mha-none-moe", torch.float32).layers[0].ffn
    x, chosen = torch.randn(2, 6, 16), []
    experts = ffn._experts
    monkeypatch.setattr(ffn, "_experts", lambda *args: (chosen.append(args[1]), experts(*args))[1])
    with torch.no_grad():
        ffn(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert ffn(x).dtype == torch.bfloat16
    assert torch.equal(*chosen)


def test_dropout_draws_from_its_generator_and_nothing_for_a_rate_of_0():
    x, generator = torch.ones(64), torch.Generator().manual_seed(0)
    before = generator.get_state()
    for rate in (0.0, 0.5):
        dropout = Dropout(rate)
        dropout.generator = generator
        assert set(dropout(x).tolist()) == ({1.0} if rate == 0 else {0.0, 2.0})
        assert torch.equal(generator.get_state(), before) == (rate == 0)
