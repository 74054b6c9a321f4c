"""The report of a comparison: statistics over seeds, tables and plots, and all numbers as JSON.

A directory receives comparison.json, table.md, questions.md and the plots of moveimg.plots.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from moveimg import plots
from moveimg.files import read_json, write_json, write_text
from moveimg.model import model_cost
from moveimg.tables import markdown_table

SCORES = ("loss", "val_loss", "fid", "accuracy")


def write_report(
    runs: Sequence[Any],
    questions: Sequence[tuple[str, str]],
    out: Path,
    about: dict[str, Any],
    plot: bool = True,
) -> str:
    """Write the report of the runs that are finished and scored; return the table.

    `runs` are moveimg.compare.ComparedRun. Each row is compared with the first over their common
    seeds; while the first has no finished run, these columns are empty.
    """
    results: list[dict[str, Any]] = []
    baseline = [run.outcome() for run in runs if run.name == runs[0].name and run.scored()]
    for name in dict.fromkeys(run.name for run in runs):
        done = [run for run in runs if run.name == name and run.scored()]
        if not done:
            continue
        outcomes = [run.outcome() for run in done]
        config = done[0].config.model
        result = {"name": name, **asdict(model_cost(config)), "runs": outcomes}
        result |= config.model_dump(mode="json", include={"attention", "memory", "ffn"})
        result["optimizer"] = done[0].config.optimizer.model_dump(mode="json")
        result |= summarize(outcomes)
        results.append(result | {"difference": difference(outcomes, baseline)})
    if not results:
        return ""
    speed, earlier, times = out / "speed.json", out / "comparison.json", {}
    if speed.is_file():
        times = read_json(speed)
    elif earlier.is_file():
        times = {row["name"]: row.get("seconds") for row in read_json(earlier)["rows"]}
    for result in results:
        result["seconds"] = times.get(result["name"])  # of each round
        result["relative_seconds"] = relative_seconds(times, result["name"], runs[0].name)
    report = {**about, "rows": results, "questions": compare_pairs(questions, results)}
    write_json(out / "comparison.json", report)
    table = results_table(report)
    write_text(out / "table.md", table + "\n")
    write_text(out / "questions.md", questions_table(report) + "\n")
    if plot:
        plots.plot_comparison(results, out)
    return table


def summarize(outcomes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation of each score over seeds; speed and memory."""
    summary: dict[str, Any] = {
        "steps_per_second": statistics.median(run["steps_per_second"] for run in outcomes),
        "peak_memory": max(run["peak_memory"] for run in outcomes),
    }
    for key in SCORES:
        values = [run[key] for run in outcomes if run.get(key) is not None]
        if values:
            std = statistics.stdev(values) if len(values) > 1 else None
            summary[key] = {"mean": statistics.mean(values), "std": std}
    return summary


def difference(
    outcomes: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]], level: float = 0.95
) -> dict[str, Any]:
    """The mean loss difference over common seeds, and the half-width of its confidence interval.

    By Student's t over the differences paired by seed. `interval` is None with fewer than two
    common seeds, `mean` None without one.
    """
    theirs = {run["seed"]: run["loss"] for run in baseline}
    paired = [run["loss"] - theirs[run["seed"]] for run in outcomes if run["seed"] in theirs]
    half = None
    if len(paired) > 1:
        error = statistics.stdev(paired) / len(paired) ** 0.5
        half = float(student.ppf((1 + level) / 2, len(paired) - 1)) * error
    mean = statistics.mean(paired) if paired else None
    return {"mean": mean, "interval": half, "seeds": len(paired), "level": level}


def compare_pairs(
    pairs: Sequence[tuple[str, str]], results: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The loss difference of each pair of finished rows, at a joint level of 95 % (Bonferroni)."""
    by_name = {result["name"]: result["runs"] for result in results}
    level = 1 - 0.05 / max(1, len(pairs))
    tests = []
    for a, b in pairs:
        if a in by_name and b in by_name:
            result = difference(by_name[a], by_name[b], level)
            half = result["interval"]
            significant = half is not None and abs(result["mean"]) > half
            tests.append({"question": f"{a} - {b}", **result, "significant": significant})
    return tests


def relative_seconds(times: dict[str, Any], name: str, baseline: str) -> dict[str, float] | None:
    """The median over rounds of a row's seconds divided by the baseline's; None if unmeasured."""
    if not times.get(name) or not times.get(baseline):
        return None
    ratios = {
        key: [a / b for a, b in zip(times[name][key], times[baseline][key], strict=True)]
        for key in times[name]
    }
    return {key: statistics.median(values) for key, values in ratios.items()}


def results_table(report: dict[str, Any]) -> str:
    """The Markdown table of a report's rows."""
    return markdown_table([_row(result) for result in report["rows"]])


def questions_table(report: dict[str, Any]) -> str:
    """The Markdown table of a report's tested pairs; empty while none is finished."""
    if not report["questions"]:
        return ""
    return markdown_table([
        {
            "question": test["question"],
            "nats per code": format_difference(test),
            "seeds": test["seeds"],
            "significant": "yes" if test["significant"] else "no",
        }
        for test in report["questions"]
    ])  # fmt: skip


def _row(result: dict[str, Any]) -> dict[str, Any]:
    def mean_and_std(key: str, form: str) -> str:
        if key not in result:
            return ""
        mean, std = result[key]["mean"], result[key]["std"]
        return format(mean, form) + ("" if std is None else f" ± {format(std, form)}")

    def milliseconds(key: str) -> str:
        if not result["relative_seconds"]:
            return ""
        median = 1e3 * statistics.median(result["seconds"][key])
        return f"{median:.0f} ({result['relative_seconds'][key]:.2f})"

    return {
        "row": result["name"],
        "seeds": len(result["runs"]),
        "nats per code": mean_and_std("loss", ".4f"),
        "to the first row (95 %)": format_difference(result["difference"]),
        "FID": mean_and_std("fid", ".4f"),
        "recognised": mean_and_std("accuracy", ".1%"),
        "parameters": f"{result['parameters']:,}",
        "active": f"{result['active']:,}",
        "MFLOPs per token": f"{result['flops_per_token'] / 1e6:.3f}",
        "ms per step": milliseconds("step"),
        "ms for 8 images": milliseconds("sample"),
        "peak MiB": f"{result['peak_memory'] / 2**20:,.0f}",
    }


def format_difference(difference: dict[str, Any]) -> str:
    """A result of `difference` as text: `-0.1095 ± 0.0226`; empty without common seeds."""
    if difference["mean"] is None:
        return ""
    half = "" if difference["interval"] is None else f" ± {difference['interval']:.4f}"
    return f"{difference['mean']:+.4f}{half}"
