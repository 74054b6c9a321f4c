"""The HTTP service of `moveimg serve`, which draws images of classes on Ray Serve.

    Front, in Ray's proxy of each machine -> Generator replicas, each with the model

A replica draws the requests that arrive within a window as one batch. An image depends on its seed
alone: if a replica dies, Front sends the request to another replica, which draws the same image.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from base64 import b64encode
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal
from urllib.request import urlopen

import ray
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import from_json
from ray import serve
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from moveimg.config import SamplingSettings
from moveimg.errors import describe, shorten, validate

APP = "moveimg"
IMAGES = "/v1/images/generations"
MAX_BODY = 64 * 1024  # bytes
ATTEMPTS = 3  # replicas tried per request: the next one if a replica dies


class ImageRequest(BaseModel):
    """The body of a request for images; extra keys are fields of SamplingSettings."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None
    prompt: str | int | None = None
    class_: str | int | None = Field(None, alias="class")
    n: int = Field(1, ge=1)
    seed: int | None = Field(None, ge=0, lt=2**32 - 2**16)  # leaves room for seed + n
    size: str = "auto"
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png"] = "png"
    stream: bool = False
    partial_images: int = Field(2, ge=0, le=16)
    user: str | None = None  # a field of OpenAI's API; not used


@dataclass(eq=False)
class Order:
    """The images that a request asks for; image i has seed + i."""

    label: int
    seed: int
    n: int
    settings: SamplingSettings
    partials: list[int]  # numbers of codes after which partial images are sent
    done: bool = False  # all images are sent, or the client has disconnected


