"""Benchmarks measure what they say; no test here looks at how long anything takes."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from moveimg.bench import workloads
from moveimg.bench.timing import seconds_of, spread
from moveimg.cli import app
from moveimg.config import OptimizerConfig, SamplingSettings
from tests.conftest import lively, tiny_config
from tests.test_pipeline import tiny_tokenizer

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


def test_a_training_step_is_three_forward_passes():
    model = lively(tiny_config(), dtype=torch.float32)
    before = model.head.weight.clone()
    found = workloads.bench_train(model, OptimizerConfig(), 2, 1, CPU, torch.float32)
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    attention = 2 * 4 * 6.5 * 16
    assert found["limit"]["flops"] == 3 * 24 * (2 * matrices + attention)
    assert not torch.equal(model.head.weight, before)  # it really trains


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
        (["train", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_bad_input_is_named(arguments, message):
    result = CliRunner().invoke(app, ["bench", *arguments, "--device", "cpu"])
    assert result.exit_code == 2 and message in result.output
