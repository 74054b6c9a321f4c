"""The commands as a user runs them; bad input gets one line and exit code 2, Ctrl-C 130."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from moveimg import __version__
from moveimg.commands import app
from moveimg.commands.common import find_commands
from moveimg.config import SamplingSettings
from tools.api_reference import api_reference

ROOT = Path(__file__).parents[1]
PNG = ROOT / "docs/images/fashion.png"
README = (ROOT / "README.md").read_text()


def run(*arguments, code=0):
    """Run a command in this process; returns its result."""
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


def read_png(path):
    """The settings and the pixels of a PNG."""
    with Image.open(path) as image:
        return json.loads(image.info["moveimg"]), image.tobytes()


def test_sample_writes_images_with_their_settings_and_a_grid(tmp_path):
    values = {"cfg_schedule": "linear", "cfg_power": 2.0, "cfg_start": 0.1, "temperature": 0.9,
              "cfg_scale": 2.0, "top_k": 30, "top_p": 0.95}  # fmt: skip
    assert values.keys() == SamplingSettings.model_fields.keys()  # every setting is an option
    options = [word for k, v in values.items() for word in (f"--{k.replace('_', '-')}", v)]
    run("sample", "7", "dress", "--num", 2, "--seed", 5, "--out", tmp_path, *options)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "0003-dress-seed7.png", "0003-dress-seed8.png",
        "0007-sneaker-seed5.png", "0007-sneaker-seed6.png", "grid.png",
    ]  # fmt: skip
    about, pixels = read_png(tmp_path / "0003-dress-seed7.png")
    assert about["class_name"] == "Dress" and {name: about[name] for name in values} == values
    # the metadata suffices to draw the image again
    run("sample", about["class"], "--num", 1, "--seed", about["seed"], "--out", tmp_path / "again",
        *options)  # fmt: skip
    assert read_png(tmp_path / "again" / "0003-dress-seed7.png")[1] == pixels


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        (["sample", "--temperature", "-1"], ["temperature", "-1"]),
        (["sample", "--cfg-schedule", "cubic"], ["cfg-schedule", "'cubic'", "'linear'"]),
        (["sample", "--num", "100000000"], ["--num", "'100000000'", "10000"]),
        (["sample", "--model", "nowhere"], ["'nowhere'", "digits"]),
        (["sample", "hat"], ["'hat'", "Trouser"]),
        (["sample", "--device", "abacus"], ["'abacus'"]),
        (["sample", "0", "--out", ROOT / "README.md" / "x"], ["README.md"]),
        (["edit", PNG, "--keep", "top", "--hole", "top"], ["--hole"]),
        (["edit", PNG, "--keep", "sideways"], ["sideways"]),
        (["score", "nowhere"], ["'nowhere'"]),
        (["train"], ["missing argument 'config'"]),
        (["smaple"], ["'smaple'", "'sample'"]),
        (["bench", "sleep"], ["'sleep'", "bench --help"]),
        (["info", "digits", "--set", "a=1"], ["--set a=1"]),
        (["train", "nowhere.yaml"], ["nowhere.yaml"]),
        (["train", "digits-move"], ["runs/digits-tokenizer"]),
        (["compare", "digits-move", "--out", "x", "--seeds", "1,1"], ["'1,1'"]),
        (["encode", "digits", "--tokenizer", "t", "--out", "o"], ["t: no such tokenizer"]),
        (["encode", "digits", "--tokenizer", "digits", "--out", "o", "--crops", "six"], ["'six'"]),
        (["inspect", "digits", "--codes", "nope"], ["nope"]),
        (["convert", "upcycle", "digits", "--out", "o"], ["--slots"]),
        (["convert", "llamagen", "--vq", "no.pt", "--out", "o"], ["no.pt: no such file"]),
        (["push", "digits"], ["OWNER/NAME"]),
        (["push", "digits", "a/b/c"], ["a/b/c"]),
    ],
)
def test_bad_input_gets_one_line(arguments, values, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refused(*arguments)
    assert all(value in line for value in values), line
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_memory_errors_get_one_line(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("moveimg.pipeline.Pipeline.from_pretrained", fail)
    assert "DefaultCPUAllocator" in refused("sample", "0")


def test_help_and_version():
    assert run("--version").stdout == f"moveimg {__version__}\n"
    text = run(code=2).output
    group = typer.main.get_command(app)
    for name, (_, about) in find_commands().items():  # as the sources say, without importing them
        assert re.search(rf"^  {name} +{re.escape(about[:20])}", text, re.M)
        command = group.get_command(None, name)
        assert command.get_short_help_str(200) == about
        for part in [command, *getattr(command, "commands", {}).values()]:
            assert re.fullmatch(r"[A-Z].*\.", part.help.split("\n\n")[0].strip(), re.S), name
    assert "Commands:" in run("bench", code=2).output


def test_references_are_current():
    for file, command, text in (
        ("api.md", "python tools/api_reference.py", api_reference() + "\n"),
        ("config.md", "moveimg config-reference", run("config-reference").output),
    ):
        assert (ROOT / "docs" / file).read_text() == text, f"run: {command} > docs/{file}"
    assert "| `lr` | number, > 0, <=" in text


@pytest.mark.skipif(os.name != "posix", reason="signals are sent")
@pytest.mark.parametrize("seconds", [0.05, 0.5, 1.2, None])
def test_ctrl_c_gives_one_line_at_any_moment(tmp_path, seconds):
    """After Python's own start, while torch is imported, and while images are drawn."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = ["-m", "moveimg", "sample", "--num", "900", "--batch-size", "4", "--out", tmp_path]
    process = subprocess.Popen(
        [sys.executable, *words], env=environment, stderr=subprocess.PIPE, text=True
    )
    begun = time.monotonic()
    subprocess.run([sys.executable, "-c", "import moveimg.cli"], env=environment, check=True)
    start = 2 * (time.monotonic() - begun)  # two processes started at once: the other is as far
    end = begun + (60 if seconds is None else start + seconds)
    while time.monotonic() < end and not (seconds is None and list(tmp_path.glob("0*.png"))):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    lines = [line for line in errors.replace("\r", "\n").splitlines() if "code/s" not in line]
    assert process.returncode == 130 and [line for line in lines if line.strip()] == ["interrupted"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_info_describes_configs_and_models():
    config = json.loads(run("info", "digits-move", "--json").output)
    model = json.loads(run("info", "digits", "--json").output)
    assert config == model  # the bundled model is what its config says
    parts = ("backbone", "embeddings", "router", "bank")
    assert config["parameters"] == sum(config[part] for part in parts)
    assert f"{config['parameters']:,}" in run("info", "digits").output
    low, high = json.loads(run("info", "digits", "--train", "--json").output)["hours"]
    assert 0 < low < high


def test_compare_passes_its_options_on(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("moveimg.compare.compare", lambda *given: calls.append(given) or "| table")
    words = ["--seeds", "3,1", "--set", "steps=1", "--jobs", 2, "--vary", "a.b", "--device", "cpu"]
    assert run("compare", "x.yaml", "y", "--out", tmp_path, *words).stdout == "| table\n"
    ((study, *others),) = calls
    assert list(study.rows) == ["x", "y"] and study.seeds == (3, 1) and study.vary == ("a.b",)
    assert others == [tmp_path, ["steps=1"], torch.device("cpu"), 2, 0]


def test_code_of_the_readme_runs(tmp_path, monkeypatch):
    """Every `moveimg` line that needs no training or download runs as written, and the Python."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name in ("photo.png", "photos/one.png"):
        Image.new("RGB", (40, 30), "grey").save(name)
    lines = "".join(re.findall(r"```sh\n(.*?)```", README, re.S)).splitlines()
    commands = [shlex.split(line.split("#")[0])[1:] for line in lines if line[:8] == "moveimg "]
    light = [words for words in commands if words[0] in ("sample", "edit", "score", "configs")]
    light = [words for words in light if not {"runs/fashion-move", "llamagen-b-256"} & {*words}]
    assert len(light) >= 4
    for words in light:
        run(*words)
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
    assert Path("sneaker.png").is_file()
