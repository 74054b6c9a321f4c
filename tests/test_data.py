"""Crops, the digits, folders, and the modes and metadata of image files."""

import io
import shutil
import unicodedata

import numpy as np
import pytest
from PIL import Image

from moveimg.data import count_views, crop_views, open_images
from moveimg.data.sources import load_digit_arrays
from moveimg.images import (
    UnreadableImageError,
    center_crop,
    read_image,
    to_pil,
    to_tensor,
    to_uint8,
)

NFC, NFD = "café", unicodedata.normalize("NFD", "café")


def noise(width, height, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def write_images(root, counts, suffix=".png"):
    """In each folder `count` images of 8 x 8 pixels: 0.png, 1.png, ..."""
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            noise(8, 8, i).save(root / folder / f"{i}{suffix}")


def adm_reference(image, size):
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
def test_center_crop_is_adms(width, height):
    image = noise(width, height)
    assert np.array_equal(np.asarray(center_crop(image, (32, 32))), adm_reference(image, 32))


def test_a_strip_is_cut_before_it_is_enlarged(monkeypatch):
    sizes, resize = [], Image.Image.resize
    spy = lambda image, size, *more: sizes.append(size) or resize(image, size, *more)  # noqa: E731
    monkeypatch.setattr(Image.Image, "resize", spy)
    assert center_crop(Image.new("L", (30, 4000)), (256, 256)).size == (256, 256)
    assert sizes == [(256, 16 * 256)]


def test_ten_crop_order_and_counts():
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


def test_tensors_and_images_round_trip():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    images = to_tensor([Image.fromarray(pixels)] * 2)
    assert images.shape == (2, 3, 5, 6) and images.min() >= -1 and images.max() <= 1
    assert np.array_equal(to_uint8(images), np.stack([pixels] * 2))
    assert np.array_equal(np.asarray(to_pil(images * 3)[0]) > 127, pixels > 127)  # clipped


def test_digits_split_is_fixed_and_disjoint():
    train, (images, labels, val) = load_digit_arrays("train")[2], load_digit_arrays("val")
    assert np.array_equal(np.sort(np.concatenate([train, val])), np.arange(1797))
    # A changed split would put val images into what published models were trained on.
    assert val[:6].tolist() == [21, 24, 28, 34, 35, 37]
    source = open_images("digits", "val")
    image, label = source[7]
    assert image.mode == "RGB" and image.size == (8, 8) and label == labels[7]
    assert np.array_equal(np.asarray(image)[..., 1], images[7]) and images.max() == 255
    assert source.class_names[3] == "three" and len(set(source.identifiers)) == len(source) == 360
    # A changed digest would refuse codes that were encoded before.
    assert source.digest().startswith("ef512d7c873568c8b5e7db1c53fa6f22")
    assert open_images("digits", "test", 0.5).digest() == source.digest()
    assert len(open_images("digits", "train", 0.5)) == 719


def test_a_fifth_of_every_class_is_held_out(tmp_path):
    write_images(tmp_path, {"cat": 10, "ant": 5, "bee": 2, "one": 1})
    train, val = (open_images(tmp_path, split) for split in ("train", "val"))
    assert train.class_names == ["ant", "bee", "cat", "one"]
    assert np.bincount(train.labels).tolist() == [4, 2, 8, 1]
    # The split must never change: another one would validate on images that were trained on.
    assert list(val.identifiers) == ["ant/2.png", "cat/2.png", "cat/8.png"]
    paths = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")]
    assert sorted([*train.identifiers, *val.identifiers]) == sorted(paths)
    image, label = val[1]
    assert train.class_names[label] == "cat"
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(tmp_path / "cat/2.png")))
    assert len(open_images(tmp_path, "train", val_fraction=0)) == 18
    assert set(open_images(tmp_path, "train", val_fraction=0.9).labels) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "names",
    [("train", "val", "test"), ("TRAIN", "dev", "Test"), ("train_set", "val2017", "testing")],
)
def test_own_splits_and_a_share_of_train(tmp_path, names):
    for name, count in zip(names, (4, 2, 1), strict=True):
        cafe = NFD if name == names[0] else NFC  # macOS's name of the folder, and Linux's
        write_images(tmp_path, {f"{name}/a": count, f"{name}/{cafe}": count})

    def sizes(*splits, val_fraction=None):
        return [len(open_images(tmp_path, split, val_fraction)) for split in splits]

    assert sizes("train", "val", "test") == [8, 4, 2]
    assert sizes("train", "val", "test", val_fraction=0.25) == [6, 2, 2]
    val = open_images(tmp_path, "val")
    assert val.class_names == ["a", NFC] and val.labels.tolist() == [0, 0, 1, 1]
    assert val.identifiers[0] == f"{names[1]}/a/0.png"
    shutil.rmtree(tmp_path / names[2])
    assert sizes("train", "val", "test", val_fraction=0.25) == [6, 2, 4]
    with pytest.raises(ValueError, match="test"):
        sizes("test")


