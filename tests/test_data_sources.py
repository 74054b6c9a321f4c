"""Sources beside plain folders: ImageNet's archives, Parquet files; how a file becomes pixels."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from moveimg.data.images import open_images
from moveimg.images import UnreadableImageError

WNIDS = ["n01443537", "n01440764", "n02007558"]  # goldfish, tench, flamingo; not sorted
IDS = {1: "n01440764", 2: "n02007558", 3: "n01443537", 4: "n00001740"}  # the last has children
VAL = [3, 1, 1, 2, 3]  # ILSVRC2012_ID of each val image


def jpeg(seed: int, orientation: int = 1) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (9 + seed % 3, 12, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def devkit() -> bytes:
    columns = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(i, wnid, "words", int(i == 4)) for i, wnid in IDS.items()]
    tables = io.BytesIO()
    savemat(tables, {"synsets": np.array(rows, columns)})
    root = "ILSVRC2012_devkit_t12/data/"
    return tar_of(
        {
            root + "meta.mat": tables.getvalue(),
            root + "ILSVRC2012_validation_ground_truth.txt": "\n".join(map(str, VAL)).encode(),
        }
    )


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    """ImageNet in small: three classes of 2, 3 and 2 images, five for validation."""
    root = tmp_path / "archives"
    root.mkdir()
    images = {
        wnid: {
            f"{wnid}_{i}.JPEG": jpeg(10 * k + i, 6 if i == 0 else 1)
            for i in (10, 2, 0)[: 2 + k % 2]
        }
        for k, wnid in enumerate(WNIDS)
    }
    train = tar_of({f"{wnid}.tar": tar_of(files) for wnid, files in images.items()})
    (root / "ILSVRC2012_img_train.tar").write_bytes(train)
    val = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": jpeg(100 + i) for i in range(len(VAL))}
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar_of(val))
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(devkit())
    return root


def unpacked(archives: Path, out: Path) -> Path:
    """The folders that torchvision.datasets.ImageNet leaves."""
    with tarfile.open(archives / "ILSVRC2012_img_train.tar") as train:
        train.extractall(out / "train", filter="data")
    for inner in (out / "train").glob("*.tar"):
        with tarfile.open(inner) as archive:
            archive.extractall(inner.with_suffix(""), filter="data")
        inner.unlink()
    with tarfile.open(archives / "ILSVRC2012_img_val.tar") as val:
        for number, name in zip(VAL, sorted(val.getnames()), strict=True):
            val.extract(name, out / "val" / IDS[number], filter="data")
    return out


def test_archives_equal_the_folder_that_torchvision_unpacks(archives: Path, tmp_path: Path) -> None:
    folder = unpacked(archives, tmp_path / "folder")
    for split, counts in (("train", [3, 2, 2]), ("val", [2, 2, 1])):
        packed, loose = open_images(archives, split), open_images(folder, split)
        assert np.bincount(packed.labels).tolist() == counts  # tench, goldfish, flamingo
        assert list(packed.identifiers) == list(loose.identifiers)
        assert packed.labels.tolist() == loose.labels.tolist()
        for i in range(len(packed)):
            assert packed.labels[i] == sorted(WNIDS).index(packed.identifiers[i].split("/")[1])
            assert np.array_equal(np.asarray(packed[i][0]), np.asarray(loose[i][0]))
    names = [name.split(",")[0] for name in packed.class_names]
    assert names == ["tench", "goldfish", "flamingo"] and packed.class_names == loose.class_names
    assert packed[0][0].size == pickle.loads(pickle.dumps(packed))[0][0].size  # for workers


def test_archives_that_are_missing_or_damaged(archives: Path) -> None:
    train = archives / "ILSVRC2012_img_train.tar"
    whole = train.read_bytes()
    with tarfile.open(train) as archive:
        last = archive.getmembers()[-1]
    train.write_bytes(whole[: last.offset_data + 900])
    with pytest.raises(ValueError, match=r"img_train\.tar' is damaged or no archive"):
        open_images(archives, "train")
    train.write_bytes(b"nothing of the kind" * 100)
    with pytest.raises(ValueError, match="damaged or no archive"):
        open_images(archives, "train")
    train.write_bytes(whole)
    (archives / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    with pytest.raises(FileNotFoundError, match="no ILSVRC2012_devkit_t12"):
        open_images(archives, "val")


def test_a_damaged_image_in_an_archive_is_named(archives: Path) -> None:
    source = open_images(archives, "train")
    path = archives / "ILSVRC2012_img_train.tar"
    data = path.read_bytes().replace(jpeg(2), bytes(len(jpeg(2))))  # n01443537_2
    path.write_bytes(data)
    bad = [i for i in range(len(source)) if "n01443537_2" in source.identifiers[i]]
    with pytest.raises(UnreadableImageError, match=r"train/n01443537/n01443537_2\.JPEG' cannot"):
        source[bad[0]]


def test_pictures_are_turned_and_put_on_white_but_not_imagenets(tmp_path: Path) -> None:
    for name in ("cat", "n01440764"):
        (tmp_path / name / name).mkdir(parents=True)
        (tmp_path / name / name / "0.jpg").write_bytes(jpeg(0, orientation=6))
        clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
        clear.putpixel((0, 0), (0, 255, 0, 255))
        clear.save(tmp_path / name / name / "1.png")
    turned, clear = (open_images(tmp_path / "cat", "train", 0)[i][0] for i in range(2))
    stored = np.asarray(Image.open(io.BytesIO(jpeg(0))))
    assert np.array_equal(np.asarray(turned), np.rot90(stored, -1))
    assert clear.getpixel((0, 0)) == (0, 255, 0) and clear.getpixel((1, 1)) == (255, 255, 255)
    plain, red = (open_images(tmp_path / "n01440764", "train", 0)[i][0] for i in range(2))
    assert np.array_equal(np.asarray(plain), stored) and red.getpixel((1, 1)) == (255, 0, 0)


@pytest.fixture
def parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"])
    )
    rows = [
        {"image": {"bytes": jpeg(i) if i != 2 else b"broken", "path": None}, "label": i % 2}
        for i in range(10)
    ]
    out = tmp_path / "set" / "data"
    out.mkdir(parents=True)
    made = datasets.Dataset.from_list(rows, features=features)
    made.select(range(6)).to_parquet(out / "train-00000-of-00002.parquet")
    made.select(range(6, 10)).to_parquet(out / "train-00001-of-00002.parquet")
    return out.parent


def test_parquet_files(parquet: Path) -> None:
    train, val = open_images(parquet, "train"), open_images(parquet, "val")
    assert train.class_names == ["cat", "dog"] and (len(train), len(val)) == (8, 2)
    rows = sorted(int(name.split("/")[1]) for name in [*train.identifiers, *val.identifiers])
    assert rows == list(range(10))
    for source in (train, val):
        for i, name in enumerate(source.identifiers):
            row = int(name.split("/")[1])
            assert source.labels[i] == row % 2
            if row == 2:
                with pytest.raises(UnreadableImageError, match="00000002"):
                    source[i]
                continue
            assert source.content(i) == len(jpeg(row))
            expected = np.asarray(Image.open(io.BytesIO(jpeg(row))))
            assert np.array_equal(np.asarray(source[i][0]), expected)
    assert train.digest() == open_images(parquet, "train").digest() != val.digest()


def test_parquet_files_with_a_split_and_without_class_names(parquet: Path) -> None:
    import datasets

    rows = [{"image": {"bytes": jpeg(i), "path": None}, "label": 7 + 2 * i} for i in range(2)]
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    made = datasets.Dataset.from_list(rows, features=features)
    for path in (parquet / "data").glob("*"):
        path.unlink()
    made.to_parquet(parquet / "data" / "train-00000-of-00001.parquet")
    made.select([1]).to_parquet(parquet / "data" / "validation-00000-of-00001.parquet")
    assert open_images(parquet, "train").class_names == ["7", "9"]
    val = open_images(parquet, "val")
    assert val.labels.tolist() == [1] and list(val.identifiers) == ["validation/00000000"]


def test_parquet_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "train.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pip install 'moveimg\[datasets\]'"):
        open_images(tmp_path, "train")
