"""Images and status lines as HTML. Images travel as data URIs: nothing is written to disk."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape
from typing import Any

from PIL import Image

from moveimg.demo.jobs import ModelInfo, Models, Row, image_uri, metadata
from moveimg.editing import HALVES

UPLOAD = (
    '<label class="upload"><input type="file" accept="image/*" aria-label="image">'
    "<span><b>Choose an image</b>, drop one here, or paste it</span></label>"
    '<div class="drawn"></div>'
)


def text(value: Any) -> str:
    """Escape for HTML, and for the templates that gradio's components read in what they show."""
    return re.sub(r"[{}$`]", lambda match: f"&#{ord(match[0])};", escape(str(value)))


def status(words: str, kind: str = "") -> str:
    """Return a status line; `kind` is failed or empty."""
    return f'<div class="status {kind}" role="status">{text(words)}</div>'


def progress(share: float) -> str:
    """Return the status line of a job of which a share is done."""
    return f'<div class="status"><progress value="{share:.3f}"></progress>{share:.0%}</div>'


def gallery(
    rows: Sequence[Row], images: list[list[Image.Image]], models: Models, is_finished: bool
) -> str:
    """Return all rows; finished images can be saved (page.js)."""
    sections = []
    for row, row_images in zip(rows, images, strict=True):
        tiles = []
        for i in range(len(row.labels)):
            meta = metadata(row, i, models)
            name = meta["class_name"].split(",")[0].strip()
            shown, save = '<span class="blank"></span>', ""
            if row_images:
                uri, label = image_uri(row_images[i], meta), text(f"{name}, seed {meta['seed']}")
                shown = f'<img src="{uri}" alt="{label}">'
            if is_finished:
                slug = "".join(c if c.isalnum() else "-" for c in name.lower())[:40]
                file = f"{meta['class']:04d}-{slug}-seed{meta['seed']}.png"
                save = f'<a class="save" href="#" download="{file}" title="save as PNG">↓</a>'
            tiles.append(
                f'<figure class="tile">{shown}<figcaption><span class="name" '
                f'title="{text(meta["class_name"])}">{text(name)}</span>'
                f'<span class="seed">seed {meta["seed"]}</span>{save}</figcaption></figure>'
            )
        title = f"<h3>{text(row.title)}</h3>" if row.title else ""
        kind = "strip" if row.title else ""
        tiles_html = f'<div class="tiles">{"".join(tiles)}</div>'
        sections.append(f'<section class="{kind}">{title}{tiles_html}</section>')
    return "".join(sections)


def likelihood(answer: dict[str, Any], info: ModelInfo) -> str:
    """Return what the codes of an image cost, given its likeliest class."""
    best, size = answer["classes"][0], info.config.codebook_size
    return (
        f'<p class="what">Likeliest: <b>{text(best["name"])}</b>, with '
        f"{best['nats_per_code']:.3f} nats per code ({answer['bits_per_pixel']:.3f} bits per "
        f"pixel); guessing among all {size:,} codes would cost {math.log(size):.3f}.</p>"
    )


def painter(info: ModelInfo) -> str:
    """Return the field of the Edit tab in which an image is painted over (paint.js)."""
    rows, columns = info.config.grid
    keep = [f'<button type="button" data-keep="{half}">{half}</button>' for half in HALVES]
    return (
        f'{UPLOAD}<div class="painter" style="aspect-ratio: {columns} / {rows}" '
        f'data-rows="{rows}" data-columns="{columns}"><img alt="">'
        f'<canvas width="512" height="{512 * rows // columns}" role="img" '
        'aria-label="what is painted over is drawn anew"></canvas></div>'
        f'<div class="tools">Keep{"".join(keep)}</div><div class="tools"><label>Brush <input '
        'type="range" min="2" max="40" value="14" aria-label="brush size"></label>'
        '<button type="button" data-keep="clear">clear</button>'
        '<span class="keys">Shift erases</span></div>'
    )
