"""Numbers as text: Markdown tables and sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def markdown_table(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str] | None = None
) -> str:
    """A Markdown table of `rows`, one column for each key of `columns`, titled by its value.

    A value that is missing or None leaves its cell empty.
    """
    columns = columns or {key: key for key in rows[0]}
    cells = [list(columns.values()), ["---"] * len(columns)]
    for row in rows:
        cells.append(["" if row.get(key) is None else str(row[key]) for key in columns])
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def format_bytes(size: float) -> str:
    """A size in the largest unit that leaves one digit before the point, such as `792 B`."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.0f} B"
