"""Rows of images, drawn code by code: every button of the page draws a list of rows."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from pydantic import Field, NonNegativeInt, TypeAdapter

from moveimg.config import SamplingSettings
from moveimg.config.model import Config
from moveimg.demo.models import ModelInfo, Models
from moveimg.demo.requests import FRESH_SEEDS, MAX_IMAGES, MAX_SCALES, MAX_STRIP, Generate
from moveimg.demo.uploads import read_upload
from moveimg.editing import HALVES
from moveimg.errors import validate
from moveimg.pipeline import Pipeline, find_label
from moveimg.sampling import MAX_SEED, UNKNOWN


class Row(Config):
    """Images that differ in class and seed alone; image i has seed + i.

    The browser keeps the rows that it shows and sends them back, so they are validated.

    Attributes:
        bank: False to draw with every slot of the value memory at zero.
        title: what the page writes beside the row.
        codes: [n, T], once drawn.
    """

    model: str = Field(max_length=200)
    labels: tuple[NonNegativeInt, ...] = Field(min_length=1, max_length=MAX_IMAGES)
    seed: int = Field(ge=0, le=MAX_SEED)
    settings: SamplingSettings
    bank: bool = True
    title: str = Field("", max_length=200)
    codes: tuple[tuple[NonNegativeInt, ...], ...] | None = None

    def replace(self, **changes: Any) -> Row:
        return self.model_copy(update=changes)

    def first(self, count: int = MAX_STRIP) -> Row:
        """Return the first images of the row, not drawn yet."""
        return self.replace(labels=self.labels[:count], codes=None, title="")


class EditedRow(Row):
    """Versions of an uploaded image with a part, `hole`, drawn anew: half of it, or a mask."""

    image: str
    hole: str
    passes: int


ROWS = TypeAdapter(list[Row])


@dataclass(frozen=True)
class Frame:
    """What can be shown now.

    Attributes:
        rows: all rows; those that are finished have codes.
        images: of each row, as far as they are drawn; empty where none has begun.
        done, total: codes drawn so far, of all rows.
        seconds: since the drawing began.
        ended: "" while drawing, then "done" or "stopped".
    """

    rows: list[Row]
    images: list[list[Image.Image]]
    done: int
    total: int
    seconds: float
    ended: str = ""


def read_rows(data: Any, models: Models) -> list[Row]:
    """Return the rows that a browser sent back. Raises ValueError where they fit no model."""
    rows = validate(ROWS, data or [], "the images on the page")
    if not 1 <= len(rows) <= MAX_SCALES:
        raise ValueError("draw some images first")
    for row in rows:
        config = models.describe(row.model).config
        if max(row.labels) >= config.n_classes:
            raise ValueError(f"{row.model} has no class {max(row.labels)}: draw new images")
        if row.codes is not None and (
            len(row.codes) != len(row.labels)
            or {len(image) for image in row.codes} != {config.seq_len}
            or max(map(max, row.codes)) >= config.codebook_size
        ):
            raise ValueError(f"the codes on the page are not of {row.model}: draw new images")
    return rows


def make_row(models: Models, request: Any) -> Row:
    """Return the row of images that a request describes. Raises ValueError out of bounds."""
    request = Generate(**request.model_dump(include=set(Generate.model_fields)))
    info = models.describe(request.model)
    if not request.bank and not info.has_bank:
        raise ValueError(f"{info.name} has no value memory that could be turned off")
    if str(request.class_name).strip():  # else random classes
        labels = [find_label(info.class_names, request.class_name)] * request.num
    else:
        labels = [secrets.randbelow(info.config.n_classes) for _ in range(request.num)]
    seed = secrets.randbelow(FRESH_SEEDS) if request.seed is None else request.seed
    if seed + len(labels) - 1 > MAX_SEED:
        raise ValueError(f"seed {seed}: expected at most {MAX_SEED - len(labels) + 1}")
    settings = SamplingSettings(**info.sampling.model_dump() | request.overrides())
    return Row(model=info.name, labels=labels, seed=seed, settings=settings, bank=request.bank)


def make_edit(models: Models, request: Any) -> EditedRow:
    """Return the row of versions that a request describes. Raises ValueError out of bounds."""
    row = make_row(models, request)
    if request.passes and row.settings.temperature == 0:
        raise ValueError("temperature 0: expected more, because resampling accepts by chance")
    edit = request.model_dump(include={"image", "hole", "passes"})
    return EditedRow(**row.model_dump(), **edit)


def open_edit(row: Row, pipeline: Pipeline) -> tuple[Image.Image | None, Any, Any]:
    """Return image, hole (bool [T]) and known codes (int64 [T]) of an edited row, else None."""
    if not isinstance(row, EditedRow):
        return None, None, None
    image = pipeline.crop(read_upload(row.image))
    hole = pipeline.hole(row.hole if row.hole in HALVES else read_upload(row.hole))
    if not hole.any():
        raise ValueError("nothing is masked: paint over what is to be drawn anew")
    return image, hole, pipeline.encode([image])[0].masked_fill(hole, UNKNOWN)


def change_seed(rows: Sequence[Row]) -> list[Row]:
    """Return the same rows with a fresh seed, the same in all of them."""
    seed = secrets.randbelow(FRESH_SEEDS)
    return [row.replace(seed=seed, codes=None) for row in rows]


def vary_guidance(row: Row, scales: Sequence[float] | None = None) -> list[Row]:
    """Return the first images of a row with several guidance scales and the same seeds.

    The scales left out are 1 (no guidance) and about half, once and twice the row's own.
    """
    own = row.settings.cfg_scale if row.settings.cfg_scale > 1.2 else 2.0
    scales = scales or [1.0, round(1 + (own - 1) / 2, 2), own, round(1 + 2 * (own - 1), 2)]
    settings = [row.settings.model_dump() | {"cfg_scale": scale} for scale in scales]
    return [
        row.first().replace(
            settings=validate(SamplingSettings, values, "sampling settings"),
            title=f"guidance {values['cfg_scale']:g}",
        )
        for values in settings
    ]


def compare_models(row: Row, other: ModelInfo, models: Models) -> list[Row]:
    """Return the first images of a row by its model and by another one.

    Each model keeps its own settings where the row's are its model's own. Raises ValueError where
    the classes of the two models differ, or both are one.
    """
    own = models.describe(row.model)
    if other.name not in models.comparable(own.name):
        raise ValueError(f"{own.name} and {other.name}: expected two models of the same classes")
    settings = other.sampling if row.settings == own.sampling else row.settings
    first = row.first()
    return [
        first.replace(title=own.name),
        first.replace(model=other.name, settings=settings, title=other.name),
    ]


def with_and_without_bank(row: Row, models: Models) -> list[Row]:
    """Return the first images of a row with its bank and with every slot at zero."""
    if not models.describe(row.model).has_bank:
        raise ValueError(f"{row.model} has no value memory that could be turned off")
    return [
        row.first().replace(bank=True, title="with the bank"),
        row.first().replace(bank=False, title="slots at zero"),
    ]


def select_image(rows: Sequence[Row], index: int, count: int = 1) -> Row:
    """Return at most `count` images of one row, from image `index` of all rows."""
    for row in rows:
        if 0 <= index < len(row.labels):
            codes = row.codes and row.codes[index : index + count]
            labels = row.labels[index : index + count]
            return row.replace(labels=labels, seed=row.seed + index, codes=codes)
        index -= len(row.labels)
    raise ValueError("there is no such image: draw some, then choose one")


def draw(rows: Sequence[Row], models: Models, stop: threading.Event) -> Iterator[Frame | None]:
    """Draw the rows one after another; yields a frame now and then, and None between frames.

    A frame is made when a line of the grid is full and twice the time of the last frame has
    passed, so that decoding takes at most a third of the time. `stop` ends it after the next code.
    """
    rows = list(rows)
    images: list[list[Image.Image]] = [[] for _ in rows]
    total = sum(len(r.labels) * models.describe(r.model).config.seq_len for r in rows)
    start, before = time.perf_counter(), 0
    for number, row in enumerate(rows):
        pipeline = models.get(row.model, row.bank)
        length, width = pipeline.generator.config.seq_len, pipeline.generator.config.grid[1]
        image, hole, known = open_edit(row, pipeline)
        passes = row.passes if isinstance(row, EditedRow) else 0
        steps = length + (passes * int(hole.sum()) if passes else 0)
        total += len(row.labels) * (steps - length)
        shown, cost = time.perf_counter(), 0.0
        for done, codes in pipeline.iter_codes(
            row.labels, row.settings, seed=row.seed, known=known, passes=passes
        ):
            now = time.perf_counter()
            is_last, stopped = done == steps, stop.is_set()
            line_is_full = (done % width == 0 or done > length) and now - shown >= 2 * cost
            if not (is_last or stopped or line_is_full):
                yield None
                continue
            images[number] = pipeline.decode_partial(codes, done, hole, image)
            shown = time.perf_counter()
            cost = shown - now
            if is_last:
                rows[number] = row.replace(codes=tuple(map(tuple, codes.tolist())))
            is_end = is_last and number == len(rows) - 1
            ended = "done" if is_end else "stopped" if stopped else ""
            yield Frame(
                list(rows), list(images), before + done * len(row.labels), total, shown - start,
                ended,
            )  # fmt: skip
            if ended:
                return
        before += len(row.labels) * steps


def decode_rows(rows: Sequence[Row], models: Models) -> list[list[Image.Image]]:
    """Decode the finished rows."""
    images = []
    for row in rows:
        pipeline = models.get(row.model)
        images.append(pipeline.decode(torch.tensor(row.codes, device=pipeline.device)))
    return images
