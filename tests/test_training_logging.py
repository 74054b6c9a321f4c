"""What a run shows while it trains."""

from __future__ import annotations

import errno
import io
import json
import threading
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.summary.writer.record_writer import RecordWriter

from moveimg.training import logging as run_logging
from moveimg.training.checkpoints import reason
from moveimg.training.settings import read_measurements


@pytest.mark.parametrize("text", ["[1]", '{"step": "x"}', '{"loss": 1.0}', '{"step": 1'])
def test_measurements_of_another_shape_are_named(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.jsonl"):
        read_measurements(tmp_path / "metrics.jsonl")


def test_a_full_disk_costs_what_is_shown_and_not_the_run(tmp_path, monkeypatch, capsys):
    @contextmanager
    def full(path: Any):
        raise OSError(errno.ENOSPC, "No space left on device")
        yield

    config: Any = SimpleNamespace(wandb=False, steps=3)
    with run_logging.RunLogger(tmp_path, config, 0, main=True) as logger:
        logger.line({"step": 1, "loss": 2.0})
        with monkeypatch.context() as patch:
            patch.setattr(run_logging, "atomic", full)
            patch.setattr(run_logging, "write_text", lambda path, text: full(path).__enter__())
            logger.image("", Image.new("RGB", (8, 8)), 2)
            logger.line({"step": 2, "loss": 1.0})
        logger.line({"step": 3, "loss": 0.5})
    told = capsys.readouterr()
    assert (told.out + told.err).count("No space left on device") == 2
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 3]


def test_a_full_disk_ends_tensorboard_with_one_line(tmp_path, monkeypatch, capsys):
    def full(writer: Any, data: bytes):
        raise OSError(errno.ENOSPC, "No space left on device")

    shown: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", shown.append)
    config: Any = SimpleNamespace(wandb=False, steps=9)
    with run_logging.RunLogger(tmp_path, config, 0, main=True) as logger:
        logger.scalars("train", {"loss": 1.0}, 1)
        monkeypatch.setattr(RecordWriter, "write", full)
        for step in range(2, 9):
            logger.scalars("train", {"loss": 1.0, "lr": 0.1}, step)
        logger.image("", Image.new("RGB", (8, 8)), 9)
        thread = threading.Thread(target=full, args=(None, b""))  # another's errors are shown
        thread.start()
        thread.join()
    told = capsys.readouterr()
    assert (told.out + told.err).count("TensorBoard gets nothing more") == 1
    assert len(shown) == 1 and shown[0].thread is thread
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
