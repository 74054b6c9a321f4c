"""Train several configs with several seeds, and compare them (see moveimg.compare_report).

A study has rows: a config, overrides and seeds. Each training is a separate `moveimg train`
process, so that peak memory is measured per run; `moveimg evaluate` then scores the model on the
test set, once. Finished runs are not repeated, and stopped runs continue.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator

from moveimg.bench import bench_rounds
from moveimg.checkpoint import load_generator, load_tokenizer, read_about
from moveimg.compare_report import write_report
from moveimg.config import TrainConfig, load_config
from moveimg.config.model import Config
from moveimg.config.run import read_settings
from moveimg.data import PackedCodes
from moveimg.device import hardware
from moveimg.dist import die_with_parent, signals_raise
from moveimg.errors import validate
from moveimg.files import read_json, write_json
from moveimg.progress import progress_bar
from moveimg.training.logging import (
    MAY_CHANGE,
    changed_settings,
    find_differences,
    flatten_settings,
    read_measurements,
    read_records,
)

# Keys in which rows may differ: attention, memory, ffn, size, and settings that follow from codes.
COMPARED = ("out", "seed", "memory_every", "model.attention", "model.memory", "model.ffn",
            "model.n_layer", "model.n_head", "model.width", "model.codebook_size",
            "model.n_classes", "model.grid")  # fmt: skip
Seeds = tuple[Annotated[int, Field(ge=0, lt=2**32)], ...]


class StudyRow(Config):
    """A config that is compared."""

    config: str = Field(description="a YAML file or recipe, as for `moveimg train`")
    set: dict[str, Any] = Field({}, description="settings of its own, by dotted key")
    seeds: Seeds | None = Field(None, description="null: the study's")


class TestSet(Config):
    """The test set on which each trained model is scored once."""

    codes: Path = Field(description="packed codes, for the loss in nats per code")
    reference: str = Field(description="the reference of `moveimg evaluate`")
    samples: int = Field(10_000, ge=4, le=10**7, description="samples that it draws")


class Study(Config):
    """Rows to compare, of which the first is the baseline, and pairs of rows to test."""

    seeds: Seeds = (0, 1, 2)
    rows: dict[str, StudyRow] = Field(min_length=1)
    vary: tuple[str, ...] = Field((), description="other keys in which rows may differ")
    test: TestSet | None = None
    questions: tuple[tuple[str, str], ...] = Field((), description="pairs of rows: a - b")

    @model_validator(mode="after")
    def _check_questions(self) -> Study:
        if unknown := {name for pair in self.questions for name in pair} - self.rows.keys():
            raise ValueError(f"questions: no row {min(unknown)!r}")
        return self


@dataclass(frozen=True)
class ComparedRun:
    """A row with a seed, trained in `config.out`."""

    name: str
    row: StudyRow
    config: TrainConfig
    key: str  # of comparison.json: see settings_key
    test: TestSet | None
    known: dict[str, Any] | None = None  # the outcome, if comparison.json has it

    def __str__(self) -> str:
        return f"{self.name}, seed {self.config.seed}"

    def finished(self) -> bool:
        """Whether the directory holds the model of this run's last step, and its measurement."""
        out = self.config.out
        if not (out / "config.json").is_file() or not read_measurements(metrics_path(out)):
            return False
        return read_about(out).get("step") == self.config.steps

    def scored(self) -> bool:
        """Whether its outcome is known: trained, and scored if there is a test set."""
        if self.known is not None:
            return True
        return self.finished() and (self.test is None or (self.config.out / "test.json").is_file())

    def commands(self, overrides: Sequence[str], device: torch.device) -> list[list[str]]:
        """The commands still to run: `moveimg train`, then `moveimg evaluate`."""
        out, moveimg = str(self.config.out), [sys.executable, "-m", "moveimg"]
        own = {**self.row.set, "seed": self.config.seed, "out": out}
        settings = [*overrides, *(f"{key}={json.dumps(value)}" for key, value in own.items())]
        train = ["train", self.row.config, *(word for text in settings for word in ("--set", text))]
        commands = [] if self.finished() else [train]
        if self.test is not None and not (self.config.out / "test" / "results.json").is_file():
            count = ["--num-samples", str(self.test.samples), "--out", f"{out}/test"]
            commands.append(["evaluate", out, "--reference", self.test.reference, *count])
        return [[*moveimg, *command, "--device", str(device)] for command in commands]

    def outcome(self) -> dict[str, Any]:
        """Held-out and test scores, learning curve, records and speed of a finished run."""
        if self.known is not None:
            return self.known
        out = self.config.out
        lines = read_measurements(metrics_path(out))
        test = read_json(out / "test.json") if self.test is not None else {}
        return {
            "seed": self.config.seed,
            "settings": self.key,
            "val_loss": lines[-1].loss,
            "loss": lines[-1].loss,
            **test,
            "steps_per_second": lines[-1].step / max(lines[-1].seconds, 1e-9),
            "peak_memory": max(line.peak_memory or 0 for line in lines),
            "curve": [[line.step, line.loss] for line in lines],
            "records": read_records(out / "training" / "records.jsonl"),
        }


