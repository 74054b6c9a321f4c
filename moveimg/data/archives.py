"""Images inside archives: ImageNet's tar files of 2012, and tables of `datasets` (Parquet, Hub).

ImageNet's archives have the names that torchvision.datasets.ImageNet expects and are read in place.
They give the same identifiers, order and labels as the folder that torchvision unpacks.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from moveimg.data.images import ImageSource, Parts
from moveimg.errors import describe, shorten
from moveimg.images import UnreadableImageError, read_image

TRAIN = "ILSVRC2012_img_train.tar"
VAL = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
_META = "ILSVRC2012_devkit_t12/data/meta.mat"
_TRUTH = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"


# --- ImageNet ------------------------------------------------------------------------------


class Member(NamedTuple):
    """A file inside an archive: its name, and where its bytes are."""

    name: str
    offset: int
    size: int


def has_archives(root: Path) -> bool:
    """Whether one of ImageNet's image archives is in `root`."""
    return any((root / name).is_file() for name in (TRAIN, VAL))


def find_imagenet(root: Path) -> Parts:
    """The train and val split of ImageNet's archives in `root`; opening reads only their headers.

    Raises FileNotFoundError for an archive that is missing. Opening raises ValueError for one
    that is damaged or has other members than ImageNet's.
    """
    for name in (TRAIN, VAL, DEVKIT):
        if not (root / name).is_file():
            raise FileNotFoundError(
                f"no {name} in '{root}': expected ImageNet's three archives {TRAIN}, {VAL} and "
                f"{DEVKIT}, or train/ and val/ with class subfolders"
            )
    return {split: partial(_open_imagenet, root, split) for split in ("train", "val")}


def _open_imagenet(root: Path, split: str) -> ImageSource:
    """A split of the archives; labels follow the WordNet ids, sorted."""
    with _open_tar(root / TRAIN) as archive:
        classes = sorted(_list_members(archive, ".tar"))
        wnids = [member.name.removesuffix(".tar") for member in classes]
        train = list(_train_images(archive, classes)) if split == "train" else []
    labelled = train if split == "train" else _val_images(root, wnids)
    names = [f"{split}/{wnids[label]}/{member.name}" for label, member in labelled]
    offsets = np.array([member.offset for _, member in labelled], np.int64)
    sizes = np.array([member.size for _, member in labelled], np.int64)
    path = root / (TRAIN if split == "train" else VAL)
    return ImageSource(
        name=str(root),
        class_names=imagenet_names(wnids) or wnids,
        identifiers=names,
        labels=np.array([label for label, _ in labelled], np.int32),
        load=partial(_read_member, path, names, offsets, sizes),
        content=sizes.item,
    )


def _read_member(
    path: Path, names: list[str], offsets: np.ndarray, sizes: np.ndarray, row: int
) -> Image.Image:
    with open(path, "rb") as file:  # per image: right in every worker process
        file.seek(offsets[row])
        data = file.read(sizes[row])
    return read_image(io.BytesIO(data), names[row], as_published=True)


def imagenet_names(folders: list[str]) -> list[str] | None:
    """Names of the classes if all `folders` are WordNet ids of ImageNet-1k, else None."""
    if not all(len(name) == 9 and name[0] == "n" and name[1:].isdigit() for name in folders):
        return None
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    index_of = {wnid: index for index, wnid in enumerate(info.label_names())}
    if not set(folders) <= set(index_of):
        return None
    return [info.index_to_description(index_of[wnid]) for wnid in folders]


def _train_images(archive: tarfile.TarFile, classes: list[Member]) -> Iterator[tuple[int, Member]]:
    """(label, image) of the archives inside the train archive, class after class."""
    assert archive.fileobj is not None
    for label, inner in enumerate(classes):
        archive.fileobj.seek(inner.offset)
        with tarfile.TarFile(fileobj=archive.fileobj) as images:
            for member in sorted(_list_members(images, ".jpeg")):
                yield label, member


def _val_images(root: Path, wnids: list[str]) -> list[tuple[int, Member]]:
    """(label, image) of the val archive, class after class."""
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    with _open_tar(root / VAL) as archive:
        images = sorted(_list_members(archive, ".jpeg"))
    truth = _val_wnids(root / DEVKIT)
    if len(truth) != len(images):
        raise ValueError(
            f"'{root / VAL}' holds {len(images)} images: expected {len(truth)}, as many as "
            f"{DEVKIT} has labels"
        )
    unknown = sorted(set(truth) - set(label_of))
    if unknown:
        raise ValueError(f"'{root / TRAIN}' lacks the class {unknown[0]} that {DEVKIT} names")
    return sorted((label_of[wnid], image) for wnid, image in zip(truth, images, strict=True))


