"""Jobs as the page's buttons and as named endpoints.

Every button's handler is an async generator that ends with a status line, whatever happens. Errors
that a visitor can mend are one sentence; others go to the server's log.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from typing import Any

import gradio as gr
import numpy as np
from gradio.context import LocalContext

from apps.demo_parts import analysis, html, jobs
from apps.demo_parts.jobs import Frame, Row
from apps.demo_parts.models import LOG, Models
from apps.demo_parts.queue import Job, JobQueue, Visitor, Waiting, run_in_turn
from apps.demo_parts.requests import ENDPOINTS, Search, parse_call
from moveimg.errors import describe
from moveimg.pipeline import search_names

SKIP: Any = gr.skip()
MAX_CLASSES = 1000  # in one answer of /classes


def current_visitor() -> Visitor:
    """Return who sent the event that is handled: a tab or client at its user name or address."""
    request: Any = LocalContext.request.get()
    address = request.username or (request.client.host if request.client else "unknown")
    return Visitor(request.session_hash or "unknown", address)


def listener_check() -> Callable[[], bool]:
    """Return a function that says whether the listener of the current event has gone."""
    blocks: Any = LocalContext.blocks.get()
    event = blocks._queue.event_ids_to_events.get(LocalContext.event_id.get(None))
    return lambda: event is not None and not event.alive


def explain(error: Exception) -> str:
    """Return an error for the visitor: bad input in its own words, others without details."""
    if isinstance(error, ValueError):
        return describe(error)
    LOG.error("a job failed", exc_info=error)
    if "out of memory" in str(error).lower():
        return "the server ran out of memory: ask for fewer images"
    return "something went wrong on the server; its log says what"


def once(compute: Callable[..., Any], *values: Any) -> Job[Any]:
    """Return a job of one step."""

    def job(stop: threading.Event) -> Iterator[Any]:
        yield compute(*values)

    return job


class Handlers:
    """The buttons and endpoints of one demo."""

    def __init__(self, models: Models, queue: JobQueue) -> None:
        self.models, self.queue = models, queue

    def run(self, job: Job[Any]) -> AsyncGenerator[Any]:
        """Run a job in the current visitor's turn."""
        return run_in_turn(self.queue, current_visitor(), job, listener_check())

    def stop(self) -> None:
        """End the visitor's jobs after their next code."""
        self.queue.stop(current_visitor())

    # --- the page ----------------------------------------------------------------------------

    def drawing(self, plan: Callable[..., list[Row]], pick: str = "") -> Callable[..., Any]:
        """Return the handler of a button that draws the rows of `plan(*values)`.

        It yields (status, gallery, rows as plain data).
        """

        async def update(*values: Any) -> AsyncGenerator[tuple[Any, Any, Any]]:
            try:
                yield html.status("Starting …", "busy"), SKIP, SKIP
                rows = await asyncio.to_thread(plan, *values)
                frame = None
                async with aclosing(self.run(lambda stop: jobs.draw(rows, self.models, stop))) as f:
                    async for frame in f:
                        if isinstance(frame, Waiting):
                            yield html.waiting(frame.ahead), SKIP, SKIP
                            continue
                        shown = await asyncio.to_thread(html.gallery, frame, self.models, pick)
                        kept = [row.model_dump(mode="json") for row in frame.rows]
                        yield html.progress(frame), shown, kept if frame.ended else SKIP
                if not isinstance(frame, Frame):
                    yield html.status("Stopped before it began."), SKIP, SKIP
            except Exception as error:
                yield html.status(explain(error), "failed"), SKIP, SKIP

        return update

    def computing(self, prepare: Callable[..., Job[Any]], doing: str) -> Callable[..., Any]:
        """Return the handler of a button that shows the result of one job: (status, result)."""

        async def update(*values: Any) -> AsyncGenerator[tuple[Any, Any]]:
            try:
                yield html.status(f"{doing} …", "brief"), SKIP
                job = await asyncio.to_thread(prepare, *values)
                async with aclosing(self.run(job)) as items:
                    async for item in items:
                        if not isinstance(item, Waiting):
                            yield "", item
                            return
                        yield html.waiting(item.ahead), SKIP
                yield html.status("Stopped."), SKIP
            except Exception as error:
                yield html.status(explain(error), "failed"), SKIP

        return update

    def look(self, rows: Any, index: int, kind: str) -> Job[str]:
        """Prepare the maps of image `index` of the rows on the page."""
        row = jobs.select_image(jobs.read_rows(rows, self.models), int(index))
        if row.codes is None:
            raise ValueError("this image is not finished: choose another one")

        def compute() -> str:
            maps = analysis.map_bank(row, self.models)
            return html.bank_maps(*maps, row, self.models.describe(row.model), kind)

        return once(compute)

    def reconstruct(self, model: str, data: str) -> Job[str]:
        """Prepare the reconstruction of an uploaded image."""
        request: Any = parse_call("reconstruct", {"model": model, "image": data})

        def compute() -> str:
            result = analysis.reconstruct(request.image, model, self.models)
            return html.reconstruction(result, self.models.describe(model))

        return once(compute)

    def pack(self, rows: Any) -> Job[str]:
        """Prepare a zip file, as base64, of the finished rows on the page."""
        done = [row for row in jobs.read_rows(rows, self.models) if row.codes is not None]
        if not done:
            raise ValueError("no image is finished yet")

        def compute() -> str:
            images = jobs.decode_rows(done, self.models)
            return base64.b64encode(html.zip_images(done, images, self.models)).decode()

        return once(compute)

    def restore(self, rows: Any, pick: str) -> Job[str]:
        """Prepare the gallery of the finished rows that a browser has kept."""
        done = [row for row in jobs.read_rows(rows, self.models) if row.codes is not None]

        def compute() -> str:
            frame = Frame(done, jobs.decode_rows(done, self.models), 0, 0, 0.0, "done")
            return html.gallery(frame, self.models, pick)

        return once(compute)

    # --- the endpoints -----------------------------------------------------------------------

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

    async def call_compare(self, request: Any) -> dict[str, Any]:
        names = request.models or (self.models.names * 2)[:2]
        row = jobs.make_row(self.models, request.model_copy(update={"model": names[0]}))
        other = self.models.describe(names[1])
        return {"rows": await self._draw(lambda: jobs.compare_models(row, other, self.models))}

    async def call_memory(self, request: Any) -> dict[str, Any]:
        info = self.models.describe(request.model)
        if not info.has_bank:
            raise ValueError(f"{info.name} has no value memory, so there is nothing to map")
        row = await asyncio.to_thread(jobs.make_row, self.models, request)

        def job(stop: threading.Event) -> Iterator[Any]:
            for frame in jobs.draw([row], self.models, stop):
                is_done = frame is not None and frame.ended == "done"
                yield analysis.map_bank(frame.rows[0], self.models) if is_done else None

        image, layers = await self._last(job)
        maps = [m | {"share": _grid(m["share"]), "gates": _grid(m["gates"])} for m in layers]
        return {"image": self._answer(row, [image])["images"][0], "layers": maps}

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
        async with aclosing(self.run(job)) as items:
            async for item in items:
                result = item
        if (
            result is None
            or isinstance(result, Waiting)
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


def _grid(values: np.ndarray) -> list[list[float | None]]:
    return [[None if np.isnan(v) else round(float(v), 4) for v in line] for line in values]
