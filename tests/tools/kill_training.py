"""Kill a training again and again, and compare what it makes with an uninterrupted one.

    python -m tests.tools.kill_training --kills 100 --out FOLDER

Every life of the process ends by SIGKILL at a random moment: mostly while it trains and writes
checkpoints (every second step), sometimes while it starts. Then it is left to finish. Weights,
their average and the optimizer's moments must be equal bit by bit, the model file byte by byte.
Lives are forked from a server that has the libraries in memory, which saves their loading.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch
import yaml

from moveimg import cli
from moveimg.config import TrainConfig
from tests.test_training import encode_tiny_digits, newest_state, train_config

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.tools.kill_training", "torch.utils.tensorboard"])
EARLY = 0.2  # share of the kills that may come before the first step


def train(path: Path, log: Path) -> None:
    """One life: the command, with what it says in a file."""
    torch.set_num_threads(1)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["moveimg", "train", str(path), "--device", "cpu"]
    cli.main()


def start(config: TrainConfig, log: Path) -> ForkServerProcess:
    """Start a run, its settings written down beside it."""
    path = log.with_name(f"{config.out.name}.yaml")
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    log.write_text("")
    process = SERVER.Process(target=train, args=(path, log))
    process.start()
    return process


def until_it_trains(process: ForkServerProcess, log: Path) -> None:
    """Wait until a run's loop has begun, or it has ended."""
    while process.is_alive() and "train:" not in log.read_text(errors="replace"):
        time.sleep(0.005)


def end(process: ForkServerProcess, log: Path) -> None:
    """Let a run finish. Raises RuntimeError with what it said unless it ends well."""
    process.join()
    if process.exitcode:
        raise RuntimeError(log.read_text(errors="replace"))


def leftovers(out: Path) -> list[Path]:
    """Files and folders that only a writer under way has."""
    return [path for path in out.rglob(".*") if path.name != ".metadata"]


def compare_killed(data: Path, folder: Path, steps: int, kills: int, seed: int = 0) -> list[int]:
    """Kill a run of `steps` steps `kills` times; the steps of its checkpoints after each kill.

    `data` is what encode_tiny_digits made. A run that reaches its end in between is compared, and
    begun anew.
    Raises AssertionError where a killed run ends with other bits than the one left alone.
    """
    every = {"log_every": 20, "validate_every": 20, "preview_every": steps, "checkpoint_every": 2}
    whole, killed = (
        train_config(data, folder / name, steps=steps, **every) for name in ("whole", "killed")
    )
    rng, log = random.Random(seed), folder / "log"
    begun = time.perf_counter()
    process = start(whole, log)
    until_it_trains(process, log)
    started = time.perf_counter()
    end(process, log)
    training, starting = time.perf_counter() - started, started - begun
    lives: list[int] = []
    while len(lives) < kills:
        process = start(killed, log)
        if rng.random() < EARLY:
            time.sleep(rng.uniform(0, 1.2 * starting))
        else:
            until_it_trains(process, log)
            time.sleep(rng.uniform(0, 2 * training / (kills + 1)))
        if not process.is_alive():  # it got to its end, or failed: another one takes its place
            end(process, log)
            require_equal(whole.out, killed.out)
            shutil.rmtree(killed.out)
            continue
        process.kill()
        process.join()
        kept = sorted((killed.out / "training/checkpoints").glob("step-*"))
        lives.append(int(kept[-1].name.removeprefix("step-")) if kept else 0)
        print(f"kill {len(lives)}: step {lives[-1]}", flush=True)
    end(start(killed, log), log)
    require_equal(whole.out, killed.out)
    return lives


def require_equal(whole: Path, killed: Path) -> None:
    """Raise AssertionError where two runs' states, models or held-out losses differ in a bit."""
    expected, found = newest_state(whole), newest_state(killed)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key
    models = [(out / "model.safetensors").read_bytes() for out in (whole, killed)]
    assert models[0] == models[1]
    lines = [(out / "training/metrics.jsonl").read_text().splitlines() for out in (whole, killed)]
    losses = [[line.split('"loss"')[1] for line in each] for each in lines]
    assert losses[0] == losses[1]
    assert not leftovers(killed), leftovers(killed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    encode_tiny_digits(chosen.out)
    lives = compare_killed(chosen.out, chosen.out, chosen.steps, chosen.kills, chosen.seed)
    print(f"{len(lives)} kills in {chosen.steps} steps: equal to the bit")


if __name__ == "__main__":
    main()
