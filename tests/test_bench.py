"""Benchmarks measure what they say; no test here looks at how long anything takes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import tokenizer as vq
from moveimg.bench import workloads
from moveimg.bench.timing import seconds_of, spread
from moveimg.cli import app
from moveimg.config import SamplingSettings
from moveimg.model import Transformer
from moveimg.training import loop
from moveimg.training.generator import GeneratorTask
from moveimg.training.loop import Run
from tests.conftest import lively, tiny_config
from tests.test_pipeline import tiny_tokenizer
from tests.test_training import train_config

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def known_limits(monkeypatch):
    """A machine that reads 1 GB and adds up 1 GFLOP a second."""
    monkeypatch.setattr(workloads, "memory_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(workloads, "matrix_rate", lambda *args: 1e9)


def test_a_call_is_made_once_more_than_it_is_timed():
    calls = []
    assert len(seconds_of(lambda: calls.append(1), CPU, 3)) == 3
    assert len(calls) == 4


def test_spread():
    assert spread([3.0, 1.0, 2.0]) == {"min": 1.0, "median": 2.0, "max": 3.0}


@pytest.mark.parametrize(("cfg_scale", "rows"), [(1.0, 2), (2.0, 4)])
def test_least_work_of_sampling(cfg_scale, rows):
    model = lively(tiny_config(memory={"kind": "move", "slots": 3}), dtype=torch.float32)
    found = workloads.bench_sample(model, SamplingSettings(cfg_scale=cfg_scale), 2, 2, CPU)
    config, length = model.config, 12
    width, hidden, heads, layers = config.width, 256, config.n_head, config.n_layer
    a_layer = 4 * width**2 + 3 * width * hidden + width * heads * 4  # qkv and out, SwiGLU, router
    matrices = layers * a_layer + width * config.codebook_size
    cache = layers * 2 * width  # numbers a position
    assert found["limit"]["bytes"] == length * 4 * (matrices + rows * 6.5 * cache)
    mix, attention = layers * 2 * 3 * width, layers * 4 * 6.5 * width
    assert found["limit"]["flops"] == length * rows * (2 * matrices + mix + attention)
    assert len(found["first_row_seconds"]) == 3
    least = found["limit"]["bytes"] / found["limit"]["bytes_per_second"]
    assert found["share"]["bytes"] == least / found["seconds"]["median"]
    assert found["codes_per_second"]["max"] == 24 / found["seconds"]["min"]


def test_a_quantized_model_reads_a_quarter_of_its_matrices():
    model = lively(tiny_config(), dtype=torch.float32)
    whole, small = (
        workloads.bench_sample(model, SamplingSettings(cfg_scale=1.0), 1, 1, CPU, quantize)
        for quantize in (None, "int8")
    )
    matrices = sum(w.numel() for n, w in model.named_parameters() if "norm" not in n)
    matrices -= model.label_embedding.weight.numel() + model.code_embedding.weight.numel()
    assert whole["limit"]["bytes"] - small["limit"]["bytes"] == 12 * 3 * matrices


def test_encoding_counts_its_convolutions():
    found = workloads.bench_encode(tiny_tokenizer(), 8, 2, 1, CPU)
    assert found["images"] == 2 and found["limit"]["flops"] > 0
    assert found["codes_per_second"]["median"] == 2 * 4 / found["seconds"]["median"]


def test_encoding_is_measured_as_the_command_does_it():
    seen, low, tokenizer = [], torch.bfloat16, tiny_tokenizer()
    for module in tokenizer.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, x, out: seen.append(out.dtype))
    found = workloads.bench_encode(tokenizer, 8, 2, 1, CPU, low)
    assert low in seen and all(p.dtype == torch.float32 for p in tokenizer.parameters())
    codes = found["call"]()
    assert codes.shape == (2, 1, 4) and codes.dtype == np.uint16


def test_the_work_of_an_encoding_is_that_of_the_plain_way():
    config = {"kind": "vq", "width": 128, "multipliers": [1], "n_res_blocks": 1, "attention": False}
    plain = vq.build(vq.parse_config(config, "test")).freeze()
    counts = [
        workloads.bench_encode(tokenizer, 64, 1, 1, CPU)["limit"]["flops"]
        for tokenizer in (plain, vq.fast_tokenizer(plain))
    ]
    assert counts[0] == counts[1] > 0


def test_a_training_step_is_three_forward_passes(tmp_path):
    model = {"n_layer": 2, "n_head": 2, "width": 16, "codebook_size": 11, "grid": [3, 4]}
    config = train_config(tmp_path, tmp_path / "out", model=model, batch_size=2)
    found = workloads.bench_train(config, 1, CPU)
    layers = [m for m in Transformer(config.model).modules() if isinstance(m, torch.nn.Linear)]
    matrices = sum(layer.weight.numel() for layer in layers)
    assert found["limit"]["flops"] == 3 * 24 * (2 * matrices + 2 * 4 * 6.5 * 16)
    assert not any(tmp_path.iterdir())  # nothing is kept of it


@pytest.mark.parametrize(
    ("batch_size", "passes"),
    [(8, 2), (6, 1)],  # micro_batch 4, and where it does not divide
)
def test_a_training_step_is_that_of_the_config(tmp_path, monkeypatch, batch_size, passes):
    (tmp_path / "tiny.yaml").write_text(
        "out: unused\ndata: {codes: c, tokenizer: t}\nsteps: 9\nmicro_batch: 4\nema: 0.5\n"
        "activation_checkpointing: true\nmodel: {n_layer: 1, n_head: 2, width: 16, "
        "codebook_size: 11, n_classes: 5, grid: [3, 4]}\n"
    )
    runs, start = [], Run.__init__
    monkeypatch.setattr(Run, "__init__", lambda run, *given: runs.append(run) or start(run, *given))
    passed, loss = [], GeneratorTask.loss
    monkeypatch.setattr(
        GeneratorTask, "loss", lambda task, index: passed.append(index) or loss(task, index)
    )
    arguments = ["bench", "train", str(tmp_path / "tiny.yaml"), "--batch-size", str(batch_size)]
    result = CliRunner().invoke(app, [*arguments, "--repeats", "1", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert passed == list(range(2 * passes)) and "steps a second" in result.output
    (run,) = runs
    assert run.step == 2 and run.ema is not None and run.task.model.checkpointing
    assert run.task.model.head.weight.any()  # it really trains


@pytest.mark.parametrize(
    ("dtype", "able", "times"),
    [("bfloat16", False, 1), ("bfloat16", True, 0), ("float32", False, 0)],
)
def test_training_tells_once_that_bfloat16_is_slow(
    tmp_path, monkeypatch, capsys, dtype, able, times
):
    monkeypatch.setattr(loop, "has_bfloat16", lambda: able)
    model = {"n_layer": 1, "n_head": 2, "width": 16, "codebook_size": 11, "grid": [3, 4]}
    config = train_config(tmp_path, tmp_path / "out", model=model, batch_size=2, dtype=dtype)
    workloads.bench_train(config, 2, CPU)
    assert capsys.readouterr().err.count("--set dtype=float32 is faster") == times


def test_the_command_writes_json_and_a_trace(tmp_path):
    out, trace = tmp_path / "bench.json", tmp_path / "trace.json"
    (tmp_path / "tiny.yaml").write_text(
        "out: unused\ndata: {codes: c, tokenizer: t}\nmodel: {n_layer: 1, n_head: 2, width: 16, "
        "codebook_size: 11, n_classes: 5, grid: [3, 4]}\n"
    )
    arguments = ["bench", "sample", str(tmp_path / "tiny.yaml"), "--batch-size", "1", "--repeats",
                 "1", "--device", "cpu"]  # fmt: skip
    result = CliRunner().invoke(app, [*arguments, "--json", str(out), "--profile", str(trace)])
    assert result.exit_code == 0, result.output
    assert "images a second" in result.output and "reached" in result.output
    found = json.loads(out.read_text())
    assert found["machine"]["device"] == "cpu" and found["images"] == 1
    assert json.loads(trace.read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "nowhere"], "no model 'nowhere'"),
        (["sample", "--quantize", "int3"], "expected int8"),
        (["encode", "--size", "30"], "size 30: expected a multiple of 4"),
        (["encode", "--dtype", "float64"], "float64: expected float32 or bfloat16"),
        (["train", "nowhere.yaml"], "nowhere.yaml"),
        (["sample", "--json", "."], "is a directory"),
    ],
)
def test_bad_input_is_named(arguments, message):
    result = CliRunner().invoke(app, ["bench", *arguments, "--device", "cpu"])
    assert result.exit_code == 2 and message in result.output
