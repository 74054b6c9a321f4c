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
    """Raise KeyboardInterrupt; while a command imports its modules, end the process at once.

    An import can swallow KeyboardInterrupt or turn it into another error. What libraries import
    while they work is left to them: a file may be open that has to be removed.
    """
    signal.signal(signal.SIGINT, _end)  # a second Ctrl-C does not wait
    importing, importer = False, ""
    while frame is not None:
        name = frame.f_code.co_filename
        if importing and not name.startswith("<frozen importlib"):
            importer = name  # of the outermost import in the end
        importing = name.startswith("<frozen importlib")
        frame = frame.f_back
    if importer.startswith((__file__, os.path.join(os.path.dirname(__file__), "commands"))):
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
