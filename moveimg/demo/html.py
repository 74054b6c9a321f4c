"""Images, maps and status lines as HTML. Images travel as data URIs: nothing is written to disk."""

from __future__ import annotations

import base64
import io
import math
import re
import zipfile
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from moveimg.demo.analysis import Reconstruction, Score, heat_map
from moveimg.demo.jobs import EditedRow, Frame, Row
from moveimg.demo.models import ModelInfo, Models
from moveimg.editing import HALVES
from moveimg.errors import list_names
from moveimg.images import png_bytes

UPLOAD = (
    '<label class="upload"><input type="file" accept="image/*" aria-label="image">'
    "<span><b>Choose an image</b>, drop one here, or paste it</span></label>"
    '<div class="drawn"></div>'
)
JPEG_FROM = 128  # pixels of a side from which unfinished images are sent as JPEG
MAPS = {
    "share": "Each square is one code of the image. Bright: much of what the layer mixes into its "
    "values there comes from the bank, |Σ gᵢMᵢ| / (|g₀V| + |Σ gᵢMᵢ|). Below: the mean, and the "
    "mean of g₀, the gate of the layer's own values, and of the slots' gates, ḡ.",
    "gates": "Each square is one code of the image. Bright: the mean gate of the slots is larger "
    "than g₀, the gate of the layer's own values: ḡ / (ḡ + g₀).",
}
EMPTY_GALLERY = (
    '<div class="gallery empty"><section class="row"><div class="tiles">'
    + '<figure class="tile"><span class="blank"></span></figure>' * 8
    + "</div></section></div>"
)


def text(value: Any) -> str:
    """Escape for HTML, and for the templates that gradio's components read in what they show."""
    table = {"{": "&#123;", "}": "&#125;", "$": "&#36;", "`": "&#96;"}
    return re.sub(r"[{}$`]", lambda match: table[match[0]], escape(str(value)))


def status(words: str, kind: str = "") -> str:
    """Return a status line; `kind` is busy (Stop is shown), brief (it is not), failed or ""."""
    role = "alert" if kind == "failed" else "status"
    bar = "<progress></progress>" if kind in ("busy", "brief") else ""
    return (
        f'<div class="status {kind}" role="{role}">{bar}{text(words[:1].upper() + words[1:])}</div>'
    )


def progress(frame: Frame) -> str:
    """Return the status line of a frame."""
    share = f"{frame.done} of {frame.total} codes"
    if frame.ended == "done":
        count = sum(len(row.labels) for row in frame.rows)
        return status(f"{count} image{'s' * (count > 1)} in {frame.seconds:.1f} s")
    if frame.ended:
        return status(f"Stopped after {share}.")
    return busy(frame.done, frame.total, "codes")


def busy(done: int, total: int, units: str) -> str:
    """Return the status line of a job that can be stopped."""
    bar = f'<progress max="{total}" value="{done}"></progress>'
    return f'<div class="status busy" role="status">{bar}{done} of {total} {units}</div>'


def metadata(row: Row, index: int, class_names: Sequence[str]) -> dict[str, Any]:
    """Return what draws image `index` of a row again; the keys are those of `moveimg sample`."""
    label = row.labels[index]
    values = {"model": row.model, "class": label, "class_name": class_names[label]}
    values |= {"seed": row.seed + index} | row.settings.model_dump()
    if isinstance(row, EditedRow):
        values |= {"hole": row.hole if row.hole in HALVES else "mask", "passes": row.passes}
    return values if row.bank else values | {"bank": False}


def file_name(meta: dict[str, Any]) -> str:
    """Return `0007-seven-seed3.png`, as `moveimg sample` names it."""
    slug = "".join(c if c.isalnum() else "-" for c in short_name(meta["class_name"]).lower())[:40]
    bank = "" if meta.get("bank", True) else "-nobank"
    edit = "-edit" if "hole" in meta else ""
    return f"{meta['class']:04d}-{slug}-seed{meta['seed']}{bank}{edit}.png"


def short_name(class_name: str) -> str:
    """Return the first of a class's synonyms."""
    return class_name.split(",")[0].strip()