def metrics_path(out: Path) -> Path:
    """The metrics.jsonl of a run's directory."""
    return out / "training" / "metrics.jsonl"


def parse_seeds(text: str) -> list[int]:
    """The seeds of `0,1,2`. Raises ValueError for anything else, or a repeated seed."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 11 for part in parts) or len({*parts}) < len(parts):
        raise ValueError(f"seeds {text[:60]!r}: expected different whole numbers, as in 0,1,2")
    return [int(part) for part in parts]


def load_study(configs: Sequence[str], seeds: str | None, vary: Sequence[str] = ()) -> Study:
    """The study of a file with `rows`, or one whose rows are configs.

    `seeds`, as in 0,1,2, replace those of the study and its rows. Raises FileNotFoundError, or
    ValueError for a file that is not a study or two configs of one name.
    """
    settings = read_settings(configs[0]) if len(configs) == 1 else {}
    if "rows" not in settings:
        settings = {"rows": {Path(config).stem: {"config": config} for config in configs}}
        if len(settings["rows"]) < len(configs):
            raise ValueError(f"configs {', '.join(configs)}: two have the same file name")
    study = validate(Study, settings, configs[0])
    chosen = {"seeds": tuple(parse_seeds(seeds))} if seeds else {}
    rows = {
        n: row.model_copy(update={"seeds": None} if seeds else {}) for n, row in study.rows.items()
    }
    return study.model_copy(update={**chosen, "rows": rows, "vary": (*study.vary, *vary)})


def compare(
    study: Study,
    out: Path,
    overrides: Sequence[str],
    device: torch.device,
    jobs: int = 1,
    rounds: int = 0,
) -> str:
    """Train every row with every seed in out/ROW-seedN; write and return the table.

    out/ receives logs/, the report of moveimg.compare_report after each run, and plots at the end.
    Runs that its comparison.json holds with equal settings are not repeated, even if their folders
    were deleted.

    Args:
        overrides: settings for all rows, as `key.path=value`.
        jobs: runs trained in parallel; they divide the CPU cores.
        rounds: rounds of speed measurement before training; 0: none.

    Raises ValueError if rows differ in other keys than COMPARED and `vary`, if a run's folder holds
    another run, for test codes of another tokenizer, or, after all other runs, for failed runs.
    """
    runs, failures = list_runs(study, out, overrides), []
    # without paths, which say nothing on another machine
    left_out = (*COMPARED, *study.vary, "data.codes", "data.tokenizer", "init_from")
    settings = flatten_settings(runs[0].config, left_out)
    about = {"settings": settings, "hardware": {**hardware(device), "jobs": jobs}}
    if rounds:
        configs = {run.name: run.config for run in reversed(runs)}  # of a row's first seed
        write_json(out / "speed.json", bench_rounds(configs, rounds, device))
    missing = [run for run in runs if not run.scored()]
    if study.test is not None and missing:
        codes = PackedCodes(study.test.codes)
        for path in {run.config.data.tokenizer for run in missing}:
            codes.require_tokenizer(load_tokenizer(path, torch.device("cpu")).fingerprint)
    jobs_done = run_all(missing, overrides, device, jobs, out / "logs")
    with progress_bar(len(missing), "compare", "run") as bar, closing(jobs_done):
        for run, failure in jobs_done:
            bar.update()
            if failure is None and run.finished():
                write_test_scores(run, device)
                write_report(runs, study.questions, out, about, plot=False)
            else:
                failures.append(f"{run}: {failure or 'ended without the model of its last step'}")
                bar.write(f"failed: {failures[-1]}", file=sys.stderr)
    table = write_report(runs, study.questions, out, about)
    if failures:
        raise ValueError("; ".join(failures))
    return table


def list_runs(study: Study, out: Path, overrides: Sequence[str]) -> list[ComparedRun]:
    """A run for each row and seed. Raises ValueError for rows that cannot be compared."""
    runs: list[ComparedRun] = []
    first, known = None, read_known(out)
    for name, row in study.rows.items():
        own = [f"{key}={json.dumps(value)}" for key, value in row.set.items()]
        config = load_config(row.config, TrainConfig, [*overrides, *own])
        settings = flatten_settings(config, (*COMPARED, *study.vary))
        first = first or settings
        for key, values in find_differences(first, settings).items():
            raise ValueError(
                f"{key} is {values[0]} in the first row, {values[1]} in {name}: expected "
                f"differences in attention, memory, ffn and size only (or --vary {key})"
            )
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        for seed in row.seeds or study.seeds:
            chosen = {"seed": seed, "out": out / f"{slug}-seed{seed}"}
            own_config = config.model_copy(update=chosen)
            key = settings_key(own_config, study.vary)
            outcome = known.get((key, seed))
            if study.test is not None and "fid" not in (outcome or {}):
                outcome = None  # of a study without a test set
            runs.append(ComparedRun(name, row, own_config, key, study.test, outcome))
    for run in runs:
        path = run.config.out / "training" / "config.yaml"
        for key, (before, now) in (
            changed_settings(path, run.config) if path.is_file() else {}
        ).items():
            raise ValueError(
                f"{run.config.out}: holds a run with another value of {key} ({before}, now {now}); "
                "choose another --out, or remove it"
            )
    return runs


def settings_key(config: TrainConfig, vary: Sequence[str] = ()) -> str:
    """A digest of the settings that an outcome depends on.

    Without the seed and, unless rows vary in them, the paths in `data` and `init_from`.
    """
    paths = {"data", "init_from"} - {key.partition(".")[0] for key in vary}
    settings = flatten_settings(config, (*MAY_CHANGE, "seed", *sorted(paths)))
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def read_known(out: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The outcomes in a directory's comparison.json, by settings_key and seed."""
    path = out / "comparison.json"
    rows = read_json(path)["rows"] if path.is_file() else []
    return {(run["settings"], run["seed"]): run for row in rows for run in row["runs"]}


