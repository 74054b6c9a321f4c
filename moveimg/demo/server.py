"""The demo's server: gradio's app behind checks of hosts, routes, bodies, logins and visitors."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse

from moveimg.demo.jobs import Models
from moveimg.demo.page import build_app
from moveimg.demo.requests import ENDPOINTS, MAX_BODY, parse_call

# Gradio's routes for files, uploads and its own tools. The page needs none of them: images travel
# inside the messages, in both directions.
CLOSED = tuple(
    f"/gradio_api/{name}"
    for name in (
        "upload", "file", "stream", "proxy", "process_recording", "component_server",
        "custom_component", "deep_link", "vibe", "undo-vibe", "run", "profiling", "dev",
    )
)  # fmt: skip
OPEN = ("/gradio_api/run/predict",)  # events that do not wait in the queue
# A Space is framed by its page on the Hub.
SPACE = " https://huggingface.co" if "SPACE_HOST" in os.environ else ""
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; "
    "style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    f"font-src 'self' data:; frame-ancestors 'self'{SPACE}; base-uri 'self'; form-action 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
CALL = "/gradio_api/call/"
BODY_SECONDS = 60  # for a client to send its body
FREE_LOGINS, LOGIN_WAIT = 3, 10.0  # failed logins without a wait; seconds between later tries


class Guard:
    """ASGI middleware: no route to the disk, bounded bodies, valid calls, few failed logins.

    trust_proxy: whether the last entry of X-Forwarded-For is the visitor's address.
    """

    def __init__(self, app: Any, trust_proxy: bool = False) -> None:
        self.app, self.trust_proxy = app, trust_proxy
        self.logins: dict[str, tuple[int, float]] = {}  # address -> failures, time of the last

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        forwarded = Headers(scope=scope).get("x-forwarded-for")
        if self.trust_proxy and forwarded:
            scope["client"] = (forwarded.rsplit(",", 1)[-1].strip()[:50], 0)
        status, answer = await self._check(scope, receive)
        if status != 200:
            await PlainTextResponse(f"{answer}\n", status)(scope, receive, send)
            return
        messages = [{"type": "http.request", "body": answer, "more_body": False}]

        async def replay() -> Any:
            return messages.pop() if messages else await receive()

        async def respond(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
                if _is_login(scope) and message["status"] < 400:
                    self.logins.pop(scope["client"][0], None)
            await send(message)

        await self.app(scope, replay, respond)

    async def _check(self, scope: dict[str, Any], receive: Any) -> tuple[int, Any]:
        """Return 200 and the body of a request, or the status and message of a refusal."""
        path = scope["path"]
        if path.startswith((*CLOSED, "/monitoring")) and not path.startswith(OPEN):
            return 404, "not found"
        if scope["method"] != "POST":
            return 200, b""
        if _is_login(scope) and self._is_too_soon(scope["client"][0]):
            return 429, f"too many failed logins: wait {LOGIN_WAIT:.0f} s"
        body = bytearray()
        with suppress(TimeoutError):
            async with asyncio.timeout(BODY_SECONDS):
                more = True
                while more and len(body) <= MAX_BODY:
                    message = await receive()
                    body += message.get("body", b"")
                    more = message.get("more_body")
        if len(body) > MAX_BODY:
            return 413, f"more than {MAX_BODY // 2**20} MB"
        if more:
            return 408, f"the body did not arrive within {BODY_SECONDS} s"
        if path.startswith(CALL):
            name = path.removeprefix(CALL).removeprefix("v2/").strip("/")
            if name not in ENDPOINTS:
                return 404, f"no such endpoint: expected one of {', '.join(ENDPOINTS)}"
            try:
                await asyncio.to_thread(lambda: parse_call(name, json.loads(body)))
            except (ValueError, RecursionError) as problem:
                return 422, " ".join(str(problem)[:300].split())
        return 200, bytes(body)

    def _is_too_soon(self, address: str) -> bool:
        """Count a login as failed, until it succeeds; returns whether it must not be tried yet."""
        failures, last = self.logins.get(address, (0, 0.0))
        now = time.monotonic()
        if failures >= FREE_LOGINS and now < last + LOGIN_WAIT:
            return True
        if len(self.logins) > 10_000:
            self.logins.clear()
        self.logins[address] = (failures + 1, now)
        return False


def _is_login(scope: dict[str, Any]) -> bool:
    return scope["path"].rstrip("/") == "/login" and scope["method"] == "POST"


def build_server(
    models: Models,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    auth: list[tuple[str, str]] | None = None,
    allow_hosts: tuple[str, ...] = (),
    trust_proxy: bool = False,
    queue: int = 64,
    per_visitor: int = 2,
) -> tuple[uvicorn.Server, socket.socket]:
    """Return a server, and the socket for its `run`; arguments: see `moveimg demo`.

    Raises OSError where no port can be used.
    """
    listener = open_port(host, port)
    app = build_app(models, queue, per_visitor, auth)
    app.add_middleware(Guard, trust_proxy=trust_proxy)
    names = ["localhost", "127.0.0.1", "[::1]", host, socket.gethostname(), *allow_hosts]
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=names)
    config = uvicorn.Config(
        app, log_level="warning", proxy_headers=False, server_header=False,
        timeout_graceful_shutdown=1,
    )  # fmt: skip
    return uvicorn.Server(config), listener


def open_port(host: str, port: int | None) -> socket.socket:
    """Listen on a port, or on the first free one from 7860. Raises OSError where none is free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for candidate in (port,) if port else range(7860, 7960):
        with suppress(OSError):
            return socket.create_server((host, candidate), family=family)
    raise OSError(f"port {port or '7860..7959'} at {host} cannot be used")


def read_auth(option: str | None) -> list[tuple[str, str]] | None:
    """Return the accounts in `user:password` or in a file of such lines, else raise ValueError."""
    if option is None:
        return None
    path = Path(option)
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else [option]
    pairs = [line.strip().partition(":") for line in lines if line.strip()]
    if not pairs or not all(user and password for user, _, password in pairs):
        raise ValueError("--auth: expected USER:PASSWORD, or a file with one such line per user")
    return [(user, password) for user, _, password in pairs]
