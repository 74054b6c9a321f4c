"""Several configs with several seeds in one table: the same steps, data order and settings.

Each training is a process of its own, `moveimg train`, so that its peak memory is its own. The
table is made from what it leaves in its directory: metrics.jsonl and the model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import timeit
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from moveimg import plots
from moveimg.checkpoint import load_generator, read_about, read_model_config
from moveimg.compare_table import ABOUT, comparison_table, csv_table, summarize
from moveimg.config import TrainConfig, load_config, read_yaml
from moveimg.device import hardware
from moveimg.dist import die_with_parent, signals_raise
from moveimg.errors import shorten, validate
from moveimg.files import read_json, write_json, write_text
from moveimg.model import model_cost
from moveimg.progress import progress_bar
from moveimg.sampling import image_rngs, sample_codes
from moveimg.training.settings import Measurement, read_measurements

SAMPLED = 32  # batch size when the sampling rate is measured
# Keys in which the configs may differ: the model's three slots and its size.
COMPARED = ("out", "seed", "model.attention", "model.memory", "model.ffn", "model.n_layer",
            "model.n_head", "model.width")  # fmt: skip
OF_THE_CODES = ("model.codebook_size", "model.n_classes", "model.grid")  # may be left out
# Keys that do not change what is trained.
NEUTRAL = ("out", "log_every", "validate_every", "preview_every", "checkpoint_every", "wandb",
           "keep_checkpoints", "distributed", "activation_checkpointing", "compile",
           "evaluation")  # fmt: skip


@dataclass(frozen=True)
class ComparedRun:
    """A config with a seed, trained in `directory`."""

    name: str
    seed: int
    path: Path
    config: TrainConfig

    @property
    def directory(self) -> Path:
        return self.config.out

    def measurements(self) -> list[Measurement]:
        """The lines of metrics.jsonl."""
        return read_measurements(self.directory / "training" / "metrics.jsonl")

    def finished(self) -> bool:
        """Whether the directory holds this run, measured and exported at its last step."""
        names = ("training/config.yaml", "config.json", "model.safetensors")
        if not all((self.directory / name).is_file() for name in names):
            return False
        steps, lines = self.config.steps, self.measurements()
        if not lines or lines[-1].step != steps or lines[-1].loss is None:
            return False
        # A run killed after its last measurement still has the model of an earlier step.
        return read_about(self.directory).get("step") == steps and not self.changed_settings()

    def changed_settings(self) -> dict[str, tuple[Any, Any]]:
        """Settings in which the run in the directory differs from this one: before and now."""
        path = self.directory / "training" / "config.yaml"
        if not path.is_file():
            return {}
        before = validate(TrainConfig, read_yaml(path), str(path))
        return differing(settings_without(before, NEUTRAL), settings_without(self.config, NEUTRAL))


class _Rate(BaseModel):
    """The content of sampling_rate.json."""

    images_per_second: float | None = None
    device: str | None = None


def parse_seeds(text: str) -> list[int]:
    """The seeds of `0,1,2`. Raises ValueError for anything else, or a repeated seed."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 11 for part in parts) or len({*parts}) < len(parts):
        raise ValueError(f"seeds {shorten(text)}: expected different whole numbers, as in 0,1,2")
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

    A finished run is read, a stopped one continues. out/ receives table.md, table.csv, table.json
    (with the learning curves), three plots and logs/. They are written anew whenever all seeds of
    a config are done; the first of those configs is the baseline of the others. Sampling rates
    are measured last, when nothing else runs.

    The configs may differ in the model's slots and size, and in the keys of `vary` and those below
    them (`optimizer.lr`). `overrides`, as `key.path=value`, are for all configs. `jobs` trainings
    run at the same time, each with its share of the CPU cores.

    Raises ValueError when two configs have one name or differ in more, when a run's folder holds
    another run, or, after all others are done, for trainings that failed.
    """
    if jobs < 1:
        raise ValueError(f"jobs {jobs}: expected at least 1")
    runs = list_runs(configs, seeds, out, overrides, vary)
    about = {
        "settings": settings_without(runs[0].config, COMPARED),
        "hardware": {**hardware(device), "jobs": jobs, "sampling_batch_size": SAMPLED},
        "columns": ABOUT,
    }
    missing, failures = [run for run in runs if not run.finished()], []
    (out / "logs").mkdir(parents=True, exist_ok=True)
    trainings = train_all(missing, overrides, device, jobs, out / "logs")
    with progress_bar(len(missing), "compare", "run") as bar, closing(trainings):
        for run, failure in trainings:
            bar.update()
            if failure is None and not run.finished():
                failure = f"{run.name}, seed {run.seed}: ended without the model of its last step"
            if failure is not None:
                failures.append(failure)
                bar.write(f"failed: {failure}", file=sys.stderr)
                continue
            loss = run.measurements()[-1].loss
            bar.write(f"{run.name}, seed {run.seed}: loss {loss:.4f}", file=sys.stderr)
            if all(other.finished() for other in runs if other.name == run.name):
                write_report(runs, out, about, device, kept_only=True)
    table = write_report(runs, out, about, device, kept_only=False)
    if failures:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        done = f"; the table of the finished configs is in {out}" if table else ""
        raise ValueError(f"{failures[0]}{more}{done}")
    return table


# --- the runs --------------------------------------------------------------------------------


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
    (first, (_, config)), *others = loaded.items()
    shared = settings_without(config, [*COMPARED, *vary])
    for name, (_, other) in others:
        for key, values in differing(shared, settings_without(other, [*COMPARED, *vary])).items():
            in_both = config.model.model_fields_set & other.model.model_fields_set
            if key in OF_THE_CODES and key.removeprefix("model.") not in in_both:
                continue  # the codes decide it, the same for all
            raise ValueError(
                f"{first} and {name} differ in {key} ({values[0]}, {values[1]}): expected "
                f"differences in the model's slots and size only (or --vary {key})"
            )
    runs = []
    for name, (path, config) in loaded.items():
        for seed in seeds:
            own = config.model_copy(update={"seed": seed, "out": out / f"{name}-seed{seed}"})
            runs.append(ComparedRun(name, seed, path, own))
    for run in runs:
        for key, (before, now) in run.changed_settings().items():
            raise ValueError(
                f"{run.directory}: holds a run with another value of {key} ({before}, now {now}); "
                f"choose another --out, or remove {run.directory}"
            )
    return runs


def settings_without(config: TrainConfig, keys: Sequence[str]) -> dict[str, Any]:
    """The settings of a run by dotted key, without `keys` and all below them."""

    def flatten(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in settings.items():
            if isinstance(value, dict):
                yield from flatten(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    left_out = tuple(f"{key}." for key in keys)
    flat = flatten(config.model_dump(mode="json"))
    return {key: value for key, value in flat if not f"{key}.".startswith(left_out)}


def differing(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ in two flat dictionaries, with both values."""
    return {key: (a.get(key), b.get(key)) for key in a | b if a.get(key) != b.get(key)}


