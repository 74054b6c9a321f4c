"""Send a demo mixed requests from six visitors; print waits, and memory after every 30 requests.

moveimg demo --port 7999 --model digits & python tools/load_test.py $! --requests 300
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import typer
from PIL import Image

from moveimg.demo.jobs import image_uri


def make_request(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """Return a random endpoint and its values; one in ten is too large."""
    if rng.random() < 0.1:
        return "generate", {"class_name": "x" * 10_000_000}
    name = rng.choice(["generate"] * 3 + ["score", "reconstruct"])
    if name == "generate":
        values = {"num": rng.choice([1, 4, 8]), "bank": rng.random() < 0.8}
        return name, values | {"class_name": rng.randrange(10), "seed": rng.randrange(1000)}
    noise = Image.effect_noise((rng.choice([32, 500, 2000]),) * 2, 80)
    return name, {"image": image_uri(noise, {})}


def main(process: int, requests: int = 300, port: int = 7999) -> None:
    waits: dict[tuple[str, int], list[float]] = defaultdict(list)
    url, rng = f"http://127.0.0.1:{port}/gradio_api/call", random.Random(0)

    def visit(_: int) -> None:
        (name, values), begin = make_request(rng), time.perf_counter()
        answer = httpx.post(f"{url}/v2/{name}", json=values, timeout=120)
        if answer.is_success:
            answer = httpx.get(f"{url}/{name}/{answer.json()['event_id']}", timeout=600)
        waits[name, answer.status_code].append(time.perf_counter() - begin)

    with ThreadPoolExecutor(6) as pool:
        for done in range(30, requests + 1, 30):
            list(pool.map(visit, range(30)))
            status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
            print(f"{done}: {int(status.split('VmRSS:')[1].split()[0]) // 1024} MB", flush=True)
    for (name, code), seconds in sorted(waits.items()):
        longest = f"{sum(seconds) / len(seconds):.1f} s (longest {max(seconds):.1f})"
        print(f"{name} {code}: {len(seconds)}, {longest}")


if __name__ == "__main__":
    typer.run(main)
