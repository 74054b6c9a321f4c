"""What a process does with its memory on a CPU."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from moveimg import device

FAULTS = """
import resource, torch
from moveimg.device import pick_device
if {kept}:
    pick_device("cpu")
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.zeros(2**24)
before = faults()
for _ in range(8):
    torch.zeros(2**24)  # 64 MiB each, freed at once
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_freed_memory_is_used_again():
    counts = [
        int(subprocess.check_output([sys.executable, "-c", FAULTS.format(kept=kept)], text=True))
        for kept in (True, False)
    ]
    pages = 2**26 // 4096
    assert counts[0] < pages / 4 and counts[0] < counts[1] / 4


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: pytest.fail("was asked"))
    assert device.keep_memory() is False and str(device.pick_device("cpu")) == "cpu"
