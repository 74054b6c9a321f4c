"""Comparisons: what is comparable, statistics, the report, and runs that end early.

Nothing is trained here: a stand-in leaves a run's folder as a training would (test_cli.py has a
real one).
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image

from moveimg import compare as module
from moveimg import plots
from moveimg.compare import compare, list_runs, load_study, run_all
from moveimg.compare_report import (
    compare_pairs,
    difference,
    format_difference,
    questions_table,
    results_table,
)
from moveimg.files import write_json, write_text
from tests.conftest import CPU

SIZE = {"n_layer": 2, "n_head": 2, "codebook_size": 8, "n_classes": 3, "grid": [2, 2], "width": 16}
MOE = {"kind": "moe", "n_experts": 4, "hidden": 8, "shared_hidden": 8}
MODELS = {
    "dense": SIZE,
    "experts": SIZE | {"memory": {"kind": "move", "slots": 2}, "ffn": MOE},
    "wide": SIZE | {"width": 32, "attention": {"kind": "mla", "kv_rank": 8, "rope_dim": 4}},
}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def configs(tmp_path):
    base = {"out": "unused", "data": {"codes": "c", "tokenizer": "t"}, "steps": 4, "batch_size": 8}
    for name, model in MODELS.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(base | {"model": model}))
    return [str(tmp_path / f"{name}.yaml") for name in MODELS]


def leave(run, exported=4):
    """Write a run's folder after its last measurement, with the model of step `exported`."""
    logs = run.config.out / "training"
    write_text(logs / "config.yaml", yaml.safe_dump(run.config.model_dump(mode="json")))
    text = ""
    for step, memory in ((2, 3 * 2**20), (4, 2**20)):
        line = {"step": step, "seconds": step / 2, "loss": 2 / step + run.config.seed}
        text += json.dumps(line | {"peak_memory": memory}) + "\n"
    write_text(logs / "metrics.jsonl", text)
    model = run.config.model.model_dump(mode="json")
    about = {"format": 1, "model": model, "about": {"step": exported}}
    write_json(run.config.out / "config.json", about)


@pytest.fixture
def trained(monkeypatch):
    """Trainings replaced by files of finished runs: the list of runs. Seed 13 fails."""
    made = []

    def run_all(runs, *_):
        for run in runs:
            made.append(str(run))
            if run.config.seed != 13:
                leave(run)
            yield run, "the codes are gone" if run.config.seed == 13 else None

    monkeypatch.setattr(module, "run_all", run_all)
    monkeypatch.setattr(plots, "plot_comparison", lambda *_: None)  # takes seconds
    return made


