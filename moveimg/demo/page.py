"""The demo's page: its layout, the jobs that buttons start, and the HTML of their results."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial, wraps
from html import escape
from pathlib import Path
from typing import Any, get_args

import gradio as gr

from moveimg.demo import api, jobs
from moveimg.demo.jobs import ModelInfo, Models, Row
from moveimg.errors import describe

# Jobs run one at a time; gradio shows their place in the queue. Other events do not wait.
JOB: dict[str, Any] = {"concurrency_id": "job", "concurrency_limit": 1}
DIRECT: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
HEADER = "<h1>moveimg</h1><p>A class label in, images out, one discrete code after another.</p>"
HINT = "Enter draws, Esc stops. The same class, settings and seed give the same image."
GO: dict[str, Any] = {"variant": "primary", "elem_classes": "go", "min_width": 100}
SEED = "Image i is drawn with seed + i; empty: a random seed"


def build_page(models: Models) -> gr.Blocks:
    """Build the page with its tabs, and the endpoints of the API."""
    with gr.Blocks(title="moveimg", analytics_enabled=False, fill_width=True) as page:
        for name in api.ENDPOINTS:
            gr.api(api.make_endpoint(models, name), api_name=name, **JOB)
        gr.HTML(HEADER, elem_id="header")
        with gr.Tabs():
            with gr.Tab("Generate"):
                model, *fields = _build_generate_tab(models)
            with gr.Tab("Edit"):
                fields += _build_edit_tab(models, model)
            with gr.Tab("Likelihood"):
                _build_likelihood_tab(models, model)

        def show_model(name: str) -> list[Any]:
            info = models.describe(name)
            fields = [_class_field(info, "klass"), *info.sampling.model_dump().values()]
            fields += [gr.update(visible=info.has_bank)]
            return [*fields, _class_field(info, "edit-class"), show_painter(info)]

        model.input(show_model, model, fields, **DIRECT)
    return page


def _build_generate_tab(models: Models) -> list[Any]:
    """Build the main tab; returns the field for the model and the fields that depend on it."""
    info, last = models.describe(), gr.State(None, time_to_live=3600)
    with gr.Row(elem_id="main"):
        with gr.Column(elem_id="form", elem_classes="form", scale=4, min_width=290):
            choices = list(models.infos)
            model = gr.Dropdown(choices, label="Model", visible=len(choices) > 1, elem_id="model")
            klass = _class_field(info, "klass")
            num = gr.Slider(1, api.MAX_IMAGES, value=8, step=1, label="Images", elem_id="num")
            with gr.Row(elem_classes="press"):
                generate = gr.Button("Generate", elem_id="generate", **GO)
                stop = gr.Button(
                    "Stop", elem_id="generate-stop", elem_classes="halt", min_width=100
                )
            with gr.Accordion("Advanced", open=False, elem_id="advanced"):
                seed = gr.Number(None, label="seed", info=SEED, precision=0, elem_id="seed")
                settings = {name: _setting_field(name, info) for name in api.SETTINGS}
        with gr.Column(elem_id="results", scale=9, min_width=290):
            status = gr.HTML(show_status(HINT), elem_id="status")
            gallery = gr.HTML(elem_id="gallery")
            with gr.Row():
                vary = gr.Button("Vary guidance", size="sm", elem_id="vary")
                with gr.Column(visible=info.has_bank, min_width=200) as bank:
                    percent = gr.Slider(
                        0, 100, 0, step=5, label="Bank, percent", elem_id="bank-percent"
                    )
                    off = gr.Button("Compare with this bank", size="sm", elem_id="bank-off")
    form = {"model": model, "class_name": klass, "num": num, "seed": seed, **settings}
    outputs = [status, gallery, last]
    draw = _make_handler(models, partial(_parse_row, models, "generate", form), *outputs)
    _start_job_on(generate.click, draw, form.values(), outputs, stop)
    vary_guidance = _make_handler(models, jobs.vary_guidance, status, gallery)
    _start_job_on(vary.click, vary_guidance, [last], outputs, stop)
    vary_bank = _make_handler(models, jobs.vary_bank, status, gallery)
    _start_job_on(off.click, vary_bank, [last, percent], outputs, stop)
    return [model, klass, *settings.values(), bank]


def _build_edit_tab(models: Models, model: gr.Dropdown) -> list[Any]:
    """Build the tab for edits; returns the fields that depend on the model."""
    info, script = models.describe(), read("upload.js") + read("paint.js")
    gr.HTML(read("edit.html"))
    with gr.Row():
        with gr.Column(elem_classes="form", scale=4, min_width=290):
            painter = gr.HTML(
                show_painter(info), elem_id="painter", most=api.MAX_UPLOAD, js_on_load=script
            )
            klass = _class_field(info, "edit-class")
            with gr.Row(elem_classes="press"):
                edit = gr.Button("Redraw", elem_id="edit", **GO)
                stop = gr.Button("Stop", elem_id="edit-stop", elem_classes="halt", min_width=100)
            num = gr.Slider(1, api.MAX_EDITS, 4, step=1, label="Versions", elem_id="edit-num")
            seed = gr.Number(None, label="seed", info=SEED, precision=0, elem_id="edit-seed")
            about = "Metropolis-Hastings over blocks of 4 codes; slower"
            passes = gr.Slider(0, 20, 0, step=1, label="resampling passes", info=about)
        with gr.Column(scale=6, min_width=290):
            status = gr.HTML(elem_id="edit-status")
            versions = gr.HTML(elem_id="versions")
    form = {
        "model": model, "class_name": klass, "num": num, "seed": seed, "passes": passes,
        "image": gr.Textbox(visible=False), "hole": gr.Textbox(visible=False),
    }  # fmt: skip
    js = "(...values) => [...values.slice(0, -2), ...window.painted()]"
    draw = _make_handler(models, partial(_parse_row, models, "edit", form), status, versions)
    _start_job_on(edit.click, draw, form.values(), [status, versions], stop, js=js)

    def choose_drawn(event: gr.EventData) -> Any:  # the class of a drawn image
        return event.label

    painter.select(choose_drawn, None, klass, **DIRECT)
    return [klass, painter]


def _build_likelihood_tab(models: Models, model: gr.Dropdown) -> None:
    field, script = read("likelihood.html") + read("upload.html"), read("upload.js")
    upload = gr.HTML(field, elem_id="score-upload", most=api.MAX_UPLOAD, js_on_load=script)
    stop = gr.Button("Stop", elem_id="score-stop", elem_classes="halt")
    status = gr.HTML(elem_id="score-status")
    classes = gr.Label(num_top_classes=10, label="Likeliest classes", elem_id="score-result")

    def score(name: str, event: gr.EventData) -> Iterator[dict[Any, Any]]:
        request = api.parse("score", {"model": name, "image": event.data})
        for share, answer in jobs.score(models, request, api.listener_check()):  # noqa: B007
            yield {status: show_progress(share)}
        best = {f"{c['index']} · {c['name']}": c["probability"] for c in answer["classes"]}
        name, nats = next(iter(best)), answer["classes"][0]["nats_per_code"]
        yield {status: show_status(f"{name}: {nats:.3f} nats per code"), classes: best}

    _start_job_on(upload.upload, score, [model], [status, classes], stop)


def _parse_row(models: Models, endpoint: str, names: Iterable[str], *values: Any) -> list[Row]:
    """Return, as a list, the row that an endpoint draws for the values of a form."""
    return [jobs.make_row(models, api.parse(endpoint, dict(zip(names, values, strict=True))))]


def _make_handler(
    models: Models, make_rows: Callable[..., list[Row]], status: Any, gallery: Any, last: Any = None
) -> Callable[..., Any]:
    """Return an event handler that draws `make_rows(*values)`; `last` keeps the first row."""

    def run(*values: Any) -> Iterator[dict[Any, Any]]:
        if values[0] is None:
            raise ValueError("draw some images first")
        rows, begin = make_rows(*values), time.perf_counter()
        yield {status: show_status("Starting …"), **({last: rows[0]} if last else {})}
        for share, images in jobs.draw(rows, models, api.listener_check()):
            yield {status: show_progress(share), gallery: show_gallery(rows, images, share == 1)}
        count, seconds = sum(map(len, images)), time.perf_counter() - begin
        yield {status: show_status(f"{count} image{'s' * (count > 1)} in {seconds:.1f} s")}

    return run


def _start_job_on(
    trigger: Any, handler: Any, inputs: Iterable[Any], outputs: list[Any], stop: Any, **options: Any
) -> None:
    """Make an event start a job, whose errors and place in the queue the first output shows."""

    @wraps(handler)
    def run(*values: Any) -> Iterator[Any]:
        try:
            yield from handler(*values)
        except ValueError as error:  # gradio hides the message of other errors
            yield {outputs[0]: show_status(describe(error), "failed")}

    options |= {"api_visibility": "private", "show_progress_on": outputs[0], **JOB}
    work = trigger(run, list(inputs), outputs, **options)
    stop.click(lambda: show_status("Stopped."), None, outputs[0], cancels=[work], **DIRECT)


def _class_field(info: ModelInfo, name: str) -> gr.Dropdown:
    """Make the field for a class, with all synonyms so that any synonym can be typed."""
    choices = [(f"{i} · {name}", i) for i, name in enumerate(info.class_names)]
    about = f"Type part of a name, or an index: {len(choices):,} classes. Empty: random classes."
    return gr.Dropdown(
        choices, value=0, label="Class", info=about, allow_custom_value=True, elem_id=name,
        elem_classes="klass",
    )  # fmt: skip


def _setting_field(name: str, info: ModelInfo) -> Any:
    """Make the field for a sampling setting from its declaration in SamplingSettings."""
    field = api.SETTINGS[name]
    common: dict[str, Any] = {
        "value": getattr(info.sampling, name), "info": field.description,
        "label": name.replace("_", " ").replace("cfg", "CFG"), "elem_id": name.replace("_", "-"),
    }  # fmt: skip
    if choices := get_args(field.annotation):
        return gr.Dropdown(list(choices), filterable=False, **common)
    is_whole = field.annotation is int
    return gr.Number(precision=0 if is_whole else None, step=1 if is_whole else 0.05, **common)


def read(name: str) -> str:
    """Return a text file of this folder."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def text(value: Any) -> str:
    """Escape a value for HTML and for the template syntax of gradio's components."""
    return re.sub(r"[{}$`]", lambda match: f"&#{ord(match[0])};", escape(str(value)))


