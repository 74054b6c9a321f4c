"""The entry point of the `moveimg` command.

Nothing heavy is imported before `main` listens for Ctrl-C: see moveimg/commands/ for the commands.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any, NoReturn


def main() -> None:
    """Run the command line. Ctrl-C ends it with one line and exit code 130 at any moment."""
    listening = signal.getsignal(signal.SIGINT) != signal.SIG_IGN  # ignored under nohup
    if listening:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        if hiding := find_hiding_module():
            print(f"error: {hiding} hides moveimg's package `tokenizer`: rename it, or start the "
                  "command `moveimg` in place of `python -m moveimg`", file=sys.stderr)  # fmt: skip
            raise SystemExit(2)
        from moveimg.commands import app

        app()
    except KeyboardInterrupt:
        _end()
    finally:
        if listening:
            signal.signal(signal.SIGINT, _end)


def find_hiding_module() -> str | None:
    """The file that `import tokenizer` would load in place of moveimg's own package, if any."""
    from importlib.util import find_spec
    from pathlib import Path

    spec = find_spec("tokenizer")
    own = Path(__file__).resolve().parents[1] / "tokenizer" / "__init__.py"
    if spec is None or spec.origin is None or Path(spec.origin).resolve() == own:
        return None
    return spec.origin


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; inside an import, where it can get lost, end the process at once.

    Imports while moveimg.files writes a file are an exception: it removes its temporary file.
    """
    signal.signal(signal.SIGINT, _end)  # a second Ctrl-C does not wait
    names = []
    while frame is not None:
        names.append(frame.f_code.co_filename)
        frame = frame.f_back
    importing = any(name.startswith("<frozen importlib") for name in names)
    if importing and not any(name.endswith(os.path.join("moveimg", "files.py")) for name in names):
        _end()
    raise KeyboardInterrupt


def _end(*_: Any) -> NoReturn:
    os.write(2, b"interrupted\n")
    os._exit(130)


def __getattr__(name: str) -> Any:
    """Import `app`, the typer application, when it is asked for."""
    if name == "app":
        from moveimg.commands import app

        return app
    raise AttributeError(f"module 'moveimg.cli' has no attribute {name!r}")
