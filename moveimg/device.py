"""The device and number type to run on: detected, unless the user names them."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX = -4, -1, -8  # parameters of glibc's mallopt
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def pick_device(name: str | None = None) -> torch.device:
    """The named device, or an available accelerator, or the CPU. ValueError if unusable."""
    if name is None or name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # meta tensors hold no value
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]  # the whole would fill a screen
        raise ValueError(f"device {name[:60]!r} cannot be used here: {reason[:200]}") from None
    return device


def own_device(name: str | None) -> str | None:
    """The device of a --device option; under torchrun, each process has its own GPU.

    Call it before anything is put on a GPU, so that no process allocates on another's.
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
    """Build modules on the meta device, without values: to count them, or to assign weights.

    The meta device alone would do, but torch decomposes `nn.init.normal_` on it in Python and loads
    its compiler for that: two seconds of every start.
    """
    with torch.device("meta"), _NoInit():
        yield


def keep_memory() -> bool:
    """Make glibc reuse freed memory instead of returning it to the system; whether it could.

    Zeroing every large activation anew, page by page, is a third of encoding's time
    (docs/performance.md). It holds for the whole process, so commands call it, never the library.
    """
    return _mallopt(M_MMAP_MAX, 0) and _mallopt(M_TRIM_THRESHOLD, -1)


def limit_arenas(count: int = 2) -> bool:
    """Let glibc keep freed memory in `count` heaps in place of one per thread; whether it could.

    It holds for the whole process; call it before threads start.
    """
    return _mallopt(M_ARENA_MAX, count)


def _mallopt(parameter: int, value: int) -> bool:
    return platform.libc_ver()[0] == "glibc" and bool(ctypes.CDLL(None).mallopt(parameter, value))


def release_memory() -> None:
    """Return freed memory to the system, where the C library is glibc."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The named type; left out: bfloat16 on CUDA from capability 8.0, else float32."""
    if name is None or name == "auto":
        fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if fast else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype {name[:60]!r}: expected one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def has_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16 matrices."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def peak_memory(device: torch.device) -> int:
    """Peak bytes of this process: allocated by torch on CUDA, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):  # getrusage would include the parent's memory before exec
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        for line in status.splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # not on Windows

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def hardware(device: torch.device) -> dict[str, Any]:
    """The hardware and torch version that a measurement was made with, as plain data."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        path = Path("/proc/cpuinfo")
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else platform.processor() or platform.machine()
    return {
        "device": device.type,
        "name": name,
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }
