"""What the page's buttons call: jobs in the line, shown as HTML while they run.

Every handler yields values for fixed outputs, and ends with a status line whatever happens. Bad
input and errors become messages on the page; what a visitor cannot mend goes to the server's log.
"""

from __future__ import annotations

import threading
from base64 import b64encode
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from functools import wraps
from typing import Any

import gradio as gr

from apps.demo_parts import drawing, looking, show
from apps.demo_parts.drawing import Row
from apps.demo_parts.gallery import tiles, zip_of
from apps.demo_parts.models import LOG, Models
from apps.demo_parts.turns import Turns, Visitor, Waiting, in_turn

PICK = "show what the memory did"
SKIP = gr.skip()


def visitor_of(request: gr.Request) -> Visitor:
    """Who asks: the tab or client, at its user name or network address."""
    client = getattr(request, "client", None)
    address = request.username or (client.host if client else "somewhere")
    return Visitor(request.session_hash or "nobody", address)


def words(error: Exception) -> str:
    """An error for the visitor: bad input in its own words, anything else without details."""
    if isinstance(error, ValueError):
        return str(error)
    LOG.error("a job failed", exc_info=error)
    if "out of memory" in str(error).lower():
        return "the server ran out of memory: ask for fewer pictures"
    return "something went wrong on the server; its log says what"


def streamed(method: Callable[..., AsyncGenerator[Any]]) -> Callable[..., AsyncGenerator[Any]]:
    """An async generator function of what `method` returns, closed as soon as its reader leaves."""

    @wraps(method)
    async def run(*args: Any, **kwargs: Any) -> AsyncGenerator[Any]:
        async with aclosing(method(*args, **kwargs)) as updates:
            async for update in updates:
                yield update

    return run


