"""ImageNet's archives of 2012, read where they lie: no image is unpacked to disk.

They carry the names under which torchvision.datasets.ImageNet takes them, and the source made of
them equals the one of the folder that torchvision unpacks: the same identifiers, order, labels.

    ILSVRC2012_img_train.tar       n01440764.tar, ... each with that class's images
    ILSVRC2012_img_val.tar         ILSVRC2012_val_00000001.JPEG, ...
    ILSVRC2012_devkit_t12.tar.gz   which class each val image belongs to
"""

from __future__ import annotations

import io
import tarfile
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from moveimg.data.images import ImageSource, Names, Split
from moveimg.images import read_image

TRAIN = "ILSVRC2012_img_train.tar"
VAL = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
_IDS = "ILSVRC2012_devkit_t12/data/meta.mat"
_TRUTH = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"


class _Member(NamedTuple):
    """A file inside an archive: its name, and where its bytes stand in the archive."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class _Members:
    """Images inside an archive, by row number."""

    archive: Path
    names: Names
    offsets: np.ndarray
    sizes: np.ndarray

    def load(self, row: int) -> Image.Image:
        # Opened for each image: cheap beside decoding, and right in every worker process.
        with open(self.archive, "rb") as file:
            file.seek(self.offsets[row])
            data = file.read(self.sizes[row])
        return read_image(io.BytesIO(data), self.names[row], as_published=True)

    def size(self, row: int) -> int:
        return int(self.sizes[row])


def has_archives(root: Path) -> bool:
    """Whether one of ImageNet's image archives lies in `root`."""
    return any((root / name).is_file() for name in (TRAIN, VAL))


def open_archives(root: Path, split: Split) -> ImageSource:
    """One split of the archives in `root`; labels follow the WordNet ids, sorted.

    Raises FileNotFoundError for an archive that is missing, ValueError for one that is damaged
    or has other members than ImageNet's.
    """
    for name in (TRAIN, VAL, DEVKIT):
        if not (root / name).is_file():
            raise FileNotFoundError(
                f"no {name} in '{root}': expected ImageNet's three archives {TRAIN}, {VAL} and "
                f"{DEVKIT}, or train/ and val/ with class subfolders"
            )
    with _reading(root / TRAIN) as archive:
        classes = sorted(_members(archive, ".tar"))
        wnids = [member.name.removesuffix(".tar") for member in classes]
        if split == "train":
            labels, images = _gather(root / TRAIN, "train", wnids, _train_images(archive, classes))
        else:
            labels, images = _gather(root / VAL, "val", wnids, _val_images(root, wnids))
    return ImageSource(
        name=f"{root} ({split})",
        class_names=readable_names(wnids) or wnids,
        identifiers=images.names,
        labels=labels,
        load=images.load,
        content=images.size,
    )


def _gather(
    archive: Path, split: Split, wnids: list[str], found: Iterable[tuple[int, _Member]]
) -> tuple[np.ndarray, _Members]:
    """Labels int32 [N] and the images, kept in arrays rather than as a million objects."""
    labels, offsets, sizes = array("i"), array("q"), array("q")

    def listed() -> Iterator[str]:
        for label, member in found:
            labels.append(label)
            offsets.append(member.offset)
            sizes.append(member.size)
            yield f"{split}/{wnids[label]}/{member.name}"

    names = Names(listed())
    images = _Members(archive, names, np.array(offsets, np.int64), np.array(sizes, np.int64))
    return np.array(labels, np.int32), images


def readable_names(folders: list[str]) -> list[str] | None:
    """Names of the classes if all `folders` are WordNet ids of ImageNet-1k, else None."""
    if not all(len(name) == 9 and name[0] == "n" and name[1:].isdigit() for name in folders):
        return None
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    index_of = {wnid: index for index, wnid in enumerate(info.label_names())}
    if not set(folders) <= set(index_of):
        return None
    return [info.index_to_description(index_of[wnid]) for wnid in folders]


def _train_images(
    archive: tarfile.TarFile, classes: list[_Member]
) -> Iterator[tuple[int, _Member]]:
    """(label, image) of the archives inside the train archive, class after class."""
    assert archive.fileobj is not None
    for label, inner in enumerate(classes):
        archive.fileobj.seek(inner.offset)
        with tarfile.TarFile(fileobj=archive.fileobj) as images:
            for member in sorted(_members(images, ".jpeg")):
                yield label, member


def _val_images(root: Path, classes: list[str]) -> list[tuple[int, _Member]]:
    """(label, image) of the val archive, class after class."""
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    with _reading(root / VAL) as archive:
        images = sorted(_members(archive, ".jpeg"))
    wnids = _val_wnids(root / DEVKIT)
    if len(wnids) != len(images):
        raise ValueError(
            f"'{root / VAL}' holds {len(images)} images: expected {len(wnids)}, as many as "
            f"{DEVKIT} has labels"
        )
    unknown = sorted(set(wnids) - set(label_of))
    if unknown:
        raise ValueError(f"'{root / TRAIN}' lacks the class {unknown[0]} that {DEVKIT} names")
    labelled = [(label_of[wnid], image) for wnid, image in zip(wnids, images, strict=True)]
    return sorted(labelled)


def _val_wnids(path: Path) -> list[str]:
    """The WordNet id of each val image, in the order of their names."""
    from scipy.io import loadmat

    with _reading(path) as devkit:
        try:
            tables, truth = (devkit.extractfile(name) for name in (_IDS, _TRUTH))
        except KeyError as error:
            raise ValueError(f"'{path}' is not ImageNet's: {error.args[0]}") from None
        assert tables is not None and truth is not None
        synsets = loadmat(io.BytesIO(tables.read()), squeeze_me=True)["synsets"]
        numbers = [int(line) for line in truth.read().split()]
    wnid_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in np.atleast_1d(synsets)}
    return [wnid_of[number] for number in numbers]


@contextmanager
def _reading(path: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(path) as archive:
            yield archive
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"'{path}' is damaged or no archive: {error}") from error


def _members(archive: tarfile.TarFile, suffix: str) -> list[_Member]:
    """The files of an archive; TarError where the archive is shorter than they are."""
    assert archive.fileobj is not None
    found = []
    while (member := archive.next()) is not None:
        vars(archive)["members"] = []  # else it keeps a record of every member
        if member.isfile() and member.name.lower().endswith(suffix):
            name = member.name.rpartition("/")[2]
            found.append(_Member(name, member.offset_data, member.size))
    archive.fileobj.seek(0, io.SEEK_END)  # type: ignore[call-arg]
    length = archive.fileobj.tell()
    if not found:
        raise tarfile.TarError(f"it holds no {suffix} files")
    if max(member.offset + member.size for member in found) > length:
        raise tarfile.TarError(f"it ends after {length} bytes, before its members do")
    return found
