"""The entry point of the `moveimg` command; nothing heavy is imported before it handles Ctrl-C."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any


def main() -> None:
    """Run the command line. Ctrl-C ends it with one line and exit code 130 at any moment."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # ignored under nohup
        signal.signal(signal.SIGINT, _interrupt)
    try:
        from moveimg.commands import app

        app()
    except KeyboardInterrupt:  # outside of the command's own work
        _end()


def _interrupt(_: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; end the process at once in an import, which may swallow it."""
    signal.signal(signal.SIGINT, _end)  # a second Ctrl-C does not wait
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _end()
        frame = frame.f_back
    raise KeyboardInterrupt


def _end(*_: Any) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)
