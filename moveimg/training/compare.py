"""Several configs, several seeds, one table: same steps, same data order, same settings.

Every training is a process of its own, so that its peak memory is its own; what it leaves in its
directory (metrics.jsonl, the model) is all that is read of it. The table is made from that.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from moveimg.checkpoint import load_generator, read_model_config
from moveimg.device import hardware
from moveimg.files import write_json, write_text
from moveimg.model.cost import model_cost
from moveimg.progress import progress_bar
from moveimg.sampling import image_rngs, sample_codes
from moveimg.training.comparison import ABOUT, csv_table, markdown_table, summarize
from moveimg.training.comparison_jobs import train_all
from moveimg.training.comparison_plots import plot_all
from moveimg.training.comparison_runs import OneRun, outcome, plan, shared_settings

SAMPLED = 32  # images side by side when the sampling rate is measured


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
    curves.png, parameters.png, flops.png, and logs/. They are written anew whenever all seeds of
    a config are done; the first of those configs is what the others are compared with. Sampling
    rates are measured last, when nothing else runs, and are left open until then.

    Args:
        configs: YAML files; they may differ in `out` and the model's attention, memory, ffn and
            size alone.
        seeds: each config is trained once with each.
        out: the folder.
        overrides: `key.path=value`, for all configs.
        device: what to train and sample on.
        jobs: trainings side by side; each has its share of the CPU cores.

    Raises ValueError when two configs have one name or differ in more, when a run's folder holds
    another run, or, when all others are done and their table is written, for trainings that failed.
    """
    runs = plan(configs, seeds, out, overrides)
    report = Report(runs, out, device, jobs)
    missing = [run for run in runs if not run.finished()]
    failures = []
    with (
        progress_bar(len(missing), "compare", "run") as bar,
        closing(train_all(missing, overrides, device, jobs, out / "logs")) as trained,
    ):
        for run, failure in trained:
            bar.update()
            if failure is None and not run.finished():
                failure = f"{run.name}, seed {run.seed}: ended without its last step's model"
            if failure is not None:
                failures.append(failure)
                bar.write(f"failed: {failure}")
                continue
            bar.write(f"{run.name}, seed {run.seed}: loss {run.measurements()[-1]['loss']:.4f}")
            report.update(run.name)
    table = report.finish()
    if failures:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        done = f"; the table of what is done is in {out}" if table else ""
        raise ValueError(f"{failures[0]}{more}{done}")
    return table


class Report:
    """The table and plots of the configs whose runs are all finished."""

    def __init__(self, runs: Sequence[OneRun], out: Path, device: torch.device, jobs: int) -> None:
        self.out, self.device = out, device
        self.runs: dict[str, list[OneRun]] = {}
        for run in runs:
            self.runs.setdefault(run.name, []).append(run)
        self.about = {
            "settings": shared_settings(runs[0].config),
            "hardware": {**hardware(device), "jobs": jobs, "sampled_side_by_side": SAMPLED},
            "columns": ABOUT,
        }

    def update(self, name: str) -> None:
        """Write them anew if a run of `name` was the config's last."""
        if all(run.finished() for run in self.runs[name]):
            self._write(kept_rate)

    def finish(self) -> str:
        """Measure the sampling rates, write everything, return the table; "" where none is done."""
        return self._write(sampling_rate)

    def _write(self, rate: Any) -> str:
        done = {n: runs for n, runs in self.runs.items() if all(run.finished() for run in runs)}
        if not done:
            return ""
        results = []
        for name, runs in done.items():
            cost = model_cost(read_model_config(runs[0].directory)).as_dict()
            speed = {"images_per_second": rate(runs[0], self.device)}
            results.append({"name": name} | speed | outcome(runs) | cost)
        summaries = summarize(results)
        table = markdown_table(summaries)
        write_json(self.out / "table.json", {**self.about, "configs": summaries})
        write_text(self.out / "table.md", table + "\n")
        write_text(self.out / "table.csv", csv_table(summaries))
        plot_all(summaries, self.out)
        return table


def kept_rate(run: OneRun, device: torch.device) -> float | None:
    """What sampling_rate has measured before, if it has."""
    kept = run.directory / "training" / "sampling_rate.json"
    found = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    return found["images_per_second"] if found.get("device") == device.type else None


def sampling_rate(run: OneRun, device: torch.device) -> float:
    """Images a second by the run's own sampling settings, measured once and kept beside it."""
    if (known := kept_rate(run, device)) is not None:
        return known
    model = load_generator(run.directory, device)
    labels = torch.arange(SAMPLED, device=device) % model.config.n_classes
    seconds = []
    for _ in range(3):  # the first one warms up
        begun = time.perf_counter()
        sample_codes(model, labels, run.config.sampling, image_rngs(range(SAMPLED))).cpu()
        seconds.append(time.perf_counter() - begun)
    rate = SAMPLED / min(seconds[1:])
    kept = run.directory / "training" / "sampling_rate.json"
    write_json(kept, {"images_per_second": rate, "batch": SAMPLED, "device": device.type})
    return rate