@pytest.mark.parametrize(
    "folders, split, named",
    [
        ([], "train", "images"),
        (["dog"], "val", "val"),
        (["dog"], "dev", "dev"),
        (["train/a", "cats/a"], "train", "cats"),  # names of splits must not become classes
        (["val/a", "test/a"], "train", "test"),
        (["cats/a", "Dev/a"], "train", "Dev"),
        (["train/a", "val/a", "val/odd"], "train", "odd"),
    ],
)
def test_folders_without_the_split_are_refused(tmp_path, folders, split, named):
    root = tmp_path / "images"
    with pytest.raises(FileNotFoundError, match=str(root)):
        open_images(root, split)
    root.mkdir()
    write_images(root, dict.fromkeys(folders, 1))
    with pytest.raises(ValueError, match=named):
        open_images(root, split)


def test_which_entries_are_read_in_which_order(tmp_path, capsys):
    root = tmp_path / "root"
    write_images(root, {"a": 2, "a/1": 1, "b": 1})
    write_images(tmp_path, {"elsewhere": 2})
    for folder in (".ipynb_checkpoints", "@eaDir", "__MACOSX"):  # hidden, or of other programs
        write_images(root, {folder: 1, f"a/1/{folder}": 1})
    noise(8, 8).save(root / "b" / "._0.png")
    for suffix in (".jfif", ".tif", ".webp", ".PNG", ".bmp", ".jp2", ".gif"):
        write_images(root, {"b": 1}, suffix)
    for name in ("a/notes.txt", "a/LICENSE", "a/scan.eps"):
        (root / name).write_text("")
    noise(8, 8).save(root / "stray.png")
    for link, target in {"a/up": "..", "a/again": ".", "loop": "..", "c": "../elsewhere"}.items():
        (root / link).symlink_to(target)
    source = open_images(root, "train", val_fraction=0)
    assert source.class_names == ["a", "b", "c"] and len(source) == 13
    assert source.identifiers[:3] == ["a/0.png", "a/1/0.png", "a/1.png"]
    assert source.identifiers[-2:] == ["c/0.png", "c/1.png"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert all(f"1 {kind}" in said for kind in (".txt", ".eps", "without a suffix", "image out"))


# --- one function reads an image -----------------------------------------------------------


def reread(image, kind, as_published=False, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return np.asarray(read_image(io.BytesIO(buffer.getvalue()), "x", as_published))


@pytest.mark.parametrize(
    "kind, dtype, values, expected",
    [
        ("png", "u2", [0, 256, 65535], [0, 1, 255]),
        ("tiff", "u2", [0, 256, 65535], [0, 1, 255]),
        ("ppm", "i4", [0, 200], [0, 0]),  # 16-bit PGM: dark
        ("tiff", "i4", [0, 200], [0, 200]),
        ("tiff", "i4", [0, 65535], [0, 255]),
        ("tiff", "i4", [-5, 3], None),
        ("tiff", "i4", [0, 65536], None),
        ("tiff", "f4", [0, 0.5], None),
    ],
)
def test_wide_modes_follow_the_stated_rule(kind, dtype, values, expected):
    image = Image.fromarray(np.array([values], dtype))
    if expected is None:
        with pytest.raises(UnreadableImageError, match="'x'"):
            reread(image, kind)
    else:
        assert reread(image, kind)[0, :, 0].tolist() == expected


RED, GREY = (200, 30, 60), (84, 84, 84)


@pytest.mark.parametrize(
    "mode, kind, colour",
    [("1", "png", (0, 0, 0)), ("L", "png", GREY), ("P", "png", RED), ("LA", "png", GREY),
     ("RGBA", "png", RED), ("RGB", "webp", RED), ("L", "jpeg", GREY), ("CMYK", "jpeg", RED)],
)  # fmt: skip
def test_every_mode_is_read_turned_and_on_white(mode, kind, colour):
    image, exif = Image.new("RGB", (2, 4), RED), Image.Exif()
    image = image.quantize(4) if mode == "P" else image.convert(mode, dither=Image.Dither.NONE)
    exif[0x0112] = 6
    pixels = reread(image, kind, exif=exif)
    assert pixels.shape == (2, 4, 3) and np.abs(pixels[0, 0].astype(int) - colour).max() <= 5
    if mode in ("LA", "RGBA"):
        image.putalpha(0)
        assert reread(image, kind).min() == 255
        assert reread(image, kind, as_published=True).max() < 255
    if mode in ("L", "P") and kind == "png":
        assert reread(image, kind, transparency=image.getpixel((0, 0))).min() == 255
    broken = reread(image, kind, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert broken.shape == (4, 2, 3)  # as without EXIF data


def test_unreadable_images_say_why(tmp_path):
    file = tmp_path / "image.png"
    noise(8, 8).save(file)
    whole = file.read_bytes()
    size = (1).to_bytes(4, "big") + (2**30).to_bytes(4, "big")  # width and height
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    for data in (postscript, whole[: len(whole) // 2], whole[:16] + size + whole[24:]):
        file.write_bytes(data)
        with pytest.raises(UnreadableImageError, match=r"'a/0\.png'") as caught:
            read_image(file, "a/0.png")
        assert str(tmp_path) not in str(caught.value)
