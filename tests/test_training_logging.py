"""What a run shows while it trains."""

from __future__ import annotations

import errno
import io
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from moveimg.training import logging as run_logging
from moveimg.training.checkpoints import reason
from moveimg.training.settings import read_measurements


@pytest.mark.parametrize("text", ["[1]", '{"step": "x"}', '{"loss": 1.0}', '{"step": 1'])
def test_measurements_of_another_shape_are_named(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.jsonl"):
        read_measurements(tmp_path / "metrics.jsonl")


def full(*_: Any):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_costs_logs_and_not_the_run(tmp_path, monkeypatch, capsys):
    config: Any = SimpleNamespace(wandb=False, steps=9)
    with run_logging.RunLogger(tmp_path, config, 0, main=True) as logger:
        logger.line({"step": 1, "loss": 2.0})
        with monkeypatch.context() as patch:
            patch.setattr(run_logging, "save_png", full)
            patch.setattr(run_logging, "write_text", full)
            logger.image("", Image.new("RGB", (8, 8)), 2)
            logger.line({"step": 2, "loss": 1.0})
        logger.line({"step": 3, "loss": 0.5})
        monkeypatch.setattr(type(logger.writer), "add_scalar", full)
        for step in range(4, 9):
            logger.scalars("train", {"loss": 1.0, "lr": 0.1}, step)
        logger.image("", Image.new("RGB", (8, 8)), 9)
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("No space left on device") == 3  # TensorBoard's once
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 3]
    assert (tmp_path / "preview-000009.png").is_file()


class SmallDisk(io.BytesIO):
    """A file that a full disk cuts off, as the system does: the last write falls short."""

    def write(self, data: Any) -> int:
        room = 3000 - self.tell()
        if len(data) > room > 0:
            return super().write(data[:room])
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def test_a_full_disk_is_named_as_the_system_does():
    with pytest.raises(RuntimeError) as caught:  # torch's writer of archives misses bytes
        torch.save(torch.zeros(10_000), SmallDisk())
    assert reason(caught.value) == "No space left on device"


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),
        ("NVIDIA RTX A1000", None),
    ],
)
def test_the_peak_is_that_of_the_data_sheet(name, peak):
    assert run_logging.data_sheet_peak(name) == peak
