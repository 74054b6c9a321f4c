"""The page: its layout, and which button begins which job."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI

from moveimg.config import SamplingSettings
from moveimg.demo import html, jobs, requests
from moveimg.demo.api import Api, explain, listener_check
from moveimg.demo.jobs import ModelInfo, Models, Row
from moveimg.errors import validate

# Jobs take turns; gradio shows their place in the queue. Other events do not wait.
JOB: dict[str, Any] = {"concurrency_id": "job", "concurrency_limit": 1}
DIRECT: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
HEADER = "<h1>moveimg</h1><p>A class label in, images out, one discrete code after another.</p>"
EDIT = (
    '<p class="what">Paint over a part of an image, or choose a half to keep: the rest is drawn '
    "anew. Codes are drawn from the top left to the bottom right and see only those before them; "
    "resampling passes let them see those after them, too.</p>"
)
LIKELIHOOD = (
    '<p class="what">How likely is an image, as each of the classes? The probability of its codes '
    "given a class is exact; Bayes' rule turns it into a probability of the class.</p>"
)


def read(name: str) -> str:
    """Return a text file of this folder."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def build_app(
    models: Models, queue: int, per_visitor: int, auth: list[tuple[str, str]] | None = None
) -> FastAPI:
    """Return the whole demo as an ASGI app. System fonts: nothing is fetched from elsewhere."""
    page = build_page(models)
    page.queue(max_size=queue, api_open=False)
    limit_visitors(page._queue, per_visitor)
    page.state_session_capacity = 200
    page._queue.pending_messages_per_session.max_size = 200  # results that nobody has read
    theme = gr.themes.Base(
        primary_hue="indigo", neutral_hue="slate", radius_size="lg",
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"],
    )  # fmt: skip
    return gr.mount_gradio_app(
        FastAPI(openapi_url=None), page, path="", auth=auth, theme=theme, js=read("page.js"),
        # not `css`, whose selectors gradio rewrites: it gets :is() and body wrong
        head=f"<style>{read('page.css')}</style>", show_error=False, enable_monitoring=False,
        run_history=False, footer_links=["api"], max_file_size=requests.MAX_BODY, ssr_mode=False,
        mcp_server=False,
    )  # fmt: skip


