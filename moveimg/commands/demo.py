"""`moveimg demo`."""

from __future__ import annotations

import logging
import os
import signal
import sys
from contextlib import suppress
from typing import Annotated, Any

from typer import Option

from moveimg import DEFAULT_MODEL
from moveimg.commands.common import Device, Dtype, command

MODEL = Option("--model", help="A name, a model directory or a Hub id; repeatable.")
AUTH = Option(metavar="USER:PASSWORD", envvar="MOVEIMG_AUTH", help="Ask for it; repeatable.")


@command
def demo(
    models: Annotated[list[str], MODEL] = [DEFAULT_MODEL],  # noqa: B006
    host: Annotated[str, Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="0: a free one.")] = 7860,
    auth: Annotated[list[str], AUTH] = [],  # noqa: B006
    allow_host: Annotated[list[str], Option(help="A host name of this server; repeatable.")] = [],  # noqa: B006
    trust_proxy: Annotated[
        bool, Option("--trust-proxy", help="Identify visitors by X-Forwarded-For.")
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Serve the web demo until it is interrupted: choose a class and see it drawn code by code."""
    from moveimg.demo.jobs import Models
    from moveimg.demo.server import build_server
    from moveimg.device import limit_arenas, pick_device, pick_dtype

    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", level=logging.WARNING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    limit_arenas()
    accounts: list[Any] = [tuple(account.split(":", 1)) for account in auth]
    if not all(len(account) == 2 and all(account) for account in accounts):
        raise ValueError("--auth: expected USER:PASSWORD")
    pick_dtype(dtype, pick_device(device))  # fails if the machine lacks them
    loaded = Models(models, device=device, dtype=dtype)
    server, listener = build_server(loaded, host, port, accounts, allow_host, trust_proxy)
    loaded.get()
    shown = f"[{host}]" if ":" in host else host
    print(f"moveimg demo: http://{shown}:{listener.getsockname()[1]}", flush=True)
    with suppress(KeyboardInterrupt, SystemExit):
        server.run([listener])
    os._exit(0)  # at once: a thread may be in the middle of a matrix product
