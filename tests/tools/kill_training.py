"""Kill a training again and again, and compare what it makes with an uninterrupted one.

    python -m tests.tools.kill_training --kills 100 --out FOLDER

Every life of the process ends by SIGKILL at a random moment: mostly while it trains and writes
checkpoints (every second step), sometimes while it starts. Then it is left to finish. Weights,
their average and the optimizer's moments must be equal bit by bit, the model file byte by byte.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml

from moveimg.config import TrainConfig
from tests.test_training import encode_tiny_digits, newest_state, train_config

ROOT = Path(__file__).parents[2]
EARLY = 0.2  # share of the kills that may come before the first step


def command(config: TrainConfig, folder: Path) -> list[str]:
    """The command of a run, its settings written down."""
    path = folder / f"{config.out.name}.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    return [sys.executable, "-m", "moveimg", "train", str(path), "--device", "cpu"]


def live(arguments: list[str], log: Path) -> tuple[subprocess.Popen, float]:
    """Start a run; return when its loop has begun, or it has ended, and when that was."""
    with log.open("w") as file:
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    while process.poll() is None and "train:" not in log.read_text(errors="replace"):
        time.sleep(0.01)
    return process, time.perf_counter()


def end(process: subprocess.Popen, log: Path) -> None:
    """Let a run finish. Raises RuntimeError with what it said unless it ends well."""
    if process.wait():
        raise RuntimeError(log.read_text(errors="replace"))


def leftovers(out: Path) -> list[Path]:
    """Files and folders that only a writer under way has."""
    return [path for path in out.rglob(".*") if path.name != ".metadata"]


def compare_killed(folder: Path, steps: int, kills: int, seed: int = 0) -> list[int]:
    """Kill a run of `steps` steps `kills` times; the steps of its checkpoints after each kill.

    Raises AssertionError where the killed run ends with other bits than the one left alone.
    """
    encode_tiny_digits(folder)
    every = {"log_every": 20, "validate_every": 20, "preview_every": steps, "checkpoint_every": 2}
    whole, killed = (
        train_config(folder, folder / name, steps=steps, **every) for name in ("whole", "killed")
    )
    rng, log = random.Random(seed), folder / "log"
    begun = time.perf_counter()
    process, started = live(command(whole, folder), log)
    end(process, log)
    training, starting = time.perf_counter() - started, started - begun
    lives: list[int] = []
    while len(lives) < kills:
        early = rng.random() < EARLY
        begun = time.perf_counter()
        if early:
            with log.open("w") as file:
                process = subprocess.Popen(
                    command(killed, folder), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT
                )
            time.sleep(rng.uniform(0, 1.2 * starting))
        else:
            process, _ = live(command(killed, folder), log)
            time.sleep(rng.uniform(0, 2 * training / (kills + 1)))
        if process.poll() is not None:  # it got to its end, or failed
            end(process, log)
            break
        process.kill()
        process.wait()
        kept = sorted((killed.out / "training/checkpoints").glob("step-*"))
        lives.append(int(kept[-1].name.removeprefix("step-")) if kept else 0)
        print(f"kill {len(lives)}: step {lives[-1]}", flush=True)
    process, _ = live(command(killed, folder), log)
    end(process, log)
    expected, found = newest_state(whole.out), newest_state(killed.out)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key
    models = [(config.out / "model.safetensors").read_bytes() for config in (whole, killed)]
    assert models[0] == models[1]
    lines = [(c.out / "training/metrics.jsonl").read_text().splitlines() for c in (whole, killed)]
    losses = [[line.split('"loss"')[1] for line in each] for each in lines]
    assert losses[0] == losses[1]
    assert not leftovers(killed.out), leftovers(killed.out)
    return lives


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    lives = compare_killed(chosen.out, chosen.steps, chosen.kills, chosen.seed)
    print(f"{len(lives)} kills in {chosen.steps} steps: equal to the bit")


if __name__ == "__main__":
    main()
