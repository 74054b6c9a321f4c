"""The service of `moveimg serve`: images of classes over HTTP, on Ray Serve.

Front, in Ray's proxy of each machine, sends requests to the replicas of Generator, each with the
model. A replica draws the requests that arrive within a window as one batch.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from base64 import b64encode
from collections import defaultdict, deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.request import urlopen

import ray
from pydantic import Field
from ray import serve
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from moveimg.config import SamplingSettings
from moveimg.errors import describe, shorten, validate
from moveimg.files import parse_json

APP = "moveimg"
IMAGES = "/v1/images/generations"
MAX_BODY = 64 * 1024  # bytes


class ImageRequest(SamplingSettings):
    """The body of a request for images; settings left out are the model's own."""

    model: str | None = None
    class_: str | int | None = Field(None, alias="class")
    prompt: str | int | None = None
    n: int = Field(1, ge=1)
    seed: int | None = Field(None, ge=0, lt=2**32 - 2**16)  # room for the last image's seed
    size: str | None = None
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png"] = "png"
    stream: bool = False
    partial_images: int = Field(2, ge=0, le=16)
    user: str | None = None  # of OpenAI's API; not used


@dataclass(eq=False)
class Order:
    """The images that a request asks for; image i has seed + i."""

    label: int
    seed: int
    n: int
    settings: SamplingSettings
    partials: list[int]  # numbers of codes after which partial images are sent
    events: asyncio.Queue[dict[str, Any] | None] = field(default_factory=asyncio.Queue)
    done: bool = False  # nobody listens any more


