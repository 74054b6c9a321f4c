"""Benchmarks count the right work; no test here looks at how long anything takes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import tokenizer as vq
from moveimg import bench
from moveimg.cli import app
from moveimg.config import SamplingSettings
from moveimg.training.generator import GeneratorTask
from tests.conftest import lively, tiny_config
from tests.test_pipeline import tiny_tokenizer

CPU = torch.device("cpu")
TINY = (
    "out: unused\ndata: {codes: c, tokenizer: t}\nsteps: 9\nmicro_batch: 4\nmodel: {n_layer: 1, "
    "n_head: 2, width: 16, codebook_size: 11, n_classes: 5, grid: [3, 4]}\n"
)


@pytest.fixture(autouse=True)
def known_limits(monkeypatch):
    """A machine that reads 1 GB and does 1 GFLOP per second."""
    monkeypatch.setattr(bench, "memory_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(bench, "matrix_rate", lambda *args: 1e9)


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["bench", *map(str, arguments), "--device", "cpu"])
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize(("cfg_scale", "rows"), [(1.0, 2), (2.0, 4)])
def test_least_work_of_sampling(cfg_scale, rows):
    model = lively(tiny_config(memory={"kind": "move", "slots": 3}), dtype=torch.float32)
    found = bench.bench_sample(model, SamplingSettings(cfg_scale=cfg_scale), 2, 2, CPU)
    config, length = model.config, 12
    width, hidden, heads, layers = config.width, 256, config.n_head, config.n_layer
    per_layer = 4 * width**2 + 3 * width * hidden + width * heads * 4  # attention, SwiGLU, router
    matrices = layers * per_layer + width * config.codebook_size
    cache = layers * 2 * width  # numbers per position
    assert found["limit"]["bytes"] == length * 4 * (matrices + rows * 6.5 * cache)
    mix, attention = layers * 2 * 3 * width, layers * 4 * 6.5 * width
    assert found["limit"]["flops"] == length * rows * (2 * matrices + mix + attention)
    least = found["limit"]["bytes"] / found["limit"]["bytes_per_second"]
    assert found["share"]["bytes"] == pytest.approx(least / found["seconds"]["median"])
    assert found["codes_per_second"]["max"] == 24 / found["seconds"]["min"]
    assert 0 < found["first_row_seconds"]["median"] < found["seconds"]["max"]
    if rows == 2:  # matrices of one byte per number
        small = bench.bench_sample(model, SamplingSettings(), 2, 1, CPU, "int8")
        assert found["limit"]["bytes"] - small["limit"]["bytes"] == length * 3 * matrices


def test_encoding_is_measured_as_the_command_does_it():
    seen, low, tokenizer = [], torch.bfloat16, tiny_tokenizer()
    for module in tokenizer.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, x, out: seen.append(out.dtype))
    found = bench.bench_encode(tokenizer, 8, 2, 1, CPU, low)
    assert low in seen and all(p.dtype == torch.float32 for p in tokenizer.parameters())
    assert found["codes_per_second"]["median"] == 2 * 4 / found["seconds"]["median"]
    codes = found["call"]()
    assert codes.shape == (2, 1, 4) and codes.dtype == np.uint16


def test_winograd_convolutions_count_as_direct_ones():
    config = {"kind": "vq", "width": 128, "multipliers": [1], "n_res_blocks": 1, "attention": False}
    plain = vq.build(vq.parse_config(config, "test")).freeze()
    counts = [
        bench.bench_encode(tokenizer, 64, 1, 1, CPU)["limit"]["flops"]
        for tokenizer in (plain, vq.fast_tokenizer(plain))
    ]
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    ("batch_size", "passes"),
    [(8, 2), (6, 1)],  # micro_batch 4, and where it does not divide
)
def test_training_is_measured_with_the_configs_passes(tmp_path, monkeypatch, batch_size, passes):
    (tmp_path / "tiny.yaml").write_text(TINY)
    made, loss = [], GeneratorTask.loss
    monkeypatch.setattr(
        GeneratorTask, "loss", lambda task, *index: made.append(task) or loss(task, *index)
    )
    out = tmp_path / "bench.json"
    result = run("train", tmp_path / "tiny.yaml", "--batch-size", batch_size, "--repeats", 1,
                 "--json", out)  # fmt: skip
    assert len(made) == 2 * passes and "steps per second" in result.output
    assert made[0].model.head.weight.any()  # it really trains
    layers = [m for m in made[0].model.modules() if isinstance(m, torch.nn.Linear)]
    matrices = sum(layer.weight.numel() for layer in layers)
    flops = json.loads(out.read_text())["limit"]["flops"]
    assert flops == 3 * batch_size * 12 * (2 * matrices + 4 * 6.5 * 16)  # three forward passes
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.yaml", "bench.json"}


def test_command_writes_json_and_a_trace(tmp_path):
    out, trace = tmp_path / "bench.json", tmp_path / "trace.json"
    (tmp_path / "tiny.yaml").write_text(TINY)
    result = run("sample", tmp_path / "tiny.yaml", "--batch-size", 1, "--repeats", 1, "--json",
                 out, "--profile", trace)  # fmt: skip
    assert "1 image," in result.output and "reached" in result.output
    found = json.loads(out.read_text())
    assert found["machine"]["device"] == "cpu" and found["images"] == 1
    assert json.loads(trace.read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["sample", "nowhere"], "'nowhere'"),
        (["sample", "--quantize", "int3"], "int8"),
        (["sample", "--set", "a=1"], "a=1"),
        (["sample", "--repeats", "0"], "'--repeats'"),
        (["encode", "--size", "30"], "size 30"),
        (["encode", "nowhere"], "nowhere"),
        (["encode", "--dtype", "float64"], "float64"),
        (["train", "nowhere.yaml"], "nowhere.yaml"),
        (["sample", "--json", "."], "is a directory"),
    ],
)
def test_bad_input_is_named(arguments, value):
    result = run(*arguments, code=2)
    assert value in result.output and result.output.count("\n") == 1
