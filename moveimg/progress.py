"""A progress bar with rate and time left; in a log file, a line every 15 seconds."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(total: int, what: str, unit: str, initial: int = 0, delay: float = 0) -> tqdm:
    """A tqdm bar on stderr, shown after `delay` seconds; use it as a context manager."""
    terminal = sys.stderr.isatty()
    options: Any = {"mininterval": 0.1 if terminal else 15, "maxinterval": 10 if terminal else 60}
    return tqdm(desc=what, total=total, unit=unit, initial=initial, delay=delay, **options)
