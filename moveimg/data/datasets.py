"""Named data sets: torchvision's, and tables of the library `datasets` (Parquet files, the Hub)."""

from __future__ import annotations

import gzip
import inspect
import io
import os
import re
import sys
from contextlib import redirect_stdout
from functools import partial
from importlib.util import find_spec
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moveimg.data.images import SPLIT_OF, ImageSource, Splits
from moveimg.errors import describe
from moveimg.files import atomic
from moveimg.images import UnreadableImageError, read_image, to_rgb

Arguments = dict[str, dict[str, Any]]  # split -> arguments of a torchvision class
FLAG: Arguments = {"train": {"train": True}, "test": {"train": False}}
ONE: Arguments = {"train": {}}
TWO: Arguments = {"train": {"split": "train"}, "test": {"split": "test"}}
THREE: Arguments = {**TWO, "val": {"split": "val"}}
COUNTRY: Arguments = {**TWO, "val": {"split": "valid"}}
PETS: Arguments = {**TWO, "train": {"split": "trainval"}}
TRANSPOSE = methodcaller("transpose", Image.Transpose.TRANSPOSE)  # EMNIST stores columns
EMNIST = {split: {"split": "balanced", "transform": TRANSPOSE, **FLAG[split]} for split in FLAG}
NETTE: Arguments = {"train": {"split": "train"}, "val": {"split": "val"}}
IDX = "{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz"
# torchvision's class, its arguments by split, and the files that it needs below the data root
DATASETS: dict[str, tuple[str, Arguments, str]] = {
    "mnist": ("MNIST", FLAG, f"MNIST/raw/{IDX}"),
    "fashion-mnist": ("FashionMNIST", FLAG, f"FashionMNIST/raw/{IDX}"),
    "kmnist": ("KMNIST", FLAG, f"KMNIST/raw/{IDX}"),
    "emnist": ("EMNIST", EMNIST, "EMNIST/raw/gzip.zip"),
    "usps": ("USPS", FLAG, "usps.bz2 and usps.t.bz2"),
    "semeion": ("SEMEION", ONE, "semeion.data"),
    "cifar10": ("CIFAR10", FLAG, "cifar-10-python.tar.gz"),
    "cifar100": ("CIFAR100", FLAG, "cifar-100-python.tar.gz"),
    "svhn": ("SVHN", TWO, "{train,test}_32x32.mat"),
    "stl10": ("STL10", TWO, "stl10_binary.tar.gz"),
    "food101": ("Food101", TWO, "food-101.tar.gz"),
    "gtsrb": ("GTSRB", TWO, "gtsrb/GTSRB, unpacked, and gtsrb/GT-final_test.csv"),
    "flowers102": ("Flowers102", THREE, "flowers-102/{102flowers.tgz,imagelabels.mat,setid.mat}"),
    "fgvc-aircraft": ("FGVCAircraft", THREE, "fgvc-aircraft-2013b.tar.gz"),
    "dtd": ("DTD", THREE, "dtd/dtd-r1.0.1.tar.gz"),
    "country211": ("Country211", COUNTRY, "country211.tgz"),
    "rendered-sst2": ("RenderedSST2", THREE, "rendered-sst2.tgz"),
    "oxford-pets": ("OxfordIIITPet", PETS, "oxford-iiit-pet/{images,annotations}.tar.gz"),
    "imagenette": ("Imagenette", NETTE, "imagenette2.tgz"),
    "eurosat": ("EuroSAT", ONE, "eurosat/EuroSAT.zip"),
    "caltech101": ("Caltech101", ONE, "caltech101/101_ObjectCategories, unpacked"),
    "caltech256": ("Caltech256", ONE, "caltech256/256_ObjectCategories.tar"),
}
REFUSED = {"celeba", "coco", "voc", "inaturalist", "kitti", "cityscapes", "widerface", "sbd"}
REFUSED |= {"lsun", "lfw", "flickr8k", "flickr30k", "sbu", "phototour", "moving-mnist", "omniglot"}
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist


def is_named_source(source: str | Path) -> bool:
    """Return whether `source` names a data set, or is a Hub id `owner/name` and no local path."""
    text = str(source)
    on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text) and not Path(text).exists()
    return text in ("digits", *DATASETS, *REFUSED) or bool(on_hub and find_spec("datasets"))


def find_splits(name: str, data_root: Path | None = None) -> Splits:
    """Return the splits of a named data set, which is downloaded when a split is first opened.

    Raises ValueError for a set without exactly one label per image. Opening a split raises
    FileNotFoundError where its files are missing and cannot be downloaded.
    """
    if name in REFUSED:
        raise ValueError(f"the data set {name} cannot be used: expected one class label per image")
    if name not in DATASETS:
        return find_tables(name)
    root = data_root or Path(os.environ.get("MOVEIMG_DATA") or Path.home() / ".cache/moveimg/data")
    return {split: partial(_open_split, name, split, root) for split in DATASETS[name][1]}


