"""A progress bar with rate and time left; in a log file, a line every 15 seconds."""

from __future__ import annotations

import sys

from tqdm import tqdm


def progress_bar(total: int, what: str, unit: str, initial: int = 0, delay: float = 0) -> tqdm:
    """A tqdm bar on stderr, shown after `delay` seconds; use it as a context manager."""
    first, later = (0.1, 10) if sys.stderr.isatty() else (15, 60)
    shown = {"desc": what, "total": total, "unit": unit, "initial": initial, "delay": delay}
    return tqdm(**shown, mininterval=first, maxinterval=later, dynamic_ncols=True)
