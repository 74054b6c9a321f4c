"""Records of the memory during training."""

from __future__ import annotations

import pytest

from moveimg.training.generator import train_generator
from moveimg.training.logging import read_records
from tests.test_training import CPU, die_at_step_5, same_end, train_config


@pytest.mark.parametrize("kind", ["move", "lave"])
def test_records_change_no_weight_and_are_the_same_after_an_interruption(
    digits, tmp_path, monkeypatch, kind
):
    memory = {"kind": "move", "slots": 2} if kind == "move" else {"kind": "lave"}
    model = {"n_layer": 2, "n_head": 2, "width": 16, "memory": memory, "resid_dropout": 0.1}
    configs = [
        train_config(digits, tmp_path / name, model=model, memory_every=every)
        for name, every in (("plain", 0), ("whole", 2), ("stopped", 2))
    ]
    for config in configs[:2]:
        train_generator(config, CPU)
    die_at_step_5(monkeypatch, lambda: train_generator(configs[2], CPU))
    train_generator(configs[2], CPU)
    assert all(same_end(configs[0].out, config.out) for config in configs[1:])
    none, lines, again = (read_records(c.out / "training/records.jsonl") for c in configs)
    assert not none and lines == again and [line["step"] for line in lines] == [2, 4, 6, 8]
    layers = {"move": ["1", "2"], "lave": ["2"]}[kind]
    for line in lines:
        assert list(line["by_layer"]) == list(line["slots"]) == layers
        assert 0 < line["rows_updated"] <= 1 and len(line["cosines"]) == len(layers)


def test_records_of_sharded_models_are_refused(digits, tmp_path):
    with pytest.raises(ValueError, match="memory_every"):
        train_config(digits, tmp_path / "x", memory_every=2, distributed="fsdp")
