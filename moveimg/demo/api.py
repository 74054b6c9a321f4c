"""The named endpoints: the page's jobs with plain values in and out, for scripts."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import gradio as gr
from gradio.context import LocalContext

from moveimg.demo import jobs
from moveimg.demo.jobs import LOG, Models, Row
from moveimg.demo.requests import ENDPOINTS, parse_call
from moveimg.errors import describe
from moveimg.images import to_pil, to_tensor
from moveimg.pipeline import search_names


def explain(error: Exception) -> str:
    """Return an error for the visitor: bad input in its own words, others without details."""
    if isinstance(error, ValueError):
        return describe(error)
    LOG.error("a job failed", exc_info=error)
    return "something went wrong on the server; its log says what"


def listener_check() -> Callable[[], bool]:
    """Return a function that says whether the listener of the current event has gone."""
    queue: Any = LocalContext.blocks.get()._queue  # type: ignore[union-attr]
    event = queue.event_ids_to_events.get(LocalContext.event_id.get(None))
    return lambda: event is not None and not event.alive


class Api:
    """The endpoints of one demo; call_NAME answers a request to /NAME."""

    def __init__(self, models: Models) -> None:
        self.models = models

    def endpoint(self, name: str) -> Callable[..., Any]:
        """Return the function of a named endpoint, with a parameter per field of its request."""
        kind = ENDPOINTS[name]

        def call(*values: Any) -> Any:
            try:
                return getattr(self, f"call_{name}")(parse_call(name, {"data": values}))
            except Exception as error:
                raise gr.Error(explain(error), print_exception=False) from None

        word = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [
            inspect.Parameter(key, word, default=field.default, annotation=field.annotation)
            for key, field in kind.model_fields.items()
        ]
        signature = inspect.Signature(parameters, return_annotation=dict)
        call.__signature__ = signature  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": dict}
        help = [f"    {key}: {field.description}" for key, field in kind.model_fields.items()]
        call.__doc__ = "\n".join([f"{kind.__doc__}\n", "Parameters:", *help])
        return call

    def call_generate(self, request: Any) -> dict[str, Any]:
        return self._draw([jobs.make_row(self.models, request)])[0]

    call_edit = call_generate

    def call_vary_guidance(self, request: Any) -> dict[str, Any]:
        row = jobs.make_row(self.models, request)
        return {"rows": self._draw(jobs.vary_guidance(row, request.scales))}

    def call_score(self, request: Any) -> dict[str, Any]:
        *_, (_, answer) = jobs.score(request.image, request.model, self.models, listener_check())
        return answer

    def call_reconstruct(self, request: Any) -> dict[str, Any]:
        pipeline = self.models.get(request.model)
        pixels = to_tensor([pipeline.crop(jobs.read_upload(request.image))])
        codes = pipeline.tokenizer.encode(pixels.to(pipeline.device))
        grid = pipeline.generator.config.grid
        decoded = pipeline.tokenizer.decode(codes, grid).cpu()
        mse = (decoded - pixels).double().square().mean().item()
        return {
            "mse": mse, "psnr": 10 * math.log10(4 / mse) if mse else None,
            "codes": codes.view(grid).tolist(), "image": jobs.image_uri(to_pil(decoded)[0], {}),
        }  # fmt: skip

    def call_classes(self, request: Any) -> list[dict[str, Any]]:
        names, part = self.models.describe(request.model).class_names, request.search.strip()
        labels = search_names(names, part)
        if part.isdecimal() and int(part) < len(names):
            labels = sorted({*labels, int(part)})
        return [{"index": label, "name": names[label]} for label in labels]

    def call_models(self, request: Any) -> list[dict[str, Any]]:
        return [
            {
                "name": info.name, "classes": len(info.class_names), "bank": info.has_bank,
                "grid": list(info.config.grid), "settings": info.sampling.model_dump(),
            }
            for info in self.models.infos.values()
        ]  # fmt: skip

    def _draw(self, rows: list[Row]) -> list[dict[str, Any]]:
        *_, (_, images) = jobs.draw(rows, self.models, listener_check())
        answers = []
        for row, row_images in zip(rows, images, strict=True):
            shown = []
            for i, image in enumerate(row_images):
                meta = jobs.metadata(row, i, self.models)
                keys = {key: meta[key] for key in ("class", "class_name", "seed")}
                shown.append(keys | {"png": jobs.image_uri(image, meta)})
            settings = row.settings.model_dump()
            answer = {"model": row.model, "settings": settings, "bank": row.bank, "images": shown}
            answers.append(answer)
        return answers
