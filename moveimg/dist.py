"""The processes of a run that torchrun started; one process alone is the same code."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from moveimg.device import own_device, pick_device

GRACE = 10.0  # seconds in which the launcher ends the other processes after the first one's error
LOST = ("connection closed by peer", "connection reset", "connection was likely closed", "nccl")


@dataclass(frozen=True)
class World:
    """The processes of a training, and which one this is; alone by default."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: Any = None

    @property
    def main(self) -> bool:
        """Whether this process is the one that prints, logs and exports."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean over processes of a tensor that each has, on the CPU, in float64."""
        if self.size == 1:
            return values.detach().cpu().double()
        values = values.detach().to(self.device, torch.float64, copy=True)
        dist.all_reduce(values, group=self.group)
        return (values / self.size).cpu()

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process."""
        if self.size == 1:
            return flag
        return bool(self.mean(torch.tensor(float(flag), device=self.device)) > 0)

    def from_main(self, value: object) -> object:
        """What the first process says, in all of them; the others' own value is not looked at."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group, device=self.device)
        return box[0]

    def wait(self) -> None:
        """Go on when every process is here."""
        self.any(False)

    def run_first(self, action: Callable[[], object]) -> None:
        """Run `action` on rank 0 while the others wait; its ValueError or OSError ends all."""
        error: Exception | None = None
        if self.main:
            try:
                action()
            except (ValueError, OSError) as caught:
                error = caught
        message = self.from_main(None if error is None else str(error))
        if error is not None:
            raise error
        if message is not None:
            raise ValueError(message)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Around what fetches a file: the first process does it, then the others find it there."""
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()


@contextmanager
def processes(device: str | None) -> Iterator[World]:
    """Join the processes that torchrun started, if it did, each with a device of its own.

    nccl carries tensors on CUDA, gloo those on the CPU. An error ends every process: the first one
    says its line at once; the others speak only if it had none to say.
    Raises ValueError for a device that cannot be used, or when another process is gone.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if size == 1:
        yield World(device=pick_device(device))
        return
    try:
        chosen = pick_device(own_device(device))
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
        yield World(rank, size, chosen)
        dist.destroy_process_group()
    except (ValueError, OSError) as error:
        if rank == 0:
            raise
        time.sleep(GRACE)
        raise ValueError(f"process {rank} of {size}: {error}") from error
    except RuntimeError as error:
        if not any(sign in str(error).lower() for sign in LOST):
            raise
        why = " ".join(str(error).split())[:200]  # nccl's own troubles, too, come this way
        raise ValueError(
            f"process {rank} of {size}: another process of this run ended ({why})"
        ) from error


def is_distributed() -> bool:
    """Whether this process is one of several in a process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over processes of a tensor, without a gradient; of one process, the tensor."""
    if not is_distributed():
        return tensor
    result = tensor.detach().clone()
    dist.all_reduce(result)
    return result


def reduce_mean(tensor: Tensor) -> Tensor:
    """The mean over processes, with this process's gradient: DDP averages gradients later."""
    if not is_distributed():
        return tensor
    average = reduce_sum(tensor) / dist.get_world_size()
    return tensor + (average - tensor.detach()) if tensor.requires_grad else average


def broadcast_from_rank0(tensor: Tensor) -> None:
    """Overwrite a tensor, in place, by that of rank 0."""
    if is_distributed():
        dist.broadcast(tensor.detach(), src=0)


@contextmanager
def all_ranks(timeout: timedelta = timedelta(days=7)) -> Iterator[World]:
    """The processes of this job on the CPU, with a process group that may wait for days.

    Encoding and sampling sets take hours, and a process that has less to do waits for the others.
    Inside a training's process group it makes another one beside it. Every process has to enter.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    ours = dist.is_available() and not dist.is_initialized()
    if not several and (ours or not dist.is_available()):
        yield World()
        return
    if ours:
        dist.init_process_group("gloo", timeout=timeout)
    group = None if ours else dist.new_group(backend="gloo", timeout=timeout)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), group=group)
    finally:
        dist.destroy_process_group(group)


def print_rank0(message: str) -> None:
    """A line on stderr, above the bar if there is one; said by the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(message, file=sys.stderr)
