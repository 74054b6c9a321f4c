"""Image sources, splits and crops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moveimg.data.crops import center_crop, count_views, crop_views, enlarged, to_tensor
from moveimg.data.images import ImageSource, digits_arrays, open_images
from moveimg.images import UnreadableImageError, to_pil, to_uint8


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def write_folder(root: Path, counts: dict[str, int]) -> Path:
    for seed, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            noise(8, 8, 1000 * seed + i).save(root / name / f"{i:02d}.png")
    return root


# --- crops ---------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "width, height", [(32, 32), (33, 40), (131, 67), (64, 200), (8, 8), (5, 9)]
)
def test_center_crop_is_adms(width: int, height: int) -> None:
    image = noise(width, height)
    assert np.array_equal(np.asarray(center_crop(image, 32)), adm_reference(image, 32))


def test_center_crop_halves_by_box_first() -> None:
    image = noise(64, 64)
    boxes = np.asarray(image, np.float64).reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(np.asarray(center_crop(image, 32)) - boxes).max() <= 1  # Pillow rounds each pass


def test_ten_crop_count_and_order() -> None:
    image = noise(22, 22)  # the enlarged square itself: 20 * 1.1
    views = [np.asarray(view) for view in crop_views(image, 20, "ten", (1.1, 1.05))]
    assert len(views) == count_views("ten", (1.1, 1.05)) == 20
    pixels = np.asarray(image)
    corners = [(0, 0), (0, 2), (2, 0), (2, 2), (1, 1)]  # top and left
    for i, (top, left) in enumerate(corners):
        crop = pixels[top : top + 20, left : left + 20]
        assert np.array_equal(views[i], crop)
        mirrored_left = 2 - left  # of the mirror image, the same place
        crop = pixels[:, ::-1][top : top + 20, left : left + 20]
        assert np.array_equal(views[5 + i], crop)
        assert np.array_equal(views[5 + i], pixels[top : top + 20, mirrored_left:][:, 19::-1])
    assert np.array_equal(views[14], np.asarray(center_crop(center_crop(image, 21), 21))[:20, :20])


@pytest.mark.parametrize("crops, count", [("center", 1), ("flip", 2), ("five", 5), ("ten", 10)])
def test_views_have_the_size_and_count(crops, count: int) -> None:
    for ranges in ((1.0,), (1.1, 1.05)):
        views = crop_views(noise(40, 30), 16, crops, ranges)
        assert [view.size for view in views] == [(16, 16)] * (count * len(ranges))
    assert np.array_equal(
        np.asarray(crop_views(noise(40, 30), 16, crops)[0]), adm_reference(noise(40, 30), 16)
    )


def test_flip_mirrors() -> None:
    centre, mirror = crop_views(noise(40, 30), 16, "flip")
    assert np.array_equal(np.asarray(centre)[:, ::-1], np.asarray(mirror))


@pytest.mark.parametrize("crops, ranges", [("nine", (1.0,)), ("ten", ()), ("ten", (0.9,))])
def test_crops_refused(crops, ranges) -> None:
    with pytest.raises(ValueError, match="expected"):
        crop_views(noise(8, 8), 8, crops, ranges)


# --- digits --------------------------------------------------------------------------------


def test_digits_split_is_fixed_stratified_and_disjoint() -> None:
    train, val = digits_arrays("train")[2], digits_arrays("val")[2]
    assert (len(train), len(val)) == (1437, 360)
    assert np.array_equal(np.sort(np.concatenate([train, val])), np.arange(1797))
    counts = np.bincount(digits_arrays("val")[1])
    assert counts.min() >= 34 and counts.max() <= 37
    # A changed split would put val images into what published models were trained on.
    assert val[:6].tolist() == [21, 24, 28, 34, 35, 37]


def test_digits_source() -> None:
    source = open_images("digits", "val", val_fraction=0.5, seed=9)
    images, labels, _ = digits_arrays("val")
    assert len(source) == 360 and images.dtype == np.uint8 and images.max() == 255
    image, label = source[7]
    assert image.mode == "RGB" and image.size == (8, 8) and label == labels[7]
    assert np.array_equal(np.asarray(image)[..., 1], images[7])
    assert source.class_names[3] == "three" and len(set(source.identifiers)) == 360
    assert crop_views(image, 32)[0].size == (32, 32)


# --- folders -------------------------------------------------------------------------------


def test_folder_split(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 10, "ant": 5, "bee": 2, "one": 1})
    (tmp_path / ".cache").mkdir()
    train, val = open_images(tmp_path, "train"), open_images(tmp_path, "val")
    assert train.class_names == ["ant", "bee", "cat", "one"]
    assert np.bincount(train.labels).tolist() == [4, 2, 8, 1]
    assert np.bincount(val.labels).tolist() == [1, 0, 2]
    assert sorted([*train.identifiers, *val.identifiers]) == sorted(
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")
    )
    image, label = val[1]
    assert train.class_names[label] == val.identifiers[1].split("/")[0]
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(tmp_path / val.identifiers[1])))
    assert list(open_images(tmp_path, "val", seed=1).identifiers) != list(val.identifiers)
    assert len(open_images(tmp_path, "train", val_fraction=0)) == 18


def test_every_class_keeps_a_train_image(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": 2, "b": 3})
    assert set(open_images(tmp_path, "train", val_fraction=0.9).labels) == {0, 1}
    assert len(open_images(tmp_path, "val", val_fraction=0.9)) == 3


def test_split_does_not_follow_the_file_systems_order(tmp_path: Path, monkeypatch) -> None:
    import os

    write_folder(tmp_path, {"a": 9, "b": 9})
    before = list(open_images(tmp_path, "val").identifiers)
    walk, listdir = os.walk, Path.iterdir
    monkeypatch.setattr(
        os, "walk", lambda *a, **k: ((r, d[::-1], f[::-1]) for r, d, f in walk(*a, **k))
    )
    monkeypatch.setattr(Path, "iterdir", lambda self: reversed(list(listdir(self))))
    assert list(open_images(tmp_path, "val").identifiers) == before


def test_train_and_val_folders_are_the_splits(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 3, "b": 3})
    write_folder(tmp_path / "val", {"a": 1, "b": 2})
    val = open_images(tmp_path, "val")
    assert list(val.identifiers) == ["val/a/00.png", "val/b/00.png", "val/b/01.png"]
    assert val.labels.tolist() == [0, 1, 1] and val.class_names == ["a", "b"]
    assert len(open_images(tmp_path, "train")) == 6
    write_folder(tmp_path / "val", {"c": 1})
    with pytest.raises(ValueError, match="only in train: none; only in val: c"):
        open_images(tmp_path, "train")


def test_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.*expected"):
        open_images(tmp_path / "nowhere", "train")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file' is not a folder"):
        open_images(tmp_path / "file", "train")
    with pytest.raises(ValueError, match="no subfolders"):
        open_images(tmp_path, "train")
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match="no images"):
        open_images(tmp_path, "train")
    write_folder(tmp_path, {"dog": 1})
    with pytest.raises(ValueError, match="without images: cat"):
        open_images(tmp_path, "train")
    write_folder(tmp_path, {"cat": 1})
    with pytest.raises(ValueError, match="no images for the val split"):
        open_images(tmp_path, "val")
    with pytest.raises(ValueError, match=r"val_fraction is 1\.5"):
        open_images(tmp_path, "val", val_fraction=1.5)
    with pytest.raises(ValueError, match="no test split"):
        open_images(tmp_path, "test")


def test_a_lone_train_folder_is_not_a_class(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 2})
    with pytest.raises(ValueError, match="train"):
        open_images(tmp_path, "train")
    assert open_images(tmp_path / "train", "train").class_names == ["a"]


def test_unreadable_images_say_why(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": 3})
    (tmp_path / "a" / "00.png").write_bytes(b"not an image")
    whole = (tmp_path / "a" / "01.png").read_bytes()
    (tmp_path / "a" / "01.png").write_bytes(whole[: len(whole) // 2])
    source = open_images(tmp_path, "train", val_fraction=0)
    for i in range(2):
        with pytest.raises(UnreadableImageError, match=f"'a/0{i}.png' cannot be read") as caught:
            source[i]
        assert str(tmp_path) not in str(caught.value)
    assert source[2][0].size == (8, 8)


def test_grey_of_16_bits_keeps_its_levels(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(levels * 257).save(tmp_path / "a" / "0.png")
    image, _ = open_images(tmp_path, "train", val_fraction=0)[0]
    assert np.array_equal(np.asarray(image)[..., 0], levels)


def test_digest_notices_changes(tmp_path: Path) -> None:
    def opened() -> ImageSource:
        return open_images(tmp_path, "train", val_fraction=0)

    write_folder(tmp_path, {"a": 2, "b": 2})
    before = opened().digest()
    assert opened().digest() == before
    noise(9, 9).save(tmp_path / "a" / "01.png")
    replaced = opened().digest()
    (tmp_path / "a" / "01.png").rename(tmp_path / "a" / "02.png")
    assert len({before, replaced, opened().digest()}) == 3


# --- pictures ------------------------------------------------------------------------------


def test_tensors_and_pictures_round_trip() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    images = to_tensor([Image.fromarray(pixels)] * 2)
    assert images.shape == (2, 3, 5, 6) and images.min() >= -1 and images.max() <= 1
    assert np.array_equal(to_uint8(images), np.stack([pixels] * 2))
    assert np.array_equal(np.asarray(to_pil(images * 3)[0]) > 127, pixels > 127)  # clipped


def test_crop_sides_are_rounded_down_as_llamagens() -> None:
    assert [enlarged(256, ratio) for ratio in (1.0, 1.05, 1.1)] == [256, 268, 281]
    assert enlarged(20, 1.15) == 23  # 22.999... in floating point
