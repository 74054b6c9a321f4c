"""Markdown tables, and sizes in bytes as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> str:
    """Return a Markdown table of rows with the given columns, by default the first row's keys."""
    columns = columns or [*rows[0]]
    lines = [columns, ["---"] * len(columns)]
    lines += [["" if row.get(c) is None else str(row[c]) for c in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_bytes(size: float) -> str:
    """Format a size in the largest unit in which it is at least 1, such as `792 B`."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.0f} B"
