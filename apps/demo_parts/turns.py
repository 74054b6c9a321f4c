"""Who may compute now: a bounded line with a fair share for every visitor.

One job computes at a time (two would only slow each other down and double the memory). The line
is not first come, first served alone: a visitor's second job stands behind every first job.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")
POLL = 0.03  # seconds between looks at the line


class Busy(ValueError):
    """No room in the line; the message is for the visitor."""


@dataclass(frozen=True)
class Visitor:
    """Who asks: one browser tab or API client (`session`), at a network address or user name."""

    session: str
    address: str


@dataclass(frozen=True)
class Waiting:
    """What is yielded before a job's own results: how many jobs come first."""

    ahead: int


@dataclass(eq=False)
class Ticket:
    """A place in the line. `stop` ends the job at its next step."""

    visitor: Visitor
    stop: threading.Event = field(default_factory=threading.Event)
    running: bool = False


class Turns:
    """The line.

    Args:
        length: most jobs waiting.
        per_visitor: most jobs of one visitor, running or waiting.
        per_address: most jobs of all visitors at one address; None: half the line.
    """

    def __init__(
        self, length: int = 64, per_visitor: int = 2, per_address: int | None = None
    ) -> None:
        self.length, self.per_visitor = length, per_visitor
        self.per_address = max(per_visitor, per_address or length // 2)
        self.steps = 0  # of all jobs so far; stands still where nothing computes
        self._tickets: list[Ticket] = []  # in order of arrival
        self._lock = threading.Lock()

    def enter(self, visitor: Visitor) -> Ticket:
        """Join the line. Raises Busy where it is full or the visitor has enough in it."""
        with self._lock:
            mine = [t for t in self._tickets if t.visitor == visitor]
            here = [t for t in self._tickets if t.visitor.address == visitor.address]
            if len(mine) >= self.per_visitor:
                raise Busy(
                    f"you already have {len(mine)} jobs in the line: wait for one, or stop it"
                )
            if len(here) >= self.per_address:
                raise Busy(
                    f"{len(here)} jobs from your network are in the line already: "
                    "try again in a minute"
                )
            if sum(not t.running for t in self._tickets) >= self.length:
                raise Busy(f"{self.length} jobs are waiting already: try again in a minute")
            ticket = Ticket(visitor)
            self._tickets.append(ticket)
            return ticket

    def leave(self, ticket: Ticket) -> None:
        """Leave the line, or end the turn."""
        with self._lock:
            if ticket in self._tickets:
                self._tickets.remove(ticket)

    def ahead(self, ticket: Ticket) -> int:
        """How many jobs come before this one; 0 where it has the turn, and then it keeps it."""
        with self._lock:
            line = self._line()
            place = line.index(ticket)
            ticket.running = ticket.running or place == 0
            return place

    def stop(self, session: str) -> int:
        """Ask every job of a session to stop; returns how many there were."""
        with self._lock:
            mine = [t for t in self._tickets if t.visitor.session == session]
        for ticket in mine:
            ticket.stop.set()
        return len(mine)

    def jobs(self) -> int:
        """Jobs running or waiting."""
        return len(self._tickets)

    def _line(self) -> list[Ticket]:
        """The tickets in the order of their turns."""
        seen: dict[Visitor, int] = {}
        ranks = []
        for arrival, ticket in enumerate(self._tickets):
            rank = seen.get(ticket.visitor, 0)
            seen[ticket.visitor] = rank + 1
            ranks.append((not ticket.running, rank, arrival, ticket))
        return [entry[-1] for entry in sorted(ranks, key=lambda entry: entry[:3])]


async def in_turn(
    turns: Turns, visitor: Visitor, job: Callable[[threading.Event], Iterator[T]]
) -> AsyncGenerator[Waiting | T]:
    """Run a job's iterator in threads when its turn comes, and yield what it yields.

    Ends early when its visitor stops it; when the reader goes away, the job stops within a step.
    The turn is given back in every case. Raises Busy before anything is yielded.
    """
    ticket = turns.enter(visitor)
    try:
        told = 0
        while ahead := turns.ahead(ticket):
            if ticket.stop.is_set():
                return
            if ahead != told:
                told = ahead
                yield Waiting(ahead)
            await asyncio.sleep(POLL)
        work = job(ticket.stop)
        while True:
            step = asyncio.ensure_future(asyncio.to_thread(_advance, work))
            try:
                done, item = await asyncio.shield(step)
            except BaseException:
                ticket.stop.set()
                await asyncio.wait([step])  # the thread still computes: keep the turn until then
                raise
            turns.steps += 1
            if done:
                return
            yield item  # type: ignore[misc]
    finally:
        ticket.stop.set()
        turns.leave(ticket)


def _advance(work: Iterator[T]) -> tuple[bool, T | None]:
    """The next item, as (finished, item): StopIteration cannot travel through a future."""
    for item in work:
        return False, item
    return True, None
