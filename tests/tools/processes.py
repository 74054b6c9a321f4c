"""Trainings in several processes of this machine, as torchrun would start them.

`launch` starts `python -m tests.tools.processes JSON` N times, with the jobs of the file. After a
step of a tokenizer all weights, its discriminator's, too, must be the same in every process.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from moveimg.config import RunConfig, TokenizerTrainConfig, TrainConfig
from moveimg.errors import validate


def job(config: RunConfig, stop_at: int | None = None) -> dict:
    """A run; at step `stop_at` the last process, and it alone, gets SIGTERM."""
    kind = "generator" if isinstance(config, TrainConfig) else "tokenizer"
    settings = config.model_dump(mode="json", exclude_unset=True)
    return {"kind": kind, "config": settings, "stop_at": stop_at}


def launch(n: int, jobs: list[dict], folder: Path) -> None:
    """Do jobs (of `job`) in `n` processes. Raises RuntimeError with what they said if one fails."""
    (folder / "jobs.json").write_text(json.dumps(jobs, default=str))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(n)}
    words = [sys.executable, "-m", "tests.tools.processes", str(folder / "jobs.json")]
    running = [
        subprocess.Popen(
            words, cwd=Path(__file__).parents[2], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env={**os.environ, **shared, "OMP_NUM_THREADS": "1"}
            | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(n)
    ]  # fmt: skip
    said = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError("\n".join(said))


def work(jobs: list[dict]) -> None:
    """What one of the processes does."""
    import torch
    from torch.nn.utils import parameters_to_vector

    from moveimg.dist import processes
    from moveimg.training.generator import train_generator
    from moveimg.training.loop import Run
    from moveimg.training.tokenizer import TokenizerTask, train_tokenizer

    torch.set_num_threads(1)
    advance = Run.advance
    with processes("cpu") as world:
        for job in jobs:

            def dying(run: Run, stop_at: int | None = job["stop_at"]) -> dict:
                scalars = advance(run)
                if isinstance(task := run.task, TokenizerTask):
                    judge = [] if task.adversary is None else [task.adversary.discriminator]
                    for model in (task.model, *judge):
                        weights = parameters_to_vector(model.parameters()).detach().double()
                        assert torch.equal(world.mean(weights), weights)
                if run.step == stop_at and world.rank == world.size - 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                return scalars

            Run.advance = dying  # type: ignore[method-assign]
            try:
                if job["kind"] == "tokenizer":
                    train_tokenizer(validate(TokenizerTrainConfig, job["config"], "job"), world)
                else:
                    train_generator(validate(TrainConfig, job["config"], "job"), world)
            except SystemExit as stop:
                assert stop.code == 143 and job["stop_at"], stop.code


if __name__ == "__main__":
    work(json.loads(Path(sys.argv[1]).read_text()))
