"""Status lines, maps and reconstructions as HTML."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from apps.demo_parts.drawing import Frame, Row
from apps.demo_parts.gallery import data_uri, picture_uri, short_name, text
from apps.demo_parts.looking import LayerMap, Reconstructed, heat
from apps.demo_parts.models import About

KINDS = {
    "share": "what is mixed in",
    "gates": "gates",
}
MEANING = {
    "share": "Each square is one code of the picture. Bright: much of what the layer mixes into "
    "its values there comes from the bank, |Σ gᵢMᵢ| / (|g₀V| + |Σ gᵢMᵢ|). Below: the mean, and "
    "the mean of g₀, the gate of the layer's own values, and of the slots' gates, ḡ.",
    "gates": "Each square is one code of the picture. Bright: the mean gate of the slots stands "
    "above g₀, the gate of the layer's own values: ḡ / (ḡ + g₀).",
}


def busy(words: str, brief: bool = False) -> str:
    """Work whose end cannot be told; `brief` where it is not worth a Stop button."""
    kind = "brief" if brief else "busy"
    return f'<div class="status {kind}" role="status"><progress></progress>{text(words)} …</div>'


def waiting(ahead: int) -> str:
    """A place in the line."""
    jobs = "1 job comes" if ahead == 1 else f"{ahead} jobs come"
    return busy(f"In line: {jobs} before yours")


def note(words: str) -> str:
    return f'<div class="status" role="status">{text(words)}</div>'


def failed(words: str) -> str:
    """A message that something could not be done."""
    sentence = words[:1].upper() + words[1:]
    return f'<div class="status failed" role="alert">{text(sentence)}</div>'


def progress(frame: Frame) -> str:
    """How far a drawing is."""
    if frame.ended == "done":
        pictures = sum(len(row.labels) for row in frame.rows)
        what = "1 picture" if pictures == 1 else f"{pictures} pictures"
        return note(f"{what} in {frame.seconds:.1f} s")
    share = f"{frame.done} of {frame.total} codes"
    if frame.ended:
        return note(f"Stopped after {share}.")
    return (
        f'<div class="status busy" role="status"><progress max="{frame.total}" '
        f'value="{frame.done}"></progress>{share}</div>'
    )


def bank_maps(
    picture: Image.Image, layers: Sequence[LayerMap], row: Row, about: About, kind: str
) -> str:
    """A picture and the maps of all layers on one scale, with their mean gates."""
    kind = kind if kind in KINDS else "share"
    maps = {m.layer: m.share if kind == "share" else m.gates for m in layers}
    low = min(float(np.nanmin(values)) for values in maps.values())
    high = max(float(np.nanmax(values)) for values in maps.values())
    name = text(f"{short_name(about.class_names[row.labels[0]])}, seed {row.seed}")
    cells = [
        f'<figure class="tile map"><img src="{picture_uri(picture)}" width="{picture.width}" '
        f'height="{picture.height}" alt="{name}"><figcaption><span class="name">picture</span>'
        '<span class="seed">grey: never read</span></figcaption></figure>'
    ]
    for m in layers:
        values = maps[m.layer]
        uri = data_uri(_png(heat(values, low, high)), "png")
        mean = float(np.nanmean(values))
        cells.append(
            f'<figure class="tile map"><img class="codes" src="{uri}" width="{values.shape[1]}" '
            f'height="{values.shape[0]}" alt="layer {m.layer}: {mean:.0%} on average">'
            f'<figcaption><span class="name">layer {m.layer}</span>'
            f'<span class="seed">{mean:.0%}</span><span class="seed">g₀ {m.g_0:.2f}</span>'
            f'<span class="seed">ḡ {m.slots:.2f}</span></figcaption></figure>'
        )
    ramp = data_uri(_png(heat(np.linspace(0, 1, 64)[None], 0, 1)), "png")
    return (
        f'<p class="what"><b>{name}</b>. {MEANING[kind]}</p>'
        f'<div class="legend">{low:.0%}<img src="{ramp}" alt="colour scale">{high:.0%}</div>'
        f'<div class="tiles maps">{"".join(cells)}</div>'
    )


def reconstruction(r: Reconstructed) -> str:
    """Image, decoded image and codes side by side, with the error."""
    h, w = r.codes.shape
    figures = [
        ("image", f"{r.before.width} x {r.before.height}", picture_uri(r.before, {}), r.before),
        ("decoded", f"PSNR {r.psnr:.1f} dB · MSE {r.mse:.4f}", picture_uri(r.after, {}), r.after),
        (
            "codes",
            f"{h} x {w}, {r.distinct} different",
            data_uri(_png(r.colours), "png"),
            r.colours,
        ),
    ]
    cells = "".join(
        f'<figure class="tile"><img class="{"codes" if name == "codes" else ""}" '
        f'src="{uri}" width="{p.width}" height="{p.height}" alt="{name}">'
        f'<figcaption><span class="name">{name}</span><span class="seed">{about}</span>'
        "</figcaption></figure>"
        for name, about, uri, p in figures
    )
    numbers = "\n".join(" ".join(f"{code:5d}" for code in line) for line in r.codes.tolist())
    return (
        f'<div class="tiles three">{cells}</div>'
        f"<details><summary>the codes as numbers</summary><pre>{numbers}</pre></details>"
    )


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    return buffer.getvalue()
