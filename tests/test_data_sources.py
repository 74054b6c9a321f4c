"""Sources beside folders: ImageNet's archives, Parquet files, data sets by name."""

import gzip
import hashlib
import io
import struct
import sys
import tarfile
import urllib.request

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision import datasets as available
from torchvision.datasets import imagenet

from moveimg.data import datasets, open_images
from moveimg.images import UnreadableImageError

WNIDS = ["n01443537", "n01440764", "n02007558"]  # goldfish, tench, flamingo; not sorted
IDS = {1: "n01440764", 2: "n02007558", 3: "n01443537", 4: "n00001740"}  # the last has children
VAL = [3, 1, 1, 2, 3]  # ILSVRC2012_ID of each val image


def jpeg(seed, orientation=1):
    pixels = np.random.default_rng(seed).integers(0, 256, (9 + seed % 3, 12, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def tar_of(files, mode="w"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """ImageNet in small: three classes of two images, five for validation."""
    images = {w: {f"{w}_{i}.JPEG": jpeg(i, 6 if i == 0 else 1) for i in (10, 0)} for w in WNIDS}
    columns = [(name, "O") for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")]
    rows = [(i, wnid, "words", "gloss", int(i == 4)) for i, wnid in IDS.items()]
    tables = io.BytesIO()
    savemat(tables, {"synsets": np.array(rows, columns)})
    root, truth = "ILSVRC2012_devkit_t12/data/", "\n".join(map(str, VAL)).encode()
    devkit = {"meta.mat": tables.getvalue(), "ILSVRC2012_validation_ground_truth.txt": truth}
    for kind, data in {
        "train": tar_of({f"{wnid}.tar": tar_of(files) for wnid, files in images.items()}),
        "val": tar_of({f"ILSVRC2012_val_{i + 1:08d}.JPEG": jpeg(100 + i) for i in range(len(VAL))}),
        "devkit": tar_of({root + name: data for name, data in devkit.items()}, "w:gz"),
    }.items():
        name = imagenet.ARCHIVE_META[kind][0]
        monkeypatch.setitem(imagenet.ARCHIVE_META, kind, (name, hashlib.md5(data).hexdigest()))
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_imagenets_archives_are_unpacked_once_and_read_as_published(archives):
    for split, counts in (("train", [2, 2, 2]), ("val", [2, 2, 1])):
        source = open_images(archives, split)
        assert np.bincount(source.labels).tolist() == counts  # tench, goldfish, flamingo
        for i, name in enumerate(source.identifiers):
            assert source.labels[i] == sorted(WNIDS).index(name.split("/")[1])
            assert source[i][0].height < source[i][0].width  # EXIF is ignored, as ADM does
    val = {name.split("/")[2]: name.split("/")[1] for name in source.identifiers}
    assert [val[name] for name in sorted(val)] == [IDS[number] for number in VAL]
    names = [name.split(",")[0] for name in source.class_names]
    assert names == ["tench", "goldfish", "flamingo"]
    for path in archives.glob("*.tar*"):
        if "train" not in path.name:
            path.unlink()
    assert len(open_images(archives, "train")) == 6


def test_imagenets_archives_that_are_missing_or_damaged(archives):
    (archives / "ILSVRC2012_img_val.tar").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=str(archives)):
        open_images(archives, "val")
    assert (archives / "train").exists() and not (archives / "val").exists()
    assert not [path for path in archives.iterdir() if path.name.startswith(".")]


def test_parquet_files(tmp_path, monkeypatch):
    library = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
    import pyarrow.parquet

    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    images = [jpeg(i) if i != 2 else b"broken" for i in range(10)]
    named, number = library.ClassLabel(names=["cat", "dog"]), library.Value("int64")

    def write(file, rows, kind):
        cells = [{"bytes": images[row], "path": None} for row in rows]
        columns = {"image": cells, "label": [row % 2 for row in rows]}
        features = library.Features({"image": library.Image(), "label": kind})
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        table = pyarrow.table(columns, schema=features.arrow_schema)
        pyarrow.parquet.write_table(table, tmp_path / file)

    write("set/data/train-0-of-2.parquet", range(6), named)
    write("set/data/train-1-of-2.parquet", range(6, 10), named)
    train, val = (open_images(tmp_path / "set", split) for split in ("train", "val"))
    assert train.class_names == ["cat", "dog"] and (len(train), len(val)) == (8, 2)
    assert train.digest() == open_images(tmp_path / "set", "train").digest() != val.digest()
    seen = []
    for source in (train, val):
        for i, name in enumerate(source.identifiers):
            seen.append(row := int(name.removeprefix("train/")))
            assert source.labels[i] == row % 2 and source.content(i) == len(images[row])
            if row == 2:
                with pytest.raises(UnreadableImageError, match="00000002"):
                    source[i]
            else:
                expected = np.asarray(Image.open(io.BytesIO(images[row])))
                assert np.array_equal(np.asarray(source[i][0]), expected)
    assert sorted(seen) == list(range(10))
    write("plain/train.parquet", range(2), number)
    with pytest.raises(ValueError, match="ClassLabel"):
        open_images(tmp_path / "plain", "train")


def write_idx(folder, pack=bytes, suffix=""):
    """Fashion-MNIST's four files, with 60 and 20 images."""
    folder.mkdir(parents=True)
    for prefix, n in (("train", 60), ("t10k", 20)):
        pixels = np.random.default_rng(n).integers(0, 256, n * 28 * 28, np.uint8).tobytes()
        images = struct.pack(">4i", 2051, n, 28, 28) + pixels
        labels = struct.pack(">2i", 2049, n) + bytes(i % 10 for i in range(n))
        for name, data in (("images-idx3", images), ("labels-idx1", labels)):
            (folder / f"{prefix}-{name}-ubyte{suffix}").write_bytes(pack(data))
    return folder


def test_fashion_mnist(tmp_path, monkeypatch):
    debian = write_idx(tmp_path / "deb", gzip.compress, ".gz")
    monkeypatch.setattr(datasets, "DEBIAN_FASHION_MNIST", debian)
    monkeypatch.setenv("MOVEIMG_DATA", str(tmp_path / "cache"))
    assert [len(open_images("fashion-mnist", split)) for split in ("train", "val")] == [60, 20]
    parts = {s: open_images("fashion-mnist", s, 1 / 6) for s in ("train", "val", "test")}
    assert [len(part) for part in parts.values()] == [50, 10, 20]
    assert not set(parts["train"].identifiers) & set(parts["val"].identifiers)
    assert np.bincount(parts["val"].labels).tolist() == [1] * 10
    assert parts["test"].class_names[9] == "Ankle boot"
    assert parts["test"][0][0].size == (28, 28) and parts["test"][0][0].mode == "RGB"
    assert parts["test"].identifiers[0] == "fashion-mnist/test/00000"
    monkeypatch.setattr(datasets, "DEBIAN_FASHION_MNIST", tmp_path / "nowhere")
    write_idx(tmp_path / "root/FashionMNIST/raw")
    monkeypatch.setenv("MOVEIMG_DATA", str(tmp_path / "root"))  # torchvision's own files
    assert open_images("fashion-mnist", "val", 1 / 6).digest() == parts["val"].digest()


def test_sets_of_files_are_read_as_files_are(tmp_path):
    for part in ("train", "val"):
        folder = tmp_path / "imagenette2" / part / "n01440764"
        folder.mkdir(parents=True)
        for i in range(2):
            (folder / f"{i}.JPEG").write_bytes(jpeg(i, 6) if i else b"broken")
    train = open_images("imagenette", "train", data_root=tmp_path)
    assert train.class_names == ["tench, Tinca tinca"] and len(train) == 2
    assert train[1][0].height > train[1][0].width  # turned as EXIF says
    with pytest.raises(UnreadableImageError, match="imagenette/train/00000"):
        train[0]


def test_refused_unknown_and_missing_sets(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    with pytest.raises(FileNotFoundError, match=r"cifar-10-python\.tar\.gz") as caught:
        open_images("cifar10", "train", data_root=tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="celeba"):
        open_images("celeba", "train")
    with pytest.raises(FileNotFoundError, match=r"'cifar-10'.*cifar10"):
        open_images("cifar-10", "train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "train.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pip install 'moveimg\[datasets\]'"):
        open_images(tmp_path, "train")
    assert all(hasattr(available, kind) for kind, *_ in datasets.DATASETS.values())
