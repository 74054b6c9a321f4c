"""Rows of pictures, drawn code by code: everything the page's buttons make is a list of rows."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from apps.demo_parts.models import About, Models
from moveimg.config import SamplingSettings
from moveimg.errors import validate

MAX_PICTURES = 16  # of a press
MAX_STRIP = 4  # seeds of a strip with several values of guidance, or of two models
MAX_SCALES = 6
MAX_SEED = 2**32 - 1
FRESH_SEEDS = 1_000_000  # a seed nobody chose is below this, short enough to read out


@dataclass(frozen=True)
class Row:
    """Pictures that differ in class and seed alone; picture i has seed + i.

    Attributes:
        model: a name that Models knows.
        labels: the class of each picture.
        seed: of the first picture.
        settings: guidance, temperature and filters.
        bank: False to draw with every slot of the value memory at zero.
        title: what the page writes beside the row.
        codes: int64 [n, T] on the CPU, once drawn.
    """

    model: str
    labels: tuple[int, ...]
    seed: int
    settings: SamplingSettings
    bank: bool = True
    title: str = ""
    codes: Any = field(default=None, compare=False)


@dataclass(frozen=True)
class Frame:
    """What can be shown now.

    Attributes:
        rows: all rows; those that are finished have codes.
        pictures: of each row, as far as they are drawn; empty where none has begun.
        done, total: codes drawn so far, of all rows.
        seconds: since the drawing began.
        ended: "" while drawing, then "done" or "stopped".
    """

    rows: list[Row]
    pictures: list[list[Image.Image]]
    done: int
    total: int
    seconds: float
    ended: str = ""


def settings_of(about: About, **overrides: Any) -> SamplingSettings:
    """A model's own sampling settings with those not None replaced. ValueError if invalid."""
    given = {key: value for key, value in overrides.items() if value is not None}
    return validate(SamplingSettings, about.settings | given, "sampling settings")


def check_seed(seed: Any, count: int = 1) -> int:
    """A seed as given; a fresh one for None or "". ValueError beyond 0..2^32-1."""
    if seed is None or str(seed).strip() == "":
        return secrets.randbelow(FRESH_SEEDS)
    text = str(seed).strip()
    number = int(float(text)) if _is_whole(text) else -1
    if not 0 <= number <= MAX_SEED - count + 1:
        raise ValueError(f"seed {text}: expected a whole number in 0..{MAX_SEED - count + 1}")
    return number


def check_count(count: Any, most: int = MAX_PICTURES) -> int:
    """How many pictures. ValueError beyond 1..most."""
    if isinstance(count, bool) or not _is_whole(str(count)) or not 1 <= float(count) <= most:
        raise ValueError(f"{count} pictures: expected a whole number in 1..{most}")
    return int(float(count))


def _is_whole(text: str) -> bool:
    try:
        return len(text) < 20 and float(text).is_integer()
    except (ValueError, OverflowError):
        return False


def row_of(
    about: About,
    wanted: str | int | Sequence[str | int] | None,
    count: Any,
    seed: Any,
    **given: Any,
) -> Row:
    """A row of `count` pictures of a class; of random classes where none is given.

    Several classes take turns. `given` replaces the model's own sampling settings, and may hold
    `bank`. Raises ValueError for anything out of bounds.
    """
    from moveimg.pipeline import find_label

    number = check_count(count)
    bank = bool(given.pop("bank", True))
    if wanted is None:
        labels = [secrets.randbelow(len(about.class_names)) for _ in range(number)]
    else:
        names = [wanted] if isinstance(wanted, str | int) else list(wanted)
        if not names or not all(str(name).strip() for name in names) or len(names) > number:
            raise ValueError(f"{len(names)} classes: expected 1 to {number}, none of them empty")
        chosen = [find_label(about.class_names, name) for name in names]
        labels = [chosen[i % len(chosen)] for i in range(number)]
    settings = settings_of(about, **given)
    return Row(about.name, tuple(labels), check_seed(seed, number), settings, bank)


def another_seed(rows: Sequence[Row]) -> list[Row]:
    """The same rows with a fresh seed, the same in all of them."""
    seed = secrets.randbelow(FRESH_SEEDS)
    return [replace(row, seed=seed, codes=None) for row in rows]


