"""Who may compute now: a bounded queue with a fair share for every visitor.

One job computes at a time: two would slow each other down and double the memory. The order is not
first come, first served alone: a visitor's second job comes after every first job.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")
Job = Callable[[threading.Event], Iterator[T | None]]
POLL = 0.03  # seconds between two looks at the queue


class QueueFullError(ValueError):
    """No room in the queue; the message is for the visitor."""


@dataclass(frozen=True)
class Visitor:
    """One browser tab or API client (`session`) at a network address or with a user name."""

    session: str
    address: str


@dataclass(frozen=True)
class Waiting:
    """How many jobs come before the visitor's own."""

    ahead: int


@dataclass(eq=False)
class Ticket:
    """A place in the queue. `stop` ends the job at its next step."""

    visitor: Visitor
    stop: threading.Event = field(default_factory=threading.Event)
    running: bool = False


class JobQueue:
    """The tickets of all jobs, running or waiting.

    Args:
        length: how many jobs may wait.
        per_visitor: how many jobs one visitor may have.
        per_address: how many jobs all visitors of one address may have; None: half the queue.
    """

    def __init__(
        self, length: int = 64, per_visitor: int = 2, per_address: int | None = None
    ) -> None:
        self.length, self.per_visitor = length, per_visitor
        self.per_address = max(per_visitor, per_address or length // 2)
        self.steps = 0  # of all jobs so far
        self._tickets: list[Ticket] = []  # in order of arrival
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._tickets)

    def enter(self, visitor: Visitor) -> Ticket:
        """Join the queue. Raises QueueFullError where the limits are reached."""
        with self._lock:
            own = sum(t.visitor == visitor for t in self._tickets)
            near = sum(t.visitor.address == visitor.address for t in self._tickets)
            if own >= self.per_visitor:
                raise QueueFullError(f"you have {own} jobs in the queue: wait for one, or stop it")
            if near >= self.per_address:
                raise QueueFullError(
                    f"your network has {near} jobs in the queue: try again in a minute"
                )
            if sum(not t.running for t in self._tickets) >= self.length:
                raise QueueFullError(f"{self.length} jobs are waiting: try again in a minute")
            ticket = Ticket(visitor)
            self._tickets.append(ticket)
            return ticket

    def leave(self, ticket: Ticket) -> None:
        """Give up a place, or end a turn."""
        with self._lock:
            if ticket in self._tickets:
                self._tickets.remove(ticket)

    def ahead(self, ticket: Ticket) -> int:
        """Count the jobs before this one. At 0 the ticket has the turn and keeps it."""
        with self._lock:
            seen: dict[Visitor, int] = {}
            ranks = []
            for arrival, other in enumerate(self._tickets):
                rank = seen[other.visitor] = seen.get(other.visitor, -1) + 1
                ranks.append((not other.running, rank, arrival))
            place = sorted(ranks).index(ranks[self._tickets.index(ticket)])
            ticket.running = place == 0
            return place

    def stop(self, visitor: Visitor) -> int:
        """Ask every job of a visitor to stop; returns how many there were."""
        with self._lock:
            own = [t for t in self._tickets if t.visitor == visitor]
        for ticket in own:
            ticket.stop.set()
        return len(own)


async def run_in_turn(
    queue: JobQueue, visitor: Visitor, job: Job[T], is_gone: Callable[[], bool] = lambda: False
) -> AsyncGenerator[Waiting | T]:
    """Run a job's steps in threads when its turn comes, and yield each item that is not None.

    The job stops at its next step when its visitor stops it, when `is_gone` says that nobody
    listens any more, or when this generator is closed. The turn is given back in every case.
    Raises QueueFullError before anything is yielded.
    """
    ticket = queue.enter(visitor)
    try:
        shown = 0
        while ahead := queue.ahead(ticket):
            if ticket.stop.is_set() or is_gone():
                return
            if ahead != shown:
                shown = ahead
                yield Waiting(ahead)
            await asyncio.sleep(POLL)
        steps, ended = job(ticket.stop), object()
        while not is_gone():
            step = asyncio.ensure_future(asyncio.to_thread(next, steps, ended))
            try:
                item = await asyncio.shield(step)
            except BaseException:
                ticket.stop.set()
                await asyncio.wait([step])  # its thread still computes: keep the turn until then
                raise
            queue.steps += 1
            if item is ended:
                return
            if item is not None:
                yield item  # type: ignore[misc]
    finally:
        ticket.stop.set()
        queue.leave(ticket)
