"""Encoding image sources into packed codes: order, interruptions, refusals."""

import multiprocessing
import os
import socket

import numpy as np
import pytest
import torch
from PIL import Image

from moveimg.config import ImagesConfig
from moveimg.data import PackedCodes, crop_views, encode_images, encode_splits, open_images
from moveimg.data import encode as encoding
from moveimg.images import to_tensor


class PatchTokenizer:
    """Codes that are a hash of 4x4 patches; can fail at its n-th call."""

    downsample = 4

    def __init__(self, codebook_size=1000, fail_at=None):
        self.codebook_size, self.fail_at, self.calls = codebook_size, fail_at, 0
        self.fingerprint = f"{codebook_size:064x}"

    def encode(self, images):
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
def folder(tmp_path):
    """13 images in 2 classes, 2 of them broken: 3 shards of 5, 5, 3 image indices."""
    rng = np.random.default_rng(0)
    for i in range(13):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 10, 3), np.uint8)).save(path)
    for name in BROKEN:
        (tmp_path / "images" / name).write_bytes(b"broken")
    return tmp_path / "images"


def opened(folder):
    return open_images(folder, "train", val_fraction=0)


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_encoding_packs_every_view_in_order(folder, tmp_path):
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
@pytest.mark.parametrize("fail_at, calls_left", [(2, 5), (5, 3)])
def test_interrupted_encoding_resumes_to_the_same_bytes(
    folder, tmp_path, monkeypatch, fail_at, calls_left
):
    source, out, rest = opened(folder), tmp_path / "out", PatchTokenizer()
    encode_images(source, PatchTokenizer(), tmp_path / "whole", **OPTIONS)
    with pytest.raises(RuntimeError, match="interrupted"):
        encode_images(source, PatchTokenizer(fail_at=fail_at), out, **OPTIONS)
    with pytest.raises(FileNotFoundError, match=str(out)):
        PackedCodes(out)
    state = torch.get_rng_state()
    if fail_at == 5:  # two shards are finished
        with pytest.raises(ValueError, match=r"batch_size.*40.*20"):
            encode_images(source, rest, out, **OPTIONS | {"batch_size": 20})
        (out / "codes-00000.npy").write_bytes(b"damaged")  # is made again
        monkeypatch.setattr(encoding, "SMALL_SOURCE", 0)  # other processes read the images
    encode_images(source, rest, out, **OPTIONS)
    assert contents(out) == contents(tmp_path / "whole")
    assert rest.calls == calls_left  # the second shard is kept
    assert torch.equal(torch.get_rng_state(), state)  # training's random stream is left alone


def test_a_finished_directory_is_left_or_refused(folder, tmp_path):
    source, out, again = opened(folder), tmp_path / "out", PatchTokenizer()
    first = encode_images(source, PatchTokenizer(), out, **OPTIONS)
    before = contents(out)
    assert encode_images(source, again, out, **OPTIONS) == first
    with pytest.raises(ValueError, match=r"image_size.*8.*16"):
        encode_images(source, again, out, **OPTIONS | {"image_size": 16})
    with pytest.raises(ValueError, match="tokenizer_fingerprint"):
        encode_images(source, PatchTokenizer(999), out, **OPTIONS)
    os.utime(folder / "a" / "00.png", ns=(1, 1))  # edited in place, of the same size
    with pytest.raises(ValueError, match="images have changed"):
        encode_images(opened(folder), again, out, **OPTIONS)
    assert contents(out) == before and again.calls == 0


def test_encoding_refuses_what_does_not_fit(folder, tmp_path):
    source = opened(folder)

    def encode(source=source, out=tmp_path / "out", codebook_size=1000, **changes):
        encode_images(source, PatchTokenizer(codebook_size), out, **OPTIONS | changes)

    for key, bad in {"image_size": 10, "crops": "nine", "batch_size": 0, "ranges": ()}.items():
        with pytest.raises(ValueError, match=rf"size is {bad}|'{bad}'|{key}"):
            encode(**{key: bad})
    with pytest.raises(ValueError, match="65537"):
        encode(codebook_size=65537)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        encode(out=tmp_path / "file" / "out")
    with pytest.raises(ValueError, match=f"{folder.name}' is not empty"):
        encode(out=folder)
    with pytest.raises(ValueError, match=r"train.*at least one"):
        encode(source.select(np.arange(0)))
    for path in folder.glob("*/*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"a/00\.png"):
        encode(opened(folder))


def test_splits_are_encoded_with_their_views(folder, tmp_path, capsys):
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


def one_process(rank, port, source, out, fail_at):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    encode_images(opened(source), PatchTokenizer(fail_at=fail_at), out, **OPTIONS)


def encode_on_two(source, out, fail_at=0):
    """Exit codes of two processes; their environment is what torchrun gives."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        arguments = free.getsockname()[1], source, out, fail_at
    fork = multiprocessing.get_context("fork")  # spares importing torch twice
    running = [fork.Process(target=one_process, args=(rank, *arguments)) for rank in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join(200)
    return [process.exitcode for process in running]


def test_two_processes_write_the_bytes_of_one(folder, tmp_path):
    encode_images(opened(folder), PatchTokenizer(), tmp_path / "one", **OPTIONS)
    # Three shards: rank 0 fails in its second one; rank 1 has finished its only one by the time
    # it learns of that.
    assert encode_on_two(folder, tmp_path / "two", fail_at=3) == [1, 1]
    kept = {path.name for path in (tmp_path / "two").glob("codes-*.npy")}
    assert kept == {"codes-00000.npy", "codes-00001.npy"}
    assert not (tmp_path / "two" / "manifest.json").exists()
    assert encode_on_two(folder, tmp_path / "two") == [0, 0]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
