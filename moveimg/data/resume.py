"""What encoding keeps on disk until it is done, so that it can go on where it was stopped.

- progress.json: the settings everything is encoded with
- finished-00000.json, ...: a shard that is whole, with its sha256; one file each, so that
  processes do not write over one another
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from moveimg.data.codes import PackedCodes
from moveimg.data.manifest import (
    MANIFEST,
    EncodeSettings,
    Manifest,
    Record,
    Shard,
    Skipped,
    read_record,
    sha256_file,
    write_record,
)

PROGRESS = "progress.json"


class Progress(Record):
    """The content of progress.json."""

    settings: EncodeSettings


class FinishedShard(Record):
    """A shard on disk, and the images left out of it; no shard where none could be read."""

    number: int
    shard: Shard | None
    skipped: tuple[Skipped, ...]


def finished_manifest(out: Path, settings: EncodeSettings) -> Manifest | None:
    """The manifest in `out`, if it holds finished codes of these settings.

    Raises ValueError for codes of other settings.
    """
    if not (out / MANIFEST).exists():
        return None
    manifest = PackedCodes(out).manifest
    _require_same(out, manifest.settings, settings)
    return manifest


def prepare(out: Path, settings: EncodeSettings) -> None:
    """Make `out` ready to encode into, or to go on.

    Raises ValueError where it holds something else, or finished shards of other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / PROGRESS
    if path.exists():
        before = read_record(path, Progress).settings
        if before != settings and any(out.glob("codes-*.npy")):
            _require_same(out, before, settings)
    elif any(not entry.name.startswith(".") for entry in out.iterdir()):
        raise ValueError(
            f"'{out}' is not empty and holds no packed codes: expected a new or empty folder"
        )
    write_record(path, Progress(settings=settings))


def record(out: Path, entry: FinishedShard) -> None:
    """Note that a shard is whole."""
    write_record(_path(out, entry.number), entry)


def recorded(out: Path, number: int) -> FinishedShard | None:
    """The finished shard of a number; None where there is none yet."""
    path = _path(out, number)
    return read_record(path, FinishedShard) if path.exists() else None


def intact(out: Path, number: int) -> FinishedShard | None:
    """As `recorded`, if the bytes on disk are still those that were written."""
    entry = recorded(out, number)
    if entry is None or entry.shard is None:
        return entry
    with suppress(FileNotFoundError):
        shard = entry.shard
        if (
            sha256_file(out / shard.codes) == shard.codes_sha256
            and sha256_file(out / shard.labels) == shard.labels_sha256
        ):
            return entry
    return None


def forget(out: Path) -> None:
    """Remove the notes, once the manifest is written or nothing could be read."""
    for path in (*out.glob("finished-*.json"), out / PROGRESS):
        path.unlink(missing_ok=True)


def _path(out: Path, number: int) -> Path:
    return out / f"finished-{number:05d}.json"


def _require_same(out: Path, there: EncodeSettings, asked: EncodeSettings) -> None:
    differences = [
        f"{name} {_shorten(getattr(there, name))} there, {_shorten(getattr(asked, name))} asked"
        for name in EncodeSettings.model_fields
        if getattr(there, name) != getattr(asked, name)
    ]
    if differences:
        raise ValueError(
            f"'{out}' holds codes of other settings ({'; '.join(differences)}): expected the "
            "same settings or another folder"
        )


def _shorten(value: object, most: int = 40) -> str:
    text = str(value)
    return text if len(text) <= most else text[:12] + "..."