def data_uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def image_uri(image: Image.Image, meta: dict[str, Any] | None = None) -> str:
    """Return a PNG, or a JPEG of a large unfinished image (without metadata)."""
    if meta is None and max(image.size) >= JPEG_FROM:
        buffer = io.BytesIO()
        image.save(buffer, format="jpeg", quality=80)
        return data_uri(buffer.getvalue(), "jpeg")
    return data_uri(png_bytes(image, meta or {}))


def gallery(frame: Frame, models: Models, pick: str = "") -> str:
    """Return all rows of a frame; finished images can be chosen and saved.

    Args:
        pick: what choosing an image of a model with memory does, for screen readers; "" where
            images cannot be chosen.
    """
    sections, index = [], 0
    for row, images in zip(frame.rows, frame.images, strict=True):
        info, cells = models.describe(row.model), []
        for i in range(len(row.labels)):
            meta = metadata(row, i, info.class_names)
            image = images[i] if images else None
            is_finished = image is not None and row.codes is not None
            cells.append(_tile(image, meta, index, is_finished, pick if info.has_bank else ""))
            index += 1
        title = f"<h3>{text(row.title)}</h3>" if row.title else ""
        kind = "row strip" if row.title else "row"
        tiles = f'<div class="tiles">{"".join(cells)}</div>'
        sections.append(f'<section class="{kind}">{title}{tiles}</section>')
    state = "" if frame.ended else " drawing"
    if not any(models.describe(row.model).has_bank for row in frame.rows):
        state += " memoryless"  # page.css hides what concerns a bank
    return f'<div class="gallery{state}">{"".join(sections)}</div>'


def _tile(
    image: Image.Image | None, meta: dict[str, Any], index: int, is_finished: bool, pick: str
) -> str:
    label = text(f"{short_name(meta['class_name'])}, seed {meta['seed']}")
    save, shown = "", '<span class="blank"></span>'
    if image is not None:
        uri = image_uri(image, meta if is_finished else None)
        shown = f'<img src="{uri}" alt="{label}" width="{image.width}" height="{image.height}">'
    if is_finished:
        save = (
            f'<a class="save" role="button" tabindex="0" download="{text(file_name(meta))}" '
            f'aria-label="save {label}" title="save as PNG">↓</a>'
        )
        if pick:
            shown = (
                f'<button type="button" data-pick="{index}" aria-label="{label}: {text(pick)}">'
                f"{shown}</button>"
            )
    caption = [short_name(meta["class_name"]), f"seed {meta['seed']}"]
    return _figure(shown, caption, save, hint=meta["class_name"])


def _figure(
    shown: str, lines: Sequence[str], save: str = "", kind: str = "", hint: str = ""
) -> str:
    name = f'<span class="name" title="{text(hint)}">{text(lines[0])}</span>'
    rest = "".join(f'<span class="seed">{text(line)}</span>' for line in lines[1:])
    return (
        f'<figure class="tile {kind}">{shown}<figcaption>{name}{rest}{save}</figcaption></figure>'
    )


def _image(image: Image.Image, alt: str, kind: str = "") -> str:
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img class="{kind}" src="{image_uri(image, {})}" {size} alt="{text(alt)}">'


def bank_maps(
    image: Image.Image, layers: Sequence[Any], row: Row, info: ModelInfo, kind: str
) -> str:
    """Return an image and the maps of all layers on one scale, with their mean gates."""
    kind = kind if kind in MAPS else "share"
    maps = [layer[kind] for layer in layers]
    low, high = float(np.nanmin(maps)), float(np.nanmax(maps))
    title = f"{short_name(info.class_names[row.labels[0]])}, seed {row.seed}"
    cells = [_figure(_image(image, title), ["image", "grey: never read"], kind="map")]
    for layer, values in zip(layers, maps, strict=True):
        name, mean = f"layer {layer['layer']}", f"{float(np.nanmean(values)):.0%}"
        shown = _image(heat_map(values, low, high), f"{name}: {mean} on average", "codes")
        gates = [f"g₀ {layer['g_0']:.2f}", f"ḡ {layer['slots']:.2f}"]
        cells.append(_figure(shown, [name, mean, *gates], kind="map"))
    return (
        f'<p class="what"><b>{text(title)}</b>. {MAPS[kind]}</p>'
        f"{_legend(f'{low:.0%}', f'{high:.0%}')}"
        f'<div class="tiles maps">{"".join(cells)}</div>'
    )


