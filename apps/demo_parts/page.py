"""The page: its parts, and what calls what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from apps.demo_parts import drawing, looking, show, texts
from apps.demo_parts.api import Api
from apps.demo_parts.handlers import Handlers
from apps.demo_parts.models import About, Models

HERE = Path(__file__).parent
SCHEDULES = ["constant", "linear", "power-cosine"]
TO_FILE = """(data) => {
  if (!data) return;
  const link = document.createElement("a");
  link.href = "data:application/zip;base64," + data;
  link.download = "moveimg.zip";
  link.click();
}"""
PICK = """element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-pick]");
  if (!button) return;
  element.querySelectorAll(".chosen").forEach((tile) => tile.classList.remove("chosen"));
  button.closest(".tile").classList.add("chosen");
  trigger("pick", { index: Number(button.dataset.pick) });
});"""
FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]


def look() -> dict[str, Any]:
    """Theme, style and script, as arguments of launch(). System fonts: nothing is fetched."""
    theme = gr.themes.Base(
        primary_hue="indigo", neutral_hue="slate", radius_size="lg", font=FONT, font_mono=MONO
    ).set(
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_400",
    )  # fmt: skip
    return {
        "theme": theme,
        # not `css`: gradio rewrites the selectors of that, and gets :is() and body wrong
        "head": f"<style>{(HERE / 'style.css').read_text(encoding='utf-8')}</style>",
        "js": (HERE / "script.js").read_text(encoding="utf-8"),
    }


def choices(about: About) -> list[tuple[str, int]]:
    """The classes as they are listed: index and all synonyms, so that any of them can be typed."""
    return [(f"{i} · {name}", i) for i, name in enumerate(about.class_names)]


def build(handlers: Handlers) -> gr.Blocks:
    """The whole demo, with its named endpoints."""
    models = handlers.models
    first = models.describe(None)
    with gr.Blocks(title="moveimg", analytics_enabled=False, fill_width=True) as page:
        # first, since a name goes to who asks first: buttons are named after their functions
        api = Api(handlers)
        for name in ("generate", "vary_guidance", "compare", "memory", "reconstruct"):
            gr.api(getattr(api, name), api_name=name, concurrency_limit=None)
        gr.api(api.classes, api_name="classes", concurrency_limit=None)
        gr.api(api.list_models, api_name="models", concurrency_limit=None)
        gr.HTML(texts.HEADER)
        with gr.Tabs():
            with gr.Tab("Generate", id="generate-tab"):
                model = _generate_tab(handlers, models, first)
            with gr.Tab("Reconstruct", id="reconstruct-tab"):
                _reconstruct_tab(handlers, model)
            with gr.Tab("API", id="api-tab"):
                gr.Markdown(texts.API, elem_id="api")
    return page


def _generate_tab(handlers: Handlers, models: Models, first: About) -> gr.Dropdown:
    """The main tab; returns the choice of the model, which the other tabs share."""
    rows, index = gr.State([], time_to_live=3600), gr.State(0, time_to_live=3600)
    with gr.Row(elem_id="main"):
        with gr.Column(elem_id="form", scale=4, min_width=290):
            model = gr.Dropdown(
                models.names, value=first.name, label="Model", visible=len(models.names) > 1,
                elem_id="model",
            )  # fmt: skip
            klass = gr.Dropdown(
                choices(first), value=_usual(first), label="Class", allow_custom_value=True,
                info=_search_help(first), elem_id="klass",
            )  # fmt: skip
            num = gr.Slider(
                1, drawing.MAX_PICTURES, value=8, step=1, label="Pictures", elem_id="num"
            )
            with gr.Row(elem_id="press"):
                generate = gr.Button(
                    "Generate", variant="primary", elem_id="generate", scale=2, min_width=100
                )
                stop = gr.Button("Stop", variant="stop", elem_id="stop", scale=2, min_width=100)
                surprise = gr.Button("Surprise me", elem_id="surprise", scale=2, min_width=100)
            with gr.Accordion("Advanced", open=False, elem_id="advanced"):
                settings = _advanced(first)
        with gr.Column(elem_id="results", scale=9, min_width=290):
            status = gr.HTML(texts.HINT, elem_id="status")
            gallery = gr.HTML(_empty(), elem_id="gallery", js_on_load=PICK)
            with gr.Row(elem_id="actions"):
                again = gr.Button("Again, another seed", size="sm", elem_id="again", min_width=140)
                vary = gr.Button("Vary guidance", size="sm", elem_id="vary", min_width=140)
                save = gr.Button("Save all as zip", size="sm", elem_id="save-all", min_width=140)
            others = models.comparable(None)
            with gr.Row(elem_id="beside", visible=bool(others)) as beside:
                compare = gr.Button("Compare with", size="sm", elem_id="compare", min_width=140)
                other = gr.Dropdown(
                    others, value=next(iter(others), None), show_label=False, container=False,
                    label="Model to compare with", min_width=140, elem_id="other", scale=2,
                )  # fmt: skip
            shown, looks = _memory_panel(handlers, rows, index, gallery)

    form = [model, klass, num, settings["seed"], *(settings[k] for k in FORM)]
    drawn = [status, gallery, rows]
    events: list[tuple[Any, Any, list[Any]]] = [
        (generate, handlers.generate, form),
        (surprise, handlers.surprise, form),
        (again, handlers.again, [rows]),
        (vary, handlers.vary, [rows]),
        (compare, handlers.compare, [rows, other]),
    ]
    for button, handler, inputs in events:
        # what is said of the old pictures goes at once, and what is being found out about them
        button.click(lambda: (0, "", "", "", False), None, [index, *shown], cancels=looks, **DIRECT)
        button.click(handler, inputs, drawn, **QUIET)
    stop.click(handlers.stop, None, None, **DIRECT)
    packed = gr.Textbox(visible=False)
    save.click(handlers.zip, [rows], [status, packed], **QUIET).then(
        None, [packed], None, js=TO_FILE
    ).then(lambda: "", None, packed, **DIRECT)
    model.change(
        lambda name: _for_model(models.describe(name)) + _to_compare(models.comparable(name)),
        model, [klass, *(settings[k] for k in FORM), beside, other], **DIRECT,
    )  # fmt: skip
    return model


FORM = ("cfg_scale", "temperature", "top_k", "top_p", "cfg_schedule")
# Drawing shows its own progress; any number may wait, since the line has limits of its own.
QUIET: dict[str, Any] = {
    "show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None,
}  # fmt: skip
DIRECT: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "queue": False}


def _advanced(about: About) -> dict[str, Any]:
    """The folded panel; the model's own settings are the defaults."""
    own, info = about.settings, texts.HELP
    return {
        "seed": gr.Textbox(
            label="Seed", info=info["seed"], elem_id="seed", placeholder="new each time",
            max_lines=1,
        ),
        "cfg_scale": gr.Slider(
            0, 20, own["cfg_scale"], step=0.05, label="Guidance", info=info["cfg_scale"],
            elem_id="cfg-scale",
        ),
        "cfg_schedule": gr.Dropdown(
            SCHEDULES, value=own["cfg_schedule"], label="Guidance schedule",
            info=info["cfg_schedule"], filterable=False,
        ),
        "temperature": gr.Slider(
            0, 2, own["temperature"], step=0.01, label="Temperature", info=info["temperature"]
        ),
        "top_k": gr.Slider(
            0, about.codebook_size, own["top_k"], step=1, label="Top-k", info=info["top_k"]
        ),
        "top_p": gr.Slider(0.01, 1, own["top_p"], step=0.01, label="Top-p", info=info["top_p"]),
    }  # fmt: skip


