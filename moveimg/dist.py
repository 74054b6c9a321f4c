"""The processes of a run started by torchrun; a single process runs the same code."""

from __future__ import annotations

import ctypes
import os
import signal
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

PR_SET_PDEATHSIG = 1  # of Linux's prctl
GRACE = 10.0  # seconds in which torchrun ends the other processes after rank 0's error
LOST = ("connection closed by peer", "connection reset", "connection was likely closed", "nccl")


@dataclass(frozen=True)
class World:
    """The number of processes of a run, and the rank and device of this one."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: Any = None

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which prints, logs and exports."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean of a tensor over processes, on the CPU, in float64."""
        if self.size == 1:
            return values.detach().cpu().double()
        values = values.detach().to(self.device, torch.float64, copy=True)
        dist.all_reduce(values, group=self.group)
        return (values / self.size).cpu()

    def any(self, flag: bool) -> bool:
        """Whether the flag is true in any process."""
        return bool(self.mean(torch.tensor(float(flag))) > 0)

    def wait(self) -> None:
        """Return when every process has called this."""
        self.any(False)

    def run_first(self, action: Callable[[], object]) -> None:
        """Run `action` on rank 0 while the others wait; all raise its ValueError or OSError."""
        if self.size == 1:
            action()
            return
        error: Exception | None = None
        if self.main:
            try:
                action()
            except (ValueError, OSError) as caught:
                error = caught
        message = [error and str(error)]
        dist.broadcast_object_list(message, src=0, group=self.group, device=self.device)
        if message[0] is not None:
            raise error or ValueError(message[0])

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """A context that rank 0 runs before the others, which find what it downloaded."""
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()


@contextmanager
def processes(device: str | None) -> Iterator[World]:
    """Join the processes started by torchrun, if any, each with its own device.

    Collectives use nccl on CUDA and gloo on the CPU. An error ends every process: rank 0 raises at
    once, the others only if rank 0 has not ended the run by then.
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
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        # the others wait while the first rank downloads a data set, longer than ten minutes
        dist.init_process_group(backend, timeout=timedelta(days=1))
        yield World(rank, size, chosen)
        dist.destroy_process_group()
    except (ValueError, OSError, RuntimeError) as error:
        known = isinstance(error, ValueError | OSError)
        if not known and not any(sign in str(error).lower() for sign in LOST):
            raise
        if rank == 0 and known:
            raise
        if rank != 0:  # rank 0 says what happened, unless it is the one that is gone
            time.sleep(GRACE)
        what = str(error) if known else f"another process of this run ended ({str(error)[:200]})"
        raise ValueError(f"process {rank} of {size}: {' '.join(what.split())}") from error


def is_distributed() -> bool:
    """Whether this process is one of several in a process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor over processes, without a gradient; in one process, the tensor."""
    if not is_distributed():
        return tensor
    result = tensor.detach().clone()
    dist.all_reduce(result)
    return result


def reduce_mean(tensor: Tensor) -> Tensor:
    """The mean of a tensor over processes, with the gradient of this process's own.

    DDP averages the gradients later.
    """
    if not is_distributed():
        return tensor
    average = reduce_sum(tensor) / dist.get_world_size()
    return tensor + (average - tensor.detach()) if tensor.requires_grad else average


def broadcast_from_rank0(tensor: Tensor) -> None:
    """Overwrite a tensor in place with rank 0's."""
    if is_distributed():
        dist.broadcast(tensor.detach(), src=0)


@contextmanager
def all_ranks(timeout: timedelta = timedelta(days=7)) -> Iterator[World]:
    """The processes of this job on the CPU, with a process group whose timeout is days.

    Encoding and sampling sets run for hours, and a process with less work waits for the others.
    Inside a process group, a second group is made. Every process must enter.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World()
        return
    if ours := not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timeout)
    group = None if ours else dist.new_group(backend="gloo", timeout=timeout)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), group=group)
    finally:
        dist.destroy_process_group(group)


def die_with_parent() -> Callable[[], object] | None:
    """The function by which a new process asks the kernel to be killed with its parent (Linux)."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def signals_raise() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise SystemExit(128 + signal) inside the block."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    known = [getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")]  # Windows has no SIGHUP
    numbers = [n for n in known if n and signal.getsignal(n) != signal.SIG_IGN]  # nohup's stays
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def print_rank0(message: str) -> None:
    """Write a line to stderr on rank 0 alone, above the progress bar if there is one."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(message, file=sys.stderr)