def test_a_study_file_names_rows_with_settings_and_questions(configs, tmp_path, out, trained):
    study = {
        "seeds": [0, 1],
        "rows": {
            "Dense": {"config": configs[0], "seeds": [0, 1, 2]},
            "Two slots": {"config": configs[1], "set": {"model.ffn": {"kind": "swiglu"}}},
        },
        "questions": [["Two slots", "Dense"]],
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    found = load_study([str(path)], None)
    runs = list_runs(found, out, [])
    names = ["dense-seed0", "dense-seed1", "dense-seed2", "two-slots-seed0", "two-slots-seed1"]
    assert [run.config.out.name for run in runs] == names
    assert runs[3].config.model.ffn.kind == "swiglu"
    compare(found, out, [], CPU)
    report = json.loads((out / "comparison.json").read_text())
    assert report["questions"][0]["mean"] == 0 and report["questions"][0]["seeds"] == 2
    assert "Two slots - Dense" in questions_table(report)
    path.write_text(yaml.safe_dump(study | {"questions": [["Nobody", "Dense"]]}))
    with pytest.raises(ValueError, match="Nobody"):
        load_study([str(path)], None)


def test_report_holds_every_row(configs, out, trained, monkeypatch):
    table = compare(load_study(configs, "0,1"), out, [], CPU, rounds=1)
    assert trained == [f"{name}, seed {seed}" for name in MODELS for seed in (0, 1)]
    report = json.loads((out / "comparison.json").read_text())
    assert table == results_table(report) == (out / "table.md").read_text().strip()
    assert report["settings"]["steps"] == 4 and report["hardware"]["device"] == "cpu"
    assert report["rows"][0]["relative_seconds"] == {"step": 1.0, "sample": 1.0}
    for row in report["rows"]:
        assert all(ratio > 0 for ratio in row["relative_seconds"].values())
        assert row["loss"]["mean"] == 1.0 and [run["loss"] for run in row["runs"]] == [0.5, 1.5]
        assert row["runs"][0]["curve"] == [[2, 1.0], [4, 0.5]]
        assert row["peak_memory"] == 3 * 2**20 and row["steps_per_second"] == 2
        line = next(line for line in table.splitlines() if line.startswith(f"| {row['name']} |"))
        assert f"{row['active']:,}" in line and f"{row['flops_per_token'] / 1e6:.3f}" in line
    (out / "speed.json").unlink()  # the report alone keeps the measured times
    assert compare(load_study(configs, "0,1"), out, [], CPU) == table
    monkeypatch.undo()
    _, move, _ = rows = report["rows"]
    plots.plot_comparison(rows, out)
    assert all(Image.open(out / f"{name}.png").width > 300 for name in ("curves", "costs"))
    assert not (out / "saturation.png").exists()
    other = {"name": "dense bank", "bank": 10**6, "memory": move["memory"] | {"slots": 4}}
    plots.plot_comparison([*rows, move | other], out)
    assert (out / "saturation.png").exists()


def test_finished_runs_are_read_and_known_ones_need_no_folder(configs, tmp_path, out, trained):
    study = load_study(configs[:2], "0")
    leave(list_runs(study, out, [])[0], exported=2)  # as if killed before its last export
    table = compare(study, out, [], CPU)
    assert trained == ["dense, seed 0", "experts, seed 0"]
    trained.clear()
    for name in ("dense-seed0", "experts-seed0"):
        (out / name).rename(tmp_path / name)
    assert compare(study, out, ["log_every=7"], CPU) == table and not trained
    compare(load_study(configs[:1], "0,2"), out, [], CPU)
    assert trained == ["dense, seed 2"]
    trained.clear()
    with pytest.raises(ValueError, match="last step"):  # another setting: none of them is known
        compare(study, out, ["steps=5"], CPU)
    assert trained == ["dense, seed 0", "experts, seed 0"]
    trained.clear()
    with pytest.raises(ValueError, match=r"dense-seed0.*steps \(5, now 6\)"):
        compare(study, out, ["steps=6"], CPU)
    assert not trained


def test_known_runs_are_scored_again_for_a_test_set_and_differ_by_varied_keys(configs, out):
    study = load_study(configs[:1], "0", ["init_from"])
    (run,) = list_runs(study, out, [])
    (other,) = list_runs(study, out, ["init_from=elsewhere"])
    assert run.key != other.key
    write_json(out / "comparison.json", {"rows": [{"runs": [{"settings": run.key, "seed": 0}]}]})
    assert list_runs(study, out, [])[0].scored()
    test = module.TestSet(codes="codes", reference="digits")
    assert not list_runs(study.model_copy(update={"test": test}), out, [])[0].scored()


@pytest.mark.parametrize(
    ("text", "key"),
    [("optimizer: {lr: 1e-3}\n", "optimizer.lr"), ("model: {norm_eps: 1e-6}\n", "model.norm_eps")],
)
def test_only_slots_and_size_may_differ(configs, tmp_path, out, text, key):
    (tmp_path / "other.yaml").write_text(f"base: dense.yaml\n{text}")
    pair = [configs[0], str(tmp_path / "other.yaml")]
    assert len(list_runs(load_study(pair, "0", [key]), out, [])) == 2
    for vary in ([], ["opt", "model.n"]):  # a part of a key's name is not the key
        with pytest.raises(ValueError, match=key):
            list_runs(load_study(pair, "0", vary), out, [])
    with pytest.raises(ValueError, match="same file name"):
        load_study([configs[0], configs[0]], "0")


def test_failed_training_does_not_lose_the_others(configs, out, trained):
    with pytest.raises(ValueError, match=r"dense, seed 13: the codes are gone.*wide, seed 13"):
        compare(load_study(configs, "0,13"), out, [], CPU)
    report = json.loads((out / "comparison.json").read_text())
    assert [[run["seed"] for run in row["runs"]] for row in report["rows"]] == [[0]] * 3


@pytest.mark.skipif(os.name != "posix", reason="a POSIX shell stands in for a training")
@pytest.mark.parametrize("number, delay", [(signal.SIGTERM, 0), (signal.SIGINT, 0), (15, 0.5)])
def test_end_of_a_comparison_ends_its_trainings(configs, out, monkeypatch, number, delay):
    start = subprocess.Popen

    def start_slowly(*args, **options):  # the end comes before the process is known
        process = start(*args, **options)
        time.sleep(delay)
        return process

    monkeypatch.setattr(module.subprocess, "Popen", start_slowly)
    waits = "trap 'echo stopped; kill $!; exit 143' TERM; echo up; sleep 60 & wait"
    commands = lambda *_: [["sh", "-c", waits], ["false"]]  # noqa: E731
    monkeypatch.setattr(module.ComparedRun, "commands", commands)
    both = [out / "logs" / f"{name}-seed0.log" for name in ("dense", "experts")]

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
        compare(load_study(configs, "0"), out, [], CPU, jobs=2)
    thread.join()
    assert [path.read_text() for path in both] == ["up\nstopped\n"] * 2
    assert signal.getsignal(signal.SIGTERM) == before


def test_runs_have_their_seed_and_folder_and_name_their_failure(configs, tmp_path, monkeypatch):
    test = {"codes": "c", "reference": "digits", "samples": 30}
    study = load_study(configs[:1], "3,4").model_copy(update={"test": module.TestSet(**test)})
    runs = list_runs(study, tmp_path, [])
    train, evaluate = runs[0].commands(["steps=9"], CPU)
    own = ["--set", "steps=9", "--set", "seed=3", "--set", f'out="{tmp_path}/dense-seed3"']
    assert train[3:11] == ["train", configs[0], *own]
    assert evaluate[3:5] == ["evaluate", f"{tmp_path}/dense-seed3"] and "30" in evaluate
    script = "import sys; print('error: the codes are gone'); sys.exit(int(sys.argv[1]) - 3)"
    words = [sys.executable, "-c", script]
    commands = lambda run, *_: [[*words, str(run.config.seed)]]  # noqa: E731
    monkeypatch.setattr(module.ComparedRun, "commands", commands)
    ended = {str(run): failure for run, failure in run_all(runs, [], CPU, 2, tmp_path)}
    assert ended["dense, seed 3"] is None
    assert ended["dense, seed 4"].startswith("the codes are gone")
    assert "dense-seed4.log" in ended["dense, seed 4"]


def test_differences_are_paired_by_seed():
    def outcomes(*losses):
        return [{"seed": seed, "loss": loss} for seed, loss in enumerate(losses)]

    first = outcomes(1.0, 2.0, 3.0)
    same = difference(outcomes(0.9, 1.9, 2.9), first)
    assert same["mean"] == pytest.approx(-0.1)
    assert same["interval"] == pytest.approx(0, abs=1e-12)  # each seed gained the same
    assert difference(first[:1], first)["interval"] is None
    # Student's t with two degrees of freedom: 4.303 at 95 %, 9.925 at 99 %
    for level, t in ((0.95, 4.3027), (0.99, 9.9248)):
        found = difference(outcomes(0.0, 2.0, 4.0, 9.0), first, level)
        assert found["interval"] == pytest.approx(t / math.sqrt(3), rel=1e-4)
    rows = [{"name": "a", "runs": first}, {"name": "b", "runs": outcomes(0.0, 1.1, 2.0)}]
    (asked,) = compare_pairs([("b", "a")], rows)
    assert asked["level"] == 0.95 and asked["significant"]
    assert not compare_pairs([("b", "a")] * 50, rows)[0]["significant"]


OPTIONS = ("shared rows", "context left", "context above", "gates to memory", "gates to context")


def test_documents_show_the_numbers_of_the_json():
    docs = Path(__file__).parents[1] / "docs"
    report = json.loads((docs / "comparison.json").read_text())
    text = (docs / "comparison.md").read_text()
    assert results_table(report) in text and questions_table(report) in text
    runs = {row["name"]: row["runs"] for row in report["rows"]}
    shown = re.findall(r"^\| (.+) - (.+) \| (\S+ ± \S+) \|$", text, re.MULTILINE)
    assert len(shown) > 10
    for a, b, numbers in shown:
        assert format_difference(difference(runs[a], runs[b])) == numbers, (a, b)
    rows = {row["name"]: row for row in report["rows"]}
    move, standard = rows["MoVE x1"], rows["Standard"]
    fids = f"from {standard['fid']['mean']:.3f} to {move['fid']['mean']:.3f}"
    assert f"by {standard['loss']['mean'] - move['loss']['mean']:.2f} nats per code. FID" in text
    readme = (docs.parent / "README.md").read_text().replace("\n", " ")
    assert fids in text and fids in readme
    assert f"at {move['relative_seconds']['step']:.2f} times the time" in readme
    for key in ("step", "sample"):
        medians = [1e3 * statistics.median(row["seconds"][key]) for row in (move, standard)]
        assert "{:.0f} instead of {:.0f} ms".format(*medians) in text
    for run in json.loads((docs / "comparison-search.json").read_text()):
        (line,) = re.findall(rf"^\| {run['lr']} \|.*", text, re.MULTILINE)
        column = ["Standard", "LaVE x1", "MoVE x1"].index(run["row"])
        assert line.replace("*", "").split(" | ")[1 + column].startswith(f"{run['val_loss']:.3f}")
    for name in (*OPTIONS, "UltraMem"):
        line = format_difference(difference(runs[name], runs["MoVE x1"]))
        assert f"| {line} |" in (docs / "memory.md").read_text(), name
