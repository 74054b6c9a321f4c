"""The named endpoints: the page's jobs with plain values in and out, for scripts."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import gradio as gr
import numpy as np

from moveimg.demo import analysis, html, jobs
from moveimg.demo.handlers import Handlers, explain, once
from moveimg.demo.jobs import Row
from moveimg.demo.queue import Job, Waiting
from moveimg.demo.requests import ENDPOINTS, Search, parse_call
from moveimg.pipeline import search_names

MAX_CLASSES = 1000  # in one answer of /classes


class Api:
    """The endpoints of one demo; call_NAME answers a request to /NAME."""

    def __init__(self, handlers: Handlers) -> None:
        self.handlers, self.models = handlers, handlers.models

    def endpoint(self, name: str) -> Callable[..., Any]:
        """Return the function of a named endpoint, with a parameter per field of its request."""
        kind = ENDPOINTS[name]

        async def call(*values: Any) -> Any:
            try:
                request = parse_call(name, {"data": values})
                return await getattr(self, f"call_{name}")(request)
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
        call.__doc__ = kind.__doc__
        return call

    async def call_generate(self, request: Any) -> dict[str, Any]:
        return (await self._draw(lambda: [jobs.make_row(self.models, request)]))[0]

    async def call_vary_guidance(self, request: Any) -> dict[str, Any]:
        row = jobs.make_row(self.models, request)
        return {"rows": await self._draw(lambda: jobs.vary_guidance(row, request.scales))}

    async def call_edit(self, request: Any) -> dict[str, Any]:
        return (await self._draw(lambda: [jobs.make_edit(self.models, request)]))[0]

    async def call_score(self, request: Any) -> dict[str, Any]:
        info = self.models.describe(request.model)
        data = request.image
        found = await self._last(lambda stop: analysis.score(data, info.name, self.models, stop))
        best = [
            {"index": i, "name": info.class_names[i], "probability": share, "nats_per_code": nats}
            for i, share, nats in found.best()
        ]
        label = best[0]["index"]
        bits = found.likelihood.bits_per_pixel[label].item()
        nats = found.nats(label).round(4).tolist()
        return {"classes": best, "bits_per_pixel": bits, "nats": nats}

    async def call_reconstruct(self, request: Any) -> dict[str, Any]:
        r = await self._last(once(analysis.reconstruct, request.image, request.model, self.models))
        psnr = None if np.isinf(r.psnr) else r.psnr
        image = html.image_uri(r.after, {})
        return {"mse": r.mse, "psnr": psnr, "codes": r.codes.tolist(), "image": image}

    async def call_classes(self, request: Search) -> list[dict[str, Any]]:
        names, part = self.models.describe(request.model).class_names, request.search.strip()
        labels = await asyncio.to_thread(search_names, names, part)
        if part.isdecimal() and int(part) < len(names):
            labels = sorted({*labels, int(part)})
        return [{"index": label, "name": names[label]} for label in labels[:MAX_CLASSES]]

    async def call_models(self, request: Any) -> list[dict[str, Any]]:
        return [
            {
                "name": info.name, "classes": len(info.class_names), "bank": info.has_bank,
                "grid": list(info.config.grid), "settings": info.sampling.model_dump(),
            }
            for info in self.models.infos.values()
        ]  # fmt: skip

    async def _draw(self, plan: Callable[[], list[Row]]) -> list[dict[str, Any]]:
        rows = await asyncio.to_thread(plan)
        frame = await self._last(lambda stop: jobs.draw(rows, self.models, stop))
        return [self._answer(*pair) for pair in zip(frame.rows, frame.images, strict=True)]

    async def _last(self, job: Job[Any]) -> Any:
        """Return the last item of a job. Raises ValueError if it was stopped."""
        result = None
        async with aclosing(self.handlers.run(job)) as items:
            async for item in items:
                result = item
        if (
            result is None
            or isinstance(result, Waiting | tuple)
            or getattr(result, "ended", "") == "stopped"
        ):
            raise ValueError("stopped")
        return result

    def _answer(self, row: Row, images: list[Any]) -> dict[str, Any]:
        names, answers = self.models.describe(row.model).class_names, []
        for i, image in enumerate(images):
            meta = html.metadata(row, i, names)
            keys = {key: meta[key] for key in ("class", "class_name", "seed")}
            answers.append(keys | {"png": html.image_uri(image, meta)})
        settings = row.settings.model_dump()
        return {"model": row.model, "settings": settings, "bank": row.bank, "images": answers}
