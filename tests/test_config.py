"""Configs: inheritance, overrides, bounds, errors on one line, and every shipped file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

import tokenizer as vq
from moveimg.compare import list_runs, load_study
from moveimg.config import (
    TokenizerTrainConfig,
    TrainConfig,
    format_recipe,
    list_recipes,
    load_config,
)
from moveimg.model import Transformer

CONFIGS = Path(__file__).parents[1] / "configs"
SHIPPED = sorted(CONFIGS.glob("*.yaml"))
BASE = """
out: runs/x
data: {codes: c, tokenizer: t}
model: {size: B, memory: {kind: move, slots: 6}}
steps: 10
"""
MOE = "{kind: moe, n_experts: 4, hidden: 8, shared_hidden: 8, "


def load(tmp_path, text="", overrides=(), base="base: base.yaml\n"):
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "child.yaml").write_text(base + text)
    return load_config(tmp_path / "child.yaml", TrainConfig, overrides)


def test_inheritance_and_overrides(tmp_path):
    config = load(tmp_path, "model: {size: L}")
    assert config.model.n_layer == 24 and config.model.memory.slots == 6 and config.steps == 10
    fresh = load(tmp_path, "model: {memory: {kind: lave}}")  # a new kind keeps no key of the old
    assert fresh.model.memory.layers == "alternate"
    chosen = ["model.memory.slots=3", "optimizer.lr=1e-3", "optimizer.betas=[0.8, 0.9]"]
    config = load(tmp_path, overrides=chosen)
    assert config.model.memory.slots == 3
    assert config.optimizer.lr == 1e-3 and config.optimizer.betas == (0.8, 0.9)
    config = load(tmp_path, "steps: 7", base="base: digits-move-x2\n")  # a recipe
    assert config.steps == 7 and config.model.memory.slots == 6


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("model: {memori: {kind: none}}", "model.memori: unknown key"),
        ("model: {size: Q}", "'Q'"),
        ("model: {memory: {slots: 0}}", "(got 0)"),
        ("model: {memory: {kind: mov}}", "'none', 'lave', 'move'"),
        ("model: {n_head: 7}", "width 768 over 7 heads"),
        ("model: {width: 792}", "66"),
        ("model: {memory: {kind: lave, layers: [12]}}", "0..11"),
        ("model: {attention: {kind: mla, kv_rank: 100, rope_dim: 32}}", "kv_rank 100 over 12"),
        (f"model: {{ffn: {MOE} top_k: 5}}}}", "ffn.top_k 5: expected 1..n_experts (4)"),
        (f"model: {{ffn: {MOE} top_k: 1}}}}", "(got 1)"),
        ("model: {ffn: {kind: peer, n_keys: 8}}", "ffn.top_k 16: expected 1..n_keys (8)"),
        ("model: {grid: [500, 500]}", "500"),
        ("model: {grid: [256, 256]}", "[256, 256]"),
        ("model: {memory: {slots: 9223372036854775807}}", "9223372036854775807"),
        ("data: {images: {source: digits}}", "`codes`"),
        ("train: memory", "init_from"),
        ("sampling: {temperature: 1.0e-5}", "1e-05"),
        ("steps: nan", "steps"),
        ("steps: 3\nsteps: 4", "'steps'"),
        ("model: {b: [", "YAML"),
        ("base: child.yaml", "child.yaml"),
        ("base: no.yaml", "no.yaml"),
        ("base: 3", "3"),
        ("- 1", "child.yaml"),
        ("base: digits-mov", "digits-mov"),
        ("base: ../fashion-move", "fashion-move"),
        ("base: digits-tokenizer-move", "digits-tokenizer"),
        ("base: digits-lave-x3", "got 3"),
        ("base: digits-mla-x2", "digits-mla-x2"),
        ("base: digits-move-x999", "2997"),
        ("base: digits-move-x0", "x0"),
        ("base: imagenet-b-512-move-x1", "imagenet-b-512"),
        ("--set steps", "steps"),
        ("--set =3", "=3"),
        ("--set steps=[", "YAML"),
    ],
)
def test_bad_configs_get_one_line(tmp_path, text, value):
    overrides = [text.removeprefix("--set ")] if text.startswith("--set") else []
    text = "" if overrides else text
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        whole = text.startswith(("base", "- "))
        load(tmp_path, text, overrides, **({"base": ""} if whole else {}))
    assert value in str(error.value) and "\n" not in str(error.value)


def numbers(schema, path=()):
    """Every number of a JSON schema, as (name, its own schema)."""
    if isinstance(schema, dict):
        if schema.get("type") in ("integer", "number"):
            yield ".".join(path), schema
        for key, value in schema.items():
            yield from numbers(value, (*path, key))
    elif isinstance(schema, list):
        for value in schema:
            yield from numbers(value, path)


@pytest.mark.parametrize("cls", [TrainConfig, TokenizerTrainConfig])
def test_every_number_is_bounded_where_it_is_declared(cls):
    found = list(numbers(cls.model_json_schema()))
    assert len(found) > 20
    for name, schema in found:
        assert schema.keys() & {"maximum", "exclusiveMaximum", "enum"}, name
        assert schema.keys() & {"minimum", "exclusiveMinimum", "enum"}, name


def test_names_put_recipes_together(tmp_path):
    def model(name):
        return load_config(name, TrainConfig).model

    assert model("fashion") == model("fashion-move-x2") == load_config(
        CONFIGS / "fashion-move.yaml", TrainConfig).model  # fmt: skip
    assert model("digits").memory.slots == 3 and model("digits-mla-move-x2").memory.slots == 12
    assert model("digits-moe-lave-x2").memory.layers == "all"
    large = load_config("imagenet-3b-384-mla-move-x2", TrainConfig)
    assert large.model.width == 3200 and large.model.grid == (24, 24) and large.batch_size == 256
    assert large.distributed == "fsdp" and large.out == Path("runs/imagenet-3b-384-mla-move-x2")
    assert large.model.attention.kv_rank == 800 and large.model.memory.slots == 96
    small = load_config("imagenet-l-256-standard", TrainConfig)
    assert small.distributed == "ddp" and small.model.memory.kind == "none"
    (tmp_path / "printed.yaml").write_text(format_recipe("imagenet-l-256-mla-move-x2"))
    printed = load_config(tmp_path / "printed.yaml", TrainConfig)
    assert printed == load_config("imagenet-l-256-mla-move-x2", TrainConfig)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_builds(path):
    assert list_recipes()[path.stem].endswith(".")  # one whole sentence
    assert format_recipe(path.stem) == path.read_text(encoding="utf-8")
    with torch.device("meta"):
        if "tokenizer" in (yaml.safe_load(path.read_text()) or {}):
            settings = {"kind": "vq"} | load_config(path, TokenizerTrainConfig).tokenizer
            assert sum(
                p.numel()
                for p in vq.AutoencoderTokenizer(vq.parse_config(settings, "")).parameters()
            )
        elif path.stem == "comparison":
            for run in list_runs(load_study([path.stem], None), Path("none"), []):
                Transformer(run.config.model)
        else:
            Transformer(load_config(path, TrainConfig).model)


def test_the_wheel_holds_all_that_the_program_reads():
    """Hatchling's own list of files: models, recipes, the demo's page, and the marker of types."""
    builder = pytest.importorskip("hatchling.builders.wheel", reason="hatchling builds the wheel")
    wheel = builder.WheelBuilder(str(CONFIGS.parent))
    files = {file.distribution_path for file in wheel.recurse_included_files()}
    root, names = CONFIGS.parent, {f"moveimg/configs/{path.name}" for path in SHIPPED}
    for package in ("moveimg", "tokenizer"):
        names |= {path.relative_to(root).as_posix() for path in (root / package).rglob("*.*")}
    assert {"moveimg/py.typed", "moveimg/demo/page.css", "moveimg/configs/digits-mla.yaml"} <= names
    assert {name for name in names if not name.endswith(".pyc")} <= files
