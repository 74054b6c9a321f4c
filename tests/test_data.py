"""Crops, the digits, folders, and the modes and metadata of image files."""

from __future__ import annotations

import io
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moveimg.data import count_views, crop_views, open_images
from moveimg.data.images import digits_arrays, walk_images
from moveimg.images import (
    UnreadableImageError,
    center_crop,
    read_image,
    to_pil,
    to_tensor,
    to_uint8,
)

NFC, NFD = "café", unicodedata.normalize("NFD", "café")


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def write_images(folder: Path, count: int, suffix: str = ".png", start: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
        noise(8, 8, i).save(folder / f"{i}{suffix}")


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


@pytest.mark.parametrize("width, height", [(60_000, 1), (30, 4000)])
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
    # A changed split would put val images into what published models were trained on.
    assert val[:6].tolist() == [21, 24, 28, 34, 35, 37]
    images, labels, _ = digits_arrays("val")
    assert np.bincount(labels).min() >= 34 and np.bincount(labels).max() <= 37
    source = open_images("digits", "val")
    image, label = source[7]
    assert image.mode == "RGB" and image.size == (8, 8) and label == labels[7]
    assert np.array_equal(np.asarray(image)[..., 1], images[7]) and images.max() == 255
    assert source.class_names[3] == "three" and len(set(source.identifiers)) == len(source) == 360
    # A changed digest would refuse codes that were encoded before.
    assert source.digest().startswith("ef512d7c873568c8b5e7db1c53fa6f22")
    assert open_images("digits", "test", 0.5).digest() == source.digest()
    assert len(open_images("digits", "train", 0.5)) == 719


def test_folder_split(tmp_path: Path) -> None:
    for name, count in {"cat": 10, "ant": 5, "bee": 2, "one": 1}.items():
        write_images(tmp_path / name, count)
    train, val = open_images(tmp_path, "train"), open_images(tmp_path, "val")
    assert train.class_names == ["ant", "bee", "cat", "one"]
    assert np.bincount(train.labels).tolist() == [4, 2, 8, 1]
    # The same rows for ever: a changed split would validate on images that were trained on.
    assert list(val.identifiers) == ["ant/2.png", "cat/2.png", "cat/8.png"]
    paths = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")]
    assert sorted([*train.identifiers, *val.identifiers]) == sorted(paths)
    image, label = val[1]
    assert train.class_names[label] == "cat"
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(tmp_path / "cat/2.png")))
    assert len(open_images(tmp_path, "train", val_fraction=0)) == 18
    assert set(open_images(tmp_path, "train", val_fraction=0.9).labels) == {0, 1, 2, 3}


def test_own_splits_and_a_share_of_train(tmp_path: Path) -> None:
    for folder, count in {"train/a": 4, "train/b": 4, "val/a": 1, "val/b": 2}.items():
        write_images(tmp_path / folder, count)
    val = open_images(tmp_path, "val")
    assert list(val.identifiers) == ["val/a/0.png", "val/b/0.png", "val/b/1.png"]
    assert val.labels.tolist() == [0, 1, 1] and val.class_names == ["a", "b"]
    with pytest.raises(ValueError, match="test"):
        open_images(tmp_path, "test")
    splits = ("train", "val", "test")
    assert [len(open_images(tmp_path, s, 0.25)) for s in splits] == [6, 2, 3]
    write_images(tmp_path / "test/a", 1)
    write_images(tmp_path / "test/b", 1)
    assert [len(open_images(tmp_path, s, 0.25)) for s in splits] == [6, 2, 2]
    assert [len(open_images(tmp_path, s)) for s in splits] == [8, 3, 2]
    write_images(tmp_path / "val/c", 1)
    with pytest.raises(ValueError, match="c"):
        open_images(tmp_path, "train")


def test_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_images(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match=tmp_path.name):
        open_images(tmp_path, "train")
    write_images(tmp_path / "dog", 1)
    for split in ("val", "dev"):
        with pytest.raises(ValueError, match=split):
            open_images(tmp_path, split)  # type: ignore[arg-type]
    # names of splits must not become classes
    for names in (["train", "cats"], ["val", "test"], ["cats", "Dev"]):
        root = tmp_path / "-".join(names)
        for name in names:
            write_images(root / name / "a", 2)
        with pytest.raises(ValueError, match=names[-1]):
            open_images(root, "train")


@pytest.mark.parametrize(
    "names",
    [["train_set", "val_set"], ["train2017", "val2017"], ["TRAIN", "dev", "Test"]],
)
def test_usual_split_names_are_splits(tmp_path: Path, names: list[str]) -> None:
    for number, split in enumerate(names):
        for name in "ab":
            write_images(tmp_path / split / name, 2 + number)
    for number, split in enumerate(("train", "val", "test")[: len(names)]):
        source = open_images(tmp_path, split)  # type: ignore[arg-type]
        assert len(source) == 2 * (2 + number) and source.class_names == ["a", "b"]


def test_hidden_and_tool_entries_are_skipped_and_others_counted(tmp_path: Path, capsys) -> None:
    for name in "ab":
        write_images(tmp_path / name / "deep", 2)
    for folder in (".ipynb_checkpoints", "@eaDir", "__MACOSX"):
        write_images(tmp_path / folder, 1)
        write_images(tmp_path / "a" / "deep" / folder, 1)
    noise(8, 8).save(tmp_path / "b" / "._0.png")
    for suffix in (".jfif", ".tif", ".webp", ".PNG", ".bmp", ".jp2", ".gif"):
        write_images(tmp_path / "a", 1, suffix)
    for name in ("a/notes.txt", "a/LICENSE", "a/scan.eps"):
        (tmp_path / name).write_text("")
    noise(8, 8).save(tmp_path / "stray.png")
    source = open_images(tmp_path, "train", val_fraction=0)
    assert source.class_names == ["a", "b"] and len(source) == 11
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert all(f"1 {kind}" in said for kind in (".txt", ".eps", "without a suffix", "image out"))