def _for_model(about: About) -> list[Any]:
    """What the form shows when another model is chosen: its classes and its own settings."""
    own = about.settings
    return [
        gr.update(choices=choices(about), value=_usual(about), info=_search_help(about)),
        own["cfg_scale"],
        own["temperature"],
        gr.update(maximum=about.codebook_size, value=own["top_k"]),
        own["top_p"],
        own["cfg_schedule"],
    ]


def _to_compare(others: list[str]) -> list[Any]:
    """What is offered beside a model: those that know the same classes, if any."""
    return [
        gr.update(visible=bool(others)),
        gr.update(choices=others, value=next(iter(others), None)),
    ]


def _memory_panel(
    handlers: Handlers, rows: Any, index: Any, gallery: Any
) -> tuple[list[Any], list[Any]]:
    """What the bank does; returns what to clear and which events to cancel for new pictures."""
    with gr.Accordion("What the memory does", open=True, elem_id="memory"):
        gr.HTML(texts.MEMORY)
        with gr.Row(elem_id="memory-form"):
            kind = gr.Radio(
                [(label, key) for key, label in show.KINDS.items()], value="share",
                label="Show", show_label=False, container=False, elem_id="kind",
            )  # fmt: skip
            off = gr.Checkbox(
                label="Turn the bank off", elem_id="bank-off", container=False,
                info="Draws the same seeds again with every slot at zero.",
            )  # fmt: skip
        status = gr.HTML(elem_id="memory-status")
        maps = gr.HTML(elem_id="maps")
        pair = gr.HTML(elem_id="pair")

    async def pick(rows: list, kind: str, request: gr.Request, event: gr.EventData) -> Any:
        chosen = int(event.index)
        async for status, html in handlers.look(rows, chosen, kind, request):
            yield status, html, chosen

    looks = [
        gallery.pick(pick, [rows, kind], [status, maps, index], **QUIET),
        kind.change(handlers.look, [rows, index, kind], [status, maps], **QUIET),
        off.input(handlers.bank, [off, rows, index], [status, pair], **QUIET),
    ]
    return [status, maps, pair, off], looks


def _reconstruct_tab(handlers: Handlers, model: gr.Dropdown) -> None:
    gr.HTML(texts.RECONSTRUCT)
    upload = gr.HTML(
        texts.UPLOAD, elem_id="upload", most=looking.MAX_UPLOAD,
        js_on_load=(HERE / "upload.js").read_text(encoding="utf-8"),
    )  # fmt: skip
    status = gr.HTML(elem_id="reconstruct-status")
    result = gr.HTML(elem_id="reconstruction")

    async def uploaded(name: str, request: gr.Request, event: gr.EventData) -> Any:
        if event.problem:
            yield show.failed(str(event.problem)[:200]), ""
            return
        async for update in handlers.reconstruct(name, event.data, request):
            yield update

    upload.upload(uploaded, [model], [status, result], **QUIET)


def _usual(about: About) -> int:
    """The class chosen at first."""
    return min(7, len(about.class_names) - 1)


def _search_help(about: About) -> str:
    return f"Type part of a name, or an index: {len(about.class_names):,} classes."


def _empty() -> str:
    blanks = '<figure class="tile"><span class="blank"></span></figure>' * 8
    return f'<div class="gallery empty"><section class="row"><div class="tiles">{blanks}</div>' \
        "</section></div>"  # fmt: skip
