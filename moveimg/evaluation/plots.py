"""The picture and the table of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moveimg.evaluation.results import COLUMNS, markdown_table
from moveimg.files import atomic, write_text

SECOND = ("inception_score_adm", "accuracy")  # what FID is shown beside


def write_sweep(
    folder: Path, key: str, values: Sequence[float], results: Sequence[dict[str, Any]]
) -> None:
    """Write sweep.md, a row a value, and sweep.png, FID and IS (or accuracy) against the value."""
    from matplotlib.figure import Figure  # not pyplot, whose backend is the user's

    write_text(folder / "sweep.md", markdown_table(results) + "\n")
    figure = Figure(figsize=(6, 4), layout="constrained")
    left = figure.subplots()
    scores = [result["metrics"]["fid"] for result in results]
    left.plot(values, scores, "o-", color="tab:blue")
    left.set_xlabel(key)
    left.set_ylabel("FID (lower is better)", color="tab:blue")
    second = next((name for name in SECOND if name in results[0]["metrics"]), None)
    if second is not None:
        right = left.twinx()
        right.plot(values, [r["metrics"][second] for r in results], "s--", color="tab:orange")
        right.set_ylabel(COLUMNS[second], color="tab:orange")
    space = results[0]["extractor"]["space"].split(":")[0]
    left.set_title(f"{results[0]['samples']['count']:,} images; {space}", fontsize=9)
    with atomic(folder / "sweep.png") as temporary:
        figure.savefig(temporary, format="png", dpi=120)
