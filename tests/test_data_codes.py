"""Packed codes: reading them, and the order of batches."""

import io
import json
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moveimg.data.codes import Manifest, PackedCodes, draw_batch, draw_epoch, write_shard


def pack(directory, codes, labels, shard_size):
    """Write codes [N, crops, T] without a tokenizer."""
    directory.mkdir(exist_ok=True)
    arrays = codes.astype(np.uint16), labels.astype(np.int32)
    shards = [
        write_shard(directory, i, *(array[i * shard_size :][:shard_size] for array in arrays))
        for i in range(-(-len(codes) // shard_size))
    ]
    settings = {
        "tokenizer_fingerprint": "f" * 64, "codebook_size": int(codes.max()) + 1,
        "grid": (1, codes.shape[2]), "image_size": 8, "crops": "center", "ranges": (1.0,),
        "n_crops": codes.shape[1], "class_names": tuple(map(str, range(labels.max() + 1))),
        "source_digest": "0" * 64, "dtype": "unchanged", "batch_size": 1, "shard_size": shard_size,
    }  # fmt: skip
    about = {"source": "a test", "n_images": len(codes), "shards": tuple(shards), "skipped": ()}
    manifest = Manifest(settings=settings, **about)
    (directory / "manifest.json").write_text(manifest.model_dump_json())
    return PackedCodes(directory)


def packed_numbers(directory, n, shard_size=4):
    """Codes that identify image and crop: code = image * 2 + crop, T = 3."""
    codes = np.arange(n * 2).reshape(n, 2, 1).repeat(3, 2)
    return pack(directory, codes, np.arange(n) % 3, shard_size)


@pytest.mark.parametrize("n, shard_size", [(1, 4), (4, 4), (5, 4), (9, 2)])
def test_get_gathers_over_shard_boundaries(tmp_path, n, shard_size):
    packed = packed_numbers(tmp_path / "out", n, shard_size)
    images = np.array([*range(n), *range(n)[::-1], 0])
    crops = np.arange(len(images)) % 2
    codes, labels = packed.get(images, crops)
    assert codes.tolist() == [[i * 2 + c] * 3 for i, c in zip(images, crops, strict=True)]
    assert labels.tolist() == (images % 3).tolist()
    packed.require_tokenizer("f" * 64)
    with pytest.raises(ValueError, match=r"0{12}"):
        packed.require_tokenizer("0" * 64)
    largest = pack(tmp_path / "large", np.array([65535, 0]).reshape(2, 1, 1), np.zeros(2, int), 1)
    assert largest.get(np.array([0, 1]), np.zeros(2, int))[0].tolist() == [[65535], [0]]


def test_damaged_directories_are_refused(tmp_path):
    out = tmp_path / "out"
    packed_numbers(out, 9)
    shard, whole = out / "codes-00001.npy", (out / "codes-00001.npy").read_bytes()
    archive, wide = io.BytesIO(), io.BytesIO()
    np.savez(archive, np.zeros(3))
    np.save(wide, np.zeros((4, 2, 3), np.int64))
    header = whole.replace(b"'shape'", b"'shape\n")
    for damaged in (
        whole[:-2],
        whole[:50],
        b"",
        b"text",
        archive.getvalue(),
        wide.getvalue(),
        header,
    ):
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"\A.*codes-00001\.npy.*\Z"):
            PackedCodes(out)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"codes-00001\.npy"):
        PackedCodes(out)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        PackedCodes(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "place, value, named",
    [
        (["format_version"], 2, "format_version"),
        (["n_images"], [9], "n_images"),
        (["shards"], [], "shards"),
        (["settings", "codebook_size"], 2**16 + 1, "65537"),
        (["settings", "codebook_size"], 12, "codebook_size 12"),  # 13 is in the second shard
        (["settings", "class_names"], ["0"], r"0\.\.2"),
        (["shards", 0, "codes"], "../codes-00000.npy", "shards.0.codes"),
    ],
)
def test_bad_manifests_are_refused(tmp_path, place, value, named):
    packed_numbers(tmp_path, 9, shard_size=5)
    path = tmp_path / "manifest.json"
    part = manifest = json.loads(path.read_text())
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"\A.*{named}.*\Z"):
        PackedCodes(tmp_path).get(np.arange(9), np.zeros(9, int))


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    root = tmp_path_factory.mktemp("numbers")
    return {n: packed_numbers(root / str(n), n) for n in (3, 12, 14)}


def test_every_image_once_an_epoch(numbers):
    def draw(n, size, steps):
        return np.concatenate([draw_batch(numbers[n], size, 5, step)[2] for step in steps]).tolist()

    orders = {n: [draw_epoch(n, 2, 5, epoch)[0].tolist() for epoch in range(8)] for n in numbers}
    for epoch in (0, 1, 7):
        assert sorted(orders[12][epoch]) == list(range(12))
        assert draw(12, 4, range(3 * epoch, 3 * epoch + 3)) == orders[12][epoch]
    assert draw(14, 4, range(3, 6)) == orders[14][1][:12]  # 14 = 3 * 4 + 2: two are left out
    assert draw(3, 7, range(3)) == [*chain(*orders[3][:7])]  # a batch of several epochs


@settings(deadline=None, max_examples=60)
@given(
    n=st.sampled_from([3, 12, 14]),
    world_size=st.integers(1, 4),
    local=st.integers(1, 5),
    seed=st.integers(0, 2**32),
    step=st.integers(0, 1000),
)
def test_ranks_partition_the_global_batch(numbers, n, world_size, local, seed, step):
    batch = numbers[n], world_size * local, seed, step
    whole = codes, labels, indices = draw_batch(*batch)
    parts = [draw_batch(*batch, rank, world_size) for rank in range(world_size)]
    for one, several in zip(whole, zip(*parts, strict=True), strict=True):
        assert np.array_equal(one, np.concatenate(several))
    assert codes.shape == (world_size * local, 3)
    # codes identify image and crop, so they must agree with indices and labels
    assert np.array_equal(codes[:, 0].numpy() // 2, indices)
    assert labels.tolist() == (indices % 3).tolist()