class Handlers:
    """The buttons of one demo.

    Args:
        models: what can be drawn with.
        turns: the line that jobs wait in.
    """

    def __init__(self, models: Models, turns: Turns) -> None:
        self.models, self.turns = models, turns

    async def run(
        self, request: gr.Request, job: Callable[[threading.Event], Iterator[Any]]
    ) -> AsyncGenerator[Any]:
        """A job's items that are there to show, and Waiting while others come first."""
        async with aclosing(in_turn(self.turns, visitor_of(request), job)) as items:
            async for item in items:
                if item is not None:
                    yield item

    async def _draw(
        self, plan: Callable[[], list[Row]], request: gr.Request, pick: str = PICK
    ) -> AsyncGenerator[tuple[Any, Any, Any]]:
        """Draw the rows of a plan: (status, gallery, rows), until one frame has ended."""
        try:
            rows = plan()
            yield show.busy("Starting"), SKIP, SKIP
            ended = False
            job = self.run(request, lambda stop: drawing.draw(rows, self.models, stop))
            async with aclosing(job) as items:
                async for item in items:
                    if isinstance(item, Waiting):
                        yield show.waiting(item.ahead), SKIP, SKIP
                        continue
                    ended = bool(item.ended)
                    state = item.rows if ended else SKIP
                    yield show.progress(item), tiles(item, self.models, pick), state
            if not ended:
                yield show.note("Stopped before it began."), SKIP, SKIP
        except Exception as error:
            yield show.failed(words(error)), SKIP, SKIP

    async def _one(
        self,
        request: gr.Request,
        prepare: Callable[[], Callable[[threading.Event], Iterator[Any]]],
        render: Callable[[Any], Any],
        doing: str,
    ) -> AsyncGenerator[tuple[Any, Any]]:
        """(status, result) of a job that has one result."""
        try:
            job = prepare()
            yield show.busy(doing, brief=True), SKIP
            async with aclosing(self.run(request, job)) as items:
                async for item in items:
                    if isinstance(item, Waiting):
                        yield show.waiting(item.ahead), SKIP
                    else:
                        yield "", render(item)
                        return
            yield show.note("Stopped."), SKIP
        except Exception as error:
            yield show.failed(words(error)), SKIP

    @streamed
    def generate(
        self, model: str, klass: Any, num: Any, seed: Any, cfg_scale: Any, temperature: Any,
        top_k: Any, top_p: Any, cfg_schedule: Any, request: gr.Request,
    ) -> AsyncGenerator[tuple[Any, Any, Any]]:  # fmt: skip
        """Pictures of one class."""
        return self._form(
            "" if klass is None else klass, model, num, seed, request, cfg_scale=cfg_scale,
            temperature=temperature, top_k=top_k, top_p=top_p, cfg_schedule=cfg_schedule,
        )  # fmt: skip

    @streamed
    def surprise(
        self, model: str, klass: Any, num: Any, seed: Any, cfg_scale: Any, temperature: Any,
        top_k: Any, top_p: Any, cfg_schedule: Any, request: gr.Request,
    ) -> AsyncGenerator[tuple[Any, Any, Any]]:  # fmt: skip
        """Pictures of random classes."""
        return self._form(
            None, model, num, seed, request, cfg_scale=cfg_scale,
            temperature=temperature, top_k=top_k, top_p=top_p, cfg_schedule=cfg_schedule,
        )  # fmt: skip

    def _form(
        self, wanted: Any, model: str, num: Any, seed: Any, request: gr.Request, **given: Any
    ) -> AsyncGenerator[tuple[Any, Any, Any]]:
        def plan() -> list[Row]:
            if wanted == "":
                raise ValueError("choose a class first, or let it surprise you")
            return [drawing.row_of(self.models.describe(model), wanted, num, seed, **given)]

        return self._draw(plan, request)

    @streamed
    def again(self, rows: list[Row], request: gr.Request) -> AsyncGenerator[tuple[Any, Any, Any]]:
        """What was drawn last, with another seed."""
        return self._draw(lambda: drawing.another_seed(_some(rows)), request)

    @streamed
    def vary(self, rows: list[Row], request: gr.Request) -> AsyncGenerator[tuple[Any, Any, Any]]:
        """The same seeds at several values of guidance."""
        return self._draw(lambda: drawing.vary_guidance(_some(rows)[0]), request)

    @streamed
    def compare(
        self, rows: list[Row], other: str, request: gr.Request
    ) -> AsyncGenerator[tuple[Any, Any, Any]]:
        """The same classes and seeds by another model."""

        def plan() -> list[Row]:
            return drawing.beside(_some(rows)[0], self.models.describe(other), self.models)

        return self._draw(plan, request)

    @streamed
    async def bank(
        self, off: bool, rows: list[Row], index: int, request: gr.Request
    ) -> AsyncGenerator[tuple[Any, Any]]:
        """(status, gallery): pictures with and without the bank; nothing where it stays on."""
        if not off:
            yield "", ""
            return

        def plan() -> list[Row]:
            row = drawing.pictures_from(_some(rows), index, drawing.MAX_STRIP)
            return drawing.with_and_without_bank(row, self.models.describe(row.model))

        async with aclosing(self._draw(plan, request, pick="")) as updates:
            async for status, gallery, _ in updates:
                yield status, gallery

    @streamed
    def look(
        self, rows: list[Row], index: int, kind: str, request: gr.Request
    ) -> AsyncGenerator[tuple[Any, Any]]:
        """(status, maps): where each layer leans on the bank in the picture at `index`."""
        chosen: list[Row] = []

        def prepare() -> Any:
            row = drawing.pictures_from(_some(rows), index)
            if row.codes is None:
                raise ValueError("this picture is not finished: choose another one")
            chosen.append(row)
            return lambda stop: looking.bank_of(row, self.models)

        def render(found: Any) -> str:
            picture, layers = found
            about = self.models.describe(chosen[0].model)
            return show.bank_maps(picture, layers, chosen[0], about, kind)

        return self._one(request, prepare, render, "Reading the picture")

    @streamed
    def reconstruct(
        self, model: str, data: str, request: gr.Request
    ) -> AsyncGenerator[tuple[Any, Any]]:
        """(status, pictures): an uploaded image through the tokenizer and back."""

        def prepare() -> Any:
            image = looking.read_upload(data)
            return lambda stop: looking.reconstruct(image, model, self.models)

        return self._one(request, prepare, show.reconstruction, "Encoding")

    @streamed
    def zip(self, rows: list[Row], request: gr.Request) -> AsyncGenerator[tuple[Any, Any]]:
        """(status, zip as base64) of all finished pictures."""

        def prepare() -> Any:
            done = [row for row in _some(rows) if row.codes is not None]
            if not done:
                raise ValueError("no picture is finished yet")

            def job(stop: threading.Event) -> Iterator[bytes]:
                yield zip_of(done, drawing.redraw(done, self.models), self.models)

            return job

        return self._one(request, prepare, lambda data: b64encode(data).decode(), "Packing")

    def stop(self, request: gr.Request) -> None:
        """End the visitor's jobs after their next code."""
        self.turns.stop(visitor_of(request).session)


def _some(rows: list[Row] | None) -> list[Row]:
    if not rows:
        raise ValueError("draw some pictures first")
    return rows
