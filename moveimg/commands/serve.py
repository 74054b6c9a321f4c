"""`moveimg serve`."""

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
from typing import Annotated, Any

import typer

from moveimg import DEFAULT_MODEL
from moveimg.commands.common import Device, Dtype, Quantize, command
from moveimg.errors import describe


@command
def serve(
    model: Annotated[
        str, typer.Option(help="A name, a model directory or a Hub id.")
    ] = DEFAULT_MODEL,
    replicas: Annotated[int, typer.Option(min=1, help="Processes that hold the model.")] = 1,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen at.")] = 8000,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of a replica; default: cores / replicas.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images drawn at once, at most.")] = 32,
    window: Annotated[float, typer.Option(min=0, help="Seconds to wait for a batch.")] = 0.02,
    max_queued: Annotated[
        int, typer.Option(min=1, help="Requests that may wait; others are refused with 503.")
    ] = 256,
    address: Annotated[
        str | None, typer.Option(help="A cluster started by `ray start`; default: none.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
) -> None:
    """Serve images over HTTP as OpenAI's images API does, on Ray Serve, until interrupted."""
    if quantize is not None:
        raise ValueError(f"quantize {quantize}: not served, since images would depend on the batch")
    if find_spec("ray") is None:
        raise ValueError("moveimg serve needs Ray Serve: pip install 'moveimg[serve]'")
    defaults = {
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # Ray's 15 is for background work
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # a busy machine is slow to start
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "moveimg.serve.proxy_middlewares",
    }
    os.environ |= defaults | os.environ  # the user's values win
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
    try:
        if address is None:
            socket.create_server((host, port)).close()  # refuses a port that is in use
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
