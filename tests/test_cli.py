"""The commands as a user runs them, and what they say to bad input: one line, exit code 2."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from moveimg import __version__
from moveimg.checkpoint import BUNDLED
from moveimg.cli import app
from tests.test_training import EVERY, TOKENIZER

ROOT = Path(__file__).parents[1]


def run(*arguments, code=0):
    """Run a command in this process; returns what it printed."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + result.stderr
    return result


def refused(*arguments):
    """Run a command that must end with one line and exit code 2; returns the line."""
    result = run(*arguments, code=2)
    lines = result.stderr.splitlines()
    assert len([line for line in lines if "rror" in line]) == 1, result.stderr
    assert lines[-1].startswith("error: ") and "Usage" not in result.stderr, result.stderr
    return lines[-1]


def test_sample_writes_pictures_with_their_settings_and_a_grid(tmp_path):
    run("sample", "7", "three", "--num", 2, "--seed", 5, "--cfg-scale", 1.5, "--out", tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "0003-three-seed7.png", "0003-three-seed8.png",
        "0007-seven-seed5.png", "0007-seven-seed6.png", "grid.png",
    ]  # fmt: skip
    with Image.open(tmp_path / "0003-three-seed7.png") as picture:
        about = json.loads(picture.info["moveimg"])
        assert picture.size == (32, 32)
    assert about["class_name"] == "three" and about["seed"] == 7 and about["cfg_scale"] == 1.5
    # what the metadata says makes the picture again
    run("sample", about["class"], "--num", 1, "--seed", about["seed"],
        "--cfg-scale", about["cfg_scale"], "--out", tmp_path / "again")  # fmt: skip
    again = tmp_path / "again" / "0003-three-seed7.png"
    with Image.open(again) as a, Image.open(tmp_path / "0003-three-seed7.png") as b:
        assert a.tobytes() == b.tobytes()


