"""Which device and number type to run on: detected, unless the user says."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# Of glibc's mallopt: how many blocks may be mapped apart, and how much may lie free at the end.
M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def pick_device(name: str | None = None) -> torch.device:
    """The named device, or the accelerator that is there, or the CPU. ValueError if unusable.

    With a CPU, the whole process keeps its freed memory from now on (see keep_memory).
    """
    if name is None or name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        device = found or torch.device("cpu")
    else:
        try:
            device = torch.device(name)
            torch.zeros(1, device=device).item()  # meta tensors hold nothing
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0].partition(". ")[0]  # what follows fills a screen
            raise ValueError(f"device {name!r} cannot be used here: {reason}") from None
    if device.type == "cpu":
        keep_memory()
    return device


def own_device(name: str | None) -> str | None:
    """The device for a --device: of several processes that torchrun started, each its own GPU.

    It is asked for before anything is put on a GPU, so that no process begins to use another's.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    kind = (name or "auto").partition(":")[0]
    if several and kind in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return name


class _NoInit(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def shapes_only() -> Iterator[None]:
    """Modules built in here have shapes and no values: to be counted, or to be given weights.

    The meta device alone would do, but torch works out `nn.init.normal_` on it in Python, and loads
    its compiler for that: two seconds of every start.
    """
    with torch.device("meta"), _NoInit():
        yield


def keep_memory() -> bool:
    """Have freed memory used again by this process, not given back to the system; whether it could.

    It holds for what the main thread frees, and until the process ends.
    glibc maps every block of 32 MiB or more apart and unmaps it when it is freed, so that each
    large activation and gradient is handed out anew by the system, page by page, all zeros. That
    took a third of encoding's time (docs/performance.md). Other C libraries are left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The named type; left out: bfloat16 on CUDA, float32 where that is slow.

    GPUs before capability 8.0 take bfloat16 and compute it in detours, as other devices do.
    """
    if name is None or name == "auto":
        fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if fast else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r}: expected one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices by itself."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: allocated by torch on CUDA, else resident, of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count the parent's, from before this program began
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # not on Windows

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def hardware(device: torch.device) -> dict[str, Any]:
    """What figures measured on `device` stand for: its name, cores, threads, torch."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": device.type,
        "name": name,
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
