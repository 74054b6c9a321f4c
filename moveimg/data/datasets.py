"""Data sets by name: torchvision's classes for sets with one label per image, and the Hub's ids."""

from __future__ import annotations

import gzip
import inspect
import os
import sys
from contextlib import redirect_stdout
from difflib import get_close_matches
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from moveimg.data.images import ImageSource, Parts, array_source
from moveimg.dist import print_rank0
from moveimg.errors import describe
from moveimg.images import UnreadableImageError, read_image, to_rgb

Arguments = dict[str, dict[str, Any]]  # of torchvision's class, for each of the set's own splits
TRAIN_FLAG: Arguments = {"train": {"train": True}, "test": {"train": False}}
TWO_SPLITS: Arguments = {"train": {"split": "train"}, "test": {"split": "test"}}
THREE_SPLITS: Arguments = TWO_SPLITS | {"val": {"split": "val"}}
ONE_SPLIT: Arguments = {"train": {}}
IDX = "{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz"


class NamedSet(NamedTuple):
    """torchvision's class, its arguments by split, and the files it needs below the data root."""

    kind: str
    parts: Arguments
    files: str


EMNIST: Arguments = {part: {"split": "balanced", **TRAIN_FLAG[part]} for part in TRAIN_FLAG}
PETS: Arguments = {"train": {"split": "trainval"}, "test": {"split": "test"}}
IMAGENETTE: Arguments = {part: {"split": part} for part in ("train", "val")}
COUNTRY211: Arguments = THREE_SPLITS | {"val": {"split": "valid"}}
DATASETS = {
    "mnist": NamedSet("MNIST", TRAIN_FLAG, f"MNIST/raw/{IDX}"),
    "fashion-mnist": NamedSet("FashionMNIST", TRAIN_FLAG, f"FashionMNIST/raw/{IDX}"),
    "kmnist": NamedSet("KMNIST", TRAIN_FLAG, f"KMNIST/raw/{IDX}"),
    "emnist": NamedSet("EMNIST", EMNIST, "EMNIST/raw/gzip.zip"),
    "usps": NamedSet("USPS", TRAIN_FLAG, "usps.bz2 and usps.t.bz2"),
    "semeion": NamedSet("SEMEION", ONE_SPLIT, "semeion.data"),
    "cifar10": NamedSet("CIFAR10", TRAIN_FLAG, "cifar-10-python.tar.gz"),
    "cifar100": NamedSet("CIFAR100", TRAIN_FLAG, "cifar-100-python.tar.gz"),
    "svhn": NamedSet("SVHN", TWO_SPLITS, "train_32x32.mat and test_32x32.mat"),
    "stl10": NamedSet("STL10", TWO_SPLITS, "stl10_binary.tar.gz"),
    "food101": NamedSet("Food101", TWO_SPLITS, "food-101.tar.gz"),
    "gtsrb": NamedSet("GTSRB", TWO_SPLITS, "gtsrb/GTSRB, unpacked, and gtsrb/GT-final_test.csv"),
    "flowers102": NamedSet(
        "Flowers102", THREE_SPLITS, "flowers-102/102flowers.tgz, imagelabels.mat and setid.mat"
    ),
    "fgvc-aircraft": NamedSet("FGVCAircraft", THREE_SPLITS, "fgvc-aircraft-2013b.tar.gz"),
    "dtd": NamedSet("DTD", THREE_SPLITS, "dtd/dtd-r1.0.1.tar.gz"),
    "country211": NamedSet("Country211", COUNTRY211, "country211.tgz"),
    "rendered-sst2": NamedSet("RenderedSST2", THREE_SPLITS, "rendered-sst2.tgz"),
    "oxford-pets": NamedSet(
        "OxfordIIITPet", PETS, "oxford-iiit-pet/images.tar.gz and annotations.tar.gz"
    ),
    "imagenette": NamedSet("Imagenette", IMAGENETTE, "imagenette2.tgz"),
    "eurosat": NamedSet("EuroSAT", ONE_SPLIT, "eurosat/EuroSAT.zip"),
    "caltech101": NamedSet("Caltech101", ONE_SPLIT, "caltech101/101_ObjectCategories, unpacked"),
    "caltech256": NamedSet("Caltech256", ONE_SPLIT, "caltech256/256_ObjectCategories.tar"),
}
SEVERAL, UNLABELLED = "has several labels per image", "has no class label per image"
REFUSED = {
    **dict.fromkeys(("celeba", "coco", "voc", "inaturalist"), SEVERAL),
    **dict.fromkeys(("kitti", "cityscapes", "widerface", "sbd", "lsun", "lfw"), UNLABELLED),
    **dict.fromkeys(("flickr8k", "flickr30k", "sbu", "phototour", "moving-mnist"), UNLABELLED),
    "omniglot": "has other classes in its test split",
}
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist


def is_named(source: str | Path) -> bool:
    """Whether a source is a named data set, or an id `owner/name` of the Hub that is no folder."""
    text = str(source)
    return text in DATASETS or text in REFUSED or _is_hub_id(text)


