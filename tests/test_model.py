"""The transformer and its value memories against a plain reference, and its invariants."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from itertools import cycle

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moveimg.config import SIZES, ModelConfig
from moveimg.model import Transformer
from moveimg.model.cost import count_parameters, describe_cost, model_cost, token_flops
from moveimg.model.memory import GatedMixer
from moveimg.model.mla import MultiHeadLatentAttention
from moveimg.model.moe import MoE, blocks
from moveimg.model.product_key import PEER, ProductKeyMemory
from tests.conftest import (
    ATTENTIONS,
    MORE,
    MORE_MEMORIES,
    PAIRED,
    VARIANTS,
    lively,
    random_inputs,
    tiny_config,
)
from tests.reference import reference_logits

NO_DROPOUT = {"token_dropout": 0.0, "resid_dropout": 0.0, "ffn_dropout": 0.0}


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
            # to rounding: experts take their tokens together, in another order now
            torch.testing.assert_close(
                before[:, : position + 1], after[:, : position + 1], rtol=1e-12, atol=1e-12
            )
            if position < variant.seq_len - 1:
                assert not torch.equal(before[:, position + 1], after[:, position + 1])


def test_gradients_reach_every_parameter(variant):
    model = lively(variant)
    codes, labels = random_inputs(variant, batch=8)
    model(codes, labels).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_train_and_eval_mode_mean_the_same(variant):
    model = lively(variant.model_copy(update=NO_DROPOUT))
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
    model = Transformer(variant.model_copy(update=NO_DROPOUT))
    codes, labels = random_inputs(variant)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    losses = []
    for _ in range(15):
        loss = torch.nn.functional.cross_entropy(
            model(codes, labels).flatten(0, 1), codes.flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# Tracing takes seconds: each kind and each option once; two of them by the real compiler, which
# must not break a graph either.
REALLY_COMPILED = ["mla-q-move-moe-listed", "mha-move-product_key-listed"]
TRACED = PAIRED.copy()
TRACED += [f"{a}-{m}-swiglu" for a, m in zip(cycle(ATTENTIONS), MORE_MEMORIES, strict=False)]
TRACED += [name for name in MORE if name not in REALLY_COMPILED]


@pytest.mark.parametrize("name", TRACED)
def test_compiles_to_one_graph(name):
    torch._dynamo.reset()  # every variant runs the same code objects, which may recompile 8 times
    variant = tiny_config(**VARIANTS[name])
    model = lively(variant)
    codes, labels = random_inputs(variant)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(codes, labels), model(codes, labels))


@pytest.mark.skipif(shutil.which("g++") is None, reason="the real compiler needs g++")
@pytest.mark.parametrize("name", REALLY_COMPILED)
def test_the_real_compiler_gives_the_same_logits_loss_and_gradients(name):
    torch._dynamo.reset()
    variant = tiny_config(**VARIANTS[name], **NO_DROPOUT)
    model = lively(variant).train()
    codes, labels = random_inputs(variant)
    found = []
    for forward in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        logits = forward(codes, labels)
        (logits.square().mean() + model.auxiliary_loss()).backward()
        found.append((logits, [p.grad for p in model.parameters()], model.expert_load()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


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
    x, v, rows = torch.randn(2, 4, 16), torch.randn(2, 4, 2, 8), torch.randn(2, 4, 2, 3, 8)
    g_0, g_i = mixer.gates(x)
    assert torch.equal(g_0, torch.ones(2, 4, 2, 1)) and torch.equal(g_i, torch.ones(2, 4, 2, 3))
    expected = v + rows.sum(3)
    torch.testing.assert_close(mixer(x, v, rows), expected)


def test_class_rows_are_zero_unless_asked_for():
    labels = torch.tensor([0, 3, 5])
    off = Transformer(tiny_config(memory={"kind": "move", "slots": 2}))
    on = Transformer(tiny_config(memory={"kind": "move", "slots": 2, "class_rows": True}))
    assert off.memory.class_rows(labels).abs().max() == 0
    assert on.memory.class_rows(labels).shape == (3, 1, 2, 2, 8)
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
    with count_flops() as counter:
        model(codes, labels)
    # the counter takes attention over all T positions for each of the T tokens
    tokens = 2 * variant.seq_len
    expected = tokens * (token_flops(model, context=variant.seq_len) - unseen(model))
    assert counter.get_total_flops() == expected + padding(model, tokens)


@contextmanager
def count_flops():
    """Torch's FLOP counter, with attention as matrix products.

    Which fused attention kernels the counter knows depends on torch's version; it knows matrix
    products in all of them.
    """
    math_attention = sdpa_kernel(SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, math_attention, torch.no_grad():
        yield counter


def unseen(model):
    """FLOPs of a token that torch's counter does not see."""
    total = 0
    for module in model.modules():
        if isinstance(module, GatedMixer):
            total += module.own_flops(0)  # products by elements
        elif isinstance(module, ProductKeyMemory):
            total += 2 * module.table_reads()  # a weighted sum by embedding_bag
        elif isinstance(module, PEER):
            total += module.table_reads()  # the same for v, half of what is read
    return total


