"""Which requests reach the server: known hosts, no route to its disk, bounded bodies and logins."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import socket
import time
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse

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
OPEN = ("/gradio_api/run/predict",)  # buttons that do not wait in the queue
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
FREE_LOGINS, LOGIN_WAIT = 3, 30.0  # failed logins without a wait; the longest wait in seconds


class Guard:
    """ASGI middleware around gradio's app.

    Args:
        host: where the server listens.
        hosts: more names that the Host header may have.
        trust_proxy: whether the last entry of X-Forwarded-For is the visitor's address.
    """

    def __init__(
        self, app: Any, host: str, hosts: tuple[str, ...] = (), trust_proxy: bool = False
    ) -> None:
        self.app, self.trust_proxy = app, trust_proxy
        self.hosts = {"localhost", "127.0.0.1", "::1", host, *hosts}
        self.is_public = host in ("0.0.0.0", "::")
        if self.is_public:
            self.hosts |= {socket.gethostname(), socket.getfqdn()}
        self.logins: dict[str, tuple[int, float]] = {}  # address -> failures, time of the next try

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if self.trust_proxy and (forwarded := headers.get("x-forwarded-for")):
            scope["client"] = (forwarded.rsplit(",", 1)[-1].strip()[:50], 0)
        error, body = await self._check(scope, headers, receive)
        if error is not None:
            await PlainTextResponse(f"{error[1]}\n", error[0])(scope, receive, send)
            return
        address = (scope["client"] or ("unknown",))[0]
        is_login = scope["path"].rstrip("/") == "/login" and scope["method"] == "POST"
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Any:
            return parts.pop() if parts else await receive()

        async def respond(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
                if is_login and message["status"] < 400:
                    self.logins.pop(address, None)
            await send(message)

        await self.app(scope, replay, respond)

    async def _check(
        self, scope: dict[str, Any], headers: Headers, receive: Any
    ) -> tuple[tuple[int, str] | None, bytes]:
        """Return (status, message) of a request that is refused, or None, and the body."""
        path = scope["path"]
        if not self._is_known(headers.get("host", "")):
            return (421, "unknown host name: see --allow-host"), b""
        if path.startswith((*CLOSED, "/monitoring")) and not path.startswith(OPEN):
            return (404, "not found"), b""
        if scope["method"] != "POST":
            return None, b""
        if path.rstrip("/") == "/login" and (wait := self._login_wait(scope)) > 0:
            return (429, f"too many failed logins: wait {wait:.0f} s"), b""
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await _read_body(receive)
        except TimeoutError:
            return (408, f"the body did not arrive within {BODY_SECONDS} s"), b""
        if body is None:
            return (413, f"more than {MAX_BODY // 2**20} MB"), b""
        name = path.removeprefix(CALL).removeprefix("v2/").strip("/")
        if path.startswith(CALL):
            if name not in ENDPOINTS:
                return (404, f"no such endpoint: expected one of {', '.join(ENDPOINTS)}"), b""
            try:
                await asyncio.to_thread(lambda: parse_call(name, json.loads(body)))
            except (ValueError, RecursionError) as problem:
                return (422, " ".join(str(problem)[:300].split())), b""
        return None, body

    def _is_known(self, host: str) -> bool:
        name = host.rsplit("]", 1)[0][1:] if host.startswith("[") else host.rsplit(":", 1)[0]
        if name.lower() in self.hosts:
            return True
        try:  # an attacker's page can rebind a name, but not an address
            return self.is_public and bool(ipaddress.ip_address(name))
        except ValueError:
            return False

    def _login_wait(self, scope: dict[str, Any]) -> float:
        """Count a login as failed, until it succeeds; returns seconds until it may be tried."""
        address = (scope["client"] or ("unknown",))[0]
        failures, after = self.logins.get(address, (0, 0.0))
        now = time.monotonic()
        if now >= after:
            wait = (
                min(2.0 ** (failures - FREE_LOGINS), LOGIN_WAIT) if failures >= FREE_LOGINS else 0
            )
            if len(self.logins) > 10_000:
                self.logins.clear()
            self.logins[address] = (failures + 1, now + wait)
        return after - now


async def _read_body(receive: Any) -> bytes | None:
    """Return a request's body, or None where it is larger than MAX_BODY."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            return None
        if not message.get("more_body"):
            return bytes(body)
