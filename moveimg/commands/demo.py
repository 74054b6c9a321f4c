"""`moveimg demo`."""

from __future__ import annotations

import logging
import os
import signal
import sys
from contextlib import suppress
from typing import Annotated

import typer

from moveimg import DEFAULT_MODEL
from moveimg.commands.common import Device, Dtype, command


@command
def demo(
    model: Annotated[
        list[str] | None,
        typer.Option(help="A name, a model directory or a Hub id; repeatable."),
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: a free one from 7860.")
    ] = None,
    auth: Annotated[
        str | None, typer.Option(metavar="USER:PASSWORD", help="Or a file of such lines.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A host name of this server; repeatable.")
    ] = None,
    trust_proxy: Annotated[
        bool, typer.Option("--trust-proxy", help="Identify visitors by X-Forwarded-For.")
    ] = False,
    queue: Annotated[int, typer.Option(min=1, help="Jobs that may wait.")] = 64,
    per_visitor: Annotated[int, typer.Option(min=1, help="Jobs of one visitor.")] = 2,
    max_models: Annotated[int, typer.Option(min=1, help="Models kept in memory.")] = 1,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Serve the web demo until it is interrupted: choose a class and see it drawn code by code."""
    from moveimg.demo.jobs import Models
    from moveimg.demo.server import build_server, read_auth
    from moveimg.device import limit_arenas, pick_device, pick_dtype

    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", level=logging.WARNING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    limit_arenas()
    accounts = read_auth(auth)
    pick_dtype(dtype, pick_device(device))  # fails if the machine lacks them
    models = Models(model or [DEFAULT_MODEL], max_models, device, dtype)
    server, listener = build_server(
        models, host=host, port=port, auth=accounts, allow_hosts=tuple(allow_host or ()),
        trust_proxy=trust_proxy, queue=queue, per_visitor=per_visitor,
    )  # fmt: skip
    models.get()
    shown = f"[{host}]" if ":" in host else host
    print(f"moveimg demo: http://{shown}:{listener.getsockname()[1]}", flush=True)
    if host not in ("127.0.0.1", "localhost", "::1") and accounts is None:
        print("anyone who can reach this address can use it; --auth asks for a password")
    with suppress(KeyboardInterrupt, SystemExit):
        server.run([listener])
    os._exit(0)  # at once: a thread may be in the middle of a matrix product
