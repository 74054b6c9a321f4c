"""What a run shows while it trains."""

from __future__ import annotations

import errno
import json
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from moveimg.training import watch


def test_a_full_disk_costs_what_is_shown_and_not_the_run(tmp_path, monkeypatch, capsys):
    @contextmanager
    def full(path: Any):
        raise OSError(errno.ENOSPC, "No space left on device")
        yield

    config: Any = SimpleNamespace(wandb=False, steps=3)
    with watch.Journal(tmp_path, config, 0, main=True) as journal:
        journal.line({"step": 1, "loss": 2.0})
        with monkeypatch.context() as patch:
            patch.setattr(watch, "atomic", full)
            patch.setattr(watch, "write_text", lambda path, text: full(path).__enter__())
            journal.picture("", Image.new("RGB", (8, 8)), 2)
            journal.line({"step": 2, "loss": 1.0})
        journal.line({"step": 3, "loss": 0.5})
    told = capsys.readouterr()
    assert (told.out + told.err).count("No space left on device") == 2
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 3]


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
    assert watch.data_sheet_peak(name) == peak
