"""Measure the service: images per second and latency by number of clients, and what it survives.

    python tools/load_serving.py                    # by number of clients, also without batches
    python tools/load_serving.py --model gpt-b --count 8 --clients 1,8    # random weights, VQ-16
    python tools/load_serving.py --minutes 2 --kill # one of two replicas is killed each minute
    python tools/load_serving.py --minutes 10       # memory under load

A client sends its next request when it has the answer to the last one; request i asks for one image
with seed i.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import typer

import tokenizer as vq
from moveimg.checkpoint import ModelParts, save_model
from moveimg.config import ModelFile, SamplingSettings, load_config
from moveimg.model import Transformer

with socket.create_server(("127.0.0.1", 0)) as unused:
    URL = f"http://127.0.0.1:{unused.getsockname()[1]}"
CLIENT = httpx.Client(base_url=URL, timeout=3600, limits=httpx.Limits(max_connections=None))
MARK = f"MOVEIMG_LOAD={os.getpid()}"  # in the environment of the service's processes


@contextmanager
def service(model: str, *options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run a service until the block ends; the block begins when it can draw."""
    command = [sys.executable, "-m", "moveimg", "serve", "--model", model, "--port", URL[17:]]
    environment = os.environ | dict([MARK.split("=")])
    process = subprocess.Popen([*command, *map(str, options)], env=environment)
    try:
        ready = False
        while not ready and process.poll() is None:
            time.sleep(0.2)
            with suppress(httpx.HTTPError):
                ready = CLIENT.get("/health").is_success
        yield process
    finally:
        process.terminate()
        process.wait()


def list_processes(name: str = "") -> list[Path]:
    """Return the folders in /proc of the service's processes, of those with a name if given."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if MARK.encode() in (folder / "environ").read_bytes():
                found += [folder] * (name in (folder / "comm").read_text(encoding="utf-8"))
    return found


def load(clients: int, count: int, seconds: float = 1e9) -> None:
    """Send at most `count` requests, and print figures."""
    begun, latencies, statuses = time.perf_counter(), [], Counter[int]()

    def visit(seed: int) -> None:
        start = time.perf_counter()
        if start - begun < seconds:
            reply = CLIENT.post("/v1/images/generations", json={"class": 0, "seed": seed})
            statuses[reply.status_code] += 1
            latencies.append(time.perf_counter() - start)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(visit, range(count)))
    rate = statuses[200] / (time.perf_counter() - begun)
    p50, p95 = np.percentile(latencies, [50, 95])
    print(f"{clients} clients: {rate:.3g} images/s, p50 {p50:.3g} s, p95 {p95:.3g} s, answers "
          f"{dict(statuses)}", flush=True)  # fmt: skip


def main(
    model: str = "fashion", kill: bool = False, minutes: int = 0, count: int = 32,
    clients: str = "1,8,32",
) -> None:  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        if model == "gpt-b":
            generator = Transformer(load_config("imagenet-b-256-standard", ModelFile).model)
            generator.head.reset_parameters()  # it starts at zero
            names, settings = list(map(str, range(1000))), SamplingSettings(cfg_scale=2)
            save_model(
                folder,
                ModelParts(generator, vq.AutoencoderTokenizer(vq.VQConfig()), names, settings),
                {},
            )
            model = folder
        if minutes:
            with service(model, "--replicas", 1 + kill), ThreadPoolExecutor() as pool:
                for _ in range(minutes):
                    work = pool.submit(load, 8, 10**6, 60)
                    time.sleep(20)
                    if kill:
                        os.kill(int(list_processes("ray::ServeRepli")[0].name), signal.SIGKILL)
                    work.result()
                    texts = [
                        (path / "smaps_rollup").read_text("ascii") for path in list_processes()
                    ]
                    kilobytes = sum(int(text.split("Pss:")[1].split()[0]) for text in texts)
                    print(f"{kilobytes / 1024:.0f} MB, {CLIENT.get('/health').text}", flush=True)
            return
        for size, window in ((32, 0.02), (1, 0)):
            with service(model, "--batch-size", size, "--window", window):
                print(f"batches of at most {size}; the first line warms up:")
                for number in (1, *map(int, clients.split(","))):
                    load(number, max(2 * number, count))


if __name__ == "__main__":
    typer.run(main)
