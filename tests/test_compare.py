"""Comparisons: what is comparable, the table, the plots, what ends early. Nothing is trained here:
a stand-in leaves a run's folder as a training would (test_cli.py has a real one)."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import threading
import time

import pytest
import torch
import yaml
from PIL import Image

from moveimg.checkpoint import save_weights
from moveimg.files import write_json, write_text
from moveimg.model import Transformer
from moveimg.training import compare as module
from moveimg.training import comparison_jobs as jobs
from moveimg.training.compare import compare, parse_seeds
from moveimg.training.comparison import half_interval, summarize
from moveimg.training.comparison_plots import plot_all
from moveimg.training.comparison_runs import outcome, plan

CPU = torch.device("cpu")
SIZE = "n_layer: 2, n_head: 2, width: 16, codebook_size: 8, n_classes: 3, grid: [2, 2]"
MOE = "{kind: moe, n_experts: 4, hidden: 8, shared_hidden: 8}"
KEYS = "{kind: product_key, layers: [1], n_keys: 4, key_heads: 2, top_k: 2, key_width: 8}"
MODELS = {
    "dense": f"model: {{{SIZE}}}",
    "experts": f"model: {{{SIZE}, memory: {{kind: move, slots: 2}}, ffn: {MOE}}}",
    "keys": f"model: {{{SIZE}, attention: {{kind: mla, kv_rank: 8, rope_dim: 4}}, ffn: {KEYS}}}",
}


@pytest.fixture
def configs(tmp_path):
    base = "out: unused\ndata: {codes: c, tokenizer: t}\nsteps: 4\nbatch_size: 8\n"
    (tmp_path / "base.yaml").write_text(base)
    for name, model in MODELS.items():
        (tmp_path / f"{name}.yaml").write_text(f"base: base.yaml\n{model}\n")
    return [tmp_path / f"{name}.yaml" for name in MODELS]


def leave(run, exported=4):
    """A run's folder after its last measurement, with the model of step `exported`."""
    logs = run.directory / "training"
    write_text(logs / "config.yaml", yaml.safe_dump(run.config.model_dump(mode="json")))
    lines = [
        {"step": step, "seconds": step / 2, "peak_memory": memory, "loss": 2 / step + run.seed}
        for step, memory in ((2, 3 * 2**20), (4, 2**20))
    ]
    write_text(logs / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    torch.manual_seed(run.seed)
    save_weights(Transformer(run.config.model), run.directory / "model.safetensors")
    model = run.config.model.model_dump(mode="json")
    about = {"format": 1, "model": model, "about": {"step": exported}}
    write_json(run.directory / "config.json", about)


@pytest.fixture
def trained(monkeypatch):
    """A stand-in for trainings; returns the list of those made. Seed 13 fails."""
    made = []

    def train(run, *_):
        made.append((run.name, run.seed))
        if run.seed == 13:
            return f"{run.name}, seed 13: the codes are gone"
        leave(run)
        return None

    monkeypatch.setattr(jobs, "train_one", train)
    monkeypatch.setattr(module, "plot_all", lambda *_: None)  # takes seconds
    return made


def test_every_kind_stands_in_the_table(configs, tmp_path, trained):
    out = tmp_path / "out"
    table = compare(configs, [0, 1], out, [], CPU)
    assert trained == [(name, seed) for name in MODELS for seed in (0, 1)]
    lines = table.splitlines()
    assert len(lines) == 5 and all(line.count("|") == 13 for line in lines)
    report = json.loads((out / "table.json").read_text())
    assert report["settings"]["steps"] == 4 and report["hardware"]["device"] == "cpu"
    assert "resident" in report["columns"]["peak_memory"]
    for row, found in zip(
        report["configs"], csv.DictReader((out / "table.csv").open()), strict=True
    ):
        assert row["name"] == found["name"]
        losses = [run["loss"] for run in row["runs"]]
        assert float(found["loss_mean"]) == pytest.approx(sum(losses) / 2)
        assert losses == [float(found["loss_seed0"]), float(found["loss_seed1"])]
        assert row["runs"][0]["curve"] == [[2, 1.0], [4, 0.5]]
        assert row["peak_memory"] == 3 * 2**20 and row["steps_per_second"] == 2
        assert row["images_per_second"] > 0 and row["active"] <= row["parameters"]
        line = next(line for line in lines if line.startswith(f"| {row['name']} |"))
        for part in (f"{row['active']:,}", f"{row['cache_bytes_per_token']:,}",
                     f"{row['flops_per_token'] / 1e6:.3f}", " 3 |"):  # fmt: skip
            assert part in line
    plot_all(report["configs"], out)
    for name in ("curves", "parameters", "flops"):
        assert Image.open(out / f"{name}.png").width > 300

    # finished runs are read, not repeated, and give the same table
    trained.clear()
    assert compare(configs, [0, 1], out, [], CPU) == table and not trained
    # a key that is newer than a run had its default then
    described = out / "dense-seed0" / "training" / "config.yaml"
    settings = yaml.safe_load(described.read_text())
    del settings["optimizer"]["table_lr"], settings["model"]["norm_eps"]
    described.write_text(yaml.safe_dump(settings))
    assert compare(configs, [0, 1], out, [], CPU) == table and not trained
    # a new seed trains what is missing
    compare(configs[:1], [0, 2], out, [], CPU)
    assert trained == [("dense", 2)]


def test_a_run_killed_before_its_last_export_is_not_finished(configs, tmp_path):
    (run,) = plan(configs[:1], [0], tmp_path / "out", [])
    assert not run.finished()
    leave(run, exported=2)
    assert run.measurements()[-1]["step"] == 4 and not run.finished()
    leave(run)
    assert run.finished()
    assert outcome([run])["runs"][0]["peak_memory"] == 3 * 2**20  # of an earlier process
    (run.directory / "model.safetensors").unlink()
    assert not run.finished()


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("optimizer: {lr: 1e-3}\n", r"optimizer\.lr \(0\.0001, 0\.001\)"),
        ("model: {ffn_dropout: 0.3}\n", r"model\.ffn_dropout \(0\.1, 0\.3\)"),
        ("model: {norm_eps: 1e-6}\n", r"model\.norm_eps"),
        ("model: {grid: [1, 4]}\n", r"model\.grid"),
    ],
)
def test_only_slots_and_size_may_differ(configs, tmp_path, text, key):
    (tmp_path / "other.yaml").write_text(f"base: dense.yaml\n{text}")
    with pytest.raises(ValueError, match=f"dense and other differ in {key}"):
        plan([configs[0], tmp_path / "other.yaml"], [0], tmp_path / "out", [])


