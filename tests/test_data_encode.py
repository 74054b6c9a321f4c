"""Encoding image sources into packed codes: order, interruptions, refusals."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import socket
from multiprocessing.queues import Queue
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moveimg.config import ImagesConfig
from moveimg.data import (
    ImageSource,
    PackedCodes,
    crop_views,
    encode_images,
    encode_splits,
    open_images,
)
from moveimg.data import encode as encoding
from moveimg.images import to_tensor


class PatchTokenizer:
    """Codes that are a hash of 4x4 patches; can fail at its n-th call."""

    downsample = 4

    def __init__(self, codebook_size: int = 1000, fail_at: int | None = None) -> None:
        self.codebook_size, self.fail_at, self.calls = codebook_size, fail_at, 0
        self.fingerprint = f"{codebook_size:064x}"

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("interrupted")
        pixels = ((images + 1) * 127.5).round().long()
        patches = pixels.unfold(2, 4, 4).unfold(3, 4, 4)  # [B, 3, h, w, 4, 4]
        weights = torch.arange(1, 49).view(3, 1, 1, 4, 4) ** 2
        return (patches * weights).sum((1, 4, 5)).flatten(1) % self.codebook_size


OPTIONS = {
    "image_size": 8, "crops": "ten", "ranges": (1.25,), "batch_size": 40, "shard_size": 5
}  # fmt: skip
BROKEN = ("a/02.png", "b/11.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """13 images in 2 classes, 2 of them broken: 3 shards of 5, 5, 3 image indices."""
    rng = np.random.default_rng(0)
    for i in range(13):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 10, 3), np.uint8)).save(path)
    for name in BROKEN:
        (tmp_path / "images" / name).write_bytes(b"broken")
    return tmp_path / "images"


def opened(folder: Path) -> ImageSource:
    return open_images(folder, "train", val_fraction=0)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_encoding_packs_every_view_in_order(folder: Path, tmp_path: Path) -> None:
    source, out = opened(folder), tmp_path / "codes"
    manifest = encode_images(source, PatchTokenizer(), out, **OPTIONS)
    assert tuple(skipped.path for skipped in manifest.skipped) == BROKEN
    assert all("UnidentifiedImageError" in skipped.reason for skipped in manifest.skipped)
    assert [shard.n for shard in manifest.shards] == [4, 5, 2] and manifest.n_images == 11
    assert set(contents(out)) == {"manifest.json"} | {
        f"{kind}-{number:05d}.npy" for kind in ("codes", "labels") for number in range(3)
    }
    codes = PackedCodes(out)
    assert (len(codes), codes.n_crops, codes.grid, codes.image_size) == (11, 10, (2, 2), 8)
    assert codes.class_names == ["a", "b"] and codes.codebook_size == 1000
    readable = [i for i, name in enumerate(source.identifiers) if name not in BROKEN]
    views = [to_tensor(crop_views(source[i][0], 8, "ten", (1.25,))) for i in readable]
    expected = torch.stack([PatchTokenizer().encode(view) for view in views])  # [11, 10, 4]
    images, crops = np.divmod(np.random.default_rng(0).permutation(110), 10)
    found, labels = codes.get(images, crops)
    assert found.dtype == labels.dtype == torch.int64
    assert torch.equal(found, expected[images, crops])
    assert labels.tolist() == [source.labels[readable[i]] for i in images]


# 4 images of 10 views a call, so the shards take 2, 2 and 1 calls.
@pytest.mark.parametrize("fail_at, calls_left", [(2, 5), (3, 3), (5, 1)])
def test_interrupted_encoding_resumes_to_the_same_bytes(
    folder: Path, tmp_path: Path, fail_at: int, calls_left: int
) -> None:
    source, out = opened(folder), tmp_path / "out"
    encode_images(source, PatchTokenizer(), tmp_path / "whole", **OPTIONS)
    with pytest.raises(RuntimeError, match="interrupted"):
        encode_images(source, PatchTokenizer(fail_at=fail_at), out, **OPTIONS)
    with pytest.raises(FileNotFoundError, match=str(out)):
        PackedCodes(out)
    if calls_left < 5:  # a shard is finished
        with pytest.raises(ValueError, match=r"batch_size.*40.*20"):
            encode_images(source, PatchTokenizer(), out, **{**OPTIONS, "batch_size": 20})
    if calls_left == 1:
        (out / "codes-00000.npy").write_bytes(b"damaged")  # is made again
    rest = PatchTokenizer()
    encode_images(source, rest, out, **OPTIONS)
    assert contents(out) == contents(tmp_path / "whole")
    assert rest.calls == (3 if calls_left == 1 else calls_left)  # finished shards are kept


def test_worker_count_does_not_change_bytes(folder: Path, tmp_path: Path, monkeypatch) -> None:
    state = torch.get_rng_state()
    for small in (0, 2048):  # images below which no process is started
        monkeypatch.setattr(encoding, "SMALL_SOURCE", small)
        encode_images(opened(folder), PatchTokenizer(), tmp_path / str(small), **OPTIONS)
    assert contents(tmp_path / "0") == contents(tmp_path / "2048")
    assert torch.equal(torch.get_rng_state(), state)  # training's random stream is left alone


def test_a_finished_directory_is_left_or_refused(folder: Path, tmp_path: Path) -> None:
    source, out = opened(folder), tmp_path / "out"
    first = encode_images(source, PatchTokenizer(), out, **OPTIONS)
    before, again = contents(out), PatchTokenizer()
    assert encode_images(source, again, out, **OPTIONS) == first and again.calls == 0
    with pytest.raises(ValueError, match=r"image_size.*8.*16"):
        encode_images(source, again, out, **{**OPTIONS, "image_size": 16})
    with pytest.raises(ValueError, match="tokenizer_fingerprint"):
        encode_images(source, PatchTokenizer(999), out, **OPTIONS)
    with pytest.raises(ValueError, match="not empty"):
        encode_images(source, again, folder, **OPTIONS)
    shutil.copy(folder / "a" / "00.png", folder / "a" / "99.png")
    with pytest.raises(ValueError, match="images have changed"):
        encode_images(opened(folder), again, out, **OPTIONS)
    assert contents(out) == before and again.calls == 0


def test_encoding_refuses_what_does_not_fit(folder: Path, tmp_path: Path) -> None:
    source, out = opened(folder), tmp_path / "out"
    for key, bad in {"image_size": 10, "crops": "nine", "batch_size": 0, "ranges": ()}.items():
        with pytest.raises(ValueError, match=rf"size is {bad}|'{bad}'|{key}"):
            encode_images(source, PatchTokenizer(), out, **{**OPTIONS, key: bad})
    with pytest.raises(ValueError, match="65537"):
        encode_images(source, PatchTokenizer(65537), out, **OPTIONS)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        encode_images(source, PatchTokenizer(), tmp_path / "file" / "out", **OPTIONS)
    with pytest.raises(ValueError, match=r"train.*at least one"):
        encode_images(source.select(np.arange(0)), PatchTokenizer(), out, **OPTIONS)
    for path in folder.glob("*/*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"a/00\.png"):
        encode_images(opened(folder), PatchTokenizer(), out, **OPTIONS)


def test_splits_are_encoded_with_their_views(folder: Path, tmp_path: Path, capsys) -> None:
    images = ImagesConfig(source=str(folder), size=8, crops="flip", ranges=(1.25, 1.0))
    done = encode_splits(images, PatchTokenizer(), tmp_path / "out")
    assert [manifest.settings.n_crops for manifest in done.values()] == [4, 1]
    assert all(manifest.settings.dtype == "unchanged" for manifest in done.values())
    said = capsys.readouterr().err
    assert "2 classes: a, b" in said and said.count("UnidentifiedImageError") == 2
    images = images.model_copy(update={"val_fraction": 0.5})
    done = encode_splits(images, PatchTokenizer(), tmp_path / "half")
    assert {manifest.n_images + len(manifest.skipped) for manifest in done.values()} == {6, 7}
    with pytest.raises(ValueError, match="inside"):
        encode_splits(images, PatchTokenizer(), folder / "codes")


# --- several processes ---------------------------------------------------------------------


def one_process(queue: Queue, rank: int, port: int, source: Path, out: Path, fail_at: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    tokenizer = PatchTokenizer(fail_at=fail_at)
    try:
        queue.put(f"{encode_images(opened(source), tokenizer, out, **OPTIONS).n_images} images")
    except Exception as error:
        queue.put(f"{type(error).__name__}: {error}")


def encode_on_two(source: Path, out: Path, fail_at: int = 0) -> list[str]:
    """What two processes say at their end; their environment is what torchrun gives."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
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


def test_two_processes_write_the_bytes_of_one(folder: Path, tmp_path: Path) -> None:
    encode_images(opened(folder), PatchTokenizer(), tmp_path / "one", **OPTIONS)
    # Three shards: rank 0 fails in its second one; rank 1 has finished its only one by the time
    # it learns of that.
    first = encode_on_two(folder, tmp_path / "two", fail_at=3)
    assert any("interrupted" in said for said in first) and len(first) == 2
    kept = {path.name for path in (tmp_path / "two").glob("codes-*.npy")}
    assert kept == {"codes-00000.npy", "codes-00001.npy"}
    assert not (tmp_path / "two" / "manifest.json").exists()
    assert encode_on_two(folder, tmp_path / "two") == ["11 images"] * 2
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    said = encode_on_two(folder, folder)  # into the image folder itself: rank 0's error
    assert all(line.startswith("ValueError") and "is not empty" in line for line in said)
