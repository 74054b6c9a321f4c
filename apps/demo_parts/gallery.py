"""Pictures as HTML, PNG and zip. Nothing is written to disk: pictures travel as data URIs."""

from __future__ import annotations

import base64
import io
import re
import zipfile
from collections.abc import Sequence
from html import escape
from typing import Any

from PIL import Image

from apps.demo_parts.drawing import Frame, Row
from apps.demo_parts.models import Models

LARGE = 128  # pixels of a side from which unfinished pictures are sent as JPEG


def metadata(row: Row, index: int, class_names: Sequence[str]) -> dict[str, Any]:
    """What makes picture `index` of a row again; the keys are those of `moveimg sample`."""
    label = row.labels[index]
    about = {"model": row.model, "class": label, "class_name": class_names[label]}
    about |= {"seed": row.seed + index} | row.settings.model_dump()
    return about if row.bank else about | {"bank": False}


def data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def file_name(about: dict[str, Any]) -> str:
    """`0007-seven-seed3.png`, as `moveimg sample` names it; more where that would not do."""
    first = str(about["class_name"]).split(",")[0].strip().lower()
    slug = "".join(c if c.isalnum() else "-" for c in first)[:40]
    bank = "" if about.get("bank", True) else "-nobank"
    return f"{about['class']:04d}-{slug}-seed{about['seed']}{bank}.png"


def short_name(class_name: str) -> str:
    """The first of a class's synonyms."""
    return class_name.split(",")[0].strip()


def text(value: Any) -> str:
    """Escaped for HTML, braces too: the page's components read templates in what they show."""
    table = {"{": "&#123;", "}": "&#125;", "$": "&#36;", "`": "&#96;"}
    return re.sub(r"[{}$`]", lambda match: table[match[0]], escape(str(value)))


def tiles(frame: Frame, models: Models, pick: str = "") -> str:
    """All rows of a frame as HTML; finished pictures can be chosen and saved.

    Args:
        frame: what there is to show.
        models: for class names and grid sizes.
        pick: what choosing a picture of a model with memory does, for the screen reader; "" where
            nothing.
    """
    parts, index, state = [], 0, "" if frame.ended else " drawing"
    if not any(models.describe(row.model).has_bank for row in frame.rows):
        state += " memoryless"  # and style.css hides what would be said of a bank
    for row, pictures in zip(frame.rows, frame.pictures, strict=True):
        about = models.describe(row.model)
        cells = []
        for i in range(len(row.labels)):
            picture = pictures[i] if pictures else None
            meta = metadata(row, i, about.class_names)
            finished = row.codes is not None and picture is not None
            cells.append(_tile(picture, meta, index, finished, pick if about.has_bank else ""))
            index += 1
        title = f"<h3>{text(row.title)}</h3>" if row.title else ""
        kind = "row strip" if row.title else "row"
        parts.append(f'<section class="{kind}">{title}<div class="tiles">{"".join(cells)}</div>'
                     "</section>")  # fmt: skip
    return f'<div class="gallery{state}" data-pictures="{index}">{"".join(parts)}</div>'


def _tile(
    picture: Image.Image | None, meta: dict[str, Any], index: int, finished: bool, pick: str
) -> str:
    name, seed = short_name(meta["class_name"]), meta["seed"]
    label = text(f"{name}, seed {seed}")
    if picture is None:
        image = '<span class="blank"></span>'
    else:
        image = (
            f'<img src="{picture_uri(picture, meta if finished else None)}" '
            f'alt="{label}" width="{picture.width}" height="{picture.height}">'
        )
    if finished and pick:
        says = text(f"{name}, seed {seed}: {pick}")
        image = f'<button type="button" data-pick="{index}" aria-label="{says}">{image}</button>'
    save = (
        f'<a class="save" role="button" tabindex="0" download="{text(file_name(meta))}" '
        f'aria-label="save {label}" title="save as PNG">↓</a>'
        if finished
        else ""
    )
    return (
        f'<figure class="tile">{image}<figcaption><span class="name" '
        f'title="{text(meta["class_name"])}">{text(name)}</span>'
        f'<span class="seed">seed {seed}</span>{save}</figcaption></figure>'
    )


def png_bytes(picture: Image.Image, meta: dict[str, Any]) -> bytes:
    """As moveimg.images.png_bytes, which brings torch: the page is served before that is read."""
    from moveimg import images

    return images.png_bytes(picture, meta)


def picture_uri(picture: Image.Image, meta: dict[str, Any] | None = None) -> str:
    """A finished picture (with metadata) as PNG; another as PNG or, where large, as JPEG."""
    if meta is None and max(picture.size) >= LARGE:
        buffer = io.BytesIO()
        picture.save(buffer, format="jpeg", quality=80)
        return data_uri(buffer.getvalue(), "jpeg")
    return data_uri(png_bytes(picture, meta or {}), "png")


def zip_of(rows: Sequence[Row], pictures: Sequence[Sequence[Image.Image]], models: Models) -> bytes:
    """All pictures of rows as PNGs with their settings inside, in one zip file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for number, (row, some) in enumerate(zip(rows, pictures, strict=True)):
            names = models.describe(row.model).class_names
            folder = f"{number + 1}-{_slug(row.title)}/" if row.title else ""
            for i, picture in enumerate(some):
                meta = metadata(row, i, names)
                archive.writestr(folder + file_name(meta), png_bytes(picture, meta))
    return buffer.getvalue()


def _slug(title: str) -> str:
    return re.sub(r"[^\w.]+", "-", title.strip().lower())[:40]