def test_names_of_classes_meet_in_nfc(tmp_path: Path) -> None:
    for folder in (f"train/{NFD}", f"val/{NFC}", "train/b", "val/b"):
        write_images(tmp_path / folder, 2)
    for split in ("train", "val"):
        source = open_images(tmp_path, split)
        assert source.class_names == ["b", NFC] and source.labels.tolist() == [0, 0, 1, 1]


def test_each_folder_is_walked_once_in_a_fixed_order(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_images(root / "a", 3)
    write_images(root / "a" / "1 deep", 1, start=8)
    write_images(root / "b", 1, start=7)
    write_images(tmp_path / "elsewhere", 2, start=5)
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "again").symlink_to(root / "a")
    (root / "loop").symlink_to(tmp_path)
    (root / "c").symlink_to(tmp_path / "elsewhere")
    expected = ["a/0.png", "a/1 deep/8.png", "a/1.png", "a/2.png", "b/7.png", "c/5.png", "c/6.png"]
    assert walk_images(root)[0] == expected


def test_the_digest_notices_every_change(tmp_path: Path) -> None:
    def digest() -> str:
        return open_images(tmp_path, "train", val_fraction=0).digest()

    write_images(tmp_path / "a", 2)
    digests = [digest()]
    os.utime(tmp_path / "a" / "0.png", ns=(1, 1))  # edited in place, of the same size
    digests.append(digest())
    (tmp_path / "a" / "0.png").rename(tmp_path / "a" / "9.png")
    digests.append(digest())
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({*digests, digest()}) == 4


# --- one function reads an image -----------------------------------------------------------


def reread(image: Image.Image, kind: str, as_published: bool = False, **options) -> np.ndarray:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return np.asarray(read_image(io.BytesIO(buffer.getvalue()), "x", as_published))


@pytest.mark.parametrize(
    "kind, values, expected",
    [
        ("png", np.array([[0, 256, 65535]], np.uint16), [0, 1, 255]),
        ("tiff", np.array([[0, 256, 65535]], np.uint16), [0, 1, 255]),
        ("ppm", np.array([[0, 200]], np.int32), [0, 0]),  # 16-bit PGM: dark
        ("tiff", np.array([[0, 200]], np.int32), [0, 200]),
        ("tiff", np.array([[0, 65535]], np.int32), [0, 255]),
        ("tiff", np.array([[-5, 3]], np.int32), None),
        ("tiff", np.array([[0, 65536]], np.int32), None),
        ("tiff", np.array([[0, 0.5]], np.float32), None),
    ],
)
def test_wide_modes_follow_the_stated_rule(kind: str, values: np.ndarray, expected) -> None:
    if expected is None:
        with pytest.raises(UnreadableImageError, match="'x'"):
            reread(Image.fromarray(values), kind)
    else:
        assert reread(Image.fromarray(values), kind)[0, :, 0].tolist() == expected


RED = (200, 30, 60)
MODES = {  # mode and format that holds it: the colour that (200, 30, 60) becomes
    ("1", "png"): (0, 0, 0), ("L", "png"): (84, 84, 84), ("P", "png"): RED, ("RGB", "png"): RED,
    ("LA", "png"): (84, 84, 84), ("RGBA", "png"): RED, ("RGB", "webp"): RED,
    ("CMYK", "tiff"): RED, ("L", "jpeg"): (84, 84, 84), ("CMYK", "jpeg"): RED,
}  # fmt: skip


@pytest.mark.parametrize("mode, kind", MODES)
def test_every_mode_is_read_turned_and_on_white(mode: str, kind: str) -> None:
    image = Image.new("RGB", (2, 4), RED)
    image = image.quantize(4) if mode == "P" else image.convert(mode, dither=Image.Dither.NONE)
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = reread(image, kind, **({} if kind == "tiff" else {"exif": exif}))
    assert pixels.shape == ((4, 2, 3) if kind == "tiff" else (2, 4, 3))
    assert np.abs(pixels[0, 0].astype(int) - MODES[mode, kind]).max() <= 5
    if mode in ("LA", "RGBA"):
        image.putalpha(0)
        assert reread(image, kind).min() == 255
        assert reread(image, kind, as_published=True).max() < 255
    if mode in ("L", "P", "RGB") and kind == "png":
        clear = {"L": 84, "P": image.getpixel((0, 0)), "RGB": RED}[mode]
        assert reread(image, kind, transparency=clear).min() == 255
        broken = reread(image, kind, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
        assert broken.shape == (4, 2, 3)  # as without EXIF data


def test_unreadable_images_say_why(tmp_path: Path) -> None:
    write_images(tmp_path / "a", 4)
    whole = (tmp_path / "a" / "1.png").read_bytes()
    size = (1).to_bytes(4, "big") + (2**30).to_bytes(4, "big")  # width and height
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    bad = (postscript, whole[: len(whole) // 2], whole[:16] + size + whole[24:])
    for i, data in enumerate(bad):
        (tmp_path / "a" / f"{i}.png").write_bytes(data)
    source = open_images(tmp_path, "train", val_fraction=0)
    for i in range(3):
        with pytest.raises(UnreadableImageError, match=f"'a/{i}.png'") as caught:
            source[i]
        assert str(tmp_path) not in str(caught.value)
    assert source[3][0].size == (8, 8)
