"""The files of a packed-codes directory: their content as records, read and written whole."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from moveimg.files import atomic, write_text

MANIFEST = "manifest.json"
MAX_CODEBOOK_SIZE = 2**16  # codes are uint16 on disk

Crops = Literal["center", "flip", "five", "ten"]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
RecordT = TypeVar("RecordT", bound="Record")


class Record(BaseModel):
    """A frozen part of a file, unknown keys forbidden."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Shard(Record):
    """Two files: the codes and the labels of `n` images."""

    codes: Annotated[str, Field(pattern=r"^codes-\d{5,}\.npy$")]
    labels: Annotated[str, Field(pattern=r"^labels-\d{5,}\.npy$")]
    n: PositiveInt
    codes_sha256: Sha256
    labels_sha256: Sha256


class Skipped(Record):
    """An image that could not be read, and why."""

    path: str
    reason: str


class EncodeSettings(Record):
    """Everything the bytes of the shards follow from."""

    tokenizer_fingerprint: str
    codebook_size: Annotated[int, Field(ge=1, le=MAX_CODEBOOK_SIZE)]
    grid: tuple[PositiveInt, PositiveInt] = Field(description="h and w of an image's codes")
    image_size: PositiveInt = Field(description="height and width encoded, in pixels")
    crops: Crops
    ranges: tuple[float, ...] = Field(min_length=1, description="enlargements before cropping")
    n_crops: PositiveInt = Field(description="views of an image, over all ranges")
    class_names: tuple[str, ...] = Field(min_length=1)
    source_digest: Sha256 = Field(description="of the image source, see ImageSource.digest")
    dtype: str = Field(description="precision of the tokenizer's arithmetic")
    batch_size: PositiveInt = Field(description="views per call of the tokenizer, at most")
    shard_size: PositiveInt = Field(description="images a shard is made from")


class Manifest(Record):
    """The content of manifest.json."""

    format_version: Literal[1] = 1
    source: str = Field(description="name of the image source, for people")
    settings: EncodeSettings
    n_images: PositiveInt
    shards: tuple[Shard, ...] = Field(min_length=1)
    skipped: tuple[Skipped, ...] = Field(description="unreadable images that were left out")

    @model_validator(mode="after")
    def _counts_agree(self) -> Manifest:
        total = sum(shard.n for shard in self.shards)
        if total != self.n_images:
            raise ValueError(f"n_images is {self.n_images}, but the shards hold {total}")
        return self


def read_manifest(directory: Path) -> Manifest:
    """Parse manifest.json; raises FileNotFoundError, or ValueError naming the first fault."""
    path = directory / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"'{directory}' holds no {MANIFEST}: expected packed codes, as a finished "
            "`moveimg encode` leaves them"
        )
    return read_record(path, Manifest)


def read_record(path: Path, kind: type[RecordT]) -> RecordT:
    """Parse a JSON file; raises ValueError with one line that names the first fault."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        fault = f"{where}: {first['msg']}" if where else first["msg"]
        raise ValueError(f"'{path}' is malformed: {fault}") from None


def write_record(path: Path, record: Record) -> None:
    """Write JSON atomically: a reader finds the whole file or none."""
    text = json.dumps(record.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"
    write_text(path, text)


def write_shard(directory: Path, number: int, codes: np.ndarray, labels: np.ndarray) -> Shard:
    """Write the shard `number`: codes uint16 [n, crops, T] and labels int32 [n]."""
    names = f"codes-{number:05d}.npy", f"labels-{number:05d}.npy"
    for name, array in zip(names, (codes, labels), strict=True):
        with atomic(directory / name) as temporary:
            np.save(temporary, array)
    return Shard(
        codes=names[0],
        labels=names[1],
        n=len(codes),
        codes_sha256=sha256_file(directory / names[0]),
        labels_sha256=sha256_file(directory / names[1]),
    )


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
