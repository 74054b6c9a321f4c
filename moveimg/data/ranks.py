"""The processes that share the encoding of a source, as `torchrun` starts them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

# A process with more to do than the others may keep them waiting for hours.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """This process, and how many there are."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def wait(self) -> None:
        """Return when every process has called this."""
        if self.size > 1:
            dist.barrier(self.group)

    def first(self, action: Callable[[], object]) -> None:
        """Let rank 0 do something while the others wait; what it raises, they all raise."""
        error: Exception | None = None
        if self.rank == 0:
            try:
                action()
            except (ValueError, OSError) as caught:
                error = caught
        message = [None if error is None else str(error)]
        if self.size > 1:
            dist.broadcast_object_list(message, src=0, group=self.group)
        if error is not None:
            raise error
        if message[0] is not None:
            raise ValueError(message[0])


@contextmanager
def all_ranks() -> Iterator[Ranks]:
    """The processes of this job; one alone where there is no job.

    In a process group that is there already (training's), a group for the CPU is added to it: its
    own may time out while shards are being encoded. Every process has to enter.
    """
    ours = dist.is_available() and not dist.is_initialized()
    if ours and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    elif ours or not dist.is_available():
        yield Ranks()
        return
    group: Any = None if ours else dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), group)
    finally:
        dist.destroy_process_group(group)
