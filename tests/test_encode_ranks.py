"""Encoding by several processes: the bytes of one."""

from __future__ import annotations

import multiprocessing
import os
import socket
from multiprocessing.queues import Queue
from pathlib import Path

import pytest

from moveimg.data.encode import encode_images
from tests.test_data_encode import OPTIONS, PatchTokenizer, contents, folder, opened

__all__ = ["folder"]  # a fixture


def one_process(queue: Queue, rank: int, port: int, source: Path, out: Path, fail_at: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    tokenizer = PatchTokenizer(fail_at=fail_at)
    try:
        queue.put(f"{encode_images(opened(source), tokenizer, out, **OPTIONS).n_images} images")
    except Exception as error:
        queue.put(f"{type(error).__name__}: {error}")


def encode_on_two(source: Path, out: Path, port: int, fail_at: int = 0) -> list[str]:
    """What two processes say at their end; their environment is what torchrun gives."""
    fork = multiprocessing.get_context("fork")  # spares importing torch twice
    queue = fork.Queue()
    running = [
        fork.Process(target=one_process, args=(queue, rank, port, source, out, fail_at))
        for rank in range(2)
    ]
    for process in running:
        process.start()
    said = sorted(queue.get(timeout=200) for _ in running)
    for process in running:
        process.join(200)
    return said


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_two_processes_write_the_bytes_of_one(folder: Path, tmp_path: Path, port: int) -> None:
    encode_images(opened(folder), PatchTokenizer(), tmp_path / "one", **OPTIONS)
    # Three shards: rank 0 fails in its second one; rank 1 has finished its only one by the time
    # it learns of that.
    first = encode_on_two(folder, tmp_path / "two", port, fail_at=3)
    assert any("interrupted" in said for said in first) and len(first) == 2
    kept = {path.name for path in (tmp_path / "two").glob("codes-*.npy")}
    assert kept == {"codes-00000.npy", "codes-00001.npy"}
    assert not (tmp_path / "two" / "manifest.json").exists()
    assert encode_on_two(folder, tmp_path / "two", port) == ["11 images"] * 2
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_an_error_of_rank_0_ends_every_process(folder: Path, port: int) -> None:
    said = encode_on_two(folder, folder, port)  # into the image folder itself
    assert all(line.startswith("ValueError") and "is not empty" in line for line in said)
