"""What counts as a class, a split, an image: the walker, modes and metadata, named data sets."""

from __future__ import annotations

import gzip
import io
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from moveimg.data import datasets
from moveimg.data.crops import center_crop
from moveimg.data.folders import walk_images
from moveimg.data.images import open_images
from moveimg.images import UnreadableImageError, read_image, to_rgb


def write_images(folder: Path, count: int, suffix: str = ".png", start: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}{suffix}")


@pytest.mark.parametrize(
    ("train", "val"),
    [("train", "valid"), ("Train", "Val"), ("training", "testing"), ("TRAIN", "validation")],
)
def test_usual_split_names_are_splits(tmp_path, train, val):
    for number, split in enumerate((train, val)):
        for name in "ab":
            write_images(tmp_path / split / name, 2 + number, start=10 * number)
    sources = {split: open_images(tmp_path, split) for split in ("train", "val")}
    assert [len(sources[split]) for split in ("train", "val")] == [4, 6]
    assert sources["train"].class_names == sources["val"].class_names == ["a", "b"]


@pytest.mark.parametrize("names", [["train"], ["train", "cats"], ["val", "test"]])
def test_split_names_in_place_of_classes_are_refused(tmp_path, names):
    for name in names:
        write_images(tmp_path / name / "a", 2)
    with pytest.raises(ValueError, match=names[0]):
        open_images(tmp_path, "train")


def test_hidden_and_tool_entries_are_skipped_at_every_depth(tmp_path):
    write_images(tmp_path / "a" / "deep", 2)
    write_images(tmp_path / "b", 2)
    for folder in (".ipynb_checkpoints", "@eaDir", "__MACOSX"):
        write_images(tmp_path / folder, 1)
        write_images(tmp_path / "a" / "deep" / folder, 1)
    write_images(tmp_path / "b" / "hidden", 1)
    (tmp_path / "b" / "hidden" / "0.png").rename(tmp_path / "b" / "._0.png")
    source = open_images(tmp_path, "train", val_fraction=0)
    assert source.class_names == ["a", "b"] and len(source) == 4


def test_each_real_file_is_walked_once(tmp_path):
    write_images(tmp_path / "a", 3)
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "copy.png").symlink_to(tmp_path / "a" / "0.png")
    write_images(tmp_path / "elsewhere" / "b", 2, start=5)
    (tmp_path / "a" / "more").symlink_to(tmp_path / "elsewhere" / "b")
    os.mkfifo(tmp_path / "a" / "pipe.png")
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nothing")
    walk = walk_images(tmp_path / "a")
    assert len({path.resolve() for path in walk.images}) == len(walk.images) == 5 + 0
    assert walk.others["broken link"] == 1


def test_formats_of_pillow_are_read_and_others_are_counted(tmp_path, capsys):
    for suffix in (".png", ".jfif", ".tif", ".webp"):
        write_images(tmp_path / "a", 1, suffix)
    (tmp_path / "a" / "notes.txt").write_text("")
    assert len(open_images(tmp_path, "train", val_fraction=0)) == 4
    assert "1 .txt" in capsys.readouterr().err


def test_class_names_are_nfc(tmp_path):
    write_images(tmp_path / unicodedata.normalize("NFD", "café"), 2)
    assert open_images(tmp_path, "train").class_names == ["café"]


def test_an_image_edited_in_place_changes_the_digest(tmp_path):
    write_images(tmp_path / "a", 2)
    before = open_images(tmp_path, "train", val_fraction=0).digest()
    path = tmp_path / "a" / "0.png"
    os.utime(path, ns=(1, 1))
    assert open_images(tmp_path, "train", val_fraction=0).digest() != before


# --- one function reads an image -----------------------------------------------------------


def reread(image: Image.Image, kind: str, **options) -> np.ndarray:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return np.asarray(read_image(io.BytesIO(buffer.getvalue()), "x"))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 256, 65535]], np.uint16), [0, 1, 255]),
        (np.array([[0, 200]], np.int32), [0, 200]),
        (np.array([[0, 65535]], np.int32), [0, 255]),
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[0, 255]], np.float32), [0, 255]),
    ],
)
def test_wide_modes_follow_the_stated_rule(values, expected):
    assert reread(Image.fromarray(values), "tiff")[0, :, 0].tolist() == expected