def limit_visitors(queue: Any, per_visitor: int) -> None:
    """Let gradio's queue refuse jobs of a tab that has `per_visitor`, or an address with half."""
    push, per_address = queue.push, max(per_visitor, queue.max_size // 2)

    async def push_within_limits(body: Any, request: Any, username: str | None) -> Any:
        job, events = JOB["concurrency_id"], queue.event_ids_to_events.values()
        if getattr(queue.blocks.fns.get(body.fn_index), "concurrency_id", "") == job:
            events = [event for event in events if event.concurrency_id == job]
            visitor = username or request.client.host
            own = sum(event.session_hash == body.session_hash for event in events)
            near = sum((e.username or e.request.client.host) == visitor for e in events)
            if own >= per_visitor or near >= per_address:
                found = f"{own} jobs in this tab and {near} of your address"
                return False, f"{found} are in the queue: wait for one, or stop it", "queue_full"
        return await push(body=body, request=request, username=username)

    queue.push = push_within_limits


def build_page(models: Models) -> gr.Blocks:
    """Return the tabs and the named endpoints."""
    with gr.Blocks(title="moveimg", analytics_enabled=False, fill_width=True) as page:
        api = Api(models)
        for name in requests.ENDPOINTS:
            options = {"concurrency_limit": None} if name in ("classes", "models") else JOB
            gr.api(api.endpoint(name), api_name=name, **options)
        gr.HTML(HEADER, elem_id="header")
        with gr.Tabs():
            with gr.Tab("Generate"):
                model = _generate_tab(models)
            with gr.Tab("Edit"):
                _edit_tab(models, model)
            with gr.Tab("Likelihood"):
                _likelihood_tab(models, model)
    return page


def drawing(
    models: Models, plan: Callable[..., list[Row]], status: Any, gallery: Any, last: Any = None
) -> Callable[..., Any]:
    """Return the handler of a button that draws the rows of `plan(*values)`.

    `last` keeps the first of them. It ends with a status line, whatever happens.
    """

    def update(*values: Any) -> Iterator[dict[Any, Any]]:
        try:
            if values == (None,):
                raise ValueError("draw some images first")
            rows, begin = plan(*values), time.perf_counter()
            yield {status: html.status("Starting …"), **({last: rows[0]} if last else {})}
            for share, images in jobs.draw(rows, models, listener_check()):
                shown = html.gallery(rows, images, models, share == 1)
                yield {status: html.progress(share), gallery: shown}
            count = sum(len(row.labels) for row in rows)
            took = f"{time.perf_counter() - begin:.1f} s"
            yield {status: html.status(f"{count} image{'s' * (count > 1)} in {took}")}
        except Exception as error:
            yield {status: html.status(explain(error), "failed")}

    return update


def _generate_tab(models: Models) -> gr.Dropdown:
    """Build the main tab; returns the choice of the model, which the other tabs share."""
    info, last = models.describe(), gr.State(None, time_to_live=3600)
    with gr.Row(elem_id="main"):
        with gr.Column(elem_id="form", elem_classes="form", scale=4, min_width=290):
            names = list(models.infos)
            model = gr.Dropdown(names, label="Model", visible=len(names) > 1, elem_id="model")
            klass = _class_field(info, "klass")
            num = gr.Slider(1, requests.MAX_IMAGES, value=8, step=1, label="Images", elem_id="num")
            generate, stop = _press_row("Generate", "generate")
            with gr.Accordion("Advanced", open=False, elem_id="advanced"):
                seed = _seed_field("seed")
                settings = [_setting(name, info) for name in requests.SETTINGS]
        with gr.Column(elem_id="results", scale=9, min_width=290):
            hint = "Enter draws, Esc stops. The same class, settings and seed give the same image."
            status = gr.HTML(html.status(hint), elem_id="status")
            gallery = gr.HTML(elem_id="gallery")
            with gr.Row():
                vary = gr.Button("Vary guidance", size="sm", elem_id="vary")
                off = gr.Button(
                    "Turn the bank off", size="sm", elem_id="bank-off", visible=info.has_bank
                )

    def plan(*values: Any) -> list[Row]:
        names = ("model", "class_name", "num", "seed", *requests.SETTINGS)
        request = dict(zip(names, values, strict=True))
        return [jobs.make_row(models, validate(requests.Generate, request, "settings"))]

    form, outputs = [model, klass, num, seed, *settings], [status, gallery]
    works = [
        _job(generate.click, drawing(models, plan, status, gallery, last), form, [*outputs, last])
    ]
    for button, rows in ((vary, jobs.vary_guidance), (off, jobs.turn_bank_off)):
        works.append(_job(button.click, drawing(models, rows, status, gallery), last, outputs))
    _stops(stop, works, status)

    def show_model(name: str) -> list[Any]:
        info = models.describe(name)
        values = info.sampling.model_dump().values()
        return [gr.update(**_classes(info)), *values, gr.update(visible=info.has_bank)]

    model.input(show_model, model, [klass, *settings, off], **DIRECT)
    return model


def _press_row(label: str, name: str) -> tuple[gr.Button, gr.Button]:
    """Build the button that begins a tab's job, and the one that ends it."""
    with gr.Row(elem_classes="press"):
        go = gr.Button(label, variant="primary", elem_id=name, elem_classes="go", min_width=100)
        stop = gr.Button("Stop", elem_id=f"{name}-stop", elem_classes="halt", min_width=100)
    return go, stop


def _job(
    trigger: Any, handler: Callable[..., Any], inputs: Any, outputs: list[Any], **options: Any
) -> Any:
    """Let an event begin a job; its place in the queue is shown at the first of the outputs."""
    options |= {"api_visibility": "private", "show_progress_on": outputs[0], **JOB}
    return trigger(handler, inputs, outputs, **options)


def _stops(stop: gr.Button, works: list[Any], status: Any) -> None:
    stop.click(lambda: html.status("Stopped."), None, status, cancels=works, **DIRECT)


def _seed_field(name: str) -> gr.Number:
    about = "Image i is drawn with seed + i; empty: a new one each time"
    return gr.Number(None, label="seed", info=about, precision=0, elem_id=name)


def _class_field(info: ModelInfo, name: str) -> gr.Dropdown:
    options: dict[str, Any] = {
        "allow_custom_value": True,
        "elem_classes": "klass",
        **_classes(info),
    }
    return gr.Dropdown(label="Class", elem_id=name, **options)


def _classes(info: ModelInfo) -> dict[str, Any]:
    """Return the choices of a class, with all synonyms so that any of them can be typed."""
    choices = [(f"{i} · {name}", i) for i, name in enumerate(info.class_names)]
    about = f"Type part of a name, or an index: {len(choices):,} classes. Empty: random ones."
    return {"choices": choices, "value": 0, "info": about}


def _setting(name: str, info: ModelInfo) -> Any:
    """Return the control of a sampling setting, as it is declared in SamplingSettings."""
    schema = SamplingSettings.model_json_schema()["properties"][name]
    common: dict[str, Any] = {
        "value": getattr(info.sampling, name), "info": schema["description"],
        "label": name.replace("_", " ").replace("cfg", "CFG"), "elem_id": name.replace("_", "-"),
    }  # fmt: skip
    if "enum" in schema:
        return gr.Dropdown(schema["enum"], filterable=False, **common)
    is_whole = schema["type"] == "integer"
    return gr.Number(precision=0 if is_whole else None, step=1 if is_whole else 0.05, **common)


def _edit_tab(models: Models, model: gr.Dropdown) -> None:
    info = models.describe()
    gr.HTML(EDIT)
    with gr.Row():
        with gr.Column(elem_classes="form", scale=4, min_width=290):
            painter = gr.HTML(
                html.painter(info), elem_id="painter", most=requests.MAX_UPLOAD,
                js_on_load=read("upload.js") + read("paint.js"),
            )  # fmt: skip
            klass = _class_field(info, "edit-class")
            edit, stop = _press_row("Draw anew", "edit")
            num = gr.Slider(1, requests.MAX_EDITS, 4, step=1, label="Versions", elem_id="edit-num")
            seed = _seed_field("edit-seed")
            about = "Metropolis-Hastings over blocks of 4 codes; slower"
            passes = gr.Slider(0, 20, 0, step=1, label="resampling passes", info=about)
        with gr.Column(scale=6, min_width=290):
            status = gr.HTML(elem_id="edit-status")
            versions = gr.HTML(elem_id="versions")
    image, mask = gr.Textbox(visible=False), gr.Textbox(visible=False)
    names = ("model", "class_name", "num", "seed", "passes", "image", "hole")

    def plan(*values: Any) -> list[Row]:
        request = dict(zip(names, values, strict=True))
        if not request["image"]:
            raise ValueError("there is no image: choose a file, or one that was drawn")
        return [jobs.make_row(models, validate(requests.Edit, request, "settings"))]

    work = _job(
        edit.click, drawing(models, plan, status, versions),
        [model, klass, num, seed, passes, image, mask], [status, versions],
        js="(...values) => [...values.slice(0, -2), ...window.painted()]",
    )  # fmt: skip
    _stops(stop, [work], status)

    def choose_drawn(name: str, event: gr.EventData) -> Any:  # the class of a drawn image
        classes = range(models.describe(name).config.n_classes)
        return event.label if event.label in classes else gr.skip()

    painter.select(choose_drawn, model, klass, **DIRECT)

    def show(name: str) -> list[Any]:
        info = models.describe(name)
        return [gr.update(**_classes(info)), html.painter(info)]

    model.change(show, model, [klass, painter], **DIRECT)


def _likelihood_tab(models: Models, model: gr.Dropdown) -> None:
    gr.HTML(LIKELIHOOD)
    upload = gr.HTML(
        html.UPLOAD, elem_id="score-upload", most=requests.MAX_UPLOAD, js_on_load=read("upload.js")
    )
    stop = gr.Button("Stop", elem_id="score-stop", elem_classes="halt")
    status = gr.HTML(elem_id="score-status")
    classes = gr.Label(num_top_classes=10, label="Likeliest classes", elem_id="score-result")

    def score(name: str, event: gr.EventData) -> Iterator[dict[Any, Any]]:
        try:
            if event.problem:
                raise ValueError(str(event.problem)[:200])
            request = requests.parse_call("score", {"model": name, "image": event.data})
            for share, answer in jobs.score(request.image, name, models, listener_check()):
                yield {status: html.progress(share)}
                if answer:
                    best = {
                        f"{c['index']} · {c['name']}": c["probability"] for c in answer["classes"]
                    }
                    yield {status: html.likelihood(answer, models.describe(name)), classes: best}
        except Exception as error:
            yield {status: html.status(explain(error), "failed")}

    work = _job(upload.upload, score, model, [status, classes])
    _stops(stop, [work], status)
