"""Send a demo mixed requests from several visitors, and watch its memory.

    moveimg demo --port 7999 --model digits & python tools/load_test.py $! --requests 300

Prints the waiting times of each endpoint, and resident memory after every 30 requests.
"""

from __future__ import annotations

import io
import random
import statistics
import time
from base64 import b64encode
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import typer
from PIL import Image


def make_request(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """Return a random endpoint and its values; one in ten is invalid or too large."""
    if rng.random() < 0.1:
        return "generate", {"class_name": "x" * rng.choice([10, 10_000_000])}
    name = rng.choice(["generate"] * 3 + ["vary_guidance", "score", "reconstruct"])
    values: dict[str, Any] = {"class_name": rng.randrange(10), "seed": rng.randrange(1000)}
    if name == "generate":
        values |= {"num": rng.choice([1, 4, 8]), "bank": rng.random() < 0.8}
    elif name in ("reconstruct", "score"):
        buffer = io.BytesIO()
        Image.effect_noise((rng.choice([32, 500, 2000]),) * 2, 80).save(buffer, "png")
        values = {"image": b64encode(buffer.getvalue()).decode()}
    return name, values


def main(process: int, requests: int = 300, visitors: int = 6, port: int = 7999) -> None:
    waits: dict[tuple[str, str], list[float]] = defaultdict(list)
    url, rng = f"http://127.0.0.1:{port}/gradio_api/call", random.Random(0)
    work = [make_request(rng) for _ in range(requests)]

    def visit(job: tuple[str, dict[str, Any]]) -> None:
        name, begin, ended = job[0], time.perf_counter(), "refused"
        joined = httpx.post(f"{url}/v2/{name}", json=job[1], timeout=120)
        if joined.status_code == 200:
            reply = httpx.get(f"{url}/{name}/{joined.json()['event_id']}", timeout=600).text
            ended = "answered" if "event: complete" in reply else "refused"
        waits[name, ended].append(time.perf_counter() - begin)

    with ThreadPoolExecutor(visitors) as pool:
        for done in range(0, requests, 30):
            list(pool.map(visit, work[done : done + 30]))
            status = open(f"/proc/{process}/status").read()  # noqa: SIM115
            print(
                f"{done + 30}: {int(status.split('VmRSS:')[1].split()[0]) // 1024} MB", flush=True
            )
    for (name, ended), seconds in sorted(waits.items()):
        median, longest = statistics.median(seconds), max(seconds)
        print(f"{name} {ended}: {len(seconds)}, {median:.1f} s (longest {longest:.1f})")


if __name__ == "__main__":
    typer.run(main)