@serve.deployment
class Generator:
    """A replica: one model, which draws one batch at a time (see `moveimg serve`)."""

    def __init__(
        self, model: str, name: str, batch_size: int, window: float, threads: int, device: str,
        dtype: str | None,
    ) -> None:  # fmt: skip
        import torch

        from moveimg.device import limit_arenas
        from moveimg.pipeline import Pipeline

        limit_arenas()
        torch.set_num_threads(threads)
        self.pipeline = Pipeline.from_pretrained(model, device=device, dtype=dtype)
        _ = self.pipeline.decoder  # prepared before the first request
        self.size = "{1}x{0}".format(*self.pipeline.image_size)
        self.name, self.batch_size, self.window = name, batch_size, window
        self.waiting, self.lock = deque[Order](), asyncio.Lock()

    async def __call__(self, request: Request) -> Response:
        """Return images as OpenAI's API does, or its events for `stream`."""
        try:
            asked = validate(ImageRequest, parse_json(await request.body(), "request"), "request")
            events = self.draw(self.make_order(asked))
        except ValueError as error:
            return refuse(400, describe(error))
        if asked.stream:
            lines = (f"event: {e['type']}\ndata: {json.dumps(e)}\n\n" async for e in events)
            return StreamingResponse(lines, media_type="text/event-stream")
        images = [event async for event in events]
        if images[-1]["type"] == "error":
            return refuse(500, images[-1]["error"]["message"])
        return JSONResponse({"created": int(time.time()), "data": images})

    def make_order(self, asked: ImageRequest) -> Order:
        """Return the order of a request, else raise ValueError."""
        names = [name for name in (asked.class_, asked.prompt) if name is not None]
        if len(names) != 1:
            raise ValueError("expected a class, either as `class` or as `prompt`")
        for key, own in (("model", self.name), ("size", self.size)):
            if (value := getattr(asked, key)) not in (None, "auto", own):
                raise ValueError(f"{key} {shorten(value)}: expected {own}")
        if asked.n > self.batch_size:
            raise ValueError(f"n {asked.n}: expected at most {self.batch_size}")
        changes = asked.model_fields_set & SamplingSettings.model_fields.keys()
        settings = self.pipeline.sampling.model_copy(update=asked.model_dump(include=changes))
        seed = secrets.randbelow(2**31) if asked.seed is None else asked.seed
        (height, width), parts = self.pipeline.generator.config.grid, asked.partial_images + 1
        partials = [height * part // parts * width for part in range(1, parts) if asked.stream]
        return Order(self.pipeline.label(names[0]), seed, asked.n, settings, partials)

    async def draw(self, order: Order) -> AsyncIterator[dict[str, Any]]:
        """Yield an order's images, drawn with other orders', as OpenAI's streaming events."""
        self.waiting.append(order)
        self.last = asyncio.create_task(self.draw_batch())
        try:
            while event := await order.events.get():
                yield event
        finally:
            order.done = True

    async def draw_batch(self) -> None:
        """Draw the orders that wait, in groups whose settings differ in cfg_scale alone."""
        async with self.lock:
            if not self.waiting:  # an earlier batch had room for them
                return
            await asyncio.sleep(self.window)
            self.waiting = deque(order for order in self.waiting if not order.done)
            groups, size = defaultdict(list), 0
            while self.waiting and size + self.waiting[0].n <= self.batch_size:
                order = self.waiting.popleft()
                size += order.n
                groups[order.settings.model_copy(update={"cfg_scale": 1.0})].append(order)
            for group in groups.values():
                try:  # in a thread: health checks need the event loop
                    await asyncio.to_thread(self.draw_group, group, asyncio.get_running_loop())
                except Exception as error:
                    failure = {"message": describe(error), "type": "server_error"}
                    for order in group:
                        order.events.put_nowait({"type": "error", "error": failure})
                for order in group:
                    order.events.put_nowait(None)

    def draw_group(self, orders: list[Order], loop: asyncio.AbstractEventLoop) -> None:
        """Draw orders whose settings differ in cfg_scale alone."""
        import torch

        from moveimg.device import release_memory
        from moveimg.images import png_bytes
        from moveimg.sampling import image_rngs, iter_codes

        pipeline, rows = self.pipeline, [(order, i) for order in orders for i in range(order.n)]
        labels = torch.tensor([order.label for order, _ in rows], device=pipeline.device)
        rngs = image_rngs([order.seed + i for order, i in rows])
        scales = torch.tensor([o.settings.cfg_scale for o, _ in rows], dtype=torch.float64)
        codes = labels.new_zeros(len(rows), pipeline.generator.config.seq_len)
        drawn = iter_codes(pipeline.decoder, labels, orders[0].settings, rngs, cfg_scale=scales)
        for position, new in enumerate(drawn, 1):
            codes[:, position - 1] = new
            if all(order.done for order in orders):
                return
            complete = position == codes.shape[1]
            for row, (order, i) in enumerate(rows):
                if order.done or not (complete or position in order.partials):
                    continue
                # one by one: pixels must not depend on the batch
                image = pipeline.decode_partial(codes[row : row + 1], position)[0]
                about = {"class": order.label, "seed": order.seed + i}
                png = png_bytes(image, about | order.settings.model_dump())
                event: dict[str, Any] = {"type": "image_generation.completed"}
                if not complete:
                    index = order.partials.index(position)
                    event = {"type": "image_generation.partial_image", "partial_image_index": index}
                event |= {"b64_json": b64encode(png).decode(), "output_format": "png", "index": i}
                event |= about | {"size": self.size}
                loop.call_soon_threadsafe(order.events.put_nowait, event)
        release_memory()


class Front:
    """ASGI middleware of Ray's proxy: routes, and errors as OpenAI's JSON."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        pages, path = {"/health": health, "/metrics": metrics}, scope["path"]
        if path in pages:
            try:
                answer = await asyncio.to_thread(pages[path])
            except Exception as error:  # the service starts or ends
                answer = refuse(503, f"not ready ({describe(error)})")
        elif path != IMAGES:
            answer = refuse(404, f"{shorten(path)}: expected {IMAGES}, {' or '.join(pages)}")
        elif int(Headers(scope=scope).get("content-length", MAX_BODY + 1)) > MAX_BODY:
            answer = refuse(413, f"request: expected a content-length of at most {MAX_BODY}")
        else:
            messages: list[Any] = []

            async def forward(message: Any) -> None:
                messages.append(message)
                if messages[0]["status"] != 503:  # the proxy's own, as plain text: a full queue
                    await send(message)

            await self.app(scope, receive, forward)
            if messages and messages[0]["status"] != 503:
                return
            died = "the request's replica died: send the request again"
            answer = refuse(503, messages[-1]["body"].decode() if messages else died)
        await answer(scope, receive, send)


def proxy_middlewares() -> list[Middleware]:
    """Return the middlewares of Ray's proxy (RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH)."""
    return [Middleware(Front)]


def health() -> Response:
    """Return 200 while a replica can draw, else 503, with the number of replicas by state."""
    replicas = serve.status().applications[APP].deployments["Generator"].replica_states
    return JSONResponse({"replicas": replicas}, 200 if replicas.get("RUNNING") else 503)


def metrics() -> Response:
    """Return the metrics of Ray on this machine in Prometheus' text format."""
    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    return Response(urlopen(url, timeout=10).read(), media_type="text/plain; version=0.0.4")


def refuse(status: int, message: str) -> Response:
    """Return an error in the shape of OpenAI's API."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    headers = {"Retry-After": "5"} if status == 503 else None
    return JSONResponse({"error": {"message": message, "type": kind}}, status, headers)
