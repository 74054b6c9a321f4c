"""What is let through to the server: no route that reads or writes its disk, no large bodies."""

from __future__ import annotations

from typing import Any

# Gradio's routes for files, uploads and its own tools. The page needs none of them: pictures travel
# inside the messages, in both directions.
CLOSED = tuple(
    f"/gradio_api/{name}"
    for name in (
        "upload", "file", "stream", "proxy", "process_recording", "component_server",
        "custom_component", "deep_link", "vibe", "undo-vibe", "run", "profiling", "dev",
    )
)  # fmt: skip
OPEN = ("/gradio_api/run/predict",)  # buttons that do not wait in the queue
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; "
    "style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "font-src 'self' data:; frame-ancestors 'self'; base-uri 'self'; form-action 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class TooLarge(Exception):
    """A body went past the limit while it was read."""


class Guard:
    """ASGI middleware: closed routes answer 404, bodies beyond `max_body` bytes 413."""

    def __init__(self, app: Any, max_body: int) -> None:
        self.app, self.max_body = app, max_body

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        if path.startswith("/monitoring") or _closed(path):
            await _answer(send, 404, "not found")
            return
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.max_body:
            await _answer(send, 413, f"more than {self.max_body // 2**20} MB")
            return
        started = False

        async def send_on(message: dict[str, Any]) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                extra = [(k.encode(), v.encode()) for k, v in HEADERS.items()]
                message = message | {"headers": [*message.get("headers", []), *extra]}
            await send(message)

        try:
            await self.app(scope, self._counted(receive), send_on)
        except TooLarge:
            if not started:
                await _answer(send, 413, f"more than {self.max_body // 2**20} MB")

    def _counted(self, receive: Any) -> Any:
        """`receive` that stops a body sent in pieces, which declares no length."""
        read = 0

        async def receive_on() -> dict[str, Any]:
            nonlocal read
            message: dict[str, Any] = await receive()
            read += len(message.get("body", b""))
            if read > self.max_body:
                raise TooLarge
            return message

        return receive_on


def _closed(path: str) -> bool:
    return path.startswith(CLOSED) and not path.startswith(OPEN)


async def _answer(send: Any, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
