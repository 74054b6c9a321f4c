"""Several configs, several seeds, one table: same steps, same data order, same settings.

Every training is a process of its own, so that its peak memory is its own; what it leaves in its
directory (metrics.jsonl, the model) is all that is read of it. The table is made from that.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moveimg.checkpoint import load_generator, read_model_config, write_json
from moveimg.config import TrainConfig, load_config
from moveimg.files import write_text
from moveimg.model.cost import model_cost
from moveimg.progress import progress_bar
from moveimg.sampling import image_rngs, sample_codes
from moveimg.training.comparison import csv_table, markdown_table, summarize
from moveimg.training.comparison_plots import plot_all
from moveimg.training.record import changed_settings

SAMPLED = 32  # images side by side when the sampling rate is measured


@dataclass(frozen=True)
class OneRun:
    """A config with a seed, and where it is trained."""

    name: str
    seed: int
    path: Path
    config: TrainConfig

    @property
    def directory(self) -> Path:
        return self.config.out

    def measurements(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl: step, seconds, peak_memory, loss, ..."""
        path = self.directory / "training" / "metrics.jsonl"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        return [json.loads(line) for line in text.splitlines()]

    def finished(self) -> bool:
        """Whether its directory holds this run, trained to its last step."""
        described = self.directory / "training" / "config.yaml"
        if not described.is_file() or not (self.directory / "model.safetensors").is_file():
            return False
        lines = self.measurements()
        ended = bool(lines) and lines[-1]["step"] == self.config.steps
        return ended and not changed_settings(described, self.config)


def parse_seeds(text: str) -> list[int]:
    """`0,1,2` -> [0, 1, 2]. Raises ValueError for anything else, or a repeated seed."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts) or len(set(parts)) != len(parts):
        raise ValueError(f"seeds {text!r}: expected different whole numbers, as in 0,1,2")
    return [int(part) for part in parts]


def compare(
    configs: Sequence[Path],
    seeds: Sequence[int],
    out: Path,
    overrides: Sequence[str],
    device: torch.device,
    jobs: int = 1,
) -> str:
    """Train every config with every seed into out/NAME-seedN; write and return the table.

    A run that is finished is read, one that was stopped continues. out/ receives table.md,
    table.csv, table.json (with everything behind the table, the learning curves included),
    curves.png, parameters.png, flops.png, and logs/.

    Args:
        configs: YAML files; they may differ in `model` and `out` alone.
        seeds: each config is trained once with each.
        out: the folder.
        overrides: `key.path=value`, for all configs.
        device: what to train and sample on.
        jobs: trainings side by side; each has its share of the CPU cores.

    Raises ValueError when two configs have one name or differ in more than the model, or when a
    training fails.
    """
    runs = plan(configs, seeds, out, overrides)
    train_all([run for run in runs if not run.finished()], overrides, device, jobs, out / "logs")
    results = []
    for name in dict.fromkeys(run.name for run in runs):
        mine = [run for run in runs if run.name == name]
        cost = model_cost(read_model_config(mine[0].directory))
        rate = sampling_rate(mine[0], device)
        results.append({"name": name, "images_per_second": rate} | outcome(mine) | cost.as_dict())
    summaries = summarize(results)
    about = {"settings": _shared(runs[0].config), "hardware": hardware(device, jobs)}
    table = markdown_table(summaries)
    write_json(out / "table.json", {**about, "configs": summaries})
    write_text(out / "table.md", table + "\n")
    write_text(out / "table.csv", csv_table(summaries))
    plot_all(summaries, out)
    return table


def plan(
    configs: Sequence[Path], seeds: Sequence[int], out: Path, overrides: Sequence[str]
) -> list[OneRun]:
    """Every config with every seed, checked to be comparable (errors as of compare)."""
    loaded = {path.stem: (path, load_config(path, TrainConfig, overrides)) for path in configs}
    if len(loaded) != len(configs):
        raise ValueError("two configs have the same file name: expected different ones")
    (first, (_, config)), *others = loaded.items()
    wanted = _shared(config)
    for name, (_, other) in others:
        found = _shared(other)
        for key in wanted:
            if wanted[key] != found[key]:
                raise ValueError(
                    f"{first} and {name} differ in {key} ({wanted[key]}, {found[key]}): expected "
                    "the same settings but for the model"
                )
    return [
        OneRun(name, seed, path, config.model_copy(update={"seed": seed, "out": directory}))
        for name, (path, config) in loaded.items()
        for seed in seeds
        for directory in [out / f"{name}-seed{seed}"]
    ]


def _shared(config: TrainConfig) -> dict[str, Any]:
    """The settings that runs of one comparison have in common."""
    settings = config.model_dump(mode="json")
    return {key: value for key, value in settings.items() if key not in ("model", "out", "seed")}


# --- training ------------------------------------------------------------------------------


def train_all(
    runs: Sequence[OneRun], overrides: Sequence[str], device: torch.device, jobs: int, logs: Path
) -> None:
    """Train `runs`, `jobs` at a time. Raises ValueError with the first failure's last line."""
    if jobs < 1:
        raise ValueError(f"jobs {jobs}: expected at least 1")
    environment = dict(os.environ)
    if jobs > 1:  # else they would fight over the cores
        share = max(1, (os.cpu_count() or 1) // jobs)
        environment["OMP_NUM_THREADS"] = str(share)
    logs.mkdir(parents=True, exist_ok=True)
    with (
        progress_bar(len(runs), "compare", "run") as bar,
        ThreadPoolExecutor(max_workers=jobs) as pool,
    ):
        futures = [
            pool.submit(train_one, run, overrides, device, environment, logs) for run in runs
        ]
        try:
            for run, future in zip(runs, futures, strict=True):
                future.result()
                bar.update()
                bar.write(f"{run.name}, seed {run.seed}: loss {run.measurements()[-1]['loss']:.4f}")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def train_one(
    run: OneRun, overrides: Sequence[str], device: torch.device, environment: dict[str, str],
    logs: Path,
) -> None:  # fmt: skip
    """`moveimg train` in a process of its own. Raises ValueError with its last line if it fails."""
    command = [sys.executable, "-m", "moveimg", "train", str(run.path), "--device", str(device)]
    own = (f"seed={run.seed}", f"out={json.dumps(str(run.directory))}")
    for override in (*overrides, *own):
        command += ["--set", override]
    log = logs / f"{run.name}-seed{run.seed}.log"
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False
        ).returncode
    if code:
        lines = log.read_text(encoding="utf-8").strip().splitlines() or [f"exit code {code}"]
        reason = lines[-1].removeprefix("error: ")
        raise ValueError(f"{run.name}, seed {run.seed}: {reason} (see {log})")


