"""The demo's server: gradio's app behind checks of hosts, routes, bodies, logins and visitors."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from moveimg.demo.api import ENDPOINTS, parse
from moveimg.demo.jobs import Models
from moveimg.demo.page import build_page, read
from moveimg.errors import describe, shorten
from moveimg.files import parse_json

QUEUE = 64  # maximum waiting jobs; half as many per address or account
JOBS_OF_A_TAB = 2  # maximum jobs of a browser's tab
MAX_BODY = 12 * 2**20  # bytes of a request, enough for MAX_UPLOAD in base64
LOGIN_WAIT = 3.0  # minimum seconds between login attempts of an address
# Gradio's routes that the page needs; none reads or writes a file: images travel inside messages.
ROUTES = ("call", "queue", "run/predict", "info", "heartbeat", "startup-events", "cancel", "reset",
          "login_check", "theme.css", "app_id", "openapi.json")  # fmt: skip
CALL = "/gradio_api/call/"


class Guard:
    """ASGI middleware that refuses routes to files, large bodies, bad calls and rapid logins.

    trust_proxy: whether the last entry of X-Forwarded-For is the visitor's address.
    """

    def __init__(self, app: Any, trust_proxy: bool = False) -> None:
        self.app, self.trust_proxy = app, trust_proxy
        self.logins: dict[str, float] = {}  # address -> when it may log in again

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        forwarded = Headers(scope=scope).get("x-forwarded-for")
        if self.trust_proxy and forwarded:
            scope["client"] = (forwarded.rsplit(",", 1)[-1].strip()[:50], 0)
        try:
            bodies = [await self._read(scope, receive)]
        except HTTPException as refusal:
            answer = PlainTextResponse(f"{refusal.detail}\n", refusal.status_code)
            return await answer(scope, receive, send)

        async def replay() -> Any:
            return {"type": "http.request", "body": bodies.pop()} if bodies else await receive()

        await self.app(scope, replay, send)

    async def _read(self, scope: dict[str, Any], receive: Any) -> bytes:
        """Read the body of a request. Raises HTTPException if the request is to be refused."""
        path, address, now = scope["path"], scope["client"][0], time.monotonic()
        if path.startswith("/gradio_api") and not path[12:].startswith(ROUTES):
            raise HTTPException(404, f"no route {shorten(path)}: expected a route of the demo")
        body = bytearray()
        async for part in Request(scope, receive).stream():
            body += part
            if len(body) > MAX_BODY:
                raise HTTPException(413, f"request: expected at most {MAX_BODY // 2**20} MB")
        if scope["method"] == "POST" and path.rstrip("/") == "/login":
            if now < self.logins.get(address, now):
                raise HTTPException(429, f"login: expected {LOGIN_WAIT:.0f} s between attempts")
            if len(self.logins) > 10_000:
                self.logins.clear()
            self.logins[address] = now + LOGIN_WAIT
        if scope["method"] == "POST" and path.startswith(CALL):
            name = path.removeprefix(CALL).removeprefix("v2/").strip("/")
            if name not in ENDPOINTS:
                known = " or ".join(ENDPOINTS)
                raise HTTPException(404, f"endpoint {shorten(name)}: expected {known}")
            try:
                await asyncio.to_thread(lambda: parse(name, parse_json(bytes(body), "the request")))
            except ValueError as error:
                raise HTTPException(422, describe(error, 300)) from None
        return bytes(body)


def build_server(
    models: Models, host: str, port: int, auth: list[Any], allow_hosts: list[str], trust_proxy: bool
) -> tuple[uvicorn.Server, socket.socket]:
    """Build the server; returns it and the socket to run it on. Arguments: see `moveimg demo`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family)
    page = build_page(models)
    page.queue(max_size=QUEUE, api_open=False)
    limit_visitors(page._queue)
    page.state_session_capacity = 200
    page._queue.pending_messages_per_session.max_size = 200  # unread results
    theme = gr.themes.Base(  # system fonts: nothing is fetched from elsewhere
        primary_hue="indigo", neutral_hue="slate", radius_size="lg",
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"],
    )  # fmt: skip
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None), page, path="", auth=auth or None, theme=theme,
        # not `css`, whose selectors gradio rewrites: it gets :is() and body wrong
        head=f"<style>{read('page.css')}</style>", js=read("keys.js"), footer_links=["api"],
        enable_monitoring=False, run_history=False, ssr_mode=False, mcp_server=False,
        show_error=False,  # no details of errors in answers
    )  # fmt: skip
    app.add_middleware(Guard, trust_proxy=trust_proxy)
    names = ["localhost", "127.0.0.1", "[::1]", host, socket.gethostname(), *allow_hosts]
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=names)
    options: dict[str, Any] = {"proxy_headers": False, "timeout_graceful_shutdown": 1}
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", **options)), listener


def limit_visitors(queue: Any) -> None:
    """Limit gradio's queue to JOBS_OF_A_TAB jobs per tab, QUEUE / 2 per address or account."""
    push = queue.push

    async def push_within_limits(body: Any, request: Any, username: str | None) -> Any:
        events = queue.event_ids_to_events.values()
        visitor = username or request.client.host
        own = sum(event.session_hash == body.session_hash for event in events)
        same_visitor = sum((e.username or e.request.client.host) == visitor for e in events)
        if own >= JOBS_OF_A_TAB or same_visitor >= QUEUE // 2:
            queued = f"{own} jobs in this tab and {same_visitor} of your address"
            return False, f"{queued} are in the queue: wait for one, or stop it", "queue_full"
        return await push(body=body, request=request, username=username)

    queue.push = push_within_limits
