"""Processes of a run that torchrun started, or a single process, and signals."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from moveimg.device import pick_device, resolve_device

TIMEOUT = timedelta(days=7)  # ranks wait for a rank that downloads or has more work


@dataclass(frozen=True)
class World:
    """The number of processes of a run, and the rank and device of this one."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def main(self) -> bool:
        """Whether this process is rank 0, which prints, logs and exports."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of a tensor over processes, on the CPU, in float64."""
        if self.size == 1:
            return values.detach().cpu().double()
        values = values.detach().to(self.device, torch.float64, copy=True)
        dist.all_reduce(values)
        return (values / self.size).cpu()

    def any(self, flag: bool) -> bool:
        """Return whether the flag is true in any process."""
        return bool(self.mean(torch.tensor(float(flag))) > 0)

    def wait(self) -> None:
        """Block until every process has called this method."""
        self.any(False)

    def run_on_rank0(self, action: Callable[[], object]) -> None:
        """Run `action` on rank 0 while other ranks wait; all raise its ValueError or OSError."""
        error: Exception | None = None
        if self.main:
            try:
                action()
            except (ValueError, OSError) as caught:
                error = caught
        message = [error and str(error)]
        if self.size > 1:
            dist.broadcast_object_list(message, src=0, device=self.device)
        if message[0] is not None:
            raise error or ValueError(message[0])

    @contextmanager
    def rank0_first(self) -> Iterator[None]:
        """Run the block on rank 0 first, so that other ranks find the files that it downloads."""
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()


@contextmanager
def processes(device: str | None) -> Iterator[World]:
    """Join the processes of torchrun, each with its own device; an error in one ends all."""
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if size == 1:
        yield World(device=pick_device(device))
        return
    try:
        chosen = pick_device(resolve_device(device))
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
        yield World(rank, size, chosen)
        dist.destroy_process_group()
    except (ValueError, OSError) as error:
        if rank == 0:
            raise
        time.sleep(10.0)  # after an error on rank 0, torchrun ends this process meanwhile
        raise ValueError(f"process {rank} of {size}: {' '.join(str(error).split())}") from error


def reduce_sum(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over processes, detached; in a single process, the tensor."""
    if not dist.is_initialized():
        return tensor
    result = tensor.detach().clone()
    dist.all_reduce(result)
    return result


def reduce_mean(tensor: Tensor) -> Tensor:
    """Return a tensor's mean over processes; its gradient stays local, for DDP to average."""
    if not dist.is_initialized():
        return tensor
    average = reduce_sum(tensor) / dist.get_world_size()
    return tensor + (average - tensor.detach()) if tensor.requires_grad else average


def broadcast_from_rank0(tensor: Tensor) -> None:
    """Overwrite a tensor in place with rank 0's tensor."""
    if dist.is_initialized():
        dist.broadcast(tensor.detach(), src=0)


@contextmanager
def all_ranks() -> Iterator[World]:
    """Yield the World of this job on the CPU, in the existing process group or a new one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else World()
        return
    dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def die_with_parent() -> Callable[[], object] | None:
    """Return a `preexec_fn` that lets Linux kill a child with its parent, else None."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork: few calls are safe after it
    return lambda: prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@contextmanager
def handle_signals(numbers: Iterable[int], handler: Callable[[int, Any], object]) -> Iterator[None]:
    """Call `handler` on signals inside the block, if the block runs in the main thread."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in numbers if main}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def signals_raise() -> AbstractContextManager[None]:
    """Make SIGTERM and SIGHUP raise SystemExit(128 + signal) inside the block."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    known = [getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")]  # Windows has no SIGHUP
    return handle_signals([n for n in known if n and signal.getsignal(n) != signal.SIG_IGN], end)


def print_rank0(message: str) -> None:
    """Write a line to stderr on rank 0 alone, above a progress bar if there is one."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(message, file=sys.stderr)
