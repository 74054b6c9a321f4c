"""Records of the memory during training."""

from __future__ import annotations

import pytest
import torch

from moveimg.training.generator import train_generator
from moveimg.training.logging import read_records
from tests.conftest import CPU
from tests.test_training import die_at_step_5, same_end, train_config


def test_records_change_no_weight_and_are_the_same_after_an_interruption(
    digits, tmp_path, monkeypatch
):
    plain, whole, stopped = configs = [
        train_config(digits, tmp_path / name, memory_every=every)
        for name, every in (("plain", 0), ("whole", 2), ("stopped", 2))
    ]
    train_generator(plain, CPU)
    train_generator(whole, CPU)
    die_at_step_5(monkeypatch, lambda: train_generator(stopped, CPU))
    train_generator(stopped, CPU)
    assert same_end(plain.out, whole.out) and same_end(plain.out, stopped.out)
    none, lines, again = (read_records(c.out / "training/records.jsonl") for c in configs)
    assert not none and lines == again and [line["step"] for line in lines] == [2, 4, 6, 8]
    with (whole.out / "training/records.jsonl").open("a") as file:
        file.write('{"step": 9, "ba')  # as a full disk leaves it
    assert read_records(whole.out / "training/records.jsonl") == lines
    for line in lines:
        assert list(line["by_layer"]) == list(line["slots"]) == ["1", "2"]
        assert 0 < line["rows_updated"] <= 1 and len(line["cosines"]) == 2
    with pytest.raises(ValueError, match="memory_every"):
        train_config(digits, tmp_path / "x", memory_every=2, distributed="fsdp")


def test_records_of_compiled_blocks_equal_those_of_eager_ones(digits, tmp_path, monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call: compile(call, backend="aot_eager"))
    records = []
    for compiled in (False, True):
        changes = {"memory_every": 2, "validate_every": 1, "steps": 4, "compile": compiled}
        config = train_config(digits, tmp_path / str(compiled), **changes)
        still = dict.fromkeys(("token_dropout", "resid_dropout", "ffn_dropout"), 0.0)
        config = config.model_copy(update={"model": config.model.model_copy(update=still)})
        train_generator(config, CPU)
        records.append(read_records(config.out / "training/records.jsonl"))
    for eager, compiled in zip(*records, strict=True):
        assert compiled["by_layer"] == pytest.approx(eager["by_layer"], rel=1e-3)
        assert compiled["slots"] == pytest.approx(eager["slots"], rel=1e-4)
