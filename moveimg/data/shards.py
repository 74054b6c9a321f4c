"""The files of an encoding that is under way, and the manifest that ends it.

Until the manifest is written, the directory also holds `progress.json` (the settings) and one
`finished-00000.json` per whole shard, with its sha256.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np

from moveimg.data.codes import (
    MANIFEST,
    EncodeSettings,
    Manifest,
    PackedCodes,
    Record,
    Shard,
    Skipped,
    is_intact,
    read_record,
    write_record,
)
from moveimg.data.images import ImageSource
from moveimg.errors import list_names, shorten
from moveimg.tables import format_bytes

PROGRESS = "progress.json"


class ChangedSettingsError(ValueError):
    """A directory holds codes of other settings; `details` says which."""

    def __init__(self, directory: Path, details: str) -> None:
        super().__init__(
            f"'{directory}' holds codes of other settings ({details}): expected the same settings "
            "or another folder"
        )
        self.details = details


class Progress(Record):
    """The content of progress.json."""

    settings: EncodeSettings


class FinishedShard(Record):
    """A shard on disk, and the images left out of it; no shard where none could be read."""

    number: int
    shard: Shard | None
    skipped: tuple[Skipped, ...]


def codes_bytes(n_images: int, n_views: int, n_codes: int) -> int:
    """Bytes of packed codes on disk: two per code, four per label."""
    return n_images * (n_views * n_codes * 2 + 4)


def count_shards(settings: EncodeSettings, n_images: int) -> int:
    """The number of shards of `n_images`, the last of which may be smaller."""
    return -(-n_images // settings.shard_size)


def is_finished(out: Path, settings: EncodeSettings, n_images: int) -> bool:
    """Whether `out` holds finished codes of these settings; ChangedSettingsError for others."""
    if not (out / MANIFEST).exists():
        return False
    manifest = PackedCodes(out).manifest
    added = n_images - manifest.n_images - len(manifest.skipped)
    _require_same(out, manifest.settings, settings, added)
    return True


def prepare_directory(out: Path, settings: EncodeSettings, n_images: int) -> None:
    """Make `out` ready for its first or its next shard.

    Raises ValueError where it holds something else or the disk has too little space, and
    ChangedSettingsError for finished shards of other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / PROGRESS
    if path.exists():
        before = read_record(path, Progress).settings
        if any(out.glob("codes-*.npy")):
            _require_same(out, before, settings, added=0)
    elif any(not entry.name.startswith(".") for entry in out.iterdir()):
        raise ValueError(
            f"'{out}' is not empty and holds no packed codes: expected a new or empty folder"
        )
    write_record(path, Progress(settings=settings))
    n_codes = settings.grid[0] * settings.grid[1]
    present = sum(path.stat().st_size for path in out.glob("*.npy"))
    needed = codes_bytes(n_images, settings.n_crops, n_codes) - present
    free = shutil.disk_usage(out).free
    if needed > free:
        raise ValueError(
            f"'{out}' needs {format_bytes(needed)} for the codes: its disk has {format_bytes(free)}"
        )


def finish_shard(out: Path, number: int, shard: Shard | None, skipped: list[Skipped]) -> None:
    """Note that the shard `number` is whole."""
    entry = FinishedShard(number=number, shard=shard, skipped=tuple(skipped))
    write_record(_finished_path(out, number), entry)


def find_intact_shard(out: Path, number: int) -> FinishedShard | None:
    """The entry of a finished shard whose bytes are still those that were written."""
    path = _finished_path(out, number)
    if not path.exists():
        return None
    entry = read_record(path, FinishedShard)
    return entry if entry.shard is None or is_intact(out, entry.shard) else None


def write_manifest(
    out: Path, settings: EncodeSettings, source: ImageSource, every_class: bool
) -> None:
    """Write the manifest, once every shard that the settings imply is whole.

    Raises ValueError where a shard is not, where no image can be read, and with `every_class` for
    a class without a readable image.
    """
    finished: list[FinishedShard] = []
    for number in range(count_shards(settings, len(source))):
        entry = find_intact_shard(out, number)
        if entry is None:
            raise ValueError(f"'{out}': shard {number} is missing or damaged: run encode again")
        finished.append(entry)
    shards = tuple(entry.shard for entry in finished if entry.shard)
    skipped = tuple(image for entry in finished for image in entry.skipped)
    if not shards:
        _remove_progress(out)
        with suppress(OSError):
            out.rmdir()
    encoded = {int(label) for shard in shards for label in np.unique(np.load(out / shard.labels))}
    unread = sorted(set(source.labels.tolist()) - encoded)
    if unread and (every_class or not shards):
        first = f"; the first is {skipped[0].path} ({skipped[0].reason})" if skipped else ""
        names = list_names(source.class_names[label] for label in unread)
        raise ValueError(f"{source.name}: no image of these classes can be read: {names}{first}")
    manifest = Manifest(
        source=source.name,
        settings=settings,
        n_images=sum(shard.n for shard in shards),
        shards=shards,
        skipped=skipped,
    )
    write_record(out / MANIFEST, manifest)
    _remove_progress(out)


def _finished_path(out: Path, number: int) -> Path:
    return out / f"finished-{number:05d}.json"


def _remove_progress(out: Path) -> None:
    for path in (*out.glob("finished-*.json"), out / PROGRESS):
        path.unlink(missing_ok=True)


def _require_same(out: Path, present: EncodeSettings, asked: EncodeSettings, added: int) -> None:
    """Raise ChangedSettingsError that names, in the user's words, the settings that differ."""
    change = f"{abs(added)} image{'s were' if abs(added) > 1 else ' was'}"
    images = (
        f"{change} {'added' if added > 0 else 'removed'}" if added else "the images have changed"
    )
    follows = {"grid", "batch_size"} if present.image_size != asked.image_size else set()
    words = {"source_digest": images, "tokenizer_fingerprint": "another tokenizer made them"}
    differences = [
        words.get(name)
        or f"{name} is {shorten(getattr(present, name), 40)} there, "
        f"{shorten(getattr(asked, name), 40)} asked"
        for name in EncodeSettings.model_fields
        if name not in follows and getattr(present, name) != getattr(asked, name)
    ]
    if differences:
        raise ChangedSettingsError(out, "; ".join(differences))
