"""`moveimg demo` and `moveimg serve`."""

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
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from typer import Option

from moveimg import DEFAULT_MODEL
from moveimg.commands.common import Device, Dtype, Model, command
from moveimg.errors import describe

HOST = Option("127.0.0.1", help="The address to listen at.")


@command
def demo(
    model: list[str] = Option([DEFAULT_MODEL], help="A name, directory or Hub id; repeatable."),
    host: str = HOST,
    port: int = Option(7860, min=0, max=65535, help="The port; 0: a free port."),
    auth: list[str] = Option([], envvar="MOVEIMG_AUTH", help="USER:PASSWORD; repeatable."),
    allow_host: list[str] = Option([], help="A further name of this host; repeatable."),
    trust_proxy: bool = Option(False, "--trust-proxy", help="Trust X-Forwarded-For."),
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Serve the web demo until interrupted: it draws images of a class, code by code."""
    from moveimg.demo.jobs import Models
    from moveimg.demo.server import build_server
    from moveimg.device import limit_arenas, pick_device, pick_dtype

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    limit_arenas()
    accounts: list[Any] = [tuple(account.split(":", 1)) for account in auth]
    if not all(len(account) == 2 and all(account) for account in accounts):
        raise ValueError("--auth: expected USER:PASSWORD")
    pick_dtype(dtype, pick_device(device))  # refuses a device that the machine lacks
    models = Models(model, device=device, dtype=dtype)
    server, listener = build_server(models, host, port, accounts, allow_host, trust_proxy)
    models.get()
    shown = f"[{host}]" if ":" in host else host
    print(f"moveimg demo: http://{shown}:{listener.getsockname()[1]}", flush=True)
    # at once: a thread may be in the middle of a matrix product, and open pages wait for messages
    server.handle_exit = lambda *_: os._exit(0)  # type: ignore[method-assign]
    server.run([listener])


@command
def serve(
    model: Model = DEFAULT_MODEL,
    replicas: int = Option(1, min=1, help="Processes, each with the model."),
    host: str = HOST,
    port: int = Option(8000, min=1, max=65535, help="The port to listen at."),
    threads: int | None = Option(None, min=1, help="CPU threads; default: cores / replicas."),
    batch_size: int = Option(32, min=1, help="Maximum images per batch."),
    window: float = Option(0.02, min=0, help="Seconds to wait for a batch to fill."),
    max_queued: int = Option(256, min=1, help="Waiting requests; further ones get 503."),
    address: str | None = Option(None, help="A Ray cluster (`ray start`); default: a new one."),
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Serve images over HTTP as OpenAI's images API does, on Ray Serve, until interrupted."""
    if find_spec("ray") is None:
        raise ValueError("moveimg serve needs Ray Serve: pip install 'moveimg[serve]'")
    defaults = {
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # Ray's default, 15, is for background work
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # a busy machine is slow to start
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "moveimg.serve.proxy_middlewares",
    }
    os.environ |= defaults | os.environ  # the user's values win
    import ray
    from ray import serve as ray_serve

    from moveimg.device import pick_device, pick_dtype
    from moveimg.pipeline import resolve
    from moveimg.serve import APP, Generator

    where, name = pick_device(device), Path(model).resolve().name  # clients see no path
    pick_dtype(dtype, where)  # refuses a device that the machine lacks
    if (folder := resolve(model)) == Path(model):
        model = str(folder.resolve())
    threads = threads or max(1, (os.cpu_count() or 1) // replicas)
    temporary, quiet = tempfile.mkdtemp(prefix="moveimg-serve-"), {"log_level": "ERROR"}
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    local = {"num_cpus": replicas * threads, "include_dashboard": False, "_temp_dir": temporary}
    try:
        if address is None:
            socket.create_server((host, port)).close()  # raises OSError for a port in use
        ray.init(address or "local", logging_level="warning", **({} if address else local))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        ray_serve.start("EveryNode", {"host": host, "port": port}, logging_config=quiet)
        deployment: Any = Generator
        generator = deployment.options(
            num_replicas=replicas, max_ongoing_requests=2 * batch_size,
            max_queued_requests=max_queued, health_check_period_s=2, logging_config=quiet,
            ray_actor_options={"num_cpus": threads, "num_gpus": float(where.type == "cuda")},
            max_constructor_retry_count=2,
        ).bind(model, name, str(where), dtype, threads, batch_size, window)  # fmt: skip
        ray_serve.run(generator, name=APP)
        print(f"moveimg serve: {name} at http://{host}:{port}/v1/images/generations", flush=True)
        threading.Event().wait()
    except Exception as error:  # Ray raises many kinds
        raise OSError(f"the service did not start: {describe(error)}") from error
    finally:
        if address and ray.is_initialized():
            ray_serve.delete(APP)
        ray.shutdown()
        for _ in range(100):  # Ray's last processes may still write
            shutil.rmtree(temporary, ignore_errors=True)
            if not Path(temporary).exists():
                break
            time.sleep(0.1)