def test_sizes_may_differ_and_names_may_not_be_the_same(configs, tmp_path):
    (tmp_path / "wide.yaml").write_text("base: dense.yaml\nmodel: {width: 32, n_layer: 1}\n")
    assert len(plan([configs[0], tmp_path / "wide.yaml"], [0, 1], tmp_path / "out", [])) == 4
    # left out, what the codes decide is the same for all
    (tmp_path / "open.yaml").write_text(
        "base: base.yaml\nmodel: {n_layer: 2, n_head: 2, width: 16}\n"
    )
    assert len(plan([configs[0], tmp_path / "open.yaml"], [0], tmp_path / "out", [])) == 2
    with pytest.raises(ValueError, match="same file name"):
        plan([configs[0], configs[0]], [0], tmp_path / "out", [])


def test_a_folder_with_another_run_is_told_before_anything_is_trained(configs, tmp_path, trained):
    out = tmp_path / "out"
    leave(plan(configs, [0], out, [])[2])
    with pytest.raises(ValueError, match=r"keys-seed0.*steps: 4, now 5.*another --out, or remove"):
        compare(configs, [0], out, ["steps=5"], CPU)
    assert not trained


def test_a_training_that_fails_does_not_lose_the_others(configs, tmp_path, trained):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"dense, seed 13: the codes are gone$"):
        compare(configs[:1], [13], out, [], CPU)
    assert not (out / "table.md").exists()
    for run in plan(configs[1:2], [13], out, []):
        leave(run)
    trained.clear()
    with pytest.raises(ValueError, match=r"dense, seed 13: .* \(and 1 more\); the table of what"):
        compare(configs, [0, 13], out, [], CPU)
    assert trained == [("dense", 0), ("dense", 13), ("experts", 0), ("keys", 0), ("keys", 13)]
    report = json.loads((out / "table.json").read_text())
    assert [row["name"] for row in report["configs"]] == ["experts"]
    with pytest.raises(ValueError, match="jobs 0"):
        compare(configs, [3], out, [], CPU, jobs=0)


def test_the_table_grows_with_every_config(configs, tmp_path, trained, monkeypatch):
    train, seen = jobs.train_one, []

    def watching(run, *rest):
        for _ in range(200):  # the table is written beside the next training
            path = tmp_path / "out" / "table.json"
            rows = json.loads(path.read_text())["configs"] if path.exists() else []
            if len(rows) == list(MODELS).index(run.name):
                break
            time.sleep(0.05)
        seen.append([(row["name"], row["images_per_second"]) for row in rows])
        return train(run, *rest)

    monkeypatch.setattr(jobs, "train_one", watching)
    compare(configs, [0], tmp_path / "out", [], CPU)
    assert seen == [[], [("dense", None)], [("dense", None), ("experts", None)]]


STANDS = "trap 'echo stopped; kill $!; exit 143' TERM; echo up; sleep 60 & wait"


@pytest.mark.skipif(os.name != "posix", reason="a POSIX shell stands for a training")
def test_what_ends_a_comparison_ends_its_trainings(configs, tmp_path, monkeypatch):
    logs = tmp_path / "out" / "logs"

    def stand(run, overrides, device, environment, logs, processes):
        return str(processes.run(["sh", "-c", STANDS], logs / f"{run.name}.log", environment))

    def kill():
        both = [logs / "dense.log", logs / "experts.log"]
        for _ in range(600):
            if all(path.exists() and path.read_text() for path in both):
                break
            time.sleep(0.05)
        if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:  # else this would end the tests
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(jobs, "train_one", stand)
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(SystemExit) as stopped:
        compare(configs, [0], tmp_path / "out", [], CPU, jobs=2)
    thread.join()
    assert stopped.value.code == 128 + signal.SIGTERM
    assert [path.read_text() for path in sorted(logs.iterdir())] == ["up\nstopped\n"] * 2
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_training_is_named_with_the_last_line_it_wrote(configs, tmp_path):
    (run,) = plan(configs[:1], [3], tmp_path / "out", [])
    logs = tmp_path / "out" / "logs"

    class Failing(jobs.Processes):
        def run(self, command, log, environment):
            assert command[3:5] == ["train", str(configs[0])]
            assert command[-4:] == [
                "--set", "seed=3", "--set", f'out="{tmp_path}/out/dense-seed3"'
            ]  # fmt: skip
            write_text(log, "some progress\nerror: the codes are gone\n")
            return 2

    found = jobs.train_one(run, [], CPU, {}, logs, Failing())
    assert found == f"dense, seed 3: the codes are gone (see {logs / 'dense-seed3.log'})"


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
