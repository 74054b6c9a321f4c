"""The transformer and its value memories against a plain reference, and its invariants."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moveimg.config import SIZES, ModelConfig
from moveimg.model import Transformer
from moveimg.model.cost import count_parameters, model_cost, token_flops
from moveimg.model.memory import GatedMixer
from tests.conftest import lively, random_inputs, tiny_config
from tests.reference import reference_logits


def test_logits_equal_the_plain_reference(variant):
    model = lively(variant)
    codes, labels = random_inputs(variant)
    logits = model(codes, labels)
    assert logits.std() > 0.1  # not trivially equal
    for i in range(len(labels)):
        expected = torch.from_numpy(reference_logits(model, codes[i], labels[i]))
        torch.testing.assert_close(logits[i], expected, rtol=1e-10, atol=1e-10)


def decode_all(model, codes, labels):
    cache = model.make_cache(len(labels))
    steps = [model.start(labels, cache)]
    steps += [model.decode(codes[:, t], cache) for t in range(codes.shape[1] - 1)]
    return torch.stack(steps, dim=1)


def test_cached_decoding_equals_the_whole_sequence(variant):
    model = lively(variant)
    codes, labels = random_inputs(variant)
    with torch.no_grad():
        torch.testing.assert_close(
            decode_all(model, codes, labels), model(codes, labels), rtol=1e-12, atol=1e-12
        )


def test_later_codes_never_change_earlier_logits(variant):
    model = lively(variant)
    codes, labels = random_inputs(variant)
    with torch.no_grad():
        before = model(codes, labels)
        for position in range(variant.seq_len):
            changed = codes.clone()
            changed[:, position] = (changed[:, position] + 1) % variant.codebook_size
            after = model(changed, labels)
            assert torch.equal(before[:, : position + 1], after[:, : position + 1])
            if position < variant.seq_len - 1:
                assert not torch.equal(before[:, position + 1], after[:, position + 1])


def test_gradients_reach_every_parameter(variant):
    model = lively(variant)
    codes, labels = random_inputs(variant, batch=8)
    model(codes, labels).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_train_and_eval_mode_mean_the_same(variant):
    off = {"token_dropout": 0.0, "resid_dropout": 0.0, "ffn_dropout": 0.0}
    model = lively(variant.model_copy(update=off))
    codes, labels = random_inputs(variant)
    assert torch.equal(model.eval()(codes, labels), model.train()(codes, labels))


def test_two_models_share_nothing(variant):
    a, b = lively(variant, seed=0), lively(variant, seed=0)
    before = {k: v.clone() for k, v in b.state_dict().items()}
    storages = {p.data_ptr() for p in a.parameters()}
    assert storages.isdisjoint(p.data_ptr() for p in b.parameters())
    with torch.no_grad():
        for parameter in a.parameters():
            parameter.add_(1)
    assert all(torch.equal(v, before[k]) for k, v in b.state_dict().items())


def test_a_few_steps_overfit_one_batch(variant):
    torch.manual_seed(0)
    off = {"token_dropout": 0.0, "resid_dropout": 0.0, "ffn_dropout": 0.0}
    model = Transformer(variant.model_copy(update=off))
    codes, labels = random_inputs(variant)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    losses = []
    for _ in range(10):
        loss = torch.nn.functional.cross_entropy(
            model(codes, labels).flatten(0, 1), codes.flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_compiles_to_one_graph(variant):
    model = lively(variant)
    codes, labels = random_inputs(variant)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(codes, labels), model(codes, labels))


def test_builds_on_the_meta_device_at_the_start_state(variant):
    with torch.device("meta"):
        assert all(p.is_meta for p in Transformer(variant).parameters())
    model = Transformer(variant)
    assert model.head.weight.abs().max() == 0
    routers = [m.router.weight for m in model.modules() if isinstance(m, GatedMixer)]
    assert all(router.abs().max() == 0 for router in routers)
    for name, parameter in model.named_parameters():
        if "bank" in name or "embedding" in name:
            assert 0.015 < parameter.std() < 0.025, name


def test_gates_start_at_one_and_are_computed_from_the_hidden_state():
    config = tiny_config(memory={"kind": "move", "slots": 3})
    mixer = GatedMixer(config, 16, range(3), gate_standard=True)
    torch.nn.init.zeros_(mixer.router.weight)
    x, v, rows = torch.randn(2, 4, 16), torch.randn(2, 4, 2, 8), torch.randn(2, 4, 3, 16)
    g_0, g_i = mixer.gates(x)
    assert torch.equal(g_0, torch.ones(2, 4, 2, 1)) and torch.equal(g_i, torch.ones(2, 4, 2, 3))
    expected = v + rows.sum(2).unflatten(-1, (2, 8))
    torch.testing.assert_close(mixer(x, v, rows), expected)


def test_class_rows_are_zero_unless_asked_for():
    labels = torch.tensor([0, 3, 5])
    off = Transformer(tiny_config(memory={"kind": "move", "slots": 2}))
    on = Transformer(tiny_config(memory={"kind": "move", "slots": 2, "class_rows": True}))
    assert off.memory.class_rows(labels).abs().max() == 0
    assert on.memory.class_rows(labels).shape == (3, 1, 2, 16)
    assert on.memory.class_rows(labels).abs().min() > 0


@pytest.mark.parametrize(
    ("size", "millions"), [("B", 111), ("L", 343), ("XL", 775), ("XXL", 1411), ("3B", 3097)]
)
def test_dense_sizes_have_the_published_parameter_counts(size, millions):
    # arXiv 2406.06525, table 1: 111M, 343M, 775M, 1.4B, 3.1B
    cost = model_cost(ModelConfig.model_validate({"size": size}))
    assert round(cost.parameters / 1e6) == millions


@pytest.mark.parametrize(("size", "slots", "millions"), [("B", 6, 75.5), ("L", 12, 201.3)])
def test_the_bank_of_x1_has_the_papers_size(size, slots, millions):
    config = ModelConfig.model_validate({"size": size, "memory": {"kind": "move", "slots": slots}})
    cost = model_cost(config)
    assert round(cost.bank / 1e6, 1) == millions
    lave = config.model_copy(update={"memory": tiny_config(memory={"kind": "lave"}).memory})
    assert model_cost(lave).bank == cost.bank  # equal budgets, as the paper compares them


def test_every_named_size_builds():
    for size in SIZES:
        with torch.device("meta"):
            Transformer(ModelConfig.model_validate({"size": size}))


def test_flops_agree_with_torchs_counter(variant):
    model = lively(variant, dtype=torch.float32)
    codes, labels = random_inputs(variant, batch=2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(codes, labels)
    # the counter takes attention over all T positions for each of the T tokens
    per_token = token_flops(model, context=variant.seq_len)
    for mixer in model.modules():  # one slot is a product by elements, which it does not count
        if isinstance(mixer, GatedMixer) and len(mixer.slots) == 1:
            per_token -= mixer.own_flops(0)
    assert counter.get_total_flops() == 2 * variant.seq_len * per_token


def test_router_overhead_is_the_papers_formula():
    config = ModelConfig.model_validate({"size": "B", "memory": {"kind": "move", "slots": 6}})
    cost = model_cost(config)
    per_layer = 2 * config.width * config.n_head * (6 + 1)  # 2 d H (M + 1)
    assert cost.router_share * cost.flops_per_token == pytest.approx(config.n_layer * per_layer)


def test_parameter_parts_add_up(variant):
    model = Transformer(variant)
    parts = count_parameters(model)
    assert sum(parts.values()) == sum(p.numel() for p in model.parameters())
    assert (parts["bank"] > 0) == (variant.memory.kind != "none")


def test_wrong_shapes_are_named():
    model = lively(tiny_config())
    codes, labels = random_inputs(tiny_config())
    with pytest.raises(ValueError, match=r"codes \(3, 11\) for 3 labels: expected \[3, 12\]"):
        model(codes[:, :-1], labels)
    cache = model.make_cache(3)
    with pytest.raises(ValueError, match="decode at position 0"):
        model.decode(codes[:, 0], cache)
    with pytest.raises(ValueError, match="empty cache for 2 labels, got one for 3"):
        model.start(labels[:2], cache)