# --- the trainings ---------------------------------------------------------------------------


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
    environment = dict(os.environ)
    if jobs > 1:  # else they would compete for the cores
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    waiting = list(runs)
    running: list[tuple[ComparedRun, subprocess.Popen, Path]] = []
    with signals_raise():
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    with (logs / f"{run.name}-seed{run.seed}.log").open("w") as log:
                        # In its own session: a terminal's Ctrl-C reaches this process alone.
                        process = subprocess.Popen(
                            train_command(run, overrides, device), stdout=log,
                            stderr=subprocess.STDOUT, env=environment, start_new_session=True,
                            preexec_fn=die_with_parent(),
                        )  # fmt: skip
                    running.append((run, process, Path(log.name)))
                ended = [one for one in running if one[1].poll() is not None]
                for one in ended:
                    running.remove(one)
                    yield one[0], describe_failure(*one)
                if not ended:
                    time.sleep(0.1)
        finally:
            for _, process, _ in running:
                process.terminate()
            for _, process, _ in running:
                process.wait()


def train_command(run: ComparedRun, overrides: Sequence[str], device: torch.device) -> list[str]:
    """The `moveimg train` of a run."""
    own = (f"seed={run.seed}", f"out={json.dumps(str(run.directory))}")
    command = [sys.executable, "-m", "moveimg", "train", str(run.path), "--device", str(device)]
    return command + [word for text in (*overrides, *own) for word in ("--set", text)]


def describe_failure(run: ComparedRun, process: subprocess.Popen, log: Path) -> str | None:
    """The last line of a failed training's log; None where the training succeeded."""
    if process.returncode == 0:
        return None
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    reason = lines[-1].removeprefix("error: ") if lines else f"exit code {process.returncode}"
    return f"{run.name}, seed {run.seed}: {reason} (see {log})"


# --- the table -------------------------------------------------------------------------------


def write_report(
    runs: Sequence[ComparedRun],
    out: Path,
    about: dict[str, Any],
    device: torch.device,
    kept_only: bool,
) -> str:
    """Write table and plots of the configs whose runs are all finished; return the table."""
    results = []
    for name in dict.fromkeys(run.name for run in runs):
        own = [run for run in runs if run.name == name]
        if all(run.finished() for run in own):
            cost = model_cost(read_model_config(own[0].directory)).as_dict()
            rate = {"images_per_second": sampling_rate(own[0], device, kept_only)}
            results.append({"name": name} | rate | cost | {"runs": list(map(run_outcome, own))})
    if not results:
        return ""
    summaries = summarize(results)
    table = comparison_table(summaries)
    write_json(out / "table.json", {**about, "configs": summaries})
    write_text(out / "table.md", table + "\n")
    write_text(out / "table.csv", csv_table(summaries))
    plots.plot_comparison(summaries, out)
    return table


def run_outcome(run: ComparedRun) -> dict[str, Any]:
    """The last measurement of a finished run, and its learning curve.

    `peak_memory` is the largest of all lines: a stopped run has had several processes.
    """
    lines = run.measurements()
    last = lines[-1]
    return {
        "seed": run.seed,
        "loss": last.loss,
        "accuracy": last.accuracy,
        "steps_per_second": last.step / max(last.seconds, 1e-9),
        "peak_memory": max(line.peak_memory or 0 for line in lines) or None,
        "curve": [[line.step, line.loss] for line in lines],
    }


def sampling_rate(run: ComparedRun, device: torch.device, kept_only: bool) -> float | None:
    """Images per second with the run's own sampling settings, measured once and kept beside it.

    With `kept_only` nothing is measured: None where nothing is kept.
    """
    path = run.directory / "training" / "sampling_rate.json"
    kept = validate(_Rate, read_json(path) if path.is_file() else {}, str(path))
    if kept.device == device.type or kept_only:
        return kept.images_per_second
    model = load_generator(run.directory, device)
    labels = torch.arange(SAMPLED, device=device) % model.config.n_classes
    rngs = image_rngs(range(SAMPLED))
    rate = SAMPLED / min(  # the first one warms up
        timeit.repeat(lambda: sample_codes(model, labels, run.config.sampling, rngs).cpu(),
                      number=1, repeat=3)[1:]
    )  # fmt: skip
    write_json(path, {"images_per_second": rate, "batch": SAMPLED, "device": device.type})
    return rate
