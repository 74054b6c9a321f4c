"""What is a class, a split, an image: the walker, and the modes and metadata of image files."""

from __future__ import annotations

import io
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moveimg.data import open_images, walk_images
from moveimg.images import UnreadableImageError, read_image
from tests.test_data import noise

NFC, NFD = "café", unicodedata.normalize("NFD", "café")


def write_images(folder: Path, count: int, suffix: str = ".png", start: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
        noise(8, 8, i).save(folder / f"{i}{suffix}")


@pytest.mark.parametrize(
    "names",
    [["train_set", "val_set"], ["train2017", "val2017"], ["Train", "Val"], ["training", "testing"],
     ["TRAIN", "dev", "Test"]],
)  # fmt: skip
def test_usual_split_names_are_splits(tmp_path: Path, names: list[str]) -> None:
    for number, split in enumerate(names):
        for name in "ab":
            write_images(tmp_path / split / name, 2 + number)
    for number, split in enumerate(("train", "val", "test")[: len(names)]):
        source = open_images(tmp_path, split)  # type: ignore[arg-type]
        assert len(source) == 2 * (2 + number) and source.class_names == ["a", "b"]


@pytest.mark.parametrize("names", [["train", "cats"], ["val", "test"], ["cats", "Dev"]])
def test_split_names_in_place_of_classes_are_refused(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        write_images(tmp_path / name / "a", 2)
    with pytest.raises(ValueError, match=names[-1]):
        open_images(tmp_path, "train")


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


def test_each_folder_is_walked_once_in_a_fixed_order(tmp_path: Path, monkeypatch) -> None:
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
    scandir = os.scandir

    class Reversed(list):
        def __enter__(self):
            return iter(self)

        def __exit__(self, *_):
            return None

        def __next__(self):
            if not self:
                raise StopIteration
            return self.pop(0)

    monkeypatch.setattr(os, "scandir", lambda path: Reversed(list(scandir(path))[::-1]))
    assert walk_images(root)[0] == expected


def test_the_digest_notices_every_change(tmp_path: Path) -> None:
    def digest() -> str:
        return open_images(tmp_path, "train", val_fraction=0).digest()

    write_images(tmp_path / "a", 2)
    digests = [digest()]
    assert digest() == digests[0]
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
    for i, data in enumerate(
        (postscript, whole[: len(whole) // 2], whole[:16] + size + whole[24:])
    ):
        (tmp_path / "a" / f"{i}.png").write_bytes(data)
    source = open_images(tmp_path, "train", val_fraction=0)
    for i in range(3):
        with pytest.raises(UnreadableImageError, match=f"'a/{i}.png'") as caught:
            source[i]
        assert str(tmp_path) not in str(caught.value)
    assert source[3][0].size == (8, 8)
