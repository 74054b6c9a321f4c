"""Trainings in several processes of this machine, as torchrun would start them.

`launch` starts `python -m tests.tools.processes JSON` N times, with the jobs of the file.

A job is {"config": settings of a run, "stop_at": step or null}. At `stop_at` the last process, and
it alone, gets SIGTERM.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def launch(n: int, jobs: list[dict], folder: Path) -> None:
    """Run the jobs in `n` processes. Raises RuntimeError with what they said if one fails."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs, default=str))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n)}
    shared |= {"OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.tools.processes", str(path)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(n)
    ]
    said = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError("\n".join(said))


def work(jobs: list[dict]) -> None:
    """What one of the processes does."""
    import torch

    from moveimg.config import TrainConfig, validate
    from moveimg.training.distributed import processes
    from moveimg.training.generator import train_generator
    from moveimg.training.loop import Run

    torch.set_num_threads(1)
    advance = Run.advance
    with processes("cpu") as world:
        for job in jobs:

            def dying(run: Run, stop_at: int | None = job["stop_at"]) -> dict:
                scalars = advance(run)
                if run.step == stop_at and world.rank == world.size - 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                return scalars

            Run.advance = dying  # type: ignore[method-assign]
            try:
                train_generator(validate(TrainConfig, job["config"], "job"), world)
            except SystemExit as stop:
                assert stop.code == 143 and job["stop_at"], stop.code


if __name__ == "__main__":
    work(json.loads(Path(sys.argv[1]).read_text()))
