"""Properties of some variants alone: experts, tables, latent caches; how to add a variant."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml

from moveimg.config import ModelConfig
from moveimg.model.attention import ATTENTIONS
from moveimg.model.feedforward import FEEDFORWARDS
from moveimg.model.memory import MEMORIES
from moveimg.model.moe import block_shape, sort_by_expert
from tests import conftest, reference
from tests.conftest import VARIANTS, lively, random_inputs, tiny_config

CONFIGS = Path(__file__).parents[1] / "configs"


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


@pytest.mark.parametrize("rows", [1, 7, 48, 300])
@pytest.mark.parametrize("skew", [0.0, 0.5, 1.0])
def test_every_row_has_its_own_place_in_a_block_of_its_expert(rows, skew):
    g = torch.Generator().manual_seed(rows)
    experts = torch.randint(5, (rows,), generator=g)
    experts[torch.rand(rows, generator=g) < skew] = 3  # up to all rows at one expert
    size, count = block_shape(rows, 5)
    place, owner = sort_by_expert(experts, 5, size, count)
    assert len(place.unique()) == rows and place.max() < size * count
    assert torch.equal(owner[place // size], experts)


def test_the_auxiliary_loss_exists_in_train_mode_alone_and_is_returned_once():
    model = lively(tiny_config(**VARIANTS["mha-none-moe"]))
    codes, labels = random_inputs(model.config)
    model(codes, labels)
    assert model.auxiliary_loss() == 0 and model.expert_load() is None
    model.train()(codes, labels)
    load = model.expert_load()
    torch.testing.assert_close(load.sum(-1), torch.ones(2))
    loss = model.auxiliary_loss()
    assert loss > 2 * 0.01 * 0.5 and loss.requires_grad
    assert model.auxiliary_loss() == 0
    model(codes, labels)
    copy.deepcopy(model.eval())  # a graph could not be copied
    assert model.auxiliary_loss() == 0


def test_experts_are_chosen_in_float32_under_autocast(monkeypatch):
    ffn = lively(tiny_config(**VARIANTS["mha-none-moe"]), dtype=torch.float32).layers[0].ffn
    x, chosen = torch.randn(2, 6, 16), []
    experts = ffn._experts
    monkeypatch.setattr(ffn, "_experts", lambda *args: (chosen.append(args[1]), experts(*args))[1])
    with torch.no_grad():
        ffn(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert ffn(x).dtype == torch.bfloat16
    assert torch.equal(*chosen)
