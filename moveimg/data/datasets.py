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
DATASETS: dict[str, tuple[str, Arguments]] = {
    "mnist": ("MNIST", TRAIN_FLAG),
    "fashion-mnist": ("FashionMNIST", TRAIN_FLAG),
    "kmnist": ("KMNIST", TRAIN_FLAG),
    "cifar10": ("CIFAR10", TRAIN_FLAG),
    "cifar100": ("CIFAR100", TRAIN_FLAG),
    "svhn": ("SVHN", TWO_SPLITS),
    "stl10": ("STL10", TWO_SPLITS),
    "food101": ("Food101", TWO_SPLITS),
    "flowers102": ("Flowers102", THREE_SPLITS),
    "fgvc-aircraft": ("FGVCAircraft", THREE_SPLITS),
    "dtd": ("DTD", THREE_SPLITS),
    "oxford-pets": ("OxfordIIITPet", TWO_SPLITS | {"train": {"split": "trainval"}}),
    "imagenette": ("Imagenette", {"train": {"split": "train"}, "val": {"split": "val"}}),
    "eurosat": ("EuroSAT", {"train": {}}),
    "caltech101": ("Caltech101", {"train": {}}),
    "caltech256": ("Caltech256", {"train": {}}),
}
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist
SPLIT_OF = {"train": "train", "test": "test", "validation": "val", "val": "val", "valid": "val"}


def is_named_source(source: str | Path) -> bool:
    """Whether a source is a named data set, or a Hub id `owner/name` that is not a folder."""
    text = str(source)
    on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text) and not Path(text).exists()
    return text == "digits" or text in DATASETS or bool(on_hub and find_spec("datasets"))


def find_splits(name: str, data_root: Path | None = None) -> Splits:
    """The splits of a named data set, which is downloaded when the first of them is opened.

    Opening a split raises FileNotFoundError where its files are missing and cannot be downloaded.
    """
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

    kind, splits = DATASETS[name]
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
            f"the data set {name} cannot be downloaded ({describe(error, 150)}): expected the "
            f"files of torchvision.datasets.{kind} in '{root}' (--data-root or $MOVEIMG_DATA)"
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