def _open_split(name: str, split: str, root: Path) -> ImageSource:
    dataset = _open_dataset(name, split, root)
    key = next((k for k in ("targets", "labels", "_labels", "y") if hasattr(dataset, k)), None)
    labels = getattr(dataset, key) if key else [sample[1] for sample in dataset._samples]
    labels = np.asarray(labels).astype(np.int32)
    identifiers = [f"{name}/{split}/{row:05d}" for row in range(len(labels))]
    names = getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
    names = names or range(int(labels.max()) + 1)
    names = [", ".join(name) if isinstance(name, tuple) else str(name) for name in names]
    load = partial(_read_row, dataset, identifiers)
    content = partial(_read_pixels, dataset) if hasattr(dataset, "data") else int
    return ImageSource(name, names, identifiers, labels, load, content)


def _open_dataset(name: str, split: str, root: Path) -> Any:
    from torchvision import datasets

    kind, splits, files = DATASETS[name]
    for path in DEBIAN_FASHION_MNIST.glob("*.gz") if name == "fashion-mnist" else ():
        unpacked = root / "FashionMNIST/raw" / path.stem  # where torchvision reads it
        if not unpacked.exists():
            with atomic(unpacked) as temporary:
                temporary.write_bytes(gzip.decompress(path.read_bytes()))
    make = partial(getattr(datasets, kind), root=str(root), **splits[split])
    if "loader" in inspect.signature(make).parameters:  # torchvision's loader ignores EXIF
        make.keywords["loader"] = partial(read_image, identifier=name)
    try:
        with redirect_stdout(sys.stderr):
            try:
                return make(download=False)
            except Exception:  # data sets raise different exceptions for missing files
                root.mkdir(parents=True, exist_ok=True)
                return make(download=True)
    except Exception as error:  # urllib, torchvision and readers of files raise many kinds
        raise FileNotFoundError(
            f"the data set {name} cannot be downloaded ({describe(error, 150)}): put {files} into "
            f"'{root}', or name another folder by --data-root or $MOVEIMG_DATA"
        ) from None


def _read_row(dataset: Any, identifiers: list[str], row: int) -> Image.Image:
    try:
        return to_rgb(dataset[row][0])
    except Exception as error:  # Pillow's decoders raise many kinds for broken files
        reason = error.args[1] if isinstance(error, UnreadableImageError) else describe(error, 200)
        raise UnreadableImageError(identifiers[row], reason) from error


def _read_pixels(dataset: Any, row: int) -> str:
    return np.asarray(dataset[row][0]).tobytes().hex()


def find_tables(source: Path | str) -> Splits:
    """Return the splits of a folder of Parquet files, or of a data set `owner/name` on the Hub.

    Raises ValueError if the library `datasets` is not installed, or columns are missing.
    """
    if not find_spec("datasets"):
        raise ValueError(f"'{source}' needs `pip install 'moveimg[datasets]'`")
    import datasets

    try:
        tables = datasets.load_dataset(str(source))
        features = reversed(tables["train"].features.items())  # so the first of a type wins
        columns = {type(feature).__name__: name for name, feature in features}
        image, label = columns["Image"], columns["ClassLabel"]
    except Exception as error:  # its loaders raise many kinds for broken files
        reason = describe(error.__cause__ or error, 300)
        raise ValueError(
            f"'{source}': expected a folder or data set with a split `train`, a column of images "
            f"(Image) and one of labels (ClassLabel): {reason}"
        ) from error
    return {
        SPLIT_OF[name]: partial(_open_table, source, name, tables[name], image, label)
        for name in reversed(tables)
        if name in SPLIT_OF
    }


def _open_table(source: Path | str, split: str, table: Any, image: str, label: str) -> ImageSource:
    import pyarrow.compute as pc

    labels, classes = np.asarray(table[label][:]), table.features[label].names
    if not 0 <= labels.min(initial=0) <= labels.max(initial=0) < len(classes):
        extent = f"{labels.min()}..{labels.max()}"
        raise ValueError(f"'{source}' has labels {extent}: expected 0..{len(classes) - 1}")
    kind = table.features[image].__class__(decode=False)  # for read_image to decode
    names = [f"{split}/{row:08d}" for row in range(len(table))]
    data = pc.struct_field(table.data.column(image), "bytes")  # for their lengths, without a copy
    content = pc.fill_null(pc.binary_length(data), 0).to_numpy().item
    load = partial(_read_cell, table.cast_column(image, kind), image, names)
    return ImageSource(str(source), classes, names, labels.astype(np.int32), load, content)


def _read_cell(table: Any, column: str, names: list[str], row: int) -> Image.Image:
    return read_image(io.BytesIO(table[row][column]["bytes"] or b""), names[row])
