"""A progress bar with rate and remaining time, which in a log file is a line per 15 seconds."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(total: int, title: str, unit: str, initial: int = 0, delay: float = 0) -> tqdm:
    """Return a tqdm bar on stderr, shown after `delay` seconds; use it as a context manager."""
    terminal = sys.stderr.isatty()
    options: Any = {"mininterval": 0.1 if terminal else 15, "maxinterval": 10 if terminal else 60}
    return tqdm(desc=title, total=total, unit=unit, initial=initial, delay=delay, **options)
