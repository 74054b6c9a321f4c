"""The demo in the browser: choose a class, see it drawn code by code.

    python apps/demo.py                                    # the bundled model
    python apps/demo.py --model digits --model runs/digits-move
    python apps/demo.py --host 0.0.0.0 --auth me:secret    # for others, behind a password

docs/demo.md says what the page does and how it serves other people.
"""

from __future__ import annotations

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

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, from any folder


def configure_gradio() -> str:
    """Set what gradio reads from the environment; returns the folder of temporary files."""
    folder = tempfile.mkdtemp(prefix="moveimg-demo-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ |= {
        "GRADIO_TEMP_DIR": folder,
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_ANALYTICS_MAX_EVENTS": "100",  # it makes a table of them after every event
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return folder


@app.command()
def main(
    model: list[str] = typer.Option([], help="bundled name, directory or Hub id; repeatable"),
    host: str = typer.Option("127.0.0.1", help="address to listen at"),
    port: int = typer.Option(None, min=1, max=65535, help="[default: a free one from 7860]"),
    auth: str = typer.Option(None, metavar="USER:PASSWORD", help="or a file of such lines"),
    allow_host: list[str] = typer.Option([], help="a name that visitors use; repeatable"),
    trust_proxy: bool = typer.Option(False, "--trust-proxy", help="believe X-Forwarded-For"),
    queue: int = typer.Option(64, min=1, help="jobs that may wait"),
    per_visitor: int = typer.Option(2, min=1, help="jobs of one visitor"),
    max_models: int = typer.Option(1, min=1, help="models kept in memory"),
    device: str = typer.Option(None, help="cpu, cuda, mps [default: an accelerator]"),
    dtype: str = typer.Option(None, help="float32, bfloat16 or float64"),
) -> None:
    """Serve the demo until it is interrupted."""
    folder = configure_gradio()
    from apps.demo_parts.models import Models
    from apps.demo_parts.queue import JobQueue
    from apps.demo_parts.server import Server, read_auth
    from moveimg.device import limit_arenas, pick_device, pick_dtype
    from moveimg.errors import describe
    from moveimg.pipeline import DEFAULT_MODEL

    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", level=logging.WARNING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    limit_arenas()
    try:
        accounts = read_auth(auth)
        pick_dtype(dtype, pick_device(device))  # refuses what the machine does not have
        models = Models(model or [DEFAULT_MODEL], max_models, device, dtype)
        server = Server(
            models, JobQueue(queue, per_visitor), host=host, port=port, auth=accounts,
            allow_hosts=tuple(allow_host), trust_proxy=trust_proxy,
        )  # fmt: skip
        print(f"moveimg demo: {server.url}", flush=True)
        if host not in ("127.0.0.1", "localhost", "::1") and accounts is None:
            print("anyone who can reach this address can use it; --auth asks for a password")
        models.get()  # while the first visitor looks at the page
    except (ValueError, OSError) as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        raise typer.Exit(2) from None
    with suppress(KeyboardInterrupt, SystemExit):
        threading.Event().wait()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)  # at once: a thread may be in the middle of a matrix product


if __name__ == "__main__":
    app()