def show_status(words: str, kind: str = "") -> str:
    """Return the HTML of a status line; `kind` is failed or empty."""
    return f'<div class="status {kind}" role="status">{text(words)}</div>'


def show_progress(share: float) -> str:
    """Return the HTML of a job's progress, of which `share` is done."""
    return f'<div class="status"><progress value="{share:.3f}"></progress>{share:.0%}</div>'


def show_gallery(rows: list[Row], images: list[list[dict[str, Any]]], is_finished: bool) -> str:
    """Return the HTML of rows drawn so far (by jobs.draw); finished images have a save link."""
    sections = []
    for row, row_images in zip(rows, images, strict=False):
        tiles = []
        for image in row_images:
            name, seed = image["class_name"].split(",")[0].strip(), f"seed {image['seed']}"
            file = f"{image['class']:04d}-seed{image['seed']}.png"
            save = f'<a class="save" href="#" download="{file}" title="save as PNG">↓</a>'
            tiles.append(
                f'<figure class="tile"><img src="{image["png"]}" alt="{text(name)}, {seed}">'
                f'<figcaption><span class="name" title="{text(image["class_name"])}">{text(name)}'
                f'</span><span class="seed">{seed}</span>{save * is_finished}</figcaption></figure>'
            )
        title, kind = (f"<h3>{text(row.title)}</h3>", "strip") if row.title else ("", "")
        section = f'<section class="{kind}">{title}<div class="tiles">{"".join(tiles)}</div>'
        sections.append(f"{section}</section>")
    return "".join(sections)


def show_painter(info: ModelInfo) -> str:
    """Return the HTML of the field in which a user paints over an image (paint.js)."""
    rows, columns = info.config.grid
    return read("upload.html") + read("paint.html").format(
        rows=rows, columns=columns, height=512 * rows // columns
    )
