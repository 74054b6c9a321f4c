"""The page: its layout, and which button calls which job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI

from moveimg.config import SamplingSettings
from moveimg.demo import html, requests
from moveimg.demo.api import Api
from moveimg.demo.handlers import SKIP, Handlers
from moveimg.demo.models import ModelInfo

HERE = Path(__file__).parent
PICK = "show where each layer used the bank"
# Drawing shows its own progress; any number may wait, since the queue has limits of its own.
QUEUED: dict[str, Any] = {
    "show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None,
}  # fmt: skip
DIRECT: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
HEADER = (
    "<header><h1>moveimg</h1>"
    "<p>A class label in, images out, one discrete code after another.</p></header>"
)
HINT = (
    '<div class="status"><span class="keys">Press <kbd>Enter</kbd> to draw and <kbd>Esc</kbd> to '
    "stop. </span>The same class, settings and seed give the same image.</div>"
)
MEMORY = (
    '<p class="what">The model keeps a bank of value vectors for every code. In each layer a gate '
    "decides how much of it joins the layer's own values. <b>Choose an image above</b> to see "
    "where each layer used the bank while it read that image.</p>"
)
BANK_OFF = (
    "Draws the same seeds again with every slot at zero. Images that get worse show how much this "
    "model relies on its bank; a model trained without one would not be as bad."
)
RECONSTRUCT = (
    '<p class="what">The model never sees pixels: a tokenizer turns an image into a small grid of '
    "codes and decodes it again. What it cannot keep, no image here can have. The centre of your "
    "image is used; the file is not stored.</p>"
)
EDIT = (
    '<p class="what">Paint over a part of an image, or choose a half to keep: the rest is drawn '
    "anew as the class you choose. Codes are drawn from the top left to the bottom right and see "
    "only those before them; resampling passes let them see those after them, too.</p>"
)
LIKELIHOOD = (
    '<p class="what">How likely is an image, as each of the classes? The probability of its codes '
    "given a class is a product over the codes, so it is exact; Bayes' rule turns it into a "
    "probability of the class. What the tokenizer loses of the image does not count.</p>"
)


def read(name: str) -> str:
    """Return a text file of this folder."""
    return (HERE / name).read_text(encoding="utf-8")


def build_app(handlers: Handlers, auth: list[tuple[str, str]] | None = None) -> FastAPI:
    """Return the whole demo as an ASGI app. System fonts: nothing is fetched from elsewhere."""
    page = build_page(handlers)
    page.queue(max_size=2 * handlers.queue.length + 32, api_open=False)
    page._queue.max_thread_count = handlers.queue.length + 40  # each waiting job holds a place
    page.state_session_capacity = 200
    sans = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
    theme = gr.themes.Base(
        primary_hue="indigo", neutral_hue="slate", radius_size="lg", font=sans, font_mono=mono
    ).set(
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_400",
    )  # fmt: skip
    app = FastAPI(openapi_url=None)
    return gr.mount_gradio_app(
        app, page, path="", auth=auth, theme=theme, js=read("page.js"),
        # not `css`, whose selectors gradio rewrites: it gets :is() and body wrong
        head=f"<style>{read('page.css')}</style>", show_error=False, enable_monitoring=False,
        run_history=False, footer_links=["api"], max_file_size=requests.MAX_BODY, ssr_mode=False,
        mcp_server=False,
    )  # fmt: skip


def build_page(handlers: Handlers) -> gr.Blocks:
    """Return the tabs and the named endpoints."""
    with gr.Blocks(title="moveimg", analytics_enabled=False, fill_width=True) as page:
        api = Api(handlers)
        for name in requests.ENDPOINTS:
            gr.api(api.endpoint(name), api_name=name, concurrency_limit=None)
        gr.HTML(HEADER)
        with gr.Tabs():
            with gr.Tab("Generate"):
                model = _generate_tab(page, handlers)
            with gr.Tab("Edit"):
                _edit_tab(handlers, model)
            with gr.Tab("Likelihood"):
                _upload_tab(handlers, model, LIKELIHOOD, "score", "Scoring")
            with gr.Tab("Reconstruct"):
                _upload_tab(handlers, model, RECONSTRUCT, "reconstruct", "Encoding")
            with gr.Tab("API"):
                names = handlers.models.describe().class_names
                example = read("api.md").replace("CLASS", html.short_name(names[-1]))
                gr.Markdown(example + requests.endpoint_table(), elem_id="api")
    return page


def _generate_tab(page: gr.Blocks, handlers: Handlers) -> gr.Dropdown:
    """Build the main tab; returns the choice of the model, which the other tabs share."""
    models, info = handlers.models, handlers.models.describe()
    saved_form = gr.BrowserState([], storage_key="moveimg-form", secret="moveimg")
    rows = gr.BrowserState([], storage_key="moveimg-rows", secret="moveimg")
    index, packed = gr.State(0), gr.Textbox(visible=False)
    with gr.Row(elem_id="main"):
        with gr.Column(elem_id="form", elem_classes="form", scale=4, min_width=290):
            many = len(models.names) > 1
            model = gr.Dropdown(models.names, label="Model", visible=many, elem_id="model")
            klass = _class_field(info, "klass")
            num = gr.Slider(1, requests.MAX_IMAGES, value=8, step=1, label="Images", elem_id="num")
            with gr.Row(elem_classes="press"):
                generate = _button("Generate", "generate", variant="primary", elem_classes="go")
                _stop_button(handlers, "stop")
                surprise = _button("Surprise me", "surprise")
            with gr.Accordion("Advanced", open=False, elem_id="advanced"):
                seed = _seed_field("seed")
                settings = [_setting(name, info) for name in requests.SETTINGS]
        with gr.Column(elem_id="results", scale=9, min_width=290):
            status = gr.HTML(HINT, elem_id="status")
            gallery = gr.HTML(html.EMPTY_GALLERY, elem_id="gallery", js_on_load=read("pick.js"))
            with gr.Row(elem_id="actions"):
                again = _button("Again, another seed", "again", size="sm")
                vary = _button("Vary guidance", "vary", size="sm")
                save = _button("Save all as zip", "save-all", size="sm")
            others = models.comparable()
            with gr.Row(elem_id="beside", visible=bool(others)) as beside:
                compare = _button("Compare with", "compare", size="sm")
                other = gr.Dropdown(
                    others, show_label=False, container=False, label="Model to compare with",
                    min_width=140, elem_id="other", scale=2,
                )  # fmt: skip
            clear, looking = _memory_panel(handlers, rows, index, gallery)

    form = [model, klass, num, seed, *settings]
    for button, plan, inputs in (
        (generate, handlers.plan_class, form),
        (surprise, handlers.plan_random_classes, form),
        (again, handlers.plan_new_seed, [rows]),
        (vary, handlers.plan_guidance, [rows]),
        (compare, handlers.plan_comparison, [rows, other]),
    ):
        # what is shown about the old images goes at once, and so does the job that computes it
        button.click(
            lambda: (0, "", "", "", False), None, [index, *clear], cancels=looking, **DIRECT
        )
        button.click(handlers.drawing(plan, PICK), inputs, [status, gallery, rows], **QUEUED)
    packing = handlers.computing(handlers.pack, "Packing")
    save.click(packing, rows, [status, packed], **QUEUED).then(
        None, packed, packed, js=read("download.js")
    )
    changed = [klass, *settings, beside, other]
    model.input(lambda name: _show_model(handlers, name), model, changed, **DIRECT)
    gr.on([part.change for part in form], None, form, saved_form, js="(...values) => [values]")

    def restore_form(values: list[Any]) -> list[Any]:
        if len(values) != len(form) or values[0] not in models.names:
            return [SKIP] * (len(form) + 2)
        classes, *_, beside, other = _show_model(handlers, values[0])
        return [values[0], classes | {"value": values[1]}, *values[2:], beside, other]

    page.load(restore_form, saved_form, [*form, beside, other], **DIRECT)
    restoring = handlers.computing(lambda rows: handlers.restore(rows, PICK), "Loading images")

    async def restore_images(rows: Any) -> Any:
        if not rows:
            yield SKIP, SKIP
            return
        async for shown in restoring(rows):
            yield shown

    page.load(restore_images, rows, [status, gallery], **QUEUED)
    return model


def _button(label: str, name: str, **options: Any) -> gr.Button:
    return gr.Button(label, elem_id=name, min_width=100, scale=2, **options)


def _stop_button(handlers: Handlers, name: str) -> None:
    """Build a button that is shown, in place of the one that begins, while a job runs."""
    stop = _button("Stop", name, variant="stop", elem_classes="halt")
    stop.click(handlers.stop, None, None, **DIRECT)


def _seed_field(name: str) -> gr.Textbox:
    about = "Image i is drawn with seed + i; empty: a new one each time"
    return gr.Textbox(label="seed", info=about, elem_id=name, max_lines=1)


def _class_field(info: ModelInfo, name: str) -> gr.Dropdown:
    return gr.Dropdown(
        _choices(info), value=0, label="Class", allow_custom_value=True, info=_search_help(info),
        elem_id=name, elem_classes="klass",
    )  # fmt: skip


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


def _show_model(handlers: Handlers, name: str) -> list[Any]:
    """Return what the form shows for a model: classes, own settings, models to compare with."""
    info, others = handlers.models.describe(name), handlers.models.comparable(name)
    return [
        gr.update(choices=_choices(info), value=0, info=_search_help(info)),
        *info.sampling.model_dump().values(),
        gr.update(visible=bool(others)),
        gr.update(choices=others, value=next(iter(others), None)),
    ]


def _choices(info: ModelInfo) -> list[tuple[str, int]]:
    """Return the classes as they are listed, with all synonyms so that any of them can be typed."""
    return [(f"{i} · {name}", i) for i, name in enumerate(info.class_names)]


def _search_help(info: ModelInfo) -> str:
    return f"Type part of a name, or an index: {len(info.class_names):,} classes."


def _memory_panel(
    handlers: Handlers, rows: Any, index: Any, gallery: Any
) -> tuple[list[Any], list[Any]]:
    """Build the panel on the bank; returns what to clear and what to cancel for new images."""
    with gr.Accordion("What the memory does", open=True, elem_id="memory"):
        gr.HTML(MEMORY)
        with gr.Row(elem_id="memory-form"):
            kind = gr.Radio(
                [("what is mixed in", "share"), ("gates", "gates")], value="share", elem_id="kind",
                label="Show", show_label=False, container=False,
            )  # fmt: skip
            off = gr.Checkbox(
                label="Turn the bank off", elem_id="bank-off", container=False, info=BANK_OFF
            )
        status = gr.HTML(elem_id="memory-status")
        maps = gr.HTML(elem_id="maps")
        pair = gr.HTML(elem_id="pair")
    look = handlers.computing(handlers.look, "Reading the image")

    async def pick(rows: Any, kind: str, event: gr.EventData) -> Any:
        async for shown in look(rows, event.index, kind):
            yield *shown, event.index

    draw_pair = handlers.drawing(handlers.plan_bank_pair)

    async def turn_off(off: bool, rows: Any, index: int) -> Any:
        if not off:
            yield "", ""
            return
        async for shown in draw_pair(rows, index):
            yield shown[:2]

    looking = [
        gallery.pick(pick, [rows, kind], [status, maps, index], **QUEUED),
        kind.change(look, [rows, index, kind], [status, maps], **QUEUED),
        off.input(turn_off, [off, rows, index], [status, pair], **QUEUED),
    ]
    return [status, maps, pair, off], looking


def _edit_tab(handlers: Handlers, model: gr.Dropdown) -> None:
    info = handlers.models.describe()
    gr.HTML(EDIT)
    with gr.Row():
        with gr.Column(elem_classes="form", scale=4, min_width=290):
            painter = gr.HTML(
                html.painter(info), elem_id="painter", most=requests.MAX_UPLOAD,
                js_on_load=read("upload.js") + read("paint.js"),
            )  # fmt: skip
            klass = _class_field(info, "edit-class")
            with gr.Row(elem_classes="press"):
                edit = _button("Draw anew", "edit", variant="primary", elem_classes="go")
                _stop_button(handlers, "edit-stop")
            num = gr.Slider(
                1, requests.MAX_VERSIONS, 4, step=1, label="Versions", elem_id="edit-num"
            )
            with gr.Accordion("Advanced", open=False, elem_id="edit-advanced"):
                seed = _seed_field("edit-seed")
                passes = gr.Slider(
                    0, requests.MAX_PASSES, value=0, step=1, label="resampling passes",
                    info="Metropolis-Hastings over blocks of 4 codes; slower", elem_id="passes",
                )  # fmt: skip
        with gr.Column(scale=6, min_width=290):
            status = gr.HTML(elem_id="edit-status")
            versions = gr.HTML(html.EMPTY_GALLERY, elem_id="versions")
    image, mask = gr.Textbox(visible=False), gr.Textbox(visible=False)
    drawing = handlers.drawing(handlers.plan_edit)

    async def draw_anew(*values: Any) -> Any:
        async for shown in drawing(*values):
            yield shown[:2]

    edit.click(
        draw_anew, [model, klass, num, seed, passes, image, mask], [status, versions],
        js="(...values) => [...values.slice(0, -2), ...window.painted()]", **QUEUED,
    )  # fmt: skip

    def choose_drawn(name: str, event: gr.EventData) -> Any:  # the class of a drawn image
        classes = range(handlers.models.describe(name).config.n_classes)
        return event.label if event.label in classes else SKIP

    painter.select(choose_drawn, model, klass, **DIRECT)

    def show(name: str) -> list[Any]:
        return [_show_model(handlers, name)[0], html.painter(handlers.models.describe(name))]

    model.change(show, model, [klass, painter], **DIRECT)


def _upload_tab(handlers: Handlers, model: Any, about: str, name: str, doing: str) -> None:
    """Build a tab that shows the result of a handler, called `name`, for one image."""
    compute = handlers.computing(getattr(handlers, name), doing)
    gr.HTML(about)
    upload = gr.HTML(
        html.UPLOAD, elem_id=f"{name}-upload", most=requests.MAX_UPLOAD,
        js_on_load=read("upload.js"),
    )  # fmt: skip
    _stop_button(handlers, f"{name}-stop")
    status, result = gr.HTML(elem_id=f"{name}-status"), gr.HTML(elem_id=f"{name}-result")

    async def uploaded(name: str, event: gr.EventData) -> Any:
        if event.problem:
            yield html.status(str(event.problem)[:200], "failed"), ""
            return
        async for update in compute(name, event.data):
            yield update

    upload.upload(uploaded, [model], [status, result], **QUEUED)