def _val_wnids(path: Path) -> list[str]:
    """The WordNet id of each val image, in the order of their names."""
    from scipy.io import loadmat

    with _open_tar(path) as devkit:
        try:
            meta, truth = (devkit.extractfile(name) for name in (_META, _TRUTH))
        except KeyError as error:
            raise ValueError(f"'{path}' is not ImageNet's: {error.args[0]}") from None
        assert meta is not None and truth is not None
        synsets = loadmat(io.BytesIO(meta.read()), squeeze_me=True)["synsets"]
        numbers = [int(line) for line in truth.read().split()]
    wnid_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in np.atleast_1d(synsets)}
    return [wnid_of[number] for number in numbers]


@contextmanager
def _open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(path) as archive:
            yield archive
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"'{path}' is damaged or no archive: {error}") from error


def _list_members(archive: tarfile.TarFile, suffix: str) -> list[Member]:
    """The files of an archive; TarError where the archive is shorter than they are."""
    assert archive.fileobj is not None
    members = []
    while (member := archive.next()) is not None:
        vars(archive)["members"] = []  # else tarfile keeps an object per member
        if member.isfile() and member.name.lower().endswith(suffix):
            name = member.name.rpartition("/")[2]
            members.append(Member(name, member.offset_data, member.size))
    archive.fileobj.seek(0, io.SEEK_END)  # type: ignore[call-arg]
    length = archive.fileobj.tell()
    if not members:
        raise tarfile.TarError(f"it holds no {suffix} files")
    if max(member.offset + member.size for member in members) > length:
        raise tarfile.TarError(f"it ends after {length} bytes, before its members do")
    return members


# --- tables of the library `datasets` ------------------------------------------------------

_PART_OF = {"train": "train", "test": "test", "validation": "val", "val": "val", "valid": "val"}


def has_parquet(root: Path) -> bool:
    """Whether Parquet files are in `root` or in its `data/`."""
    return any(any((root / folder).glob("*.parquet")) for folder in (".", "data"))


def find_tables(source: Path | str) -> Parts:
    """The splits of a folder of Parquet files, or of a data set `owner/name` of the Hub.

    Raises ValueError where the library `datasets` is not installed, or columns are missing.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"'{source}' is a data set of Parquet files: `pip install 'moveimg[datasets]'`"
        ) from None
    try:
        tables = datasets.load_dataset(str(source))
    except Exception as error:  # its loaders raise many kinds for broken files
        reason = describe(error.__cause__ or error, 300)
        what = "no folder, and not" if isinstance(source, str) else "not"
        raise ValueError(f"'{source}' is {what} readable as a data set: {reason}") from error
    names = {_PART_OF[name]: name for name in reversed(tables) if name in _PART_OF}
    if "train" not in names:
        raise ValueError(f"'{source}' has the splits {sorted(tables)}: expected `train`")
    columns = _find_columns(source, tables["train"])
    return {
        part: partial(_open_table, source, name, tables[name], *columns)
        for part, name in names.items()
    }


def _find_columns(source: Path | str, train: Any) -> tuple[str, str, list[Any]]:
    """The image column, the label column, and the classes as the labels' values or names."""
    import datasets

    features = train.features
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    labels += [name for name in ("label", "labels", "class") if name in features]
    if not images or not labels:
        raise ValueError(
            f"'{source}' has the columns {sorted(features)}: expected one of images and one `label`"
        )
    if hasattr(features[labels[0]], "names"):
        return images[0], labels[0], list(features[labels[0]].names)
    values = train[labels[0]][:]
    if not all(isinstance(value, str | int) for value in values):
        raise ValueError(f"'{source}' has labels like {shorten(values[0])}: expected one per image")
    return images[0], labels[0], sorted(set(values))


def _open_table(
    source: Path | str, split: str, table: Any, column: str, label_column: str, classes: list[Any]
) -> ImageSource:
    import pyarrow.compute as pc

    labels = np.asarray(table[label_column][:])
    if not hasattr(table.features[label_column], "names"):
        labels = np.searchsorted(np.asarray(classes), labels)
    if not 0 <= labels.min(initial=0) <= labels.max(initial=0) < len(classes):
        reach = f"{labels.min()}..{labels.max()}"
        raise ValueError(f"'{source}' has labels {reach}: expected 0..{len(classes) - 1}")
    kind = table.features[column].__class__(decode=False)  # images are read here, as files are
    names = [f"{split}/{row:08d}" for row in range(len(table))]
    data = pc.struct_field(table.data.column(column), "bytes")  # only their lengths are read
    return ImageSource(
        name=str(source),
        class_names=[str(name) for name in classes],
        identifiers=names,
        labels=labels.astype(np.int32),
        load=partial(_read_cell, table.cast_column(column, kind), column, names),
        content=pc.fill_null(pc.binary_length(data), 0).to_numpy().item,
    )


def _read_cell(table: Any, column: str, names: list[str], row: int) -> Image.Image:
    data = table[row][column]["bytes"]
    if data is None:
        raise UnreadableImageError(names[row], "the row holds no bytes, only a path")
    return read_image(io.BytesIO(data), names[row])
