"""`moveimg demo` and `serve`."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from moveimg import DEFAULT_MODEL
from moveimg.commands.common import Device, Dtype, Model, command
from moveimg.errors import describe

Host = Annotated[str, Option(help="The address to listen at.")]
RAY = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # Ray's 15 is for background work
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # a busy machine is slow to start
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "moveimg.serve.proxy_middlewares",
}


@command
def demo(
    model: list[str] = Option([DEFAULT_MODEL], help="A name, directory or Hub id; repeatable."),
    host: Host = "127.0.0.1",
    port: int | None = Option(None, min=1, max=65535, help="Default: a free one from 7860."),
    auth: str | None = Option(None, metavar="USER:PASSWORD", help="Or a file of such lines."),
    allow_host: list[str] = Option([], help="A host name of this server; repeatable."),
    trust_proxy: bool = Option(False, "--trust-proxy", help="Visitors by X-Forwarded-For."),
    queue: int = Option(64, min=1, help="Jobs that may wait."),
    per_visitor: int = Option(2, min=1, help="Jobs of one visitor."),
    max_models: int = Option(1, min=1, help="Models kept in memory."),
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
    pick_dtype(dtype, pick_device(device))  # fails if the machine lacks them
    models, accounts = Models(model, max_models, device, dtype), read_auth(auth)
    options: Any = {"auth": accounts, "allow_hosts": (*allow_host,), "trust_proxy": trust_proxy}
    options |= {"queue": queue, "per_visitor": per_visitor}
    server, listener = build_server(models, host=host, port=port, **options)
    models.get()
    shown = f"[{host}]" if ":" in host else host
    print(f"moveimg demo: http://{shown}:{listener.getsockname()[1]}", flush=True)
    if host not in ("127.0.0.1", "localhost", "::1") and accounts is None:
        print("anyone who can reach this address can use it; --auth asks for a password")
    with suppress(KeyboardInterrupt, SystemExit):
        server.run([listener])
    os._exit(0)  # at once: a thread may be in the middle of a matrix product


@command
def serve(
    model: Model = DEFAULT_MODEL,
    replicas: int = Option(1, min=1, help="Processes that hold the model."),
    host: Host = "127.0.0.1",
    port: int = Option(8000, min=1, max=65535, help="The port to listen at."),
    threads: int | None = Option(None, min=1, help="CPU threads each; default: cores / replicas."),
    batch_size: int = Option(32, min=1, help="Images drawn at once, at most."),
    window: float = Option(0.02, min=0, help="Seconds to wait for a batch."),
    max_queued: int = Option(256, min=1, help="Requests that may wait; others get 503."),
    address: str | None = Option(None, help="A cluster started by `ray start`; default: none."),
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Serve images over HTTP as OpenAI's images API does, on Ray Serve, until interrupted."""
    if find_spec("ray") is None:
        raise ValueError("moveimg serve needs Ray Serve: pip install 'moveimg[serve]'")
    os.environ |= RAY | os.environ  # the user's values win
    import ray
    from ray import serve as ray_serve

    from moveimg.device import pick_device, pick_dtype
    from moveimg.pipeline import resolve
    from moveimg.serve import APP, Generator

    where, name = pick_device(device), Path(model).resolve().name  # not its path
    pick_dtype(dtype, where)  # fails if the machine lacks them
    if (folder := resolve(model)) == Path(model):
        model = str(folder.resolve())
    threads = threads or max(1, (os.cpu_count() or 1) // replicas)
    temporary, quiet = tempfile.mkdtemp(prefix="moveimg-serve-"), {"log_level": "ERROR"}
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    local = {"num_cpus": replicas * threads, "include_dashboard": False, "_temp_dir": temporary}
    deployment: Any = Generator
    try:
        if address is None:
            socket.create_server((host, port)).close()  # refuses a port that is in use
        ray.init(address or "local", logging_level="warning", **({} if address else local))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        ray_serve.start("EveryNode", {"host": host, "port": port}, logging_config=quiet)
        generator = deployment.options(
            num_replicas=replicas,
            max_ongoing_requests=2 * batch_size,
            max_queued_requests=max_queued,
            health_check_period_s=2,
            logging_config=quiet,
            ray_actor_options={"num_cpus": threads, "num_gpus": float(where.type == "cuda")},
            max_constructor_retry_count=2,
        )
        arguments = model, name, str(where), dtype, threads, batch_size, window
        ray_serve.run(generator.bind(*arguments), name=APP)
        print(f"moveimg serve: {name} at http://{host}:{port}/v1/images/generations", flush=True)
        threading.Event().wait()
    except Exception as error:  # Ray raises many kinds
        raise OSError(f"the service did not start: {describe(error)}") from error
    finally:
        if address and ray.is_initialized():
            ray_serve.delete(APP)
        ray.shutdown()
        deadline = time.monotonic() + 10  # Ray's last processes may still write
        while Path(temporary).exists() and time.monotonic() < deadline:
            shutil.rmtree(temporary, ignore_errors=True)
            time.sleep(0.1)