def _legend(low: str, high: str) -> str:
    ramp = _image(heat_map(np.linspace(0, 1, 64)[None]), "colour scale")
    return f'<div class="legend">{low}{ramp}{high}</div>'


def scores(result: Score, info: ModelInfo) -> str:
    """Return the likeliest classes of an image as bars, and the nats of each code as a map."""
    best, rows = result.best(), []
    for label, share, nats in best:
        name = text(short_name(info.class_names[label]))
        rounded = "&gt; 99.9%" if share > 0.5 else "&lt; 0.1%"
        shown = f"{share:.1%}" if 0.0005 <= share < 0.9995 else rounded
        rows.append(
            f'<tr><th scope="row" title="{text(info.class_names[label])}">{name}</th>'
            f'<td class="bar"><i style="width: {share:.2%}"></i></td><td>{shown}</td>'
            f"<td>{nats:.3f}</td></tr>"
        )
    label, _, nats = best[0]
    name, values = short_name(info.class_names[label]), result.nats(label)
    high = float(values.max())
    heat = _image(heat_map(values, 0, high), f"nats of each code given {name}", "codes")
    tiles = _figure(_image(result.image, "image"), ["image", "cropped"])
    tiles += _figure(heat, ["nats of each code", f"given {name}"])
    bits = result.likelihood.bits_per_pixel[label].item()
    size = info.config.codebook_size
    return (
        f'<p class="what">Likeliest: <b>{text(name)}</b>, with {nats:.3f} nats per code '
        f"({bits:.3f} bits per pixel); guessing among all {size:,} codes would cost "
        f"{math.log(size):.3f}. Bright squares of the map are codes that the model did not expect "
        f"after those before them. {trained_on(info)}: an image of anything else still gets the "
        "class that fits it best.</p>"
        '<div class="scores"><table><thead><tr><th scope="col">class</th><th></th>'
        '<th scope="col">probability</th><th scope="col">nats per code</th></tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table><div><div class="tiles two">{tiles}</div>'
        f"{_legend('0', f'{high:.1f} nats')}</div></div>"
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


def reconstruction(result: Reconstruction, info: ModelInfo) -> str:
    """Return image, decoded image and codes, with the error and what the tokenizer has seen."""
    h, w = result.codes.shape
    distinct = len(np.unique(result.codes))
    error = f"PSNR {result.psnr:.1f} dB, MSE {result.mse:.4f}"
    before = f"{result.before.width} x {result.before.height}"
    cells = [
        _figure(_image(result.before, "image"), ["image", before]),
        _figure(_image(result.after, "decoded"), ["decoded", error]),
        _figure(
            _image(result.colours, "codes", "codes"), ["codes", f"{h} x {w}, {distinct} different"]
        ),
    ]
    tiles = f'<div class="tiles three">{"".join(cells)}</div>'
    return (
        f'<p class="what">{trained_on(info)}. Its tokenizer keeps what such images need: other '
        "images, a photograph among digits say, may come back as smears, and that says nothing of "
        f"the method.</p>{tiles}"
    )


def trained_on(info: ModelInfo) -> str:
    """Say which images a model knows; without a full stop."""
    classes = text(list_names(map(short_name, info.class_names)))
    return (
        f"<b>{text(info.name)}</b> was trained on images of {len(info.class_names):,} classes "
        f"({classes})"
    )


def zip_images(
    rows: Sequence[Row], images: Sequence[Sequence[Image.Image]], models: Models
) -> bytes:
    """Return all images of rows as PNGs with their settings inside, in one zip file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for number, (row, row_images) in enumerate(zip(rows, images, strict=True), start=1):
            slug = re.sub(r"[^\w.]+", "-", row.title.lower())[:40]
            folder = f"{number}-{slug}/" if row.title else ""
            for i, image in enumerate(row_images):
                meta = metadata(row, i, models.describe(row.model).class_names)
                archive.writestr(folder + file_name(meta), png_bytes(image, meta))
    return buffer.getvalue()


def waiting(ahead: int) -> str:
    """Return the status line of a job that waits for others."""
    return status(f"In the queue: {ahead} job{'s' * (ahead > 1)} before yours …", "busy")
