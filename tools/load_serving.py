"""Measure `moveimg serve`: throughput and latency by number of clients, killed replicas, memory.

    python tools/load_serving.py                    # 1, 8, 32 clients, with and without batching
    python tools/load_serving.py --model gpt-b --count 8 --clients 1,8    # random weights, VQ-16
    python tools/load_serving.py --kill             # kills one of two replicas under load
    python tools/load_serving.py --minutes 10       # memory under load

Starts services on this machine. A client sends its next request after the answer to its last
request; request i asks for one image with seed i.
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
MARK = f"MOVEIMG_LOAD={os.getpid()}"  # environment variable that marks the service's processes


@contextmanager
def service(model: str, *options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run a service during the block, which begins when the service can draw."""
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
    """Return the folders in /proc of the service's processes whose names contain `name`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if MARK.encode() in (folder / "environ").read_bytes():
                found += [folder] * (name in (folder / "comm").read_text(encoding="utf-8"))
    return found


def load(clients: int, count: int, seconds: float = 1e9) -> dict[int, str]:
    """Send at most `count` requests, print rate and latency, and return the images by seed."""
    begun, latencies, images, statuses = time.perf_counter(), [], {}, Counter[int]()

    def visit(seed: int) -> None:
        start = time.perf_counter()
        if start - begun < seconds:
            reply = CLIENT.post("/v1/images/generations", json={"class": 0, "seed": seed})
            statuses[reply.status_code] += 1
            if reply.is_success:
                latencies.append(time.perf_counter() - start)
                images[seed] = reply.json()["data"][0]["b64_json"]

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(visit, range(count)))
    rate, p50 = len(latencies) / (time.perf_counter() - begun), np.median(latencies)
    print(f"{clients:3} clients: {rate:.3g} images/s, p50 {p50:.3g} s, "
          f"p95 {np.percentile(latencies, 95):.3g} s, answers {dict(statuses)}")  # fmt: skip
    return images


def watch(minutes: int, kill: bool) -> None:
    """Print rate, latency and memory (shared pages counted once) of each minute under load."""
    for _ in range(minutes):
        with ThreadPoolExecutor() as pool:
            pool.submit(load, 8, 10**6, 60)
            if kill:
                time.sleep(20)
                os.kill(int(list_processes("ray::ServeRepli")[0].name), signal.SIGKILL)
        texts = [(folder / "smaps_rollup").read_text("ascii") for folder in list_processes()]
        kilobytes = sum(int(text.split("Pss:")[1].split()[0]) for text in texts)
        print(f"{kilobytes / 1024:.0f} MB, {CLIENT.get('/health').text}", flush=True)


def main(
    model: str = "fashion",
    kill: bool = False,
    minutes: int = 0,
    count: int = 32,
    clients: str = "1,8,32",
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if model == "gpt-b":
            generator = Transformer(load_config("imagenet-b-256-standard", ModelFile).model)
            generator.head.reset_parameters()  # not zeros
            names, settings = list(map(str, range(1000))), SamplingSettings(cfg_scale=2)
            tokenizer = vq.AutoencoderTokenizer(vq.VQConfig())
            save_model(folder, ModelParts(generator, tokenizer, names, settings))
            model = folder
        if kill or minutes:
            with service(model, "--replicas", 1 + kill):
                watch(max(minutes, 2), kill)
            return
        alone: dict[int, str] = {}
        for size, window in ((32, 0.02), (1, 0)):
            with service(model, "--batch-size", size, "--window", window):
                print(f"batches of at most {size}; the first line warms up:")
                load(1, 1)
                for number in map(int, clients.split(",")):
                    images = load(number, max(2 * number, count))
                    alone = alone or images
                    same = sum(images[seed] == image for seed, image in alone.items())
                    print(f"{same} of {len(alone)} images equal those for one client", flush=True)


if __name__ == "__main__":
    typer.run(main)
