"""Benchmarks count the right work; no test here looks at how long anything takes."""

from __future__ import annotations

import pytest

from moveimg import bench
from moveimg.config import SamplingSettings
from moveimg.training.generator import GeneratorTask
from tests.conftest import lively, tiny_config
from tests.test_cli import refused, run

TINY = (
    "out: unused\ndata: {codes: c, tokenizer: t}\nsteps: 9\nmicro_batch: 4\nmodel: {n_layer: 1, "
    "n_head: 2, width: 16, codebook_size: 11, n_classes: 5, grid: [3, 4]}\n"
)


def test_work_of_sampling():
    found = bench.bench_sample(lively(tiny_config()).float(), SamplingSettings(), 2, 2)
    for done, unit in [(2, "images"), (24, "codes")]:
        assert found[f"{unit} per second"] == pytest.approx([done / s for s in found["seconds"]])


@pytest.mark.parametrize(("batch_size", "passes"), [(8, 2), (6, 1)])  # micro_batch is 4
def test_training_is_measured_with_the_configs_passes(tmp_path, monkeypatch, batch_size, passes):
    (tmp_path / "tiny.yaml").write_text(TINY)
    made, loss = [], GeneratorTask.loss
    monkeypatch.setattr(
        GeneratorTask, "loss", lambda task, *index: made.append(task) or loss(task, *index)
    )
    options = ["--batch-size", batch_size, "--repeats", 1, "--device", "cpu"]
    result = run("bench", "train", tmp_path / "tiny.yaml", *options)
    assert len(made) == 2 * passes and "steps per second" in result.output
    assert made[0].model.head.weight.any()  # it really trains


def test_a_config_is_sampled_from_random_weights(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    options = ["--batch-size", 1, "--repeats", 1, "--device", "cpu", "--quantize"]
    done = run("bench", "sample", tmp_path / "tiny.yaml", *options, "int8")
    assert "codes per second" in done.output
    assert "int8" in refused("bench", "sample", tmp_path / "tiny.yaml", *options, "int3")