def padding(model, tokens):
    """FLOPs of the rows that fill the experts' blocks up."""
    total = 0
    for module in model.modules():
        if isinstance(module, MoE):
            rows = tokens * module.spec.top_k
            size, count = blocks(rows, module.spec.n_experts)
            total += (size * count - rows) * 6 * module.width * module.spec.hidden
    return total


def test_decoding_flops_agree_with_torchs_counter(variant):
    variant = variant.model_copy(update={"grid": (2, 2)})  # counting a product takes milliseconds
    model = lively(variant, dtype=torch.float32)
    codes, labels = random_inputs(variant, batch=2)
    with count_flops() as counter:
        decode_all(model, codes, labels)
    per_token = token_flops(model, (variant.seq_len + 1) / 2, decoding=True) - unseen(model)
    expected = variant.seq_len * (2 * per_token + padding(model, 2))
    # a sum over one position, the first, is a product by elements, which it does not count
    latent = [m for m in model.modules() if isinstance(m, MultiHeadLatentAttention)]
    first = [2 * m.spec.kv_rank * variant.n_head + 2 * m.value_mixer.value_width for m in latent]
    assert counter.get_total_flops() == pytest.approx(expected - 2 * sum(first), rel=1e-12)


def test_router_overhead_is_the_papers_formula():
    config = ModelConfig.model_validate({"size": "B", "memory": {"kind": "move", "slots": 6}})
    cost = model_cost(config)
    per_layer = 2 * config.width * config.n_head * (6 + 1)  # 2 d H (M + 1)
    assert cost.router_share * cost.flops_per_token == pytest.approx(config.n_layer * per_layer)


def test_cache_and_table_bytes_of_each_layer():
    def cost(name):
        return model_cost(tiny_config(**VARIANTS[name]), torch.bfloat16)

    mha = cost("mha-none-swiglu")
    assert mha.cache_bytes_per_token == mha.mha_cache_bytes_per_token == 2 * 2 * 16 * 2
    assert "with MHA" not in describe_cost(mha, "bfloat16")
    mla = cost("mla-move-3-class-rows-product_key")
    assert mla.cache_bytes_per_token == 2 * (12 + 4) * 2
    assert mla.mha_cache_bytes_per_token == mha.cache_bytes_per_token
    assert mla.bank_bytes_per_token == 3 * 12 * 2
    assert mla.bank_bytes_per_layer == (3 * 12 * 2,) * 2
    assert mla.table_bytes_per_layer == (2 * 3 * 16 * 2,) * 2  # 2 look-ups of 3 rows
    text = describe_cost(mla, "bfloat16")
    assert "64  (bfloat16; with MHA 128)" in text and "384  (bfloat16, rows that" in text
    lave = cost("mla-lave-x1-swiglu")
    assert lave.bank_bytes_per_layer == (0, 16 * 2) and not any(lave.table_bytes_per_layer)
    assert "32  (1 of 2 layers)" in describe_cost(lave, "bfloat16")


def test_experts_are_chosen_in_float32_under_autocast():
    model = lively(tiny_config(**VARIANTS["mha-none-moe"]), dtype=torch.float32)
    ffn = next(module for module in model.modules() if isinstance(module, MoE))
    x, seen = torch.randn(2, 6, 16), []
    ffn.expert_router.register_forward_hook(lambda *call: seen.append(call[-1]))
    with torch.no_grad():
        ffn(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert ffn(x).dtype == torch.bfloat16
        rounded = ffn.bfloat16()
        rounded(x.bfloat16())
    assert torch.equal(seen[0], seen[1]) and seen[2].dtype == torch.float32


def test_latents_of_any_width_go_without_a_memory_in_them():
    attention = {"kind": "mla", "kv_rank": 7, "rope_dim": 4}
    config = tiny_config(attention=attention, memory={"kind": "lave"})
    model = lively(config)
    codes, labels = random_inputs(config)
    with torch.no_grad():
        torch.testing.assert_close(decode_all(model, codes, labels), model(codes, labels))
    with pytest.raises(ValueError, match=r"attention\.kv_rank 7 over 2 heads"):
        tiny_config(attention=attention, memory={"kind": "move", "slots": 2})


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
