"""Image datasets of the Hugging Face Hub, as folders of Parquet files (the extra `datasets`).

`hf download OWNER/NAME --repo-type dataset --local-dir FOLDER` brings one. The library keeps an
Arrow copy of what it opens in its cache (HF_DATASETS_CACHE), which is read by memory map.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moveimg.data.images import ImageSource, Names, Split, draw_split
from moveimg.images import UnreadableImageError, read_image

VAL_NAMES = ("validation", "val", "valid", "test")  # the first that is there


@dataclass(frozen=True)
class _Rows:
    """Rows of a split whose column `column` holds encoded images."""

    table: Any
    column: str
    names: Names
    sizes: np.ndarray

    def load(self, row: int) -> Image.Image:
        data = self.table[row][self.column]["bytes"]
        if data is None:
            raise UnreadableImageError(self.names[row], "the row holds no bytes, only a path")
        return read_image(io.BytesIO(data), self.names[row])

    def size(self, row: int) -> int:
        return int(self.sizes[row])


def has_parquet(root: Path) -> bool:
    """Whether Parquet files lie in `root` or in its `data/`."""
    return any(any((root / folder).glob("*.parquet")) for folder in (".", "data"))


def open_parquet(root: Path, split: Split, val_fraction: float, seed: int) -> ImageSource:
    """One split of a folder of Parquet files with a column of images and one of labels.

    Raises ValueError where the library is not installed, or columns are missing.
    """
    splits = _load(root)
    if "train" not in splits:
        raise ValueError(f"'{root}' has the splits {sorted(splits)}: expected `train` among them")
    val = next((name for name in VAL_NAMES if name in splits), None)
    table = splits["train" if split == "train" or val is None else val]
    column, labels, class_names = _columns(root, splits["train"], table)
    rows = np.arange(len(table))
    if val is None:
        rows = draw_split(labels, split, val_fraction, seed, str(root))
    part = val if val and split == "val" else "train"
    images = _Rows(
        # The bytes as they are: decoding is done here as for files. Neither call copies them.
        table=table.cast_column(column, table.features[column].__class__(decode=False)).select(
            rows
        ),
        column=column,
        names=Names(f"{part}/{row:08d}" for row in rows),
        sizes=_sizes(table, column)[rows],
    )
    return ImageSource(
        name=f"{root} ({split})",
        class_names=class_names,
        identifiers=images.names,
        labels=labels[rows],
        load=images.load,
        content=images.size,
    )


def _load(root: Path) -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"'{root}' holds Parquet files: to read them, `pip install 'moveimg[datasets]'`"
        ) from None
    try:
        return datasets.load_dataset(str(root))
    except Exception as error:  # its loaders raise many kinds for broken files
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"'{root}' cannot be read as a dataset: {reason}") from error


def _columns(root: Path, train: Any, table: Any) -> tuple[str, np.ndarray, list[str]]:
    """The image column (bytes, not decoded), labels int32 [N] and class names."""
    import datasets

    features = table.features
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    labels += [name for name in ("label", "labels", "class") if name in features]
    if not images or not labels:
        raise ValueError(
            f"'{root}' has the columns {sorted(features)}: expected one of images and one `label`"
        )
    values = np.asarray(table[labels[0]][:])
    kind = features[labels[0]]
    if isinstance(kind, datasets.ClassLabel):
        names = list(kind.names)
    else:
        known = sorted(set(train[labels[0]][:]))
        names = [str(value) for value in known]
        values = np.searchsorted(np.asarray(known), values)
    if len(values) and not 0 <= values.min() <= values.max() < len(names):
        raise ValueError(
            f"'{root}' has labels {values.min()}..{values.max()}: expected 0..{len(names) - 1}"
        )
    return images[0], values.astype(np.int32), names


def _sizes(table: Any, column: str) -> np.ndarray:
    """Bytes of every image, from the table's offsets, without reading the images."""
    import pyarrow.compute as pc

    data = pc.struct_field(table.data.column(column), "bytes")
    return pc.fill_null(pc.binary_length(data), 0).to_numpy()
