"""Several configs with several seeds in one table: the same steps, data order and settings.

Each training is a process of its own, `moveimg train`, so that its peak memory is its own. The
table is made from what it leaves in its directory: metrics.jsonl and config.json.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student

from moveimg import plots
from moveimg.checkpoint import read_about, read_model_config
from moveimg.config import TrainConfig, load_config
from moveimg.device import hardware
from moveimg.dist import die_with_parent, signals_raise
from moveimg.files import write_json, write_text
from moveimg.model import model_cost
from moveimg.progress import progress_bar
from moveimg.tables import markdown_table
from moveimg.training.logging import (
    Measurement,
    changed_settings,
    differing,
    flatten_settings,
    read_measurements,
)

# Keys in which the configs may differ: the model's slots and size, and what the codes decide.
COMPARED = ("out", "seed", "model.attention", "model.memory", "model.ffn", "model.n_layer",
            "model.n_head", "model.width", "model.codebook_size", "model.n_classes",
            "model.grid")  # fmt: skip


@dataclass(frozen=True)
class ComparedRun:
    """A config with a seed, trained in `config.out`."""

    name: str
    path: Path
    config: TrainConfig

    def __str__(self) -> str:
        return f"{self.name}, seed {self.config.seed}"

    def measurements(self) -> list[Measurement]:
        """The lines of metrics.jsonl."""
        return read_measurements(self.config.out / "training" / "metrics.jsonl")

    def changed_settings(self) -> dict[str, tuple[Any, Any]]:
        """Settings in which the run in the directory differs from this one: before and now."""
        path = self.config.out / "training" / "config.yaml"
        return changed_settings(path, self.config) if path.is_file() else {}

    def finished(self) -> bool:
        """Whether the directory holds the model of this run's last step, and its measurement."""
        if not (self.config.out / "config.json").is_file() or not self.measurements():
            return False
        return read_about(self.config.out).get("step") == self.config.steps

    def outcome(self) -> dict[str, Any]:
        """The last measurement and the learning curve of a finished run."""
        lines = self.measurements()  # a stopped run has had several processes
        return {
            "seed": self.config.seed,
            "loss": lines[-1].loss,
            "steps_per_second": lines[-1].step / max(lines[-1].seconds, 1e-9),
            "peak_memory": max(line.peak_memory or 0 for line in lines),
            "curve": [[line.step, line.loss] for line in lines],
        }


