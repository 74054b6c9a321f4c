"""Data sets by name: torchvision's classes, and tables of the library `datasets` (Parquet, Hub)."""

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

from moveimg.data.images import ImageSource, Splits
from moveimg.errors import describe
from moveimg.files import atomic
from moveimg.images import UnreadableImageError, read_image, to_rgb

Arguments = dict[str, dict[str, Any]]  # split -> arguments of torchvision's class
TRAIN_FLAG: Arguments = {"train": {"train": True}, "test": {"train": False}}
TWO_SPLITS: Arguments = {"train": {"split": "train"}, "test": {"split": "test"}}
THREE_SPLITS: Arguments = TWO_SPLITS | {"val": {"split": "val"}}
ONE_SPLIT: Arguments = {"train": {}}
TURN = methodcaller("transpose", Image.Transpose.TRANSPOSE)  # EMNIST is stored column by column
EMNIST: Arguments = {
    split: {"split": "balanced", "transform": TURN, **TRAIN_FLAG[split]} for split in TRAIN_FLAG
}
IDX = "{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz"
# torchvision's class, its arguments by split, and the files that it needs below the data root
DATASETS: dict[str, tuple[str, Arguments, str]] = {
    "mnist": ("MNIST", TRAIN_FLAG, f"MNIST/raw/{IDX}"),
    "fashion-mnist": ("FashionMNIST", TRAIN_FLAG, f"FashionMNIST/raw/{IDX}"),
    "kmnist": ("KMNIST", TRAIN_FLAG, f"KMNIST/raw/{IDX}"),
    "emnist": ("EMNIST", EMNIST, "EMNIST/raw/gzip.zip"),
    "usps": ("USPS", TRAIN_FLAG, "usps.bz2 and usps.t.bz2"),
    "semeion": ("SEMEION", ONE_SPLIT, "semeion.data"),
    "cifar10": ("CIFAR10", TRAIN_FLAG, "cifar-10-python.tar.gz"),
    "cifar100": ("CIFAR100", TRAIN_FLAG, "cifar-100-python.tar.gz"),
    "svhn": ("SVHN", TWO_SPLITS, "train_32x32.mat and test_32x32.mat"),
    "stl10": ("STL10", TWO_SPLITS, "stl10_binary.tar.gz"),
    "food101": ("Food101", TWO_SPLITS, "food-101.tar.gz"),
    "gtsrb": ("GTSRB", TWO_SPLITS, "gtsrb/GTSRB, unpacked, and gtsrb/GT-final_test.csv"),
    "flowers102": (
        "Flowers102",
        THREE_SPLITS,
        "flowers-102/102flowers.tgz, imagelabels.mat and setid.mat",
    ),
    "fgvc-aircraft": ("FGVCAircraft", THREE_SPLITS, "fgvc-aircraft-2013b.tar.gz"),
    "dtd": ("DTD", THREE_SPLITS, "dtd/dtd-r1.0.1.tar.gz"),
    "country211": (
        "Country211",
        TWO_SPLITS | {"val": {"split": "valid"}},
        "country211.tgz",
    ),
    "rendered-sst2": ("RenderedSST2", THREE_SPLITS, "rendered-sst2.tgz"),
    "oxford-pets": (
        "OxfordIIITPet",
        TWO_SPLITS | {"train": {"split": "trainval"}},
        "oxford-iiit-pet/images.tar.gz and annotations.tar.gz",
    ),
    "imagenette": (
        "Imagenette",
        {"train": {"split": "train"}, "val": {"split": "val"}},
        "imagenette2.tgz",
    ),
    "eurosat": ("EuroSAT", ONE_SPLIT, "eurosat/EuroSAT.zip"),
    "caltech101": ("Caltech101", ONE_SPLIT, "caltech101/101_ObjectCategories, unpacked"),
    "caltech256": ("Caltech256", ONE_SPLIT, "caltech256/256_ObjectCategories.tar"),
}
SEVERAL, UNLABELLED = "has several labels per image", "has no class label per image"
REFUSED = {
    **dict.fromkeys(("celeba", "coco", "voc", "inaturalist"), SEVERAL),
    **dict.fromkeys(("kitti", "cityscapes", "widerface", "sbd", "lsun", "lfw"), UNLABELLED),
    **dict.fromkeys(("flickr8k", "flickr30k", "sbu", "phototour", "moving-mnist"), UNLABELLED),
    "omniglot": "has other classes in its test split",
}
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist
SPLIT_OF = {"train": "train", "test": "test", "validation": "val", "val": "val", "valid": "val"}