def test_sample_without_arguments_shows_every_class(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("sample")
    assert len(list((tmp_path / "samples").glob("*-seed*.png"))) == 20


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["sample", "ten"], ["'ten'", "zero"]),
        (["sample", "10"], ["class 10", "0..9"]),
        (["sample", "--temperature", "-1"], ["temperature", "-1", "greater than or equal to 0"]),
        (["sample", "--top-p", "0"], ["top_p", "greater than 0"]),
        (["sample", "--cfg-schedule", "cubic"], ["cfg_schedule", "'cubic'", "'linear'"]),
        (["sample", "--seed", "-3"], ["seed -3", "0.."]),
        (["sample", "--model", "nowhere"], ["'nowhere'", "digits"]),
        (["sample", "--device", "abacus"], ["'abacus'"]),
        (["sample", "--device", "meta"], ["device 'meta' cannot be used here"]),
        (["sample", "--num", "0"], ["'--num'", "1", "sample --help"]),
        (["sample", "--seed", "1.5"], ["'--seed'", "valid integer", "'1.5'"]),
        (["evaluate", "--set", "cfg_scale=[1"], ["--set cfg_scale=[1: not valid YAML"]),
        (["evaluate", "--num-samples", "3"], ["too-few-samples: 3 images", "4 or more"]),
        (["reconstruct", "digits", "--tokenizer", "digits", "--allow", "x"], ["--allow x: exp"]),
        (["reconstruct", "x", "--tokenizer", "x", "--split", "test"], ["'--split': 'test' is"]),
        (["reconstruct", "digits", "--tokenizer", "digits", "--out", ROOT], ["is a directory"]),
        (["sample", "--no-such"], ["--no-such"]),
        (["train"], ["missing argument 'config'"]),
        (["smaple"], ["'smaple'", "'sample'"]),
        (["bench", "sleep"], ["'sleep'", "bench --help"]),
        (["info", "nowhere.yaml"], ["nowhere.yaml", "no such config file"]),
        (["info", ROOT / "configs/digits-tokenizer.yaml"], ["model: missing"]),
        (["train", "nowhere.yaml"], ["nowhere.yaml", "no such config file"]),
        (["compare", "a.yaml", "--out", "x", "--seeds", "1,1"], ["'1,1'", "different"]),
        (["encode", "nowhere", "--tokenizer", "t", "--out", "o"], ["t: no such tokenizer"]),
    ],
)
def test_bad_input_gets_one_line(arguments, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refused(*arguments)
    assert all(part in line for part in parts), line
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_the_version_is_told_and_groups_are_explained():
    assert run("--version").stdout == f"moveimg {__version__}\n"
    for group in ([], ["bench"]):
        result = run(*group, code=2)
        assert "Commands:" in result.output and "error:" not in result.output


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in refused("sample", "0", "--out", tmp_path / "file" / "x")
    assert "file: is a file, expected a" in refused("sample", "0", "--out", tmp_path / "file")


def test_an_empty_or_unreadable_image_folder_is_named(tmp_path):
    bundled = BUNDLED / "digits"
    (tmp_path / "empty").mkdir()
    common = ["--tokenizer", bundled, "--out", tmp_path / "codes", "--size", "32"]
    assert "empty" in refused("encode", tmp_path / "empty", *common)
    for split in ("train", "val"):
        (tmp_path / "bad" / split / "a").mkdir(parents=True)
        (tmp_path / "bad" / split / "a" / "x.png").write_text("no picture")
        (tmp_path / "bad" / split / "a" / "y.png").symlink_to("nowhere")
    assert "could be read" in refused("encode", tmp_path / "bad", *common)


def test_a_folder_of_images_goes_through_the_whole_chain(tmp_path):
    """The same commands as for the digits, on a folder of class subfolders."""
    for name, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            shade = tuple(min(255, c + 9 * i) for c in colour)
            Image.new("RGB", (40 + i, 36), shade).save(tmp_path / "images" / name / f"{i}.png")
    images = {"source": str(tmp_path / "images"), "size": 16, "crops": "ten", "ranges": [1.1]}
    settings = {"out": str(tmp_path / "vq"), "images": images, "tokenizer": TOKENIZER}
    (tmp_path / "vq.yaml").write_text(
        yaml.safe_dump(settings | {"steps": 4, "batch_size": 4} | EVERY)
    )
    run("train-tokenizer", tmp_path / "vq.yaml")
    out = run("encode", tmp_path / "images", "--tokenizer", tmp_path / "vq", "--out",
              tmp_path / "codes", "--size", 16, "--crops", "ten", "--range", 1.1)  # fmt: skip
    assert "16 images x 10 views, 0 skipped" in out.output
    shown = run("reconstruct", tmp_path / "images", "--tokenizer", tmp_path / "vq", "--size", 16,
                "--no-rfid", "--out", tmp_path / "r.png")  # fmt: skip
    figures = json.loads(shown.stdout)
    assert figures["images"] == 4 and 0 < figures["mse"] < 4 and (tmp_path / "r.png").is_file()
    data = {"codes": str(tmp_path / "codes"), "tokenizer": str(tmp_path / "vq")}
    model = {"n_layer": 2, "n_head": 2, "width": 16, "memory": {"kind": "lave"}}
    config = {"out": str(tmp_path / "model"), "data": data, "model": model, "steps": 2} | EVERY
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    run("train", tmp_path / "run.yaml", "--set", "batch_size=4")
    run("sample", "red", "--model", tmp_path / "model", "--num", 1, "--out", tmp_path / "out")
    with Image.open(tmp_path / "out" / "0001-red-seed0.png") as picture:
        assert picture.size == (16, 16)


def test_info_speaks_of_configs_and_models():
    config = json.loads(run("info", ROOT / "configs" / "digits-move.yaml", "--json").output)
    model = json.loads(run("info", "digits", "--json").output)
    assert config == model  # the bundled model is what its config says
    parts = ("backbone", "embeddings", "router", "bank")
    assert config["parameters"] == sum(config[part] for part in parts)
    text = run("info", "digits").output
    assert f"{config['parameters']:,}" in text and "cache bytes a token" in text


def test_info_takes_as_many_devices_as_can_share_a_batch():
    one = run("info", ROOT / "configs/digits-move.yaml", "--train", "--json").output
    assert json.loads(one)["gpus"] == 1


def test_compare_makes_a_table_and_reads_finished_runs(digits, tmp_path, monkeypatch):
    """One training by a process of its own; test_compare.py has several, by a stand-in."""
    monkeypatch.chdir(tmp_path)
    common = ["compare", ROOT / "configs/digits-move.yaml", "--seeds", "0", "--out", "out"]
    for override in (f"data.codes={digits / 'codes'}", f"data.tokenizer={digits / 'tokenizer'}",
                     "steps=1", "batch_size=2", "model.n_layer=2", "model.codebook_size=16",
                     "model.grid=[4,4]"):  # fmt: skip
        common += ["--set", override]
    table = run(*common).output
    assert re.search(r"\| digits-move \| \d\.\d{4} \| 1 \| [+-]\d", table)
    first = Path("out/table.json").read_text()
    assert run(*common).output.splitlines()[-1] == table.splitlines()[-1]
    assert Path("out/table.json").read_text() == first


def test_the_bundled_model_is_small():
    sizes = [path.stat().st_size for path in (BUNDLED / "digits").rglob("*") if path.is_file()]
    assert 0 < sum(sizes) <= 8e6


def readme_commands(language="sh"):
    blocks = re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_readme_commands_run(tmp_path, monkeypatch):
    """Every `moveimg` line of the README that needs no training runs as it is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    ran = 0
    for line in readme_commands():
        command = line.split("#")[0].split("&&")[-1].strip()
        words = shlex.split(command)
        if not words or words[0].split("/")[-1] != "moveimg" or words[1] not in ("sample", "info"):
            continue
        if {"runs/digits-move", "llamagen-b-256"} & {*words}:  # made by commands above it, fetched
            continue
        if ran == 0:  # as a program; the others in this process, which has the libraries loaded
            environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            words[:1] = [sys.executable, "-m", "moveimg"]
            subprocess.run(words, env=environment, check=True, capture_output=True)
        else:
            run(*words[1:])
        ran += 1
    assert ran >= 4


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
    assert Path("seven.png").is_file()
