"""Send a demo mixed requests of six visitors; print answers, latencies, and the demo's memory.

moveimg demo --port 7999 --model digits & python tools/load_test.py $! --requests 300
"""

import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import typer
from PIL import Image

from moveimg.demo.jobs import image_uri


def make_request(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """Return a random endpoint and values for it; one request in ten is too large."""
    if rng.random() < 0.1:
        return "generate", {"class_name": "x" * 10_000_000}
    if rng.random() < 0.6:
        values = {"num": rng.choice([1, 4, 8]), "bank": rng.random() < 0.8}
        return "generate", values | {"class_name": rng.randrange(10)}
    noise = Image.effect_noise((rng.choice([32, 500, 2000]),) * 2, 80)
    return rng.choice(["score", "reconstruct"]), {"image": image_uri(noise, {})}


def main(process: int, requests: int = 300, port: int = 7999) -> None:
    url, rng, answers = f"http://127.0.0.1:{port}/gradio_api/call", random.Random(0), Counter[str]()

    def visit(_: int) -> float:
        (name, values), begin = make_request(rng), time.perf_counter()
        answer = httpx.post(f"{url}/v2/{name}", json=values, timeout=120)
        if answer.is_success:
            answer = httpx.get(f"{url}/{name}/{answer.json()['event_id']}", timeout=600)
        answers[f"{name} {answer.status_code}"] += 1
        return time.perf_counter() - begin

    with ThreadPoolExecutor(6) as pool:
        for done in range(30, requests + 1, 30):
            waits = sorted(pool.map(visit, range(30)))
            status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
            memory = int(status.split("VmRSS:")[1].split()[0]) // 1024
            print(f"{done}: {memory} MB, waits {waits[15]:.1f} to {waits[-1]:.1f} s", flush=True)
    print(dict(answers))


if __name__ == "__main__":
    typer.run(main)
