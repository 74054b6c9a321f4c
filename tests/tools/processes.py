"""Trainings in several processes of this machine, as torchrun would start them.

After a step of a tokenizer its weights and its discriminator's must be the same in every process.
"""

from __future__ import annotations

import os
import signal
import socket
from multiprocessing import connection
from pathlib import Path

import torch
from torch.nn.utils import parameters_to_vector

from moveimg.config import RunConfig, TrainConfig
from moveimg.dist import processes
from moveimg.training.generator import train_generator
from moveimg.training.loop import Run
from moveimg.training.tokenizer import TokenizerTask, train_tokenizer
from tools.kill import SERVER

# A run, and the step at which the last process, and it alone, gets SIGTERM.
Job = tuple[RunConfig, int | None]


def launch(n: int, jobs: list[Job], folder: Path) -> None:
    """Do jobs in `n` processes. Raises RuntimeError with what they said if one fails."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(n)}
    logs = [folder / f"log-{rank}" for rank in range(n)]
    running = [
        SERVER.Process(
            target=work, args=(jobs, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, log)
        )
        for rank, log in enumerate(logs)
    ]
    for process in running:
        process.start()
    alive = running
    while alive and not any(process.exitcode for process in running):
        connection.wait([process.sentinel for process in alive])
        alive = [process for process in running if process.exitcode is None]
    for process in alive:  # one failed: the others would wait for it
        process.kill()
    if any(process.exitcode for process in running):
        raise RuntimeError("\n".join(log.read_text() for log in logs))


def work(jobs: list[Job], environment: dict[str, str], log: Path) -> None:
    """What one of the processes does."""
    os.environ |= environment
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    advance = Run.advance
    with processes("cpu") as world:
        for config, stop_at in jobs:

            def dying(run: Run, stop_at: int | None = stop_at) -> dict:
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
            train = train_generator if isinstance(config, TrainConfig) else train_tokenizer
            try:
                train(config, world)  # type: ignore[arg-type]
            except SystemExit as stop:
                assert stop.code == 143 and stop_at, stop.code