# --- what the runs have left ---------------------------------------------------------------


def outcome(runs: Sequence[OneRun]) -> dict[str, Any]:
    """The runs of one config: each one's last measurement, and all held-out losses."""
    found = []
    for run in runs:
        lines = run.measurements()
        last = lines[-1]
        found.append(
            {
                "seed": run.seed,
                "loss": last["loss"],
                "accuracy": last.get("accuracy"),
                "steps_per_second": last["step"] / max(last["seconds"], 1e-9),
                "peak_memory": last.get("peak_memory"),
                "curve": [[line["step"], line["loss"]] for line in lines],
            }
        )
    return {"runs": found}


def sampling_rate(run: OneRun, device: torch.device) -> float:
    """Images a second by the run's own sampling settings, measured once and kept beside it."""
    kept = run.directory / "training" / "sampling_rate.json"
    if kept.is_file():
        found = json.loads(kept.read_text(encoding="utf-8"))
        if found["device"] == device.type:
            return found["images_per_second"]
    model = load_generator(run.directory, device)
    labels = torch.arange(SAMPLED, device=device) % model.config.n_classes
    seconds = []
    for _ in range(3):  # the first one warms up
        begun = time.perf_counter()
        sample_codes(model, labels, run.config.sampling, image_rngs(range(SAMPLED))).cpu()
        seconds.append(time.perf_counter() - begun)
    rate = SAMPLED / min(seconds[1:])
    write_json(kept, {"images_per_second": rate, "batch": SAMPLED, "device": device.type})
    return rate


def hardware(device: torch.device, jobs: int) -> dict[str, Any]:
    """What the speeds were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "device": name, "cpu_cores": os.cpu_count(), "torch": torch.__version__, "jobs": jobs,
        "sampled_side_by_side": SAMPLED,
    }  # fmt: skip