@serve.deployment
class Generator:
    """A replica of the service: a model, and a thread that draws batches with it."""

    def __init__(
        self, model: str, name: str, device: str, dtype: str | None, threads: int,
        batch_size: int, window: float,
    ) -> None:  # fmt: skip
        import torch

        from moveimg.device import limit_arenas
        from moveimg.pipeline import Pipeline

        limit_arenas()
        torch.set_num_threads(threads)
        self.pipeline, self.name = Pipeline.from_pretrained(model, device=device, dtype=dtype), name
        _ = self.pipeline.prepared_generator  # prepares the weights before the first request
        self.size = "{1}x{0}".format(*self.pipeline.image_size)
        self.batch_size, self.thread = batch_size, ThreadPoolExecutor(1)
        self.idle = asyncio.Event()
        self.idle.set()
        self.draw_batch.set_max_batch_size(batch_size)
        self.draw_batch.set_batch_wait_timeout_s(window)

    async def __call__(self, request: Request) -> Response:
        """Return images in the format of OpenAI's API, as events if `stream` is set."""
        try:
            asked = validate(ImageRequest, from_json(await request.body()), "request")
            order = self.make_order(asked, int(request.headers["x-default-seed"]))
        except (LookupError, ValueError) as error:
            return refuse(404 if isinstance(error, LookupError) else 400, describe(error))
        events = self.draw(order)
        if asked.stream:
            lines = (f"event: {e['type']}\ndata: {json.dumps(e)}\n\n" async for e in events)
            return StreamingResponse(lines, media_type="text/event-stream")
        images = [event async for event in events]
        if images[-1]["type"] == "error":
            return refuse(500, images[-1]["error"]["message"])
        return JSONResponse({"created": int(time.time()), "data": images})

    def make_order(self, asked: ImageRequest, default_seed: int) -> Order:
        """Return the order for a request. Raises LookupError for another model, or ValueError."""
        name = asked.class_ if asked.prompt is None else asked.prompt
        if asked.model not in (None, self.name):
            raise LookupError(f"model {shorten(asked.model)}: expected {self.name}")
        if asked.size not in ("auto", self.size):
            raise ValueError(f"size {shorten(asked.size)}: expected {self.size}, the model's own")
        if name is None or None not in (asked.prompt, asked.class_):
            raise ValueError(f"class {shorten(name)}: expected either `class` or `prompt`")
        if asked.n > self.batch_size:
            raise ValueError(f"n {shorten(asked.n)}: expected at most {self.batch_size}")
        changes = {k: v for k, v in (asked.model_extra or {}).items() if v is not None}
        own = self.pipeline.sampling.model_dump()
        settings = validate(SamplingSettings, own | changes, "request")
        seed = default_seed if asked.seed is None else asked.seed
        (height, width), parts = self.pipeline.generator.config.grid, asked.partial_images + 1
        rows = {height * part // parts for part in range(1, parts)} if asked.stream else set()
        partials = [row * width for row in sorted(rows - {0})]
        return Order(self.pipeline.label(name), seed, asked.n, settings, partials)

    async def draw(self, order: Order) -> AsyncIterator[dict[str, Any]]:
        """Yield the images of an order as OpenAI's streaming events; orders share batches."""
        try:
            # serve.batch closes a batch when its window ends, even if the batch then has to wait.
            # Requests that arrive while a batch is drawn wait here instead, to form one batch.
            while not self.idle.is_set():
                await self.idle.wait()
            async for event in self.draw_batch(order):
                if event is not None:
                    yield event
        finally:
            order.done = True

    @serve.batch(batch_size_fn=lambda orders: sum(order.n for order in orders))
    async def draw_batch(self, orders: list[Order]) -> AsyncIterator[list[Any]]:
        """Yield lists with an item per order: an event, None, or StopIteration once it is done."""
        from moveimg.device import release_memory

        self.idle.clear()
        groups = defaultdict(list)
        for order in orders:
            groups[order.settings.model_copy(update={"cfg_scale": 1.0})].append(order)
        run: Any = asyncio.get_running_loop().run_in_executor  # the loop answers health checks
        try:
            for settings, group in groups.items():
                steps = self._draw_group(group, settings)
                step: dict[Order, Any] | None = {}
                while step is not None:
                    try:
                        step = await run(self.thread, next, steps, None)
                    except Exception as error:
                        failure = {"message": describe(error), "type": "server_error"}
                        step = {order: {"type": "error", "error": failure} for order in group}
                    yield [StopIteration if o.done else (step or {}).get(o) for o in orders]
            await run(self.thread, release_memory)
        finally:
            self.idle.set()

    def _draw_group(
        self, orders: list[Order], settings: SamplingSettings
    ) -> Iterator[dict[Order, dict[str, Any]]]:
        """Draw orders whose settings differ in cfg_scale alone; yields {order: event}."""
        import torch

        from moveimg.images import encode_png
        from moveimg.sampling import image_rngs, iter_codes

        pipeline, rows = self.pipeline, [(order, i) for order in orders for i in range(order.n)]
        labels = torch.tensor([order.label for order, _ in rows], device=pipeline.device)
        rngs = image_rngs([order.seed + i for order, i in rows])
        scales = torch.tensor([o.settings.cfg_scale for o, _ in rows], dtype=torch.float64)
        codes = labels.new_zeros(len(rows), pipeline.generator.config.seq_len)
        drawn = iter_codes(pipeline.prepared_generator, labels, settings, rngs, cfg_scale=scales)
        for position, new in enumerate(drawn, 1):
            codes[:, position - 1] = new
            if all(order.done for order in orders):
                return
            complete = position == codes.shape[1]
            for row, (order, i) in enumerate(rows):
                if order.done or not (complete or position in order.partials):
                    continue
                # decoded one by one: pixels must not depend on the batch
                image = pipeline.decode_partial(codes[row : row + 1], position)[0]
                about = {"class": order.label, "seed": order.seed + i}
                png = encode_png(image, about | order.settings.model_dump())
                event: dict[str, Any] = {"type": "image_generation.completed"}
                if not complete:
                    event["type"] = "image_generation.partial_image"
                    event["partial_image_index"] = order.partials.index(position)
                event |= {"b64_json": b64encode(png).decode(), "output_format": "png", "index": i}
                yield {order: event | about | {"size": self.size}}
                order.done |= complete and i == order.n - 1


class Front:
    """ASGI middleware of Ray's proxy: routes, retries, and errors in OpenAI's format."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        others, path = {"/health": health, "/metrics": metrics}, scope["path"]
        if path == IMAGES:
            body = b""
            async for part in Request(scope, receive).stream():
                body += part
                if len(body) > MAX_BODY:
                    answer = refuse(413, f"request: expected at most {MAX_BODY} bytes")
                    break
            else:
                return await self.forward(scope, body, receive, send)
        elif path in others:
            try:
                answer = await asyncio.to_thread(others[path])
            except Exception as error:  # the service starts or ends
                answer = refuse(503, f"not ready ({describe(error)})")
        else:
            answer = refuse(404, f"{shorten(path)}: expected {IMAGES}, {' or '.join(others)}")
        await answer(scope, receive, send)

    async def forward(self, scope: Any, body: bytes, receive: Any, send: Any) -> None:
        """Send a request to a replica, and to another replica if the first dies.

        The second answer repeats the first: messages that the client already has are skipped.
        """
        seed = (b"x-default-seed", str(secrets.randbelow(2**31)).encode())
        scope["headers"] = [seed, *scope["headers"]]  # of equal headers the first counts
        sent, text = 0, f"{ATTEMPTS} replicas died during the request".encode()
        for _ in range(ATTEMPTS):
            bodies, seen, status, complete = [{"type": "http.request", "body": body}], 0, 0, False

            async def replay(bodies: list[Any] = bodies) -> Any:
                return bodies.pop() if bodies else await receive()

            async def relay(message: Any) -> None:
                nonlocal sent, text, seen, status, complete
                status = message.get("status", status)
                seen, complete = seen + 1, not message.get("more_body", "status" in message)
                if status == 503:  # from the proxy, as plain text: the queue is full
                    text = message.get("body", text)
                elif seen > sent:
                    sent = seen
                    await send(message)

            await self.app(dict(scope), replay, relay)
            if complete:
                break
        if not sent:
            await refuse(503, text.decode())(scope, receive, send)


def proxy_middlewares() -> list[Middleware]:
    """Return the middlewares for Ray's proxy (RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH)."""
    return [Middleware(Front)]


def health() -> Response:
    """Return 200 while a replica can draw, else 503, with the number of replicas by state."""
    replicas = serve.status().applications[APP].deployments["Generator"].replica_states
    return JSONResponse({"replicas": replicas}, 200 if replicas.get("RUNNING") else 503)


def metrics() -> Response:
    """Return Ray's metrics of this machine in the text format of Prometheus."""
    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    return Response(urlopen(url, timeout=10).read(), media_type="text/plain; version=0.0.4")


def refuse(status: int, message: str) -> Response:
    """Return an error response in the format of OpenAI's API."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    headers = {"Retry-After": "5"} if status == 503 else None
    return JSONResponse({"error": {"message": message, "type": kind}}, status, headers)
