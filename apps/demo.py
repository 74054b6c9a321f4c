"""The demo in the browser: choose a class, see it drawn code by code.

    python apps/demo.py                                    # the bundled digits
    python apps/demo.py --model digits --model runs/digits-move
    python apps/demo.py --host 0.0.0.0 --auth me:secret    # for others, behind a password

docs/demo.md says what the page does and how it serves other people.
"""

from __future__ import annotations

import argparse
import atexit
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The checkout, so that the demo runs from any folder. Nothing heavy is imported up here.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from apps.demo_parts.models import Models

if TYPE_CHECKING:
    import gradio as gr

    from apps.demo_parts.turns import Turns

DTYPES = ("float32", "bfloat16", "float64")  # of moveimg.device, which would load torch
MAX_BODY = 12 * 2**20  # bytes of a request: an upload of looking.MAX_UPLOAD in base64, and a bit


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; exits with 2 and one line for what it cannot understand."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", action="append", metavar="NAME_OR_PATH",
        help="a bundled name, a model directory, public weights or a Hub id; repeatable "
        "(default: digits)",
    )  # fmt: skip
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: %(default)s)"
    )
    parser.add_argument("--port", type=_port, help="port (default: the first free one from 7860)")
    parser.add_argument(
        "--auth", metavar="USER:PASSWORD", help="ask for this; or a file with one such line a user"
    )
    parser.add_argument(
        "--max-models",
        type=_positive,
        default=1,
        help="models kept in memory (default: %(default)s)",
    )
    parser.add_argument(
        "--queue", type=_positive, default=64, help="most jobs waiting (default: %(default)s)"
    )
    parser.add_argument(
        "--per-visitor",
        type=_positive,
        default=2,
        help="most jobs of one visitor (default: %(default)s)",
    )
    parser.add_argument(
        "--device", help="cpu, cuda, mps, ... (default: an accelerator if there is one)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES,
        help="of the models' numbers (default: bfloat16 on CUDA from capability 8.0)",
    )  # fmt: skip
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number in 1..65535")
    return int(text)


def read_auth(given: str | None) -> list[tuple[str, str]] | None:
    """`user:password`, or the lines of a file. ValueError for anything else."""
    if given is None:
        return None
    path = Path(given)
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else [given]
    pairs = [line.strip().partition(":") for line in lines if line.strip()]
    if not pairs or not all(user and password for user, _, password in pairs):
        raise ValueError("--auth: expected USER:PASSWORD, or a file with one such line a user")
    return [(user, password) for user, _, password in pairs]


def quiet_gradio() -> Path:
    """Settings that gradio reads from the environment; returns the folder of temporary files."""
    folder = Path(tempfile.mkdtemp(prefix="moveimg-demo-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ |= {
        "GRADIO_TEMP_DIR": str(folder),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_ANALYTICS_MAX_EVENTS": "100",  # it makes a table of them after every event
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return folder


def serve(
    models: Models, turns: Turns, *, host: str = "127.0.0.1", port: int | None = None,
    auth: list[tuple[str, str]] | None = None,
) -> gr.Blocks:  # fmt: skip
    """Start the server in threads of its own and return the page; `page.local_url` is its address.

    Raises OSError where the port is taken.
    """
    from starlette.middleware import Middleware

    from apps.demo_parts.guard import Guard
    from apps.demo_parts.handlers import Handlers
    from apps.demo_parts.page import build, look

    page = build(Handlers(models, turns))
    page.queue(max_size=2 * turns.length + 32, api_open=False)
    options: dict[str, Any] = look()
    page.launch(
        server_name=host,
        server_port=port,
        auth=auth,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        show_error=False,
        enable_monitoring=False,
        run_history=False,
        footer_links=["api"],
        max_file_size=MAX_BODY,
        max_threads=turns.length + 40,  # every waiting job holds one of the queue's places
        state_session_capacity=500,
        ssr_mode=False,
        mcp_server=False,
        app_kwargs={"middleware": [Middleware(Guard, max_body=MAX_BODY)]},
        **options,
    )
    return page


def main(argv: list[str] | None = None) -> int:
    """Serve until interrupted; 2 for what cannot be served."""
    given = arguments(argv)
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", level=logging.WARNING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        auth = read_auth(given.auth)
        models = Models(given.model or ["digits"], given.max_models, given.device, given.dtype)
        temporary = quiet_gradio()
        from apps.demo_parts.turns import Turns

        page = serve(
            models, Turns(given.queue, given.per_visitor), host=given.host, port=given.port,
            auth=auth,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        told = str(error)
        if "empty port" in told:  # gradio's, which goes on about its own settings
            told = f"port {given.port or '7860 and those after it'} at {given.host}: cannot be used"
        print(f"error: {told}", file=sys.stderr)
        return 2
    print(f"moveimg demo: {page.local_url}", flush=True)
    if given.host not in ("127.0.0.1", "localhost", "::1") and auth is None:
        print("anyone who can reach this address can use it; --auth asks for a password")
    failed = threading.Event()
    threading.Thread(target=_warm, args=(models, failed), daemon=True).start()
    with suppress(KeyboardInterrupt, SystemExit):
        failed.wait()
    page.close(verbose=False)
    shutil.rmtree(temporary, ignore_errors=True)
    # at once: a thread may be in the middle of a matrix product
    os._exit(2 if failed.is_set() else 0)


def _warm(models: Models, failed: threading.Event) -> None:
    """Load the first model while the visitor looks at the page; a page without it is of no use."""
    try:
        models.get(None)
    except ValueError:  # models logs why
        failed.set()


if __name__ == "__main__":
    sys.exit(main())
