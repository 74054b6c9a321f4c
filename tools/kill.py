"""Kill every command that writes, start it again, and compare with what it makes undisturbed.

    python -m tools.kill --kills 104 --pairs 20 --out FOLDER

A kill is SIGKILL at a random moment of a command's life. Then the same command is started again,
and killed again or left to finish: its outputs must be equal to the undisturbed ones byte by byte
(of a training also the average and the moments), with no temporary file left. A pair is the same
command twice at once in one output: both make the whole result, or one does and the other ends
with exit code 2 and one line that names the process in its way.

Commands are forked from a server that has the libraries in memory, which saves their loading.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import sys
import time
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch
import typer
import yaml

from moveimg import cli
from moveimg.checkpoint import BUNDLED, load_model, save_model
from moveimg.config.model import NoMemoryConfig
from moveimg.model import Transformer
from moveimg.tables import markdown_table
from moveimg.training.settings import read_measurements
from tests.test_training import (
    encode_tiny_digits,
    newest_state,
    same_end,
    tokenizer_config,
    train_config,
)

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tools.kill", "torch.utils.tensorboard", "moveimg.pipeline",
                               "moveimg.evaluation.run", "moveimg.evaluation.reconstruct",
                               "moveimg.training.generator", "sklearn.datasets"])  # fmt: skip


@dataclass(frozen=True)
class Command:
    """A command line with OUT for its output; `files` are the patterns of outputs to compare."""

    words: list[str]
    files: tuple[str, ...]

    def line(self, out: Path) -> list[str]:
        """The command line that writes to `out`."""
        return [word.replace("OUT", str(out)) for word in self.words]


def list_commands(data: Path, folder: Path, steps: int = 30) -> dict[str, Command]:
    """The commands that write; `data` is what encode_tiny_digits made, `folder` gets configs."""
    configs = {}
    every = {"log_every": 20, "validate_every": 20, "preview_every": steps, "checkpoint_every": 2}
    for name, config in {
        "train": train_config(data, folder / "x", steps=steps, **every),
        "compared": train_config(data, folder / "x", steps=10, **every),
        "train-tokenizer": tokenizer_config(folder / "x", steps=steps // 2, **every),
    }.items():
        configs[name] = folder / f"{name}.yaml"
        configs[name].write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    tokenizer, model = data / "tokenizer", BUNDLED / "digits"
    parts = load_model(model)
    plain = Transformer(parts.generator.config.model_copy(update={"memory": NoMemoryConfig()}))
    save_model(folder / "plain", replace(parts, generator=plain), {})
    weights = ("model.safetensors", "tokenizer/model.safetensors")
    lines = {
        "encode": f"digits --tokenizer {tokenizer} --size 32 --out OUT",
        "train": f"{configs['train']} --set out=OUT",
        "train-tokenizer": f"{configs['train-tokenizer']} --set out=OUT",
        "convert": f"upcycle {folder / 'plain'} --slots 2 --out OUT",
        "evaluate": "digits --num-samples 40 --batch-size 4 --out OUT",
        "sample": f"--model {model} --num 3 --batch-size 2 --out OUT",
        "reconstruct": f"digits --tokenizer {tokenizer} --size 32 --no-rfid --out OUT",
        "compare": f"{configs['compared']} --seeds 0,1 --out OUT",
    }
    files = {
        "encode": ("*/*.npy", "*/manifest.json"),
        "train": weights,
        "train-tokenizer": ("model.safetensors",),
        "convert": ("*", "tokenizer/*"),
        "evaluate": ("samples.npz", "plan.json"),
        "sample": ("*.png",),
        "reconstruct": (),
        "compare": tuple(f"compared-seed{i}/{name}" for i in (0, 1) for name in weights),
    }
    return {name: Command([name, *line.split()], files[name]) for name, line in lines.items()}


def live(words: list[str], log: Path) -> None:
    """One life of a command, with its output in a file."""
    from moveimg.data.encode import encode_images

    torch.set_num_threads(1)
    assert encode_images.__kwdefaults__ is not None
    encode_images.__kwdefaults__["shard_size"] = 100  # so that a few digits are several shards
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["MOVEIMG_CACHE"] = str(log.parent / "cache")
    sys.argv = ["moveimg", *words]
    cli.main()


def start(command: Command, out: Path, log: Path) -> ForkServerProcess:
    """Start a command that writes to `out`."""
    log.write_text("")
    process = SERVER.Process(target=live, args=(command.line(out), log))
    process.start()
    return process


def finish(process: ForkServerProcess, log: Path) -> None:
    """Let a command end. Raises RuntimeError with its output unless its exit code is 0."""
    process.join()
    if process.exitcode:
        raise RuntimeError(
            f"exit code {process.exitcode}: {log.read_text(errors='replace')[-2000:]}"
        )


def read_outputs(command: Command, out: Path) -> dict[str, bytes]:
    """The bytes of the outputs by their paths."""
    paths = [out] if out.is_file() else [p for pattern in command.files for p in out.glob(pattern)]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths if path.is_file()}


def leftovers(out: Path) -> list[Path]:
    """Files and folders that only a writer at work has."""
    beside = out.parent.glob(f".{out.name}.*")
    return [path for path in (*out.rglob(".*"), *beside) if path.name != ".metadata"]


def require_equal(command: Command, whole: Path, other: Path) -> None:
    """Raise AssertionError where two results differ in a bit, or a temporary file is left."""
    expected, found = read_outputs(command, whole), read_outputs(command, other)
    assert expected and expected.keys() == found.keys(), (list(expected), list(found))
    for name, value in expected.items():
        assert value == found[name], f"{other / name} differs"
    if (whole / "training/metrics.jsonl").is_file():
        losses = [
            [one.loss for one in read_measurements(out / "training/metrics.jsonl")]
            for out in (whole, other)
        ]
        assert losses[0] == losses[1], losses
    if (whole / "training/checkpoints").is_dir():
        assert newest_state(whole).keys() and same_end(whole, other), "the checkpoints differ"
    assert not leftovers(other), leftovers(other)


def kill_command(command: Command, folder: Path, kills: int, seed: int = 0) -> int:
    """Kill a command `kills` times at random moments; returns how many lives ended by themselves.

    Raises AssertionError or RuntimeError where what was killed does not end as the undisturbed one.
    """
    rng, log = random.Random(seed), folder / "log"
    whole, killed = folder / "whole", folder / "killed"
    warm = SERVER.Process(target=os.getpid)  # starts the server
    warm.start()
    warm.join()
    begun = time.perf_counter()
    finish(start(command, whole, log), log)
    length = time.perf_counter() - begun
    done = ends = 0
    while done < kills:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        process = start(command, killed, log)
        process.join(rng.uniform(0, length))
        if process.is_alive():
            process.kill()
            process.join()
            done += 1
            print(f"kill {done} of {kills}, {ends} results compared", flush=True)
            if done < kills and rng.random() < 0.4:  # killed again
                continue
            process = start(command, killed, log)
            process.join()
        if not (process.exitcode == 2 and "there already" in log.read_text()):  # its end was lost
            finish(process, log)
        ends += 1
        require_equal(command, whole, killed)
        shutil.rmtree(killed) if killed.is_dir() else killed.unlink()
    return ends


def race(command: Command, folder: Path, seed: int = 0) -> str:
    """Start a command twice at once; returns `both`, or the line of the one that was refused."""
    logs, pair = [folder / "log-0", folder / "log-1"], folder / "pair"
    shutil.rmtree(folder / "cache", ignore_errors=True)
    processes = []
    for log in logs:
        processes.append(start(command, pair, log))
        time.sleep(random.Random(seed).uniform(0, 0.2))
    for process in processes:
        process.join()
    codes = [process.exitcode or 0 for process in processes]
    lines = [(log.read_text().strip().splitlines() or [""])[-1] for log in logs]
    assert sorted(codes) in ([0, 0], [0, 2]), (codes, lines)
    require_equal(command, folder / "whole", pair)
    shutil.rmtree(pair) if pair.is_dir() else pair.unlink()
    if codes == [0, 0]:
        return "both"
    refused = codes.index(2)
    assert f"process {processes[1 - refused].pid} " in lines[refused], lines[refused]
    return lines[refused]


def main(
    out: Path = typer.Option(...), kills: int = 104, pairs: int = 20, seed: int = 0, only: str = ""
) -> None:
    data = out / "data"
    if not data.exists():
        encode_tiny_digits(data)
    rows = []
    chosen = list_commands(data, out)
    chosen = {name: command for name, command in chosen.items() if only in ("", name)}
    for number, (name, command) in enumerate(chosen.items()):
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        n_kills, n_pairs = (
            total // len(chosen) + (number < total % len(chosen)) for total in (kills, pairs)
        )
        ends = kill_command(command, folder, n_kills, seed)
        results = [race(command, folder, seed + i) for i in range(n_pairs)]
        n_refused = n_pairs - results.count("both")
        numbers = {"kills": n_kills, "results": ends, "pairs": n_pairs, "one refused": n_refused}
        rows.append({"command": name} | {key: str(value) for key, value in numbers.items()})
        print(rows[-1], *sorted({*results} - {"both"})[:1], flush=True)
    print(markdown_table(rows, {key: key for key in rows[0]}))


if __name__ == "__main__":
    typer.run(main)