def parse_seeds(text: str) -> list[int]:
    """The seeds of `0,1,2`. Raises ValueError for anything else, or a repeated seed."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 11 for part in parts) or len({*parts}) < len(parts):
        raise ValueError(f"seeds {text[:60]!r}: expected different whole numbers, as in 0,1,2")
    return [int(part) for part in parts]


def compare(
    configs: Sequence[Path],
    seeds: Sequence[int],
    out: Path,
    overrides: Sequence[str],
    device: torch.device,
    jobs: int = 1,
    vary: Sequence[str] = (),
) -> str:
    """Train every config with every seed in out/NAME-seedN; write and return the table.

    A finished run is read, a stopped one continues. out/ receives table.md, table.json (with the
    learning curves), two plots and logs/, anew whenever all seeds of a config are done; the first
    of those configs is the baseline of the others.

    The configs may differ in the model's slots and size, and in the keys of `vary` and those below
    them (`optimizer.lr`). `overrides`, as `key.path=value`, are for all configs. `jobs` trainings
    run at the same time, each with its share of the CPU cores.

    Raises ValueError when two configs have one name or differ in more, when a run's folder holds
    another run, or, after all others are done, for trainings that failed.
    """
    runs = list_runs(configs, seeds, out, overrides, vary)
    about = {
        "settings": flatten_settings(runs[0].config, COMPARED),
        "hardware": {**hardware(device), "jobs": jobs},
    }
    missing = [run for run in runs if not run.finished()]
    table, failures = write_report(runs, out, about), []
    trainings = train_all(missing, overrides, device, jobs, out / "logs")
    with progress_bar(len(missing), "compare", "run") as bar, closing(trainings):
        for run, failure in trainings:
            bar.update()
            if failure is None and not run.finished():
                failure = "ended without the model of its last step"
            if failure is None:
                bar.write(f"{run}: loss {run.measurements()[-1].loss:.4f}", file=sys.stderr)
                table = write_report(runs, out, about)
            else:
                failures.append(f"{run}: {failure}")
                bar.write(f"failed: {failures[-1]}", file=sys.stderr)
    if failures:
        raise ValueError("; ".join(failures))
    return table


def list_runs(
    configs: Sequence[Path],
    seeds: Sequence[int],
    out: Path,
    overrides: Sequence[str],
    vary: Sequence[str] = (),
) -> list[ComparedRun]:
    """Every config with every seed. Raises ValueError where they cannot be compared."""
    loaded = {path.stem: (path, load_config(path, TrainConfig, overrides)) for path in configs}
    if len(loaded) != len(configs):
        raise ValueError("two configs have the same file name: expected different ones")
    runs, first = [], None
    for name, (path, config) in loaded.items():
        settings = flatten_settings(config, (*COMPARED, *vary))
        first = first or settings
        for key, values in differing(first, settings).items():
            raise ValueError(
                f"{key} is {values[0]} in the first config, {values[1]} in {name}: expected "
                f"differences in the model's slots and size only (or --vary {key})"
            )
        for seed in seeds:
            own = config.model_copy(update={"seed": seed, "out": out / f"{name}-seed{seed}"})
            runs.append(ComparedRun(name, path, own))
    for run in runs:
        for key, (before, now) in run.changed_settings().items():
            raise ValueError(
                f"{run.config.out}: holds a run with another value of {key} ({before}, now {now}); "
                "choose another --out, or remove it"
            )
    return runs


def train_all(
    runs: Sequence[ComparedRun],
    overrides: Sequence[str],
    device: torch.device,
    jobs: int,
    logs: Path,
) -> Generator[tuple[ComparedRun, str | None], None, None]:
    """Train `runs`, `jobs` at a time; yield each when it has ended, with its error or None.

    Closing the iterator (or SIGTERM, SIGHUP, Ctrl-C) ends those that run: they get SIGTERM, write
    a checkpoint, and are waited for.
    """
    logs.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    if jobs > 1:  # else they would compete for the cores
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    waiting = list(runs)
    running: dict[subprocess.Popen, tuple[ComparedRun, Path]] = {}
    with signals_raise():
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    log = logs / f"{run.config.out.name}.log"
                    with log.open("w") as file:
                        # In its own session: a terminal's Ctrl-C reaches this process alone.
                        process = subprocess.Popen(
                            train_command(run, overrides, device), stdout=file,
                            stderr=subprocess.STDOUT, env=environment, start_new_session=True,
                            preexec_fn=die_with_parent(),
                        )  # fmt: skip
                    running[process] = run, log
                for process in [process for process in running if process.poll() is not None]:
                    run, log = running.pop(process)
                    lines = ["killed", *log.read_text(errors="replace").splitlines()]
                    reason = f"{lines[-1].removeprefix('error: ')} (see {log})"
                    yield run, reason if process.returncode else None
                time.sleep(0.1)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()


def train_command(run: ComparedRun, overrides: Sequence[str], device: torch.device) -> list[str]:
    """The `moveimg train` of a run."""
    own = (f"seed={run.config.seed}", f"out={json.dumps(str(run.config.out))}")
    command = [sys.executable, "-m", "moveimg", "train", str(run.path), "--device", str(device)]
    return command + [word for text in (*overrides, *own) for word in ("--set", text)]


def write_report(runs: Sequence[ComparedRun], out: Path, about: dict[str, Any]) -> str:
    """Write table and plots of the configs whose runs are all finished; return the table."""
    results: list[dict[str, Any]] = []
    for name in dict.fromkeys(run.name for run in runs):
        own = [run for run in runs if run.name == name]
        if all(run.finished() for run in own):
            cost = asdict(model_cost(read_model_config(own[0].config.out)))
            outcomes = [run.outcome() for run in own]
            baseline = results[0]["runs"] if results else outcomes
            results.append({"name": name, **cost, "runs": outcomes} | summarize(outcomes, baseline))
    if not results:
        return ""
    table = markdown_table([describe_result(result) for result in results])
    write_json(out / "table.json", {**about, "configs": results})
    write_text(out / "table.md", table + "\n")
    plots.plot_comparison(results, out)
    return table


def summarize(
    runs: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]]
) -> dict[str, float | None]:
    """Statistics over a config's outcomes and the baseline's with the same seeds.

    loss_mean, loss_std     held-out loss over seeds; the deviation is of the sample (n - 1)
    difference, interval    mean over seeds of (loss - baseline's with the same seed), and half
                            its 95 % confidence interval by Student's t (None with one seed)
    """
    losses, several = [run["loss"] for run in runs], len(runs) > 1
    differences = [run["loss"] - other["loss"] for run, other in zip(runs, baseline, strict=True)]
    interval = None
    if several:
        error = statistics.stdev(differences) / len(runs) ** 0.5
        interval = float(student.ppf(0.975, len(runs) - 1)) * error
    return {
        "loss_mean": statistics.mean(losses),
        "loss_std": statistics.stdev(losses) if several else None,
        "difference": statistics.mean(differences),
        "interval": interval,
        "steps_per_second": statistics.median(run["steps_per_second"] for run in runs),
        "peak_memory": max(run["peak_memory"] for run in runs),
    }


def describe_result(result: dict[str, Any]) -> dict[str, Any]:
    """The table's row of a config, rounded for people."""
    spread, interval = (
        "" if result[key] is None else f" ± {result[key]:.4f}" for key in ("loss_std", "interval")
    )
    return {
        "config": result["name"],
        "held-out loss (nats per code)": f"{result['loss_mean']:.4f}{spread}",
        "seeds": len(result["runs"]),
        "to the first (95 %)": f"{result['difference']:+.4f}{interval}",
        "parameters": f"{result['parameters']:,}",
        "active per token": f"{result['active']:,}",
        "MFLOPs per token (forward)": f"{result['flops_per_token'] / 1e6:.3f}",
        "GFLOPs per image (decoding)": f"{result['flops_per_image'] / 1e9:.3f}",
        "cache bytes per token (float32)": f"{result['cache_bytes_per_token']:,}",
        "steps/s": f"{result['steps_per_second']:.2f}",
        "peak memory (MiB)": f"{result['peak_memory'] / 2**20:,.0f}",
    }
