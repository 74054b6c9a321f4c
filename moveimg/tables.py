"""Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A Markdown table of `rows`, one column for each key of `columns`, titled by its value.

    A value that is missing or None leaves its cell empty.
    """
    cells = [list(columns.values()), ["---"] * len(columns)]
    for row in rows:
        cells.append(["" if row.get(key) is None else str(row[key]) for key in columns])
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
