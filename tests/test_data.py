"""Crops, the digits, and the splits of a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moveimg.data import count_views, crop_views, digits_arrays, open_images
from moveimg.images import center_crop, to_pil, to_tensor, to_uint8


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def write_folder(root: Path, counts: dict[str, int]) -> Path:
    for seed, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            noise(8, 8, 1000 * seed + i).save(root / name / f"{i:02d}.png")
    return root


def adm_reference(image: Image.Image, size: int) -> np.ndarray:
    """ADM's crop, step by step on an array."""
    width, height = image.size
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
        image = image.resize((width, height), resample=Image.Resampling.BOX)
    scale = size / min(width, height)
    image = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("width, height", [(32, 32), (33, 40), (131, 67), (64, 200), (5, 9)])
def test_center_crop_is_adms(width: int, height: int) -> None:
    image = noise(width, height)
    assert np.array_equal(np.asarray(center_crop(image, (32, 32))), adm_reference(image, 32))


@pytest.mark.parametrize("width, height", [(60_000, 1), (1, 60_000), (4000, 30)])
def test_a_strip_is_cut_before_it_is_enlarged(width: int, height: int) -> None:
    gradient = Image.linear_gradient("L").rotate(90 if width > height else 0)
    image = center_crop(gradient.resize((width, height)), (256, 256))
    assert image.size == (256, 256)
    assert np.asarray(image).std() < 10  # the middle of the gradient, not all of it


def test_ten_crop_order_and_counts() -> None:
    image = noise(22, 22)  # the enlarged square itself: 20 * 1.1
    views = [np.asarray(view) for view in crop_views(image, 20, "ten", (1.1, 1.05))]
    assert len(views) == count_views("ten", (1.1, 1.05)) == 20
    pixels = np.asarray(image)
    for i, (top, left) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2), (1, 1)]):
        box = slice(top, top + 20), slice(left, left + 20)
        assert np.array_equal(views[i], pixels[box])
        assert np.array_equal(views[5 + i], pixels[:, ::-1][box])
    larger = np.asarray(center_crop(image, (21, 21)))
    assert np.array_equal(views[14], larger[:20, :20])
    centre, mirror = crop_views(noise(40, 30), 16, "flip")
    assert np.array_equal(np.asarray(centre)[:, ::-1], np.asarray(mirror))
    assert np.array_equal(np.asarray(centre), adm_reference(noise(40, 30), 16))
    # Rounded down as LlamaGen's, but 20 * 1.15 = 22.999... in floating point is 23.
    corner = np.asarray(crop_views(noise(23, 23), 20, "five", (1.15,))[0])
    assert np.array_equal(corner, np.asarray(noise(23, 23))[:20, :20])


def test_tensors_and_images_round_trip() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    images = to_tensor([Image.fromarray(pixels)] * 2)
    assert images.shape == (2, 3, 5, 6) and images.min() >= -1 and images.max() <= 1
    assert np.array_equal(to_uint8(images), np.stack([pixels] * 2))
    assert np.array_equal(np.asarray(to_pil(images * 3)[0]) > 127, pixels > 127)  # clipped


def test_digits_split_is_fixed_stratified_and_disjoint() -> None:
    train, val = digits_arrays("train")[2], digits_arrays("val")[2]
    assert np.array_equal(np.sort(np.concatenate([train, val])), np.arange(1797))
    counts = np.bincount(digits_arrays("val")[1])
    assert counts.min() >= 34 and counts.max() <= 37
    # A changed split would put val images into what published models were trained on.
    assert val[:6].tolist() == [21, 24, 28, 34, 35, 37]
    images, labels, _ = digits_arrays("val")
    source = open_images("digits", "val")
    image, label = source[7]
    assert image.mode == "RGB" and image.size == (8, 8) and label == labels[7]
    assert np.array_equal(np.asarray(image)[..., 1], images[7]) and images.max() == 255
    assert source.class_names[3] == "three" and len(set(source.identifiers)) == len(source) == 360
    assert open_images("digits", "test", 0.5).digest() == source.digest()
    assert len(open_images("digits", "train", 0.5)) == 719


def test_folder_split(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 10, "ant": 5, "bee": 2, "one": 1})
    train, val = open_images(tmp_path, "train"), open_images(tmp_path, "val")
    assert train.class_names == ["ant", "bee", "cat", "one"]
    assert np.bincount(train.labels).tolist() == [4, 2, 8, 1]
    assert np.bincount(val.labels).tolist() == [1, 0, 2]
    # The same rows for ever: a changed split would validate on images that were trained on.
    assert list(val.identifiers) == ["ant/02.png", "cat/02.png", "cat/08.png"]
    paths = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")]
    assert sorted([*train.identifiers, *val.identifiers]) == sorted(paths)
    image, label = val[1]
    assert train.class_names[label] == val.identifiers[1].split("/")[0]
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(tmp_path / val.identifiers[1])))
    assert list(open_images(tmp_path, "val", seed=1).identifiers) != list(val.identifiers)
    assert len(open_images(tmp_path, "train", val_fraction=0)) == 18
    assert set(open_images(tmp_path, "train", val_fraction=0.9).labels) == {0, 1, 2, 3}


def test_own_splits_and_a_share_of_train(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 4, "b": 4})
    write_folder(tmp_path / "val", {"a": 1, "b": 2})
    val = open_images(tmp_path, "val")
    assert list(val.identifiers) == ["val/a/00.png", "val/b/00.png", "val/b/01.png"]
    assert val.labels.tolist() == [0, 1, 1] and val.class_names == ["a", "b"]
    assert len(open_images(tmp_path, "train")) == 8
    with pytest.raises(ValueError, match="test"):
        open_images(tmp_path, "test")
    assert [len(open_images(tmp_path, s, 0.25)) for s in ("train", "val", "test")] == [6, 2, 3]
    write_folder(tmp_path / "test", {"a": 1, "b": 1})
    assert [len(open_images(tmp_path, s, 0.25)) for s in ("train", "val", "test")] == [6, 2, 2]
    assert [len(open_images(tmp_path, s)) for s in ("train", "val", "test")] == [8, 3, 2]
    write_folder(tmp_path / "val", {"c": 1})
    with pytest.raises(ValueError, match="c"):
        open_images(tmp_path, "train")


def test_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_images(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match="no images"):
        open_images(tmp_path, "train")
    write_folder(tmp_path, {"dog": 1})
    with pytest.raises(ValueError, match="val"):
        open_images(tmp_path, "val")
    with pytest.raises(ValueError, match="dev"):
        open_images(tmp_path, "dev")  # type: ignore[arg-type]
