"""How long the demo takes, and what many visitors at once do to it.

    python apps/demo_visitors.py  # starts a demo of its own; 20 visitors for a minute
    python apps/demo_visitors.py --visitors 5 --seconds 20

Prints: seconds from the command until the page answers, from the press until the first partial
picture and until eight pictures (both in a browser, where there is one), then how many requests of
all visitors succeeded or failed, their waiting times, and the server's memory before and after.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx

DEMO = Path(__file__).with_name("demo.py")


def start(port: int) -> tuple[subprocess.Popen, str, float]:
    """A demo in a process of its own: it, its address, seconds until the page answered."""
    url, begun = f"http://127.0.0.1:{port}", time.perf_counter()
    process = subprocess.Popen([sys.executable, str(DEMO), "--port", str(port)])
    while True:
        if process.poll() is not None:
            raise SystemExit("the demo did not start")
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return process, url, time.perf_counter() - begun
        except httpx.HTTPError:
            time.sleep(0.05)


def resident(process: subprocess.Popen) -> float:
    """Resident memory of a process in MB."""
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def cpu_seconds(process: subprocess.Popen) -> float:
    """CPU time that a process has used, which other programs on the machine do not add to."""
    fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def generate(url: str, num: int, seed: int) -> bool:
    """One visitor's request by plain HTTP; whether it was answered with its pictures."""
    api = f"{url}/gradio_api/call"
    body = {"class_name": str(seed % 10), "num": num, "seed": seed}
    joined = httpx.post(f"{api}/v2/generate", json=body, timeout=60)
    if joined.status_code != 200:
        return False
    reply = httpx.get(f"{api}/generate/{joined.json()['event_id']}", timeout=300).text
    return "event: complete" in reply and reply.count('"png"') == num


def press(url: str) -> tuple[float, float]:
    """Seconds from the press until the first partial picture, and until all eight are done."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page()
        page.set_default_timeout(300_000)
        page.goto(url)
        page.wait_for_selector("#generate")
        begun = time.perf_counter()
        page.click("#generate")
        page.wait_for_selector("#gallery img")
        first = time.perf_counter() - begun
        page.wait_for_selector("#gallery [data-pick='7']")
        done = time.perf_counter() - begun
        browser.close()
    return first, done


def crowd(url: str, visitors: int, seconds: float, num: int) -> tuple[int, int, list[float]]:
    """Visitors who ask again as soon as they are answered: (answered, failed, waits in seconds)."""
    waits: list[float] = []
    failed: list[int] = []
    end = time.perf_counter() + seconds

    def visit(number: int) -> None:
        turn = 0
        while time.perf_counter() < end:
            begun = time.perf_counter()
            try:
                good = generate(url, num, 1000 * number + turn)
            except httpx.HTTPError:
                good = False
            if good:
                waits.append(time.perf_counter() - begun)
            else:
                failed.append(number)
            turn += 1

    threads = [threading.Thread(target=visit, args=(i,)) for i in range(visitors)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(waits), len(failed), waits


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--visitors", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--num", type=int, default=4, help="pictures of a request")
    parser.add_argument("--port", type=int, default=7999)
    given = parser.parse_args()
    process, url, ready = start(given.port)
    try:
        print(f"page ready {ready:.1f} s after the command ({cpu_seconds(process):.1f} s of CPU)")
        generate(url, 1, 0)  # the model is loaded now
        if shutil.which("chromium"):
            for _ in range(2):
                used = cpu_seconds(process)
                first, done = press(url)
                print(
                    f"first partial picture after {first:.2f} s, eight pictures after {done:.2f} s "
                    f"({cpu_seconds(process) - used:.1f} s of CPU, serving the page included)"
                )
        crowd(url, given.visitors, 1, given.num)  # caches and threads are there now
        before = resident(process)
        answered, failed, waits = crowd(url, given.visitors, given.seconds, given.num)
        print(
            f"{given.visitors} visitors, {given.seconds:g} s: {answered} answered, "
            f"{failed} failed, "
            f"waits {statistics.median(waits):.1f} s (median), {max(waits):.1f} s (longest)"
        )
        during = resident(process)
        time.sleep(10)
        print(
            f"memory {before:.0f} MB before, {during:.0f} MB then, {resident(process):.0f} MB later"
        )
    finally:
        process.terminate()
        process.wait(30)


if __name__ == "__main__":
    main()
