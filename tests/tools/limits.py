"""Limits for what a test runs: time, working directory, network."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path


class HangError(BaseException):
    """A computation has taken longer than its time_limit."""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise HangError after `seconds` of the processor's time, or many more of the clock's."""

    def ring(*_: object) -> None:
        raise HangError

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, 1), signal.SIGALRM: (signal.ITIMER_REAL, 20)}
    before = {number: signal.signal(number, ring) for number in timers}
    for timer, factor in timers.values():
        signal.setitimer(timer, factor * seconds)
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


@contextmanager
def isolated(folder: Path) -> Iterator[None]:
    """Work in `folder`, without a network."""
    own = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy")}
    own |= {"MOVEIMG_CACHE": str(folder / "cache"), "TORCH_HOME": str(folder / "hub")}
    before = {name: os.environ.get(name) for name in own}
    os.environ |= own
    try:
        with chdir(folder):
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
