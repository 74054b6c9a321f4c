"""Devices, dtypes, the memory of a process, atomic directories and locks."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from moveimg import device, files


@pytest.mark.parametrize(
    ("name", "several", "has_cuda", "expected"),
    [
        (None, True, True, "cuda:3"),
        ("cuda:0", True, True, "cuda:3"),  # else all ranks would share it
        ("cpu", True, True, "cpu"),
        ("cuda", True, False, "cuda"),  # refused later
        ("cuda:1", False, True, "cuda:1"),
    ],
)
def test_every_rank_has_its_own_gpu(name, several, has_cuda, expected, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8" if several else "1")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(device.torch.cuda, "is_available", lambda: has_cuda)
    assert device.resolve_device(name) == expected


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_stays_with_the_process():
    script = """if True:  # in a process of its own, which the setting changes
        import torch
        from moveimg.device import keep_memory
        keep_memory()
        for _ in range(4):
            tensors = [torch.ones(8 * 2**20) for _ in range(8)]
            del tensors
        status = open("/proc/self/status").read()
        peak, now = (int(status.split(key)[1].split()[0]) for key in ("VmHWM:", "VmRSS:"))
        print((peak - now) // 1024)
    """
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout
    assert int(output) < 16  # of 256 MiB


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float32"), ((8, 0), "bfloat16")])
def test_bfloat16_is_the_default_from_capability_8(capability, dtype, monkeypatch):
    monkeypatch.setattr(device.torch.cuda, "get_device_capability", lambda where: capability)
    assert str(device.pick_dtype(None, device.torch.device("cuda"))) == f"torch.{dtype}"
    assert str(device.pick_dtype("auto", device.torch.device("cpu"))) == "torch.float32"


def test_directories_appear_whole_and_leftovers_are_removed(tmp_path):
    with pytest.raises(RuntimeError), files.atomic_directory(tmp_path / "a") as temporary:
        (temporary / "file").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".b.tmp-abcdefgh").mkdir()  # of a killed process
    (tmp_path / ".bc.tmp-abcdefgh").mkdir()  # of another directory
    with files.atomic_directory(tmp_path / "b") as temporary:
        (temporary / "file").write_text("x")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".bc.tmp-abcdefgh", "b"]
    with pytest.raises(FileExistsError), files.atomic_directory(tmp_path / "b"):
        pass


HOLD = """
import sys
from moveimg.files import lock
with lock(sys.argv[1], "encode"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_names_its_process_and_ends_with_it(tmp_path):
    out, leftover = tmp_path / "out", tmp_path / ".out.tmp-abcdefgh"
    command = [sys.executable, "-c", HOLD, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        expected = pytest.raises(ValueError, match=rf"process {process.pid} \(encode\)")
        with expected, files.atomic_directory(out):
            pass
        process.kill()
    leftover.touch()
    with files.lock(out, "a"), files.lock(out, "a"):  # a process may take its own lock twice
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "name"),
    [(b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"), (b"<!DOCTYPE html>", "HTML")],
)
def test_placeholders_are_named(tmp_path, content, name):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=name):
        files.require_file(tmp_path / "model.safetensors")
