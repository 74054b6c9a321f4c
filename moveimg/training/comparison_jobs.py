"""The trainings of a comparison, each `moveimg train` in a process of its own, several at a time.

Whatever ends the comparison early ends them too: they are sent SIGTERM, which makes them write a
checkpoint and stop, and are waited for.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from moveimg.training.comparison_runs import OneRun

ENDS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Processes:
    """The processes that run now; `stop` ends them, and lets no more begin."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen] = set()
        self.lock = threading.Lock()
        self.stopped = False

    def run(self, command: Sequence[str], log: Path, environment: dict[str, str]) -> int:
        """Run a command with its output in `log`; returns its exit code."""
        with log.open("w", encoding="utf-8") as file:
            with self.lock:
                if self.stopped:
                    return -signal.SIGTERM
                # In a session of its own: a terminal's Ctrl-C would kill it without a checkpoint.
                process = subprocess.Popen(
                    command, stdout=file, stderr=subprocess.STDOUT, env=environment,
                    start_new_session=True,
                )  # fmt: skip
                self.running.add(process)
            try:
                return process.wait()
            finally:
                with self.lock:
                    self.running.discard(process)

    def stop(self) -> None:
        """Send SIGTERM to what runs."""
        with self.lock:
            self.stopped = True
            for process in self.running:
                with suppress(OSError):
                    process.terminate()


def train_all(
    runs: Sequence[OneRun], overrides: Sequence[str], device: torch.device, jobs: int, logs: Path
) -> Generator[tuple[OneRun, str | None], None, None]:
    """Train `runs`, `jobs` at a time; yield each when it has ended, with what it failed of or None.

    The iterator must be closed (a with-block of contextlib.closing): that ends what still runs.
    Raises ValueError for less than one job.
    """
    if jobs < 1:
        raise ValueError(f"jobs {jobs}: expected at least 1")
    environment = dict(os.environ)
    if jobs > 1:  # else they would fight over the cores
        share = max(1, (os.cpu_count() or 1) // jobs)
        environment["OMP_NUM_THREADS"] = str(share)
    logs.mkdir(parents=True, exist_ok=True)
    processes = Processes()
    with ThreadPoolExecutor(max_workers=jobs) as pool, signals_raise():
        futures = {
            pool.submit(train_one, run, overrides, device, environment, logs, processes): run
            for run in runs
        }
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            processes.stop()
            pool.shutdown(wait=True)


def train_one(
    run: OneRun, overrides: Sequence[str], device: torch.device, environment: dict[str, str],
    logs: Path, processes: Processes,
) -> str | None:  # fmt: skip
    """Train one run; returns None, or in one line what it failed of."""
    command = [sys.executable, "-m", "moveimg", "train", str(run.path), "--device", str(device)]
    own = (f"seed={run.seed}", f"out={json.dumps(str(run.directory))}")
    for override in (*overrides, *own):
        command += ["--set", override]
    log = logs / f"{run.name}-seed{run.seed}.log"
    try:
        code = processes.run(command, log, environment)
        if not code:
            return None
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError as error:
        return f"{run.name}, seed {run.seed}: {error}"
    reason = lines[-1].removeprefix("error: ") if lines else f"exit code {code}"
    return f"{run.name}, seed {run.seed}: {reason} (see {log})"


@contextmanager
def signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block by SystemExit(128 + signal), as SIGINT does by its own."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {}
    for number in ENDS:
        with suppress(ValueError):  # only a main thread may listen
            if signal.getsignal(number) != signal.SIG_IGN:  # of nohup: stays
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