def vary_guidance(row: Row, scales: Sequence[float] | None = None) -> list[Row]:
    """The first pictures of a row at several values of guidance, the same seeds in each.

    Left out, the scales are 1 (none) and about half, once and twice what the row had.
    """
    if scales is None:
        usual = row.settings.cfg_scale if row.settings.cfg_scale > 1.2 else 2.0
        scales = [1.0, round(1 + (usual - 1) / 2, 2), usual, round(1 + 2 * (usual - 1), 2)]
    if not 1 <= len(scales) <= MAX_SCALES:
        raise ValueError(f"{len(scales)} values of cfg_scale: expected 1 to {MAX_SCALES}")
    short = _first(row)
    return [
        replace(
            short,
            settings=validate(
                SamplingSettings,
                row.settings.model_dump() | {"cfg_scale": scale},
                "sampling settings",
            ),
            title=f"guidance {scale:g}",
        )
        for scale in scales
    ]


def beside(row: Row, other: About, models: Models) -> list[Row]:
    """The first pictures of a row by its model and by another: same classes, same seeds.

    Each model keeps to its own settings where the row's are its model's own. Raises ValueError
    where the models' classes differ, or both are one.
    """
    mine = models.describe(row.model)
    if mine.name == other.name:
        raise ValueError(f"these pictures are by {mine.name} already: choose another model")
    if mine.class_names != other.class_names:
        raise ValueError(f"{mine.name} and {other.name} know different classes: nothing to compare")
    own = row.settings == settings_of(mine)
    settings = settings_of(other) if own else row.settings
    short = _first(row)
    return [
        replace(short, title=mine.name),
        replace(short, model=other.name, settings=settings, title=other.name),
    ]


def with_and_without_bank(row: Row, about: About) -> list[Row]:
    """The first pictures of a row with its bank and with every slot at zero."""
    if not about.has_bank:
        raise ValueError(f"{about.name} has no value memory that could be turned off")
    short = _first(row)
    return [
        replace(short, bank=True, title="with the bank"),
        replace(short, bank=False, title="slots at zero"),
    ]


def pictures_from(rows: Sequence[Row], index: int, count: int = 1) -> Row:
    """At most `count` pictures of one row, from the one at `index` of all rows counted through."""
    for row in rows:
        if 0 <= index < len(row.labels):
            codes = None if row.codes is None else row.codes[index : index + count]
            labels = row.labels[index : index + count]
            return replace(row, labels=labels, seed=row.seed + index, codes=codes)
        index -= len(row.labels)
    raise ValueError("there is no such picture: draw some, then choose one")


def draw(rows: Sequence[Row], models: Models, stop: threading.Event) -> Iterator[Frame | None]:
    """Draw the rows one after another, and yield a frame now and then; None between frames.

    A frame is made when a line of the grid is full and twice the time of the last one has passed,
    so that decoding stays within about half of the time. `stop` ends it after the next code; the
    last frame says so.
    """
    rows = list(rows)
    total = sum(len(r.labels) * _length(models.describe(r.model)) for r in rows)
    pictures: list[list[Image.Image]] = [[] for _ in rows]
    begun, before = time.perf_counter(), 0
    for number, row in enumerate(rows):
        pipeline = _pipeline(row, models)
        count, width = len(row.labels), pipeline.generator.config.grid[1]
        length = pipeline.generator.config.seq_len
        shown, cost = time.perf_counter(), 0.0
        for done, codes in pipeline.iter_codes(row.labels, row.settings, seed=row.seed):
            now = time.perf_counter()
            last, stopped = done == length, stop.is_set()
            if last or stopped or (done % width == 0 and now - shown >= 2 * cost):
                pictures[number] = pipeline.decode_partial(codes, done)
                shown = time.perf_counter()
                cost = shown - now
                if last:
                    rows[number] = replace(row, codes=codes.cpu().clone())
                over = last and number == len(rows) - 1
                ended = "done" if over else "stopped" if stopped else ""
                yield Frame(
                    list(rows), list(pictures), before + done * count, total, shown - begun, ended
                )
                if ended:
                    return
            else:
                yield None
        before += count * length


def redraw(rows: Sequence[Row], models: Models) -> list[list[Image.Image]]:
    """The pictures of rows that have codes, decoded again."""
    return [models.get(row.model).decode(row.codes) for row in rows if row.codes is not None]


def _first(row: Row) -> Row:
    return replace(row, labels=row.labels[:MAX_STRIP], codes=None, title="")


def _length(about: About) -> int:
    return about.grid[0] * about.grid[1]


def _pipeline(row: Row, models: Models) -> Any:
    pipeline = models.get(row.model)
    if row.bank:
        return pipeline
    import copy

    from moveimg.inspect import without_bank

    bare = copy.copy(pipeline)  # the loaded one serves others, too
    bare.generator = without_bank(pipeline.generator)
    return bare
