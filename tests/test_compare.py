"""Comparisons: which configs are comparable, the table, plots, and ended trainings.

Nothing is trained here: a stand-in leaves a run's folder as a training would (test_cli.py has a
real one).
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time

import pytest
import torch
import yaml
from PIL import Image

from moveimg import compare as module
from moveimg import plots
from moveimg.compare import compare, list_runs, parse_seeds, summarize
from moveimg.files import write_json, write_text

CPU = torch.device("cpu")
SIZE = "n_layer: 2, n_head: 2, codebook_size: 8, n_classes: 3, grid: [2, 2], width"
MOE = "{kind: moe, n_experts: 4, hidden: 8, shared_hidden: 8}"
MODELS = {
    "dense": f"{{{SIZE}: 16}}",
    "experts": f"{{{SIZE}: 16, memory: {{kind: move, slots: 2}}, ffn: {MOE}}}",
    "wide": f"{{{SIZE}: 32, attention: {{kind: mla, kv_rank: 8, rope_dim: 4}}}}",
}


@pytest.fixture
def configs(tmp_path):
    base = "out: unused\ndata: {codes: c, tokenizer: t}\nsteps: 4\nbatch_size: 8\n"
    for name, model in MODELS.items():
        (tmp_path / f"{name}.yaml").write_text(f"{base}model: {model}\n")
    return [tmp_path / f"{name}.yaml" for name in MODELS]


def leave(run, exported=4):
    """Write a run's folder after its last measurement, with the model of step `exported`."""
    logs = run.config.out / "training"
    write_text(logs / "config.yaml", yaml.safe_dump(run.config.model_dump(mode="json")))
    lines = [
        {"step": step, "seconds": step / 2, "peak_memory": memory,
         "loss": 2 / step + run.config.seed}
        for step, memory in ((2, 3 * 2**20), (4, 2**20))
    ]  # fmt: skip
    write_text(logs / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    model = run.config.model.model_dump(mode="json")
    about = {"format": 1, "model": model, "about": {"step": exported}}
    write_json(run.config.out / "config.json", about)


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """A stand-in for trainings: a list of those made, each with the table at its time.

    Seed 13 fails.
    """
    made = []

    def train_all(runs, *_):
        for run in runs:
            table = tmp_path / "out" / "table.json"
            rows = json.loads(table.read_text())["configs"] if table.exists() else []
            made.append((str(run), [row["name"] for row in rows]))
            if run.config.seed != 13:
                leave(run)
            yield run, "the codes are gone" if run.config.seed == 13 else None

    monkeypatch.setattr(module, "train_all", train_all)
    monkeypatch.setattr(plots, "plot_comparison", lambda *_: None)  # takes seconds
    return made


def test_table_holds_every_config(configs, tmp_path, trained, monkeypatch):
    out = tmp_path / "out"
    table = compare(configs, [0, 1], out, [], CPU)
    assert [made[0] for made in trained] == [f"{name}, seed {s}" for name in MODELS for s in (0, 1)]
    assert [made[1] for made in trained][::2] == [[], ["dense"], ["dense", "experts"]]  # it grows
    lines = table.splitlines()
    assert len(lines) == 5 and all(line.count("|") == 12 for line in lines)
    report = json.loads((out / "table.json").read_text())
    assert report["settings"]["steps"] == 4 and report["hardware"]["device"] == "cpu"
    for config in report["configs"]:
        assert config["loss_mean"] == 1.0 and [run["loss"] for run in config["runs"]] == [0.5, 1.5]
        assert config["runs"][0]["curve"] == [[2, 1.0], [4, 0.5]]
        assert config["peak_memory"] == 3 * 2**20 and config["steps_per_second"] == 2
        line = next(line for line in lines if line.startswith(f"| {config['name']} |"))
        assert f"{config['active']:,}" in line and f"{config['flops_per_token'] / 1e6:.3f}" in line
    monkeypatch.undo()
    plots.plot_comparison(report["configs"], out)
    for name in ("curves", "costs"):
        assert Image.open(out / f"{name}.png").width > 300


def test_finished_runs_are_read(configs, tmp_path, trained):
    out = tmp_path / "out"
    table = compare(configs[:2], [0], out, [], CPU)
    (run, _) = list_runs(configs[:2], [0], out, [])
    leave(run, exported=2)  # as if killed before its last export
    assert run.measurements()[-1].step == 4 and not run.finished()
    leave(run)
    trained.clear()
    assert compare(configs[:2], [0], out, ["log_every=7"], CPU) == table and not trained
    compare(configs[:1], [0, 2], out, [], CPU)
    assert [made[0] for made in trained] == ["dense, seed 2"]


@pytest.mark.parametrize(
    ("text", "key"),
    [("optimizer: {lr: 1e-3}\n", "optimizer.lr"), ("model: {norm_eps: 1e-6}\n", "model.norm_eps")],
)
def test_only_slots_and_size_may_differ(configs, tmp_path, text, key):
    (tmp_path / "other.yaml").write_text(f"base: dense.yaml\n{text}")
    pair, out = [configs[0], tmp_path / "other.yaml"], tmp_path / "out"
    assert len(list_runs(pair, [0], out, [], [key])) == 2
    for vary in ([], ["opt", "model.n"]):  # a part of a key's name is not the key
        with pytest.raises(ValueError, match=key):
            list_runs(pair, [0], out, [], vary)
    with pytest.raises(ValueError, match="same file name"):
        list_runs([configs[0], configs[0]], [0], out, [])


def test_folder_with_another_run_is_refused_before_anything_is_trained(configs, tmp_path, trained):
    out = tmp_path / "out"
    leave(list_runs(configs, [0], out, [])[2])
    with pytest.raises(ValueError, match=r"wide-seed0.*steps \(4, now 5\)"):
        compare(configs, [0], out, ["steps=5"], CPU)
    assert not trained


def test_failed_training_does_not_lose_the_others(configs, tmp_path, trained):
    out = tmp_path / "out"
    for run in list_runs(configs[1:2], [13], out, []):
        leave(run)
    with pytest.raises(ValueError, match=r"dense, seed 13: the codes are gone.*wide, seed 13"):
        compare(configs, [0, 13], out, [], CPU)
    report = json.loads((out / "table.json").read_text())
    assert [row["name"] for row in report["configs"]] == ["experts"]


@pytest.mark.skipif(os.name != "posix", reason="a POSIX shell stands in for a training")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_end_of_a_comparison_ends_its_trainings(configs, tmp_path, monkeypatch, number):
    logs = tmp_path / "out" / "logs"
    waits = "trap 'echo stopped; kill $!; exit 143' TERM; echo up; sleep 60 & wait"
    monkeypatch.setattr(module, "train_command", lambda *_: ["sh", "-c", waits])
    both = [logs / f"{name}-seed0.log" for name in ("dense", "experts")]

    def end():
        for _ in range(600):
            if all(path.exists() and path.read_text() for path in both):
                break
            time.sleep(0.05)
        if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:  # else this would end the tests
            os.kill(os.getpid(), number)

    before, thread = signal.getsignal(signal.SIGTERM), threading.Thread(target=end)
    thread.start()
    with pytest.raises(SystemExit if number == signal.SIGTERM else KeyboardInterrupt):
        compare(configs, [0], tmp_path / "out", [], CPU, jobs=2)
    thread.join()
    assert [path.read_text() for path in both] == ["up\nstopped\n"] * 2
    assert signal.getsignal(signal.SIGTERM) == before


def test_trainings_run_with_seed_and_folder_and_name_their_failure(configs, tmp_path, monkeypatch):
    runs = list_runs(configs[:1], [3, 4], tmp_path, [])
    command = module.train_command(runs[0], ["steps=9"], CPU)
    assert command[3:5] == ["train", str(configs[0])]
    assert command[-6:] == [
        "--set", "steps=9", "--set", "seed=3", "--set", f'out="{tmp_path}/dense-seed3"'
    ]  # fmt: skip
    script = "import sys; print('error: the codes are gone'); sys.exit(int(sys.argv[1]) - 3)"
    words = [sys.executable, "-c", script]
    monkeypatch.setattr(module, "train_command", lambda run, *_: [*words, str(run.config.seed)])
    ended = {str(run): failure for run, failure in module.train_all(runs, [], CPU, 1, tmp_path)}
    assert ended["dense, seed 3"] is None
    assert ended["dense, seed 4"].startswith("the codes are gone")
    assert "dense-seed4.log" in ended["dense, seed 4"]


def test_differences_are_paired_by_seed():
    def outcomes(*losses):
        return [{"loss": loss, "steps_per_second": 1.0, "peak_memory": 0} for loss in losses]

    first = outcomes(1.0, 2.0, 3.0)
    assert summarize(first, first)["loss_std"] == pytest.approx(1.0)
    second = summarize(outcomes(0.9, 1.9, 2.9), first)
    assert second["difference"] == pytest.approx(-0.1)
    assert second["interval"] == pytest.approx(0, abs=1e-12)  # each seed gained the same
    assert summarize(first[:1], first[:1])["interval"] is None
    # Student's t with two degrees of freedom: 4.303
    third = summarize(outcomes(0.0, 2.0, 4.0), first)
    assert third["interval"] == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)


def test_seeds_are_read():
    assert parse_seeds("0, 2,1") == [0, 2, 1]
    for wrong in ("", "a", "1,1", "-1", "9" * 5000, "²"):
        with pytest.raises(ValueError, match="seeds"):
            parse_seeds(wrong)
