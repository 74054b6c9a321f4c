"""Kill every command that writes files, restart it, and compare with an uninterrupted run.

    python -m tools.kill --kills 104 --pairs 24 --out FOLDER

A kill is SIGKILL at a random moment of a command's run. The command is then restarted, and killed
again or left to finish: its outputs must equal those of the uninterrupted run to the byte (of a
training also EMA and optimizer state), without temporary files. A pair is one command started twice
at the same time: one process is refused, and names the other process, or runs after it.
"""

import multiprocessing
import os
import random
import shutil
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch
import typer
import yaml

from moveimg import cli
from moveimg.checkpoint import BUNDLED
from tests import test_training as runs

SERVER = multiprocessing.get_context("forkserver")  # its children inherit the imported libraries
SERVER.set_forkserver_preload(["tools.kill", "torch.utils.tensorboard", "moveimg.evaluation.run",
                               "moveimg.training.generator", "sklearn.datasets"])  # fmt: skip
WEIGHTS = ("model.safetensors", "tokenizer/model.safetensors")
Command = tuple[str, tuple[str, ...]]  # a command line, and patterns of the outputs to compare


def list_commands(data: Path, folder: Path) -> dict[str, Command]:
    """List commands that write; `data` is encode_tiny_digits' output, `folder` gets configs."""
    every = {"log_every": 20, "validate_every": 20, "preview_every": 30, "checkpoint_every": 2}
    for name, config in {
        "train": runs.train_config(data, folder / "x", steps=20, **every),
        "train-tokenizer": runs.tokenizer_config(folder / "x", steps=15, **every),
    }.items():
        text = yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True))
        (folder / f"{name}.yaml").write_text(text)
    compared = tuple(f"train-seed{i}/{name}" for i in (0, 1) for name in WEIGHTS)
    encode = f"digits --tokenizer {data}/tokenizer --size 32 --out OUT"
    return {
        "encode": (encode, ("*/*.npy", "*/manifest.json")),
        "train": (f"{folder}/train.yaml --set out=OUT", WEIGHTS),
        "train-tokenizer": (f"{folder}/train-tokenizer.yaml --set out=OUT", WEIGHTS[:1]),
        "evaluate": ("digits --num-samples 40 --batch-size 4 --out OUT", ("samples.npz",)),
        "sample": (f"--model {BUNDLED}/digits --num 3 --batch-size 2 --out OUT", ("*.png",)),
        "reconstruct": (f"{encode} --no-rfid", ()),
        "compare": (f"{folder}/train.yaml --seeds 0,1 --out OUT", compared),
    }


def run_command(words: list[str], log: Path) -> None:
    """Run a command in this process, with its output in the file `log`."""
    from moveimg.data.codes import EncodeSettings

    torch.set_num_threads(1)
    EncodeSettings.model_fields["shard_size"].default = 100  # gives several shards
    EncodeSettings.model_rebuild(force=True)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "MOVEIMG_CACHE": str(log.parent / "cache")}
    sys.argv = ["moveimg", *words]
    cli.main()


def start(name: str, command: Command, out: Path, log: Path) -> ForkServerProcess:
    """Start a command that writes to `out`, with its output in the file `log`."""
    words = [name, *command[0].replace("OUT", str(out)).split()]
    process = SERVER.Process(target=run_command, args=(words, log))
    process.start()
    return process


def require_equal(command: Command, whole: Path, other: Path) -> None:
    """Raise AssertionError if two outputs differ or a temporary file is left; deletes `other`."""
    results = []
    for out in (whole, other):
        paths = [out] if out.is_file() else [p for pattern in command[1] for p in out.glob(pattern)]
        results.append({path.relative_to(out): path.read_bytes() for path in paths})
    assert results[0] and results[0] == results[1], f"{other} differs"
    if (whole / "training/checkpoints").is_dir():
        assert runs.same_end(whole, other), "the checkpoints differ"
    left = [*other.rglob(".*"), *other.parent.glob(f".{other.name}.*")]
    assert all(path.name == ".metadata" for path in left), left
    shutil.rmtree(other) if other.is_dir() else other.unlink()


def kill_command(name: str, command: Command, folder: Path, kills: int, seed: int) -> int:
    """Kill a command `kills` times at random moments; returns the number of compared outputs."""
    rng, log, begun = random.Random(seed), folder / "log", time.perf_counter()
    process = start(name, command, folder / "whole", log)
    process.join()
    length, done, compared = time.perf_counter() - begun, 0, 0
    while done < kills or process.exitcode != 0:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        process = start(name, command, folder / "killed", log)
        process.join(rng.uniform(0, length) if done < kills else None)
        if process.is_alive():
            process.kill()
            process.join()
            done += 1
            if rng.random() < 0.4:  # to be killed again
                continue
            process = start(name, command, folder / "killed", log)
            process.join()
        assert process.exitcode == 0, log.read_text()
        compared += 1
        require_equal(command, folder / "whole", folder / "killed")
    return compared


def run_pair(name: str, command: Command, folder: Path) -> bool:
    """Run a command twice at the same time; returns whether one process was refused."""
    logs = [folder / "log-0", folder / "log-1"]
    pair = [start(name, command, folder / "pair", log) for log in logs]
    for process in pair:
        process.join()
    require_equal(command, folder / "whole", folder / "pair")
    refused = [log.read_text() for process, log in zip(pair, logs, strict=True) if process.exitcode]
    assert all(any(str(process.pid) in text for process in pair) for text in refused), refused
    return bool(refused)


def main(out: Path = typer.Option(...), kills: int = 104, pairs: int = 24, seed: int = 0) -> None:
    if not (data := out / "data").exists():
        runs.encode_tiny_digits(data)
    commands = list_commands(data, out)
    each, twice = -(-kills // len(commands)), -(-pairs // len(commands))
    for name, command in commands.items():
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).mkdir(parents=True)
        compared = kill_command(name, command, out / name, each, seed)
        refused = sum(run_pair(name, command, out / name) for _ in range(twice))
        print(f"{name}: {each} kills, {compared} results compared", end="; ")
        print(f"{twice} pairs, {refused} with one refused", flush=True)


if __name__ == "__main__":
    typer.run(main)
