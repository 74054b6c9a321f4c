"""Named data sets: torchvision's own classes, for sets with one label per image."""

from __future__ import annotations

import os
from difflib import get_close_matches
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moveimg.data.images import ImageSource, Split, array_source, choose_split
from moveimg.errors import shorten
from moveimg.images import UnreadableImageError, to_rgb

# name: torchvision class, and the arguments of its splits (its own test split is never trained on)
_TRAIN_FLAG: dict[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
_SPLITS: dict[str, dict[str, Any]] = {"train": {"split": "train"}, "test": {"split": "test"}}
_THREE = _SPLITS | {"val": {"split": "val"}}
DATASETS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "mnist": ("MNIST", _TRAIN_FLAG),
    "fashion-mnist": ("FashionMNIST", _TRAIN_FLAG),
    "kmnist": ("KMNIST", _TRAIN_FLAG),
    "emnist": ("EMNIST", {part: {"split": "balanced"} | _TRAIN_FLAG[part] for part in _TRAIN_FLAG}),
    "cifar10": ("CIFAR10", _TRAIN_FLAG),
    "cifar100": ("CIFAR100", _TRAIN_FLAG),
    "svhn": ("SVHN", _SPLITS),
    "stl10": ("STL10", _SPLITS),
    "food101": ("Food101", _SPLITS),
    "gtsrb": ("GTSRB", _SPLITS),
    "stanford-cars": ("StanfordCars", _SPLITS),
    "flowers102": ("Flowers102", _THREE),
    "fgvc-aircraft": ("FGVCAircraft", _THREE),
    "dtd": ("DTD", _THREE),
    "pcam": ("PCAM", _THREE),
    "country211": (
        "Country211",
        {part: {"split": {"val": "valid"}.get(part, part)} for part in _THREE},
    ),
    "oxford-pets": ("OxfordIIITPet", {"train": {"split": "trainval"}, "test": {"split": "test"}}),
    "imagenette": ("Imagenette", {part: {"split": part} for part in ("train", "val")}),
    "eurosat": ("EuroSAT", {"train": {}}),
    "caltech101": ("Caltech101", {"train": {}}),
    "caltech256": ("Caltech256", {"train": {}}),
}
REFUSED = {
    "celeba": "has forty attributes per image",
    "coco": "has several labels per image",
    "voc": "has several labels per image",
    "widerface": "has no class label",
    "lfw": "has a person per image, most of them once",
}
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist


def is_named(source: str | Path) -> bool:
    """Whether a source is a named data set, or an id `owner/name` of the Hub that is no folder."""
    text = str(source)
    return text in DATASETS or text in REFUSED or (_is_hub_id(text) and not Path(text).exists())


def suggest_names(name: str) -> str:
    """The known names nearest to a name that is neither a data set nor a folder."""
    nearest = get_close_matches(name.lower(), ["digits", *DATASETS], n=3, cutoff=0.5)
    return f" (such as {', '.join(nearest or ['digits', 'fashion-mnist', 'cifar10'])})"


def open_named(
    name: str, split: Split, val_fraction: float | None, seed: int, data_root: Path | None = None
) -> ImageSource:
    """One split of a named data set, downloaded on first use.

    Raises ValueError for a set without one label per image, FileNotFoundError where its files are
    missing and cannot be downloaded.
    """
    if name in REFUSED:
        raise ValueError(f"the data set {name} {REFUSED[name]}: expected one label per image")
    if name not in DATASETS:
        from moveimg.data.archives import open_parquet

        return open_parquet(name, split, val_fraction, seed)
    root = data_root or default_root()
    parts = DATASETS[name][1]
    labels = {part: _labels(_open_part(name, part, root)) for part in parts}
    part, rows = choose_split(labels, split, val_fraction, seed, name)
    dataset = _open_part(name, part, root)
    identifiers = [f"{name}/{part}/{row:05d}" for row in rows]
    title, names = f"{name} ({split})", _class_names(dataset, labels["train"])
    data = getattr(dataset, "data", None)
    if data is not None and len(getattr(data, "shape", ())) in (3, 4):
        images = np.asarray(data)
        if images.ndim == 4 and images.shape[1] == 3:  # SVHN and STL10 keep channels first
            images = images.transpose(0, 2, 3, 1)
        return array_source(title, names, identifiers, images[rows], labels[part][rows])
    load = partial(_load_row, dataset, rows, identifiers)
    chosen = labels[part][rows].astype(np.int32)
    return ImageSource(title, names, identifiers, chosen, load, content=int)


def default_root() -> Path:
    """The folder of downloaded data sets: $MOVEIMG_DATA, or ~/.cache/moveimg/data."""
    return Path(os.environ.get("MOVEIMG_DATA") or Path.home() / ".cache/moveimg/data")


def _open_part(name: str, part: str, root: Path) -> Any:
    from torchvision import datasets

    kind, parts = DATASETS[name]
    if name == "fashion-mnist" and DEBIAN_FASHION_MNIST.is_dir():
        return _DebianFashionMNIST(**parts[part])
    try:
        return getattr(datasets, kind)(root=root, download=True, **parts[part])
    except Exception as error:  # urllib, torchvision and the sets' own readers raise many kinds
        reason = " ".join(str(error)[:200].split()) or type(error).__name__
        raise FileNotFoundError(
            f"the data set {name} is not in '{root}' and cannot be downloaded ({reason}): put its "
            f"files there as torchvision.datasets.{kind} expects them, or name another folder by "
            f"--data-root{_debian_hint(name)}"
        ) from None


def _debian_hint(name: str) -> str:
    hint = "; on Debian, `apt-get install dataset-fashion-mnist` is enough"
    return hint if name == "fashion-mnist" else ""


class _DebianFashionMNIST:
    """The four files of Debian's package, read as torchvision reads them unpacked."""

    def __init__(self, train: bool) -> None:
        import gzip

        from torchvision.datasets import FashionMNIST

        prefix = DEBIAN_FASHION_MNIST / ("train" if train else "t10k")
        with gzip.open(f"{prefix}-images-idx3-ubyte.gz") as file:
            self.data = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
        with gzip.open(f"{prefix}-labels-idx1-ubyte.gz") as file:
            self.targets = np.frombuffer(file.read(), np.uint8, offset=8)
        self.classes = list(FashionMNIST.classes)


def _labels(dataset: Any) -> np.ndarray:
    for key in ("targets", "labels", "_labels", "y"):
        if hasattr(dataset, key):
            return np.asarray(getattr(dataset, key)).astype(np.int64)
    if hasattr(dataset, "_samples"):
        return np.array([sample[1] for sample in dataset._samples], np.int64)
    return np.array([dataset[row][1] for row in range(len(dataset))], np.int64)


def _class_names(dataset: Any, labels: np.ndarray) -> list[str]:
    names = getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
    if names is None:
        names = [str(label) for label in range(int(labels.max()) + 1)]
    return [name if isinstance(name, str) else ", ".join(name) for name in names]


def _load_row(dataset: Any, rows: np.ndarray, identifiers: list[str], row: int) -> Image.Image:
    try:
        return to_rgb(dataset[int(rows[row])][0])
    except Exception as error:
        raise UnreadableImageError(identifiers[row], shorten(str(error), 200)) from error


def _is_hub_id(text: str) -> bool:
    if find_spec("datasets") is None:
        return False
    owner, slash, name = text.partition("/")
    return bool(slash) and all(
        part and "/" not in part and part[0] != "." for part in (owner, name)
    )
