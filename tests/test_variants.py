"""What only some variants have: experts, tables, latent caches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml

from moveimg.config import ModelConfig, OptimizerConfig
from moveimg.model import Transformer
from moveimg.model.attention import ATTENTIONS
from moveimg.model.cost import active_parameters, model_cost
from moveimg.model.feedforward import FEEDFORWARDS
from moveimg.model.memory import MEMORIES
from moveimg.model.moe import arrange, balance_loss, blocks, shares
from moveimg.training.optimizer import clip_gradients, make_optimizers, set_rate
from tests import conftest, reference_variants
from tests.conftest import VARIANTS, lively, random_inputs, tiny_config

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize(
    ("slot", "classes", "tables"),
    [
        ("attention", ATTENTIONS, "ATTENTIONS"),
        ("memory", MEMORIES, "MEMORIES"),
        ("ffn", FEEDFORWARDS, "FEEDFORWARDS"),
    ],
)
def test_every_kind_has_a_class_is_tried_has_a_reference_and_a_config(slot, classes, tables):
    field = ModelConfig.model_fields[slot]
    kinds = {option.model_fields["kind"].default for option in get_args(field.annotation)}
    assert kinds == set(classes)
    assert kinds == {settings["kind"] for settings in getattr(conftest, tables).values()}
    assert kinds == set(getattr(reference_variants, tables))
    shipped = [yaml.safe_load(path.read_text()).get("model", {}) for path in CONFIGS.glob("*.yaml")]
    shown = {model.get(slot, {}).get("kind") for model in shipped}
    assert kinds - {field.default.kind} <= shown


@pytest.mark.parametrize("rows", [1, 2, 7, 48, 300])
@pytest.mark.parametrize("skew", [0.0, 0.5, 1.0])
def test_every_row_gets_a_place_of_its_own_in_a_block_of_its_expert(rows, skew):
    g = torch.Generator().manual_seed(rows)
    experts = torch.randint(5, (rows,), generator=g)
    experts[torch.rand(rows, generator=g) < skew] = 3  # up to all rows at one expert
    size, count = blocks(rows, 5)
    place, owner = arrange(experts, 5, size, count)
    assert len(place.unique()) == rows and place.max() < size * count
    assert torch.equal(owner[place // size], experts)


def test_balance_is_one_when_even_and_more_when_not():
    even = torch.full((8, 4), 0.25)
    chosen = torch.arange(16).view(8, 2) % 4
    assert balance_loss(even, shares(chosen, 4)) == 1
    uneven = torch.tensor([0.7, 0.1, 0.1, 0.1]).expand(8, 4)
    assert balance_loss(uneven, shares(torch.tensor([[0, 1]] * 8), 4)) == pytest.approx(1.6)


def test_the_balance_loss_is_kept_in_train_mode_alone_and_handed_out_once():
    config = tiny_config(**VARIANTS["mha-none-moe"])
    model = lively(config)
    codes, labels = random_inputs(config)
    model(codes, labels)
    assert model.auxiliary_loss() == 0 and model.expert_load() is None
    model.train()(codes, labels)
    load = model.expert_load()
    assert load.shape == (2, 4)
    torch.testing.assert_close(load.sum(-1), torch.ones(2))
    loss = model.auxiliary_loss()
    assert loss > 2 * 0.01 * 0.5 and loss.requires_grad
    assert model.auxiliary_loss() == 0
    copy.deepcopy(model)  # no graph is left that could not be copied
    model(codes, labels)
    copy.deepcopy(model.eval())  # nor where nobody took the loss
    assert model.auxiliary_loss() == 0


def test_activation_checkpointing_keeps_no_balance_loss_and_changes_no_gradient():
    config = tiny_config(
        **VARIANTS["mha-none-moe"], token_dropout=0, resid_dropout=0, ffn_dropout=0
    )
    model = lively(config).train()
    found = []
    for model.checkpointing in (False, True):
        model.zero_grad()
        loss, _ = model(*random_inputs(config), loss=True)
        (loss + model.auxiliary_loss()).backward()
        assert model.auxiliary_loss() == 0  # of the pass that is computed again, neither
        found.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*found)


def test_value_memory_of_a_width_that_heads_cannot_share_is_refused():
    config = tiny_config(memory={"kind": "move", "slots": 2})
    with pytest.raises(ValueError, match="width 15 over 2 heads"):
        MEMORIES["move"](config, config.memory, 15)


def test_product_key_layers_share_one_value_table():
    config = tiny_config(n_layer=3, **VARIANTS["mha-move-product_key-listed"])
    config = ModelConfig.model_validate(
        config.model_dump() | {"ffn": config.ffn.model_dump() | {"layers": [0, 2], "n_keys": 5}}
    )
    model = Transformer(config)
    assert [type(ffn).__name__ for ffn in model.feedforwards()] == [
        "ProductKeyMemory", "SwiGLU", "ProductKeyMemory",
    ]  # fmt: skip
    tables = [name for name, p in model.named_parameters() if p.shape == (25, 10)]
    assert tables == ["shared_ffn.weight"]


def test_latent_cache_holds_latent_and_rotary_key_alone():
    for name, per_layer in (
        ("mla-none-swiglu", [16, 16]),
        ("mla-move-3-class-rows-swiglu", [16, 16]),
        ("mla-lave-x1-swiglu", [16, 16 + 16]),  # and what is added to the values
        ("mla-lave-x2-gated-swiglu", [16 + 16 + 2] * 2),  # and a g_0 a head
        ("mha-move-3-class-rows-swiglu", [32, 32]),
    ):
        cache = Transformer(tiny_config(**VARIANTS[name])).make_cache(3)
        assert [layer.numel_per_token() for layer in cache.layers] == per_layer, name


def test_a_latent_cache_takes_several_positions_at_once():
    config = tiny_config(**VARIANTS["mla-lave-x2-gated-swiglu"])
    attention = lively(config).attentions()[0]
    x, rows = torch.randn(2, 6, 16).double(), torch.randn(2, 6, 2, 2, 8).double()
    rope = lively(config).rope()[:6]
    cache = attention.make_cache(2, 6, like=x)
    parts = [
        attention(x[:, a:b], rows[:, a:b], rope[a:b], cache) for a, b in ((0, 3), (3, 4), (4, 6))
    ]
    whole = attention(x, rows, rope)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-12, atol=1e-12)


def test_active_parameters():
    def active(name, **changes):
        model = Transformer(tiny_config(**VARIANTS[name], **changes))
        return model, active_parameters(model)

    dense, count = active("mha-none-swiglu")
    tables = dense.code_embedding.weight.numel() + dense.label_embedding.weight.numel()
    assert count == sum(p.numel() for p in dense.parameters()) - tables + 16
    # two of four experts of 3 * 16 * 8 in each of two layers lie idle
    moe, count = active("mha-none-moe")
    assert count == sum(p.numel() for p in moe.parameters()) - tables + 16 - 2 * 2 * 384
    # 2 look-ups of 3 values of 16 in each layer, out of 16 values
    keys, count = active("mha-none-product_key")
    everything = sum(p.numel() for p in keys.parameters())
    assert count == everything - tables + 16 - 16 * 16 + 2 * 2 * 3 * 16
    assert model_cost(keys.config).table_bytes_per_layer == (2 * 3 * 16 * 4,) * 2
    move, count = active("mha-move-3-class-rows-swiglu")
    everything = sum(p.numel() for p in move.parameters())
    bank = sum(p.numel() for p in move.memory.parameters())
    assert count == everything - tables + 16 - bank + 3 * 16


def test_value_tables_have_a_rate_and_a_clip_of_their_own():
    model = lively(tiny_config(**VARIANTS["mha-none-product_key"]), dtype=torch.float32)
    config = OptimizerConfig(lr=0.1, table_lr=1.0, clip=1.0, table_clip=0.5)
    optimizers = make_optimizers(model, config)
    set_rate(optimizers, 0.01)
    table = model.shared_ffn.weight
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for parameter in model.parameters():
        assert rates[id(parameter)] == pytest.approx(0.1 if parameter is table else 0.01)
        parameter.grad = torch.full_like(parameter, 10.0)
    clip_gradients(optimizers, config)
    others = [p.grad.norm() for p in model.parameters() if p is not table]
    assert table.grad.norm() == pytest.approx(0.5)
    assert torch.stack(others).norm() == pytest.approx(1.0)
