"""Send a demo mixed requests from several visitors, and watch its memory.

    python tools/load_test.py --requests 300 --visitors 6
    python tools/load_test.py --requests 300 --slow 50    # with 50 connections that send nothing

Starts a demo of its own. Prints the waiting times of each endpoint, the longest time that the page
took to answer meanwhile, and the server's resident memory after every 30 requests.
"""

from __future__ import annotations

import io
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import typer
from PIL import Image


def start(port: int) -> tuple[subprocess.Popen[bytes], str]:
    """Start a demo; prints how long its page took to answer."""
    url, begin = f"http://127.0.0.1:{port}", time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "moveimg", "demo", "--port", str(port), "--queue", "128"]
    )
    while process.poll() is None:
        try:
            httpx.get(url, timeout=5).raise_for_status()
            print(f"page after {time.perf_counter() - begin:.1f} s")
            return process, url
        except httpx.HTTPError:
            time.sleep(0.05)
    raise SystemExit("the demo did not start")


def make_request(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """Return a random endpoint and its values; one in ten is invalid or too large."""
    if rng.random() < 0.1:
        return "generate", {"class_name": "x" * rng.choice([10, 10_000_000])}
    name = rng.choice(["generate"] * 3 + ["vary_guidance", "score", "reconstruct", "classes"])
    values: dict[str, Any] = {"class_name": rng.randrange(10), "seed": rng.randrange(1000)}
    if name == "generate":
        values |= {"num": rng.choice([1, 4, 8]), "bank": rng.random() < 0.8}
    elif name == "classes":
        values = {"search": "o"}
    elif name in ("reconstruct", "score"):
        buffer = io.BytesIO()
        Image.effect_noise((rng.choice([32, 500, 2000]),) * 2, 80).save(buffer, "png")
        values = {"image": b64encode(buffer.getvalue()).decode()}
    return name, values


def send(url: str, name: str, values: dict[str, Any]) -> str:
    """Send a request and wait for its result: answered, refused or failed."""
    joined = httpx.post(f"{url}/gradio_api/call/v2/{name}", json=values, timeout=120)
    if joined.status_code != 200:
        return "refused" if joined.status_code == 422 else "failed"
    path = f"{url}/gradio_api/call/{name}/{joined.json()['event_id']}"
    reply = httpx.get(path, timeout=600).text
    return "answered" if "event: complete" in reply else "refused"


def resident(process: subprocess.Popen[bytes]) -> float:
    """Return a process's resident memory in MB."""
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def main(requests: int = 300, visitors: int = 6, slow: int = 0, port: int = 7999) -> None:
    process, url = start(port)
    waits: dict[tuple[str, str], list[float]] = defaultdict(list)
    rng, pages, over = random.Random(0), [], threading.Event()
    jobs = [make_request(rng) for _ in range(requests)]

    def visit(job: tuple[str, dict[str, Any]]) -> None:
        begin = time.perf_counter()
        waits[job[0], send(url, *job)].append(time.perf_counter() - begin)

    def watch() -> None:
        while not over.wait(0.25):
            begin = time.perf_counter()
            httpx.get(f"{url}/theme.css", timeout=120)
            pages.append(time.perf_counter() - begin)

    try:
        send(url, "generate", {})  # loads the model
        held = [socket.create_connection(("127.0.0.1", port)) for _ in range(slow)]
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        print(f"memory at first: {resident(process):.0f} MB")
        with ThreadPoolExecutor(visitors) as pool:
            for done in range(0, requests, 30):
                list(pool.map(visit, jobs[done : done + 30]))
                print(f"after {done + 30} requests: {resident(process):.0f} MB", flush=True)
        for (name, ended), seconds in sorted(waits.items()):
            median, longest = statistics.median(seconds), max(seconds)
            print(f"{name} {ended}: {len(seconds)}, {median:.1f} s (longest {longest:.1f})")
        print(f"a file of the page: {statistics.median(pages):.2f} s (longest {max(pages):.2f})")
        print(f"slow connections held: {len(held)}")
        over.set()
        watcher.join()  # the server ends after its last request
    finally:
        process.terminate()
        process.wait(30)


if __name__ == "__main__":
    typer.run(main)
