"""The transformer against a float64 reference, and its invariants."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from moveimg.model import GatedMixer, Transformer, record_mixing
from tests.conftest import MORE, PAIRED, VARIANTS, decode_all, lively, random_inputs, tiny_config
from tests.reference import reference_logits

NO_DROPOUT = {"token_dropout": 0.0, "resid_dropout": 0.0, "ffn_dropout": 0.0}
pairs = pytest.mark.parametrize("name", PAIRED)


def test_logits_equal_the_float64_reference(variant):
    model = lively(variant)
    codes, labels = random_inputs(variant)
    logits = model(codes, labels)
    assert logits.std() > 0.1  # not trivially equal
    for i in range(len(labels)):
        expected = torch.from_numpy(reference_logits(model, codes[i], labels[i]))
        torch.testing.assert_close(logits[i], expected, rtol=1e-10, atol=1e-10)


def test_cached_decoding_equals_the_full_forward_pass(variant):
    model = lively(variant)
    codes, labels = random_inputs(variant)
    with torch.no_grad():
        torch.testing.assert_close(
            decode_all(model, codes, labels), model(codes, labels), rtol=1e-12, atol=1e-12
        )


@pairs
def test_later_codes_never_change_earlier_logits(name):
    config = tiny_config(**VARIANTS[name])
    model = lively(config)
    codes, labels = random_inputs(config)
    with torch.no_grad():
        before = model(codes, labels)
        for position in range(config.seq_len):
            changed = codes.clone()
            changed[:, position] = (changed[:, position] + 1) % config.codebook_size
            after = model(changed, labels)
            # within rounding: experts sort their tokens in another order now
            torch.testing.assert_close(
                before[:, : position + 1], after[:, : position + 1], rtol=1e-12, atol=1e-12
            )
            if position < config.seq_len - 1:
                assert not torch.equal(before[:, position + 1], after[:, position + 1])


@pytest.mark.parametrize("name", [*PAIRED, *MORE])
def test_gradients_reach_every_parameter_and_no_other_model(name):
    config = tiny_config(**VARIANTS[name])
    model, other = lively(config), lively(config)
    codes, labels = random_inputs(config, batch=8)
    model(codes, labels).square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key
    assert all(parameter.grad is None for parameter in other.parameters())
    storages = {p.data_ptr() for p in model.parameters()}
    assert storages.isdisjoint(p.data_ptr() for p in other.parameters())


@pairs
def test_train_and_eval_mode_differ_in_dropout_alone(name):
    still = lively(tiny_config(**VARIANTS[name], **NO_DROPOUT))
    codes, labels = random_inputs(still.config)
    assert torch.equal(still.eval()(codes, labels), still.train()(codes, labels))
    for rate in NO_DROPOUT:
        model = lively(tiny_config(**VARIANTS[name], **(NO_DROPOUT | {rate: 0.5})))
        assert not torch.equal(model.eval()(codes, labels), model.train()(codes, labels)), rate


def test_autocast_casts_the_rows_once_and_keeps_float32_gradients():
    model = lively(tiny_config(memory={"kind": "move", "slots": 3}), dtype=torch.float32)
    codes, labels = random_inputs(model.config)
    model(codes, labels, loss=True)[0].backward()
    exact = model.memory.bank.weight.grad.clone()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.memory.rows(labels, codes).dtype == torch.bfloat16
        model(codes, labels, loss=True)[0].backward()
    rounded = model.memory.bank.weight.grad
    assert rounded.dtype == torch.float32 and 0 < (rounded - exact).norm() < 0.1 * exact.norm()


def test_initial_values():
    for name in PAIRED:
        config = tiny_config(**VARIANTS[name])
        with torch.device("meta"):
            assert all(p.is_meta for p in Transformer(config).parameters())
        model = Transformer(config)
        assert not model.head.weight.any()
        routers = [m.router.weight for m in model.modules() if isinstance(m, GatedMixer)]
        assert not any(router.any() for router in routers)
        for key, parameter in model.named_parameters():
            if "bank" in key or "embedding" in key or "wqkv" in key:
                assert 0.015 < parameter.std() < 0.025, key


@pytest.mark.parametrize(
    "name", ["mha-lave-x1-swiglu", "mla-move-3-class-rows-moe", "mha-move-2-ungated-swiglu"]
)
def test_recorded_mixing_is_what_the_layers_mix(name):
    model = lively(tiny_config(**VARIANTS[name]))
    codes, labels = random_inputs(model.config)
    mixings = {}
    with (
        torch.no_grad(),
        record_mixing(model, lambda layer, *parts: mixings.update({layer: parts})),
    ):
        model(codes, labels)
    assert list(mixings) == ([1] if "lave" in name else [0, 1])
    for g_0, g_i, values, rows in mixings.values():
        assert rows.shape[-2] == g_i.shape[-1] and values.shape[1] == codes.shape[1] - 1
        assert (g_0 is None) == (not model.config.memory.gate_standard)
    if "lave" not in name:  # all slots, by head
        stored = model.memory.bank.weight[codes[:, :-1]].unflatten(-1, (g_i.shape[-1], 2, -1))
        assert torch.equal(mixings[0][-1], stored.transpose(2, 3))
    model(codes, labels)
    assert len(mixings) <= 2  # hooks are gone


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
    monkeypatch.setattr("moveimg.model.transformer.CHUNK", chunk)
    model = lively(tiny_config(memory={"kind": "move", "slots": 2})).train()
    inputs = random_inputs(model.config)
    expected, got = (loss_and_gradients(model, *inputs, chunked) for chunked in (False, True))
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-9)
    with torch.no_grad():
        assert model.eval()(*inputs, loss=True)[0].isfinite()
    model.head.requires_grad_(False)
    model(*inputs, loss=True)[0].backward()  # with a frozen head, too