def is_named_source(source: str | Path) -> bool:
    """Whether a source is a named data set, or a Hub id `owner/name` that is not a folder."""
    text = str(source)
    on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text) and not Path(text).exists()
    known = text == "digits" or text in DATASETS or text in REFUSED
    return known or bool(on_hub and find_spec("datasets"))


def find_splits(name: str, data_root: Path | None = None) -> Splits:
    """The splits of a named data set, which is downloaded when the first of them is opened.

    Raises ValueError for a set without exactly one label per image. Opening a split raises
    FileNotFoundError where its files are missing and cannot be downloaded.
    """
    if name in REFUSED:
        raise ValueError(f"the data set {name} {REFUSED[name]}: expected one label per image")
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
    if "loader" in inspect.signature(make).parameters:  # torchvision's ignores EXIF
        make.keywords["loader"] = partial(read_image, identifier=name)
    try:
        with redirect_stdout(sys.stderr):
            try:
                return make(download=False)
            except Exception:  # each set has its own way to say that files are missing
                root.mkdir(parents=True, exist_ok=True)
                return make(download=True)
    except Exception as error:  # urllib, torchvision and the sets' own readers raise many kinds
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
    """The splits of a folder of Parquet files, or of a data set `owner/name` of the Hub.

    Raises ValueError if the library `datasets` is not installed, or columns are missing.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError(f"'{source}' needs `pip install 'moveimg[datasets]'`") from None
    try:
        tables = datasets.load_dataset(str(source))
        features = tables["train"].features
        kinds = {name: type(kind).__name__ for name, kind in features.items()}
        image = next(name for name in kinds if kinds[name] == "Image")
        label = next(
            name
            for name in sorted(kinds, key=lambda name: kinds[name] != "ClassLabel")
            if kinds[name] == "ClassLabel" or name in ("label", "labels", "class")
        )
        values = getattr(features[label], "names", None) or sorted(set(tables["train"][label][:]))
    except Exception as error:  # its loaders raise many kinds for broken files
        reason = describe(error.__cause__ or error, 300)
        raise ValueError(
            f"'{source}': expected a folder or data set with a split `train`, a column of images "
            f"and one of labels: {reason}"
        ) from error
    return {
        SPLIT_OF[name]: partial(_open_table, source, name, tables[name], image, label, values)
        for name in reversed(tables)
        if name in SPLIT_OF
    }


def _open_table(
    source: Path | str, split: str, table: Any, image: str, label: str, classes: list[Any]
) -> ImageSource:
    import pyarrow.compute as pc

    labels = np.asarray(table[label][:])
    if not hasattr(table.features[label], "names"):
        labels = np.searchsorted(np.asarray(classes), labels)
    if not 0 <= labels.min(initial=0) <= labels.max(initial=0) < len(classes):
        reach = f"{labels.min()}..{labels.max()}"
        raise ValueError(f"'{source}' has labels {reach}: expected 0..{len(classes) - 1}")
    kind = table.features[image].__class__(decode=False)  # images are read here, as files are
    names = [f"{split}/{row:08d}" for row in range(len(table))]
    data = pc.struct_field(table.data.column(image), "bytes")  # only their lengths are read
    return ImageSource(
        name=str(source),
        class_names=[str(name) for name in classes],
        identifiers=names,
        labels=labels.astype(np.int32),
        load=partial(_read_cell, table.cast_column(image, kind), image, names),
        content=pc.fill_null(pc.binary_length(data), 0).to_numpy().item,
    )


def _read_cell(table: Any, column: str, names: list[str], row: int) -> Image.Image:
    return read_image(io.BytesIO(table[row][column]["bytes"] or b""), names[row])
