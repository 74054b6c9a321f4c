"""The demo's server: a socket, gradio's app behind the guard, and uvicorn in a thread."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import uvicorn

from moveimg.demo.guard import Guard
from moveimg.demo.handlers import Handlers
from moveimg.demo.models import Models
from moveimg.demo.page import build_app
from moveimg.demo.queue import JobQueue

FIRST_PORT = 7860


class Server:
    """A demo that serves from threads of its own; `url` is its address.

    Raises OSError where the port cannot be used.
    """

    def __init__(
        self,
        models: Models,
        queue: JobQueue,
        *,
        host: str = "127.0.0.1",
        port: int | None = None,
        auth: list[tuple[str, str]] | None = None,
        allow_hosts: tuple[str, ...] = (),
        trust_proxy: bool = False,
    ) -> None:
        listener = open_port(host, port)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{listener.getsockname()[1]}"
        app = Guard(build_app(Handlers(models, queue), auth), host, allow_hosts, trust_proxy)
        config = uvicorn.Config(
            app, log_level="warning", proxy_headers=False, server_header=False,
            timeout_graceful_shutdown=1,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.01)

    def close(self) -> None:
        """Stop serving."""
        self._server.should_exit = True
        self._thread.join(10)


def open_port(host: str, port: int | None) -> socket.socket:
    """Listen on a port, or on the first free one from 7860. Raises OSError where none is free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for candidate in (port,) if port else range(FIRST_PORT, FIRST_PORT + 100):
        with suppress(OSError):
            return socket.create_server((host, candidate), family=family)
    ports = port or f"{FIRST_PORT}..{FIRST_PORT + 99}"
    raise OSError(f"port {ports} at {host} cannot be used")


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