def run_all(
    runs: Sequence[ComparedRun],
    overrides: Sequence[str],
    device: torch.device,
    jobs: int,
    logs: Path,
) -> Generator[tuple[ComparedRun, str | None], None, None]:
    """Run the commands of `runs`, `jobs` at a time; yield each run at its end, with its error.

    Closing the iterator (or SIGTERM, SIGHUP, Ctrl-C) sends SIGTERM to the running commands, which
    write a checkpoint, and waits for them.
    """
    logs.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    if jobs > 1:  # each command would otherwise use all cores
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    running: set[subprocess.Popen] = set()
    stopped = threading.Event()

    def work(run: ComparedRun) -> str | None:
        log = logs / f"{run.config.out.name}.log"
        for command in run.commands(overrides, device):
            if stopped.is_set():
                return "stopped"
            with log.open("a") as file:  # in its own session: a terminal's Ctrl-C reaches us alone
                process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT,
                                           env=environment, start_new_session=True,
                                           preexec_fn=die_with_parent())  # fmt: skip
            running.add(process)
            if stopped.is_set():  # before the process was in `running`
                process.terminate()
            if process.wait():
                lines = ["killed", *log.read_text(errors="replace").splitlines()]
                return f"{lines[-1].removeprefix('error: ')} (see {log})"
            running.discard(process)
        return None

    with signals_raise(), ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(work, run): run for run in runs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            stopped.set()
            for future in futures:
                future.cancel()
            for process in list(running):
                process.terminate()


@torch.inference_mode()
def write_test_scores(run: ComparedRun, device: torch.device, batch_size: int = 100) -> None:
    """Write test.json: the loss on the test codes, FID and the share of samples recognised."""
    if run.test is None or run.scored():
        return
    model, codes = load_generator(run.config.out, device), PackedCodes(run.test.codes)
    total = 0.0
    for indices in torch.arange(len(codes)).split(batch_size):
        batch, labels = codes.get(indices.numpy(), 0 * indices.numpy())
        loss, _ = model(batch.to(device), labels.to(device), loss=True)
        total += loss.item() * len(indices)
    metrics = read_json(run.config.out / "test" / "results.json")["metrics"]
    scores = {"loss": total / len(codes), "fid": metrics["fid"]}
    write_json(run.config.out / "test.json", scores | {"accuracy": metrics.get("accuracy")})
