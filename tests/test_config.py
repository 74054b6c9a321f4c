"""Configs: inheritance, overrides, errors on one line, and every shipped file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

import tokenizer as vq
from moveimg.config import (
    ModelConfig,
    SamplingSettings,
    TokenizerTrainConfig,
    TrainConfig,
    load_config,
)
from moveimg.errors import validate
from moveimg.model import Transformer

CONFIGS = Path(__file__).parents[1] / "configs"
SHIPPED = sorted(CONFIGS.glob("*.yaml"))

BASE = """
out: runs/x
data: {codes: c, tokenizer: t}
model: {size: B, memory: {kind: move, slots: 6}}
steps: 10
"""


@pytest.fixture
def base(tmp_path):
    (tmp_path / "base.yaml").write_text(BASE)
    return tmp_path


def child(folder, text):
    (folder / "child.yaml").write_text(text)
    return folder / "child.yaml"


def test_a_child_changes_only_what_it_names(base):
    config = load_config(child(base, "base: base.yaml\nmodel: {size: L}\n"), TrainConfig)
    assert config.model.n_layer == 24 and config.model.memory.slots == 6
    assert config.steps == 10


def test_a_new_kind_starts_afresh(base):
    path = child(base, "base: base.yaml\nmodel: {memory: {kind: lave}}\n")
    assert load_config(path, TrainConfig).model.memory.layers == "alternate"


def test_overrides_are_yaml_and_win(base):
    path = child(base, "base: base.yaml\n")
    chosen = ["model.memory.slots=3", "optimizer.lr=1e-3", "optimizer.betas=[0.8, 0.9]"]
    config = load_config(path, TrainConfig, chosen)
    assert config.model.memory.slots == 3
    assert config.optimizer.lr == 1e-3 and config.optimizer.betas == (0.8, 0.9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: base.yaml\nmodel: {memori: {kind: none}}", "model.memori: unknown key"),
        ("base: base.yaml\nmodel: {size: Q}", "unknown size 'Q', expected one of digits, B, L"),
        ("base: base.yaml\nmodel: {memory: {slots: 0}}", "greater than 0 (got 0)"),
        ("base: base.yaml\nmodel: {memory: {kind: mov}}", "'none', 'lave', 'move'"),
        ("base: base.yaml\nmodel: {n_head: 7}", "width 768 over 7 heads"),
        ("base: base.yaml\nmodel: {memory: {kind: lave, layers: [12]}}", "0..11"),
        (
            "base: base.yaml\nmodel: {attention: {kind: mla, kv_rank: 100, rope_dim: 32}}",
            "attention.kv_rank 100 over 12 heads",
        ),
        (
            "base: base.yaml\nmodel: {attention: {kind: mla, kv_rank: 192, rope_dim: 6}}",
            "attention.rope_dim 6 must be a multiple of 4",
        ),
        (
            "base: base.yaml\nmodel: {ffn: {kind: moe, n_experts: 4, top_k: 5, hidden: 8, "
            "shared_hidden: 8}}",
            "ffn.top_k 5: expected 1..n_experts (4)",
        ),
        (
            "base: base.yaml\nmodel: {ffn: {kind: moe, n_experts: 4, top_k: 1, hidden: 8, "
            "shared_hidden: 8}}",
            "greater than or equal to 2 (got 1)",
        ),
        (
            "base: base.yaml\nmodel: {ffn: {kind: product_key, layers: [1, 1]}}",
            "ffn.layers [1, 1] must be distinct layer indices in 0..11",
        ),
        (
            "base: base.yaml\nmodel: {ffn: {kind: peer, n_keys: 8}}",
            "ffn.top_k 16: expected 1..n_keys (8)",
        ),
        ("base: base.yaml\nmodel: {ffn: {kind: product_key, key_width: 5}}", "must be even"),
        ("base: base.yaml\ndata: {images: {source: digits}}", "either `codes`"),
        ("base: base.yaml\nsteps: nan", "steps"),
        ("base: child.yaml", "`base` leads back to itself"),
        ("base: nowhere.yaml", "nowhere.yaml: no such config file"),
        ("a: [", "not valid YAML"),
        ("base: base.yaml\nsteps: 3\nsteps: 4", "'steps' is given twice"),
        ("- 1", "expected keys and values, found list"),
    ],
)
def test_bad_configs_get_one_line(base, text, message):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_config(child(base, text), TrainConfig)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("override", ["steps", "=3", "steps=[", "model.size=Q"])
def test_bad_overrides_get_one_line(base, override):
    with pytest.raises(ValueError) as error:
        load_config(child(base, "base: base.yaml"), TrainConfig, [override])
    assert "\n" not in str(error.value)


def test_configs_are_frozen_and_survive_json():
    config = ModelConfig.model_validate({"size": "digits", "memory": {"kind": "move", "slots": 3}})
    with pytest.raises(Exception, match="frozen"):
        config.n_layer = 3  # type: ignore[misc]
    assert validate(ModelConfig, config.model_dump(mode="json"), "") == config
    settings = SamplingSettings(cfg_scale=1.5)
    assert validate(SamplingSettings, settings.model_dump(), "") == settings


# The large ones are built by tests/test_budget.py, which works out what they take.
@pytest.mark.parametrize(
    "path",
    [path for path in SHIPPED if not path.match("imagenet-*-*-*.yaml")],
    ids=lambda path: path.stem,
)
def test_every_shipped_config_builds(path):
    if "tokenizer" in (yaml.safe_load(path.read_text()) or {}):
        settings = vq.parse_config(
            {"kind": "vq"} | load_config(path, TokenizerTrainConfig).tokenizer, path.name
        )
        with torch.device("meta"):
            assert sum(p.numel() for p in vq.build(settings).parameters()) > 0
    else:
        with torch.device("meta"):
            Transformer(load_config(path, TrainConfig).model)
