"""Images inside archives: ImageNet's tar files of 2012, and Parquet files of the Hub.

ImageNet's archives carry the names that torchvision.datasets.ImageNet takes, are read in place, and
give the same identifiers, order and labels as the folder that torchvision unpacks.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from moveimg.data.images import ImageSource, Split, choose_split
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


@dataclass(frozen=True)
class _Members:
    """Images inside an archive, by row number."""

    archive: Path
    names: list[str]
    offsets: np.ndarray
    sizes: np.ndarray

    def load(self, row: int) -> Image.Image:
        with open(self.archive, "rb") as file:  # per image: right in every worker process
            file.seek(self.offsets[row])
            data = file.read(self.sizes[row])
        return read_image(io.BytesIO(data), self.names[row], as_published=True)

    def content(self, row: int) -> int:
        return int(self.sizes[row])


def has_archives(root: Path) -> bool:
    """Whether one of ImageNet's image archives is in `root`."""
    return any((root / name).is_file() for name in (TRAIN, VAL))


def open_archives(root: Path, split: Split) -> ImageSource:
    """One split of ImageNet's archives in `root`; labels follow the WordNet ids, sorted.

    Raises FileNotFoundError for an archive that is missing, ValueError for one that is damaged
    or has other members than ImageNet's.
    """
    if split == "test":
        raise ValueError(f"'{root}': ImageNet's test images have no labels: expected train or val")
    for name in (TRAIN, VAL, DEVKIT):
        if not (root / name).is_file():
            raise FileNotFoundError(
                f"no {name} in '{root}': expected ImageNet's three archives {TRAIN}, {VAL} and "
                f"{DEVKIT}, or train/ and val/ with class subfolders"
            )
    with _open_tar(root / TRAIN) as archive:
        classes = sorted(_list_members(archive, ".tar"))
        wnids = [member.name.removesuffix(".tar") for member in classes]
        train = list(_train_images(archive, classes)) if split == "train" else []
    labelled = train if split == "train" else _val_images(root, wnids)
    members = [member for _, member in labelled]
    images = _Members(
        archive=root / (TRAIN if split == "train" else VAL),
        names=[f"{split}/{wnids[label]}/{member.name}" for label, member in labelled],
        offsets=np.array([member.offset for member in members], np.int64),
        sizes=np.array([member.size for member in members], np.int64),
    )
    return ImageSource(
        name=f"{root} ({split})",
        class_names=imagenet_names(wnids) or wnids,
        identifiers=images.names,
        labels=np.array([label for label, _ in labelled], np.int32),
        load=images.load,
        content=images.content,
    )


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


# --- Parquet and the Hub -------------------------------------------------------------------

_OWN_SPLITS = {"train": "train", "validation": "val", "val": "val", "valid": "val", "test": "test"}


@dataclass(frozen=True)
class _Rows:
    """Rows of a split whose column `column` holds encoded images."""

    table: Any
    column: str
    names: list[str]
    sizes: np.ndarray

    def load(self, row: int) -> Image.Image:
        data = self.table[row][self.column]["bytes"]
        if data is None:
            raise UnreadableImageError(self.names[row], "the row holds no bytes, only a path")
        return read_image(io.BytesIO(data), self.names[row])

    def content(self, row: int) -> int:
        return int(self.sizes[row])


def has_parquet(root: Path) -> bool:
    """Whether Parquet files are in `root` or in its `data/`."""
    return any(any((root / folder).glob("*.parquet")) for folder in (".", "data"))


def open_parquet(
    source: Path | str, split: Split, val_fraction: float | None, seed: int
) -> ImageSource:
    """One split of a folder of Parquet files, or of a data set `owner/name` of the Hub.

    Raises ValueError where the library `datasets` is not installed, or columns are missing.
    """
    tables = _load_tables(source)
    known = {_OWN_SPLITS[name]: name for name in reversed(tables) if name in _OWN_SPLITS}
    if "train" not in known:
        raise ValueError(f"'{source}' has the splits {sorted(tables)}: expected `train`")
    column, label_column, class_names = _find_columns(source, tables[known["train"]])
    labels = {
        part: _read_labels(source, tables[name], label_column, class_names)
        for part, name in known.items()
    }
    part, rows = choose_split(labels, split, val_fraction, seed, str(source))
    table = tables[known[part]]
    kind = table.features[column].__class__(decode=False)  # images are read here, as files are
    images = _Rows(
        table=table.cast_column(column, kind).select(rows),
        column=column,
        names=[f"{part}/{row:08d}" for row in rows],
        sizes=_image_sizes(table, column)[rows],
    )
    return ImageSource(
        name=f"{source} ({split})",
        class_names=[str(name) for name in class_names],
        identifiers=images.names,
        labels=labels[part][rows],
        load=images.load,
        content=images.content,
    )


def _load_tables(source: Path | str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"'{source}' is a data set of Parquet files: `pip install 'moveimg[datasets]'`"
        ) from None
    try:
        return datasets.load_dataset(str(source))
    except Exception as error:  # its loaders raise many kinds for broken files
        reason = " ".join(str(error.__cause__ or error)[:300].split())
        raise ValueError(f"'{source}' cannot be read as a data set: {reason}") from error


def _find_columns(source: Path | str, train: Any) -> tuple[str, str, list[Any]]:
    """The image column, the label column and the classes, as the labels' values or names."""
    import datasets

    features = train.features
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    labels += [name for name in ("label", "labels", "class") if name in features]
    if not images or not labels:
        raise ValueError(
            f"'{source}' has the columns {sorted(features)}: expected one of images and one `label`"
        )
    kind = features[labels[0]]
    if isinstance(kind, datasets.ClassLabel):
        return images[0], labels[0], list(kind.names)
    values = train[labels[0]][:]
    if any(isinstance(value, list) for value in values[:1]):
        raise ValueError(f"'{source}' has several labels per image: expected one")
    return images[0], labels[0], sorted(set(values))


def _read_labels(source: Path | str, table: Any, column: str, classes: list[Any]) -> np.ndarray:
    values = np.asarray(table[column][:])
    if not hasattr(table.features[column], "names"):
        values = np.searchsorted(np.asarray(classes), values)
    if len(values) and not 0 <= values.min() <= values.max() < len(classes):
        raise ValueError(
            f"'{source}' has labels {values.min()}..{values.max()}: expected 0..{len(classes) - 1}"
        )
    return values.astype(np.int32)


def _image_sizes(table: Any, column: str) -> np.ndarray:
    """Bytes of every image, from the table's offsets, without reading the images."""
    import pyarrow.compute as pc

    data = pc.struct_field(table.data.column(column), "bytes")
    return pc.fill_null(pc.binary_length(data), 0).to_numpy()
