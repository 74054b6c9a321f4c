"""Jobs as the page's buttons.

Every button's handler is an async generator that ends with a status line, whatever happens. Errors
that a visitor can mend are one sentence; others go to the server's log.
"""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from typing import Any

import gradio as gr
from gradio.context import LocalContext

from moveimg.demo import analysis, html, jobs
from moveimg.demo.jobs import Frame, Row
from moveimg.demo.models import LOG, Models
from moveimg.demo.queue import Job, JobQueue, Visitor, Waiting, run_in_turn
from moveimg.demo.requests import SETTINGS, Edit, Generate, parse_call
from moveimg.device import release_memory
from moveimg.errors import describe, validate

SKIP: Any = gr.skip()
UNREAD_SECONDS = 30.0  # from a message to its listener


def current_visitor() -> Visitor:
    """Return who sent the event that is handled: a tab or client at its user name or address."""
    request: Any = LocalContext.request.get()
    address = request.username or (request.client.host if request.client else "unknown")
    return Visitor(request.session_hash or "unknown", address)


def listener_check() -> Callable[[], bool]:
    """Return a function that says whether the listener of the current event has gone.

    So has one that reads no message for UNREAD_SECONDS: of an API client that never asks for the
    result of its call, say.
    """
    queue: Any = LocalContext.blocks.get()._queue  # type: ignore[union-attr]
    event = queue.event_ids_to_events.get(LocalContext.event_id.get(None))
    read = time.monotonic()

    def is_gone() -> bool:
        nonlocal read
        if event is None:
            return False
        unread = queue.pending_messages_per_session.get(event.session_hash)
        if unread is None or unread.empty():
            read = time.monotonic()
        return not event.alive or time.monotonic() - read > UNREAD_SECONDS

    return is_gone


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
    """The buttons of one demo."""

    def __init__(self, models: Models, queue: JobQueue) -> None:
        self.models, self.queue = models, queue

    def run(self, job: Job[Any]) -> AsyncGenerator[Any]:
        """Run a job in the current visitor's turn."""

        def run_and_release(stop: threading.Event) -> Iterator[Any]:
            yield from job(stop)
            release_memory()

        return run_in_turn(self.queue, current_visitor(), run_and_release, listener_check())

    def stop(self) -> None:
        """End the visitor's jobs after their next code."""
        self.queue.stop(current_visitor())

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
        """Return the handler of a button that shows the result of one job: (status, result).

        Pairs that the job yields before are its progress: classes done, and all.
        """

        async def update(*values: Any) -> AsyncGenerator[tuple[Any, Any]]:
            try:
                yield html.status(f"{doing} …", "brief"), SKIP
                job = await asyncio.to_thread(prepare, *values)
                async with aclosing(self.run(job)) as items:
                    async for item in items:
                        if isinstance(item, Waiting):
                            yield html.waiting(item.ahead), SKIP
                        elif isinstance(item, tuple):
                            done, total = item
                            yield html.busy(done, total, "classes"), SKIP
                        else:
                            yield "", item
                            return
                yield html.status("Stopped."), SKIP
            except Exception as error:
                yield html.status(explain(error), "failed"), SKIP

        return update

    def plan_class(self, model: str, klass: Any, num: Any, seed: Any, *values: Any) -> list[Row]:
        """Plan images of the class in the form; `values` are the sampling settings."""
        if klass in (None, ""):
            raise ValueError("choose a class first, or press Surprise me")
        request = {"model": model, "class_name": klass, "num": num, "seed": seed}
        request |= dict(zip(SETTINGS, values, strict=True))
        return [jobs.make_row(self.models, validate(Generate, request, "settings"))]

    def plan_edit(
        self, model: str, klass: Any, num: Any, seed: Any, passes: Any, image: str, hole: str
    ) -> list[Row]:
        """Plan versions of the image on the page, with the part that is painted over drawn anew."""
        if not image:
            raise ValueError("there is no image: choose a file, or one that was drawn")
        if klass in (None, ""):
            raise ValueError("choose a class first")
        request = {"model": model, "class_name": klass, "num": num, "seed": seed}
        request |= {"passes": passes, "image": image, "hole": hole}
        return [jobs.make_edit(self.models, validate(Edit, request, "settings"))]

    def plan_random_classes(self, model: str, _klass: Any, *values: Any) -> list[Row]:
        return self.plan_class(model, " ", *values)

    def plan_new_seed(self, rows: Any) -> list[Row]:
        return jobs.change_seed(jobs.read_rows(rows, self.models))

    def plan_guidance(self, rows: Any) -> list[Row]:
        return jobs.vary_guidance(jobs.read_rows(rows, self.models)[0])

    def plan_comparison(self, rows: Any, other: str) -> list[Row]:
        row = jobs.read_rows(rows, self.models)[0]
        return jobs.compare_models(row, self.models.describe(other), self.models)

    def plan_bank_pair(self, rows: Any, index: int) -> list[Row]:
        row = jobs.select_image(jobs.read_rows(rows, self.models), index, jobs.MAX_STRIP)
        return jobs.with_and_without_bank(row, self.models)

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

    def score(self, model: str, data: str) -> Job[Any]:
        """Prepare the likelihoods of an uploaded image."""
        request: Any = parse_call("score", {"model": model, "image": data})

        def job(stop: threading.Event) -> Iterator[Any]:
            for item in analysis.score(request.image, model, self.models, stop):
                if isinstance(item, analysis.Score):
                    yield html.scores(item, self.models.describe(model))
                else:
                    yield item

        return job

    def pack(self, rows: Any) -> Job[str]:
        """Prepare a zip file, as base64, of the finished rows on the page."""
        done = self._finished(rows)

        def compute() -> str:
            images = jobs.decode_rows(done, self.models)
            return base64.b64encode(html.zip_images(done, images, self.models)).decode()

        return once(compute)

    def restore(self, rows: Any, pick: str) -> Job[str]:
        """Prepare the gallery of the finished rows that a browser has kept."""
        done = self._finished(rows)

        def compute() -> str:
            frame = Frame(done, jobs.decode_rows(done, self.models), 0, 0, 0.0, "done")
            return html.gallery(frame, self.models, pick)

        return once(compute)

    def _finished(self, rows: Any) -> list[Row]:
        done = [row for row in jobs.read_rows(rows, self.models) if row.codes is not None]
        if not done:
            raise ValueError("no image is finished yet")
        return done