@pytest.mark.parametrize("values", [[[-5, 3]], [[0, 10**6]]])
def test_values_beyond_the_rule_are_unreadable(values):
    with pytest.raises(UnreadableImageError, match="x"):
        reread(Image.fromarray(np.array(values, np.int32)), "tiff")


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV"]
)
def test_every_mode_becomes_rgb(mode):
    image = Image.new("RGB", (4, 4), (255, 255, 255)).convert("RGB")
    image = image.convert(mode) if mode != "LAB" else Image.new("LAB", (4, 4))
    assert to_rgb(image).mode == "RGB"


def test_profiles_are_honoured_and_broken_metadata_is_ignored():
    swapped = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    red = Image.new("RGB", (8, 8), (200, 30, 30))
    assert np.abs(reread(red, "png", icc_profile=swapped).astype(int) - np.asarray(red)).max() <= 2
    assert (reread(red, "png", icc_profile=b"broken") == np.asarray(red)).all()
    assert (reread(red, "png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff") == np.asarray(red)).all()
    assert reread(Image.new("RGBA", (4, 4), (9, 9, 9, 0)), "png").min() == 255


def test_strips_and_bombs_end_no_run(tmp_path):
    assert center_crop(Image.new("L", (60_000, 1)), 256).size == (256, 256)
    bomb = Image.new("1", (1, 1))
    bomb.save(tmp_path / "x.png")
    data = bytearray((tmp_path / "x.png").read_bytes())
    data[16:24] = (1).to_bytes(4, "big") + (2**30).to_bytes(4, "big")  # width and height
    with pytest.raises(UnreadableImageError):
        read_image(io.BytesIO(bytes(data)), "x.png")


# --- named data sets -----------------------------------------------------------------------


@pytest.fixture
def fashion(tmp_path, monkeypatch) -> Path:
    """Debian's four files, with a few images."""
    rng = np.random.default_rng(0)
    for prefix, n in (("train", 60), ("t10k", 20)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8).tobytes()
        header = b"".join(value.to_bytes(4, "big") for value in (2051, n, 28, 28))
        labels = bytes(i % 10 for i in range(n))
        with gzip.open(tmp_path / f"{prefix}-images-idx3-ubyte.gz", "wb") as file:
            file.write(header + images)
        with gzip.open(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", "wb") as file:
            file.write((2049).to_bytes(4, "big") + n.to_bytes(4, "big") + labels)
    monkeypatch.setattr(datasets, "DEBIAN_FASHION_MNIST", tmp_path)
    return tmp_path


def test_the_test_split_is_validation_unless_a_share_of_train_is(fashion):
    assert [len(open_images("fashion-mnist", split)) for split in ("train", "val")] == [60, 20]
    parts = {
        split: open_images("fashion-mnist", split, 1 / 6) for split in ("train", "val", "test")
    }
    assert [len(part) for part in parts.values()] == [50, 10, 20]
    assert not set(parts["train"].identifiers) & set(parts["val"].identifiers)
    assert np.bincount(parts["val"].labels).tolist() == [1] * 10
    assert parts["test"].class_names[9] == "Ankle boot"
    assert parts["test"][0][0].size == (28, 28) and parts["test"][0][0].mode == "RGB"
    assert parts["test"].identifiers[0] == "fashion-mnist/test/00000"


def test_unknown_and_unsuitable_sets_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="fashion-mnist"):
        open_images("fashion-mnst", "train")
    with pytest.raises(ValueError, match="coco"):
        open_images("coco", "train")


def test_a_set_that_cannot_be_downloaded_says_where_its_files_belong(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    def fail(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr(CIFAR10, "__init__", fail)
    with pytest.raises(FileNotFoundError, match=r"cifar10.*no network"):
        open_images("cifar10", "train", data_root=tmp_path)


def test_every_named_set_is_one_of_torchvision():
    from torchvision import datasets as available

    assert all(hasattr(available, kind) for kind, _ in datasets.DATASETS.values())
