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
def faults(n):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n):
        parts = [torch.zeros(k * 2**22) for k in (3, 1, 4, 2)]  # 160 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(4))
pick_device("cpu")
faults(4)  # alignment splits blocks: the first passes find none that fit
print(faults(4))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_freed_memory_is_used_again():
    said = subprocess.check_output([sys.executable, "-c", FAULTS], text=True)
    given_back, kept = map(int, said.split())
    assert kept < given_back / 4


def test_why_a_device_cannot_be_used_is_one_sentence(monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("Could not run it on 'MPS'. It runs on: [CPU, Meta, ...].")

    monkeypatch.setattr(device.torch, "zeros", refuse)
    with pytest.raises(ValueError, match=r"'mps' cannot be used here: Could not run it on 'MPS'$"):
        device.pick_device("mps")


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: pytest.fail("was asked"))
    assert device.keep_memory() is False and str(device.pick_device("cpu")) == "cpu"


@pytest.mark.parametrize(
    "given, several, has_cuda, expected",
    [
        (None, True, True, "cuda:3"),
        ("auto", True, True, "cuda:3"),
        ("cuda", True, True, "cuda:3"),
        ("cuda:0", True, True, "cuda:3"),  # else all would be there
        ("cpu", True, True, "cpu"),
        (None, True, False, None),
        ("cuda", True, False, "cuda"),  # to be refused
        ("cuda:1", False, True, "cuda:1"),
        (None, False, True, None),
    ],
)
def test_every_process_of_several_takes_its_own_gpu(
    given, several, has_cuda, expected, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "8" if several else "1")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(device.torch.cuda, "is_available", lambda: has_cuda)
    assert device.own_device(given) == expected


@pytest.mark.parametrize("capability, number", [((7, 5), "float32"), ((8, 0), "bfloat16")])
def test_old_gpus_are_not_given_bfloat16_unasked(capability, number, monkeypatch):
    monkeypatch.setattr(device.torch.cuda, "get_device_capability", lambda where: capability)
    cuda = device.torch.device("cuda")
    assert str(device.pick_dtype(None, cuda)) == f"torch.{number}"
    assert str(device.pick_dtype("bfloat16", cuda)) == "torch.bfloat16"
    assert str(device.pick_dtype("auto", device.torch.device("cpu"))) == "torch.float32"