def suggest_names(name: str) -> str:
    """The known names nearest to a name that is neither a data set nor a folder."""
    plain = {key.replace("-", ""): key for key in ("digits", *DATASETS)}
    nearest = get_close_matches(name.lower().replace("-", ""), plain, n=3, cutoff=0.5)
    names = [plain[key] for key in nearest] or ["digits", "fashion-mnist", "cifar10"]
    hub = "" if name.count("/") != 1 else "; of the Hub by `pip install 'moveimg[datasets]'`"
    return f" (such as {', '.join(names)}{hub})"


def find_parts(name: str, data_root: Path | None = None) -> Parts:
    """The splits of a named data set, which is downloaded when the first of them is opened.

    Raises ValueError for a set without exactly one label per image. Opening a split raises
    FileNotFoundError where its files are missing and cannot be downloaded.
    """
    if name in REFUSED:
        raise ValueError(f"the data set {name} {REFUSED[name]}: expected one label per image")
    if name not in DATASETS:
        from moveimg.data.archives import find_tables

        return find_tables(name)
    if Path(name).is_dir():
        print_rank0(f"'{name}' is read as the data set; the folder of that name is './{name}'")
    root = data_root or Path(os.environ.get("MOVEIMG_DATA") or Path.home() / ".cache/moveimg/data")
    return {part: partial(_open_part, name, part, root) for part in DATASETS[name].parts}


def _open_part(name: str, part: str, root: Path) -> ImageSource:
    dataset = _open_dataset(name, part, root)
    labels, images = _read_labels(dataset), getattr(dataset, "data", None)
    identifiers = [f"{name}/{part}/{row:05d}" for row in range(len(labels))]
    names = getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
    names = names or range(int(labels.max()) + 1)
    names = [", ".join(name) if isinstance(name, tuple) else str(name) for name in names]
    if images is None:
        load = partial(_read_row, dataset, identifiers)
        return ImageSource(name, names, identifiers, labels.astype(np.int32), load, content=int)
    images = np.asarray(images)
    if images.ndim == 4 and images.shape[1] == 3:  # SVHN and STL10 keep channels first
        images = images.transpose(0, 2, 3, 1)
    if name == "emnist":  # stored column by column
        images = images.transpose(0, 2, 1)
    return array_source(names, identifiers, images, labels)


def _open_dataset(name: str, part: str, root: Path) -> Any:
    from torchvision import datasets

    kind, parts, files = DATASETS[name]
    if name == "fashion-mnist" and DEBIAN_FASHION_MNIST.is_dir():
        return _DebianFashionMNIST(**parts[part])
    make = partial(getattr(datasets, kind), root=str(root), **parts[part])
    if "loader" in inspect.signature(make).parameters:  # torchvision's own ignores EXIF
        make.keywords["loader"] = _read_path
    try:
        with redirect_stdout(sys.stderr):
            try:
                return make(download=False)
            except Exception:  # each set has its own way to say that files are missing
                root.mkdir(parents=True, exist_ok=True)
                return make(download=True)
    except Exception as error:  # urllib, torchvision and the sets' own readers raise many kinds
        debian = "; on Debian, `apt-get install dataset-fashion-mnist` brings it"
        raise FileNotFoundError(
            f"the data set {name} cannot be downloaded ({describe(error, 150)}): put {files} "
            f"into '{root}', or name another folder by --data-root or $MOVEIMG_DATA"
            f"{debian if name == 'fashion-mnist' else ''}"
        ) from None


class _DebianFashionMNIST:
    """The four files of Debian's package, which torchvision reads only from its own folders."""

    def __init__(self, train: bool) -> None:
        from torchvision.datasets import FashionMNIST

        prefix = DEBIAN_FASHION_MNIST / ("train" if train else "t10k")
        images = gzip.decompress(Path(f"{prefix}-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress(Path(f"{prefix}-labels-idx1-ubyte.gz").read_bytes())
        self.data = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
        self.targets = np.frombuffer(labels, np.uint8, offset=8)
        self.classes = FashionMNIST.classes


def _read_labels(dataset: Any) -> np.ndarray:
    for key in ("targets", "labels", "_labels", "y"):
        if hasattr(dataset, key):
            return np.asarray(getattr(dataset, key)).astype(np.int64)
    return np.array([sample[1] for sample in dataset._samples], np.int64)


def _read_path(path: str | Path) -> Image.Image:
    return read_image(Path(path), Path(path).name)


def _read_row(dataset: Any, identifiers: list[str], row: int) -> Image.Image:
    try:
        return to_rgb(dataset[row][0])
    except UnreadableImageError as error:
        raise UnreadableImageError(identifiers[row], error.reason) from error
    except Exception as error:  # Pillow's decoders raise many kinds for broken files
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise UnreadableImageError(identifiers[row], reason) from error


def _is_hub_id(text: str) -> bool:
    parts = text.split("/")
    plain = len(parts) == 2 and all(part and part[0] not in ".~" for part in parts)
    return plain and not Path(text).exists() and find_spec("datasets") is not None
