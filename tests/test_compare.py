"""Comparisons: what is comparable, the table, the plots; trainings run in this process here."""

from __future__ import annotations

import csv
import json
import math
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from moveimg.config import TrainConfig, load_config
from moveimg.training import compare as module
from moveimg.training.compare import compare, parse_seeds, plan
from moveimg.training.comparison import half_interval, summarize
from moveimg.training.generator import train_generator
from tests.test_training import digits  # noqa: F401

CPU = torch.device("cpu")
TINY = "model: {n_layer: 2, n_head: 2, width: 16"
MOE = "{kind: moe, n_experts: 4, hidden: 8, shared_hidden: 8}"
KEYS = "{kind: product_key, layers: [1], n_keys: 4, key_heads: 2, top_k: 2, key_width: 8}"
MODELS = {
    "dense": TINY + "}",
    "experts": f"{TINY}, memory: {{kind: move, slots: 2}}, ffn: {MOE}}}",
    "keys": f"{TINY}, attention: {{kind: mla, kv_rank: 8, rope_dim: 4}}, ffn: {KEYS}}}",
}


@pytest.fixture
def configs(digits, tmp_path):  # noqa: F811
    base = (
        f"out: unused\ndata: {{codes: {digits / 'codes'}, tokenizer: {digits / 'tokenizer'}}}\n"
        "steps: 4\nbatch_size: 8\nvalidate_every: 2\n"
    )
    (tmp_path / "base.yaml").write_text(base)
    for name, model in MODELS.items():
        (tmp_path / f"{name}.yaml").write_text(f"base: base.yaml\n{model}\n")
    return [tmp_path / f"{name}.yaml" for name in MODELS]


@pytest.fixture
def in_this_process(monkeypatch):
    """Trainings without the seconds that a new process takes; returns the list of those made."""
    made = []

    def run(command, **_):
        path, overrides = Path(command[4]), command[8::2]
        assert command[3] == "train" and set(command[7::2]) == {"--set"}
        config = load_config(path, TrainConfig, overrides)
        made.append((path.stem, config.seed))
        train_generator(config, CPU)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(module.subprocess, "run", run)
    return made


def test_every_kind_is_trained_and_stands_in_the_table(configs, tmp_path, in_this_process):
    out = tmp_path / "out"
    table = compare(configs, [0, 1], out, [], CPU)
    assert in_this_process == [(name, seed) for name in MODELS for seed in (0, 1)]
    lines = table.splitlines()
    assert len(lines) == 5 and all(line.count("|") == 11 for line in lines)
    report = json.loads((out / "table.json").read_text())
    assert report["settings"]["steps"] == 4 and report["hardware"]["device"] == "cpu"
    for row, found in zip(
        report["configs"], csv.DictReader((out / "table.csv").open()), strict=True
    ):
        assert row["name"] == found["name"]
        losses = [run["loss"] for run in row["runs"]]
        assert float(found["loss_mean"]) == pytest.approx(sum(losses) / 2)
        assert losses == [float(found["loss_seed0"]), float(found["loss_seed1"])]
        assert [step for step, _ in row["runs"][0]["curve"]] == [2, 4]
        assert row["peak_memory"] > 1e7 and row["steps_per_second"] > 0
        assert row["images_per_second"] > 0 and row["active"] <= row["parameters"]
    for name in ("curves", "parameters", "flops"):
        assert Image.open(out / f"{name}.png").width > 300

    # finished runs are read, not repeated, and give the same table
    in_this_process.clear()
    assert compare(configs, [0, 1], out, [], CPU) == table and not in_this_process
    # a key that is newer than a run had its default then
    described = out / "dense-seed0" / "training" / "config.yaml"
    settings = yaml.safe_load(described.read_text())
    del settings["optimizer"]["table_lr"], settings["model"]["norm_eps"]
    described.write_text(yaml.safe_dump(settings))
    assert compare(configs, [0, 1], out, [], CPU) == table and not in_this_process
    # a new seed trains what is missing
    compare(configs[:1], [0, 2], out, [], CPU)
    assert in_this_process == [("dense", 2)]


def test_only_the_model_may_differ(configs, tmp_path):
    with configs[1].open("a") as file:
        file.write("optimizer: {lr: 1e-3}\n")
    with pytest.raises(ValueError, match="dense and experts differ in optimizer"):
        plan(configs, [0], tmp_path / "out", [])
    with pytest.raises(ValueError, match="same file name"):
        plan([configs[0], configs[0]], [0], tmp_path / "out", [])


def test_a_training_that_fails_is_named(configs, tmp_path, monkeypatch):
    def fail(command, stdout, **_):
        stdout.write("some progress\nerror: the codes are gone\n")
        stdout.flush()
        return subprocess.CompletedProcess(command, 2)

    monkeypatch.setattr(module.subprocess, "run", fail)
    with pytest.raises(ValueError, match=r"dense, seed 3: the codes are gone .*dense-seed3\.log"):
        compare(configs, [3], tmp_path / "out", [], CPU)
    with pytest.raises(ValueError, match="jobs 0"):
        compare(configs, [3], tmp_path / "out", [], CPU, jobs=0)


def test_differences_are_paired_by_seed():
    def result(name, losses):
        runs = [
            {"seed": s, "loss": loss, "steps_per_second": 1.0, "peak_memory": None}
            for s, loss in enumerate(losses)
        ]
        return {"name": name, "runs": runs}

    first, second = summarize([result("a", [1.0, 2.0, 3.0]), result("b", [0.9, 1.9, 2.9])])
    assert first["loss_std"] == pytest.approx(1.0) and first["difference"] == 0
    assert second["difference"] == pytest.approx(-0.1)
    assert second["interval"] == pytest.approx(0, abs=1e-12)  # each seed gained the same
    assert summarize([result("a", [1.0])])[0]["interval"] is None
    # Student's t with two degrees of freedom: 4.303
    assert half_interval([-1.0, 0.0, 1.0]) == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)


def test_seeds_are_read():
    assert parse_seeds("0, 2,1") == [0, 2, 1]
    for wrong in ("", "a", "1,1", "-1"):
        with pytest.raises(ValueError, match="different whole numbers"):
            parse_seeds(wrong)
