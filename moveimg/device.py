"""Selection of device and dtype, control of glibc's memory, and the hardware of a measurement."""

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

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def pick_device(name: str | None = None) -> torch.device:
    """Return the named device, by default an accelerator or the CPU. ValueError if unusable."""
    if name is None or name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # meta tensors hold no value
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]  # the whole text would fill a screen
        raise ValueError(f"device {name[:60]!r} cannot be used here: {reason[:200]}") from None
    return device


def resolve_device(name: str | None) -> str | None:
    """Return the name of this rank's device: the --device option, or its GPU under torchrun."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    kind = (name or "auto").partition(":")[0]
    if several and kind in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return name


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Return the named dtype; default: bfloat16 on CUDA from capability 8.0, else float32."""
    if name is None or name == "auto":
        fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if fast else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype {name[:60]!r}: expected one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


class _NoInit(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def shapes_only() -> Iterator[None]:
    """Build modules on the meta device, without values, to count or to assign weights."""
    # nn.init is skipped: normal_ on meta tensors imports torch's compiler, which takes two seconds
    with torch.device("meta"), _NoInit():
        yield


def keep_memory() -> None:
    """Make glibc keep freed memory for reuse, which is faster (docs/performance.md)."""
    _call_glibc("mallopt", -4, 0)  # M_MMAP_MAX
    _call_glibc("mallopt", -1, -1)  # M_TRIM_THRESHOLD


def limit_arenas() -> None:
    """Limit glibc to two heaps instead of one per thread; call this before threads start."""
    _call_glibc("mallopt", -8, 2)  # M_ARENA_MAX


def release_memory() -> None:
    """Return freed memory to the system, if the C library is glibc."""
    _call_glibc("malloc_trim", 0)


def _call_glibc(function: str, *arguments: int) -> None:
    if platform.libc_ver()[0] == "glibc":
        getattr(ctypes.CDLL(None), function)(*arguments)


def has_bfloat16() -> bool:
    """Return whether oneDNN supports products of bfloat16 matrices on this CPU."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes of this process: allocated by torch on CUDA, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, IndexError):  # getrusage would include the parent's memory before exec
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    import resource  # not on Windows

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def hardware(device: torch.device) -> dict[str, Any]:
    """Return the hardware and the torch version of a measurement, as plain data."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif (path := Path("/proc/cpuinfo")).is_file():
        after = path.read_text(encoding="utf-8").partition("model name")[2]
        name = after.partition(":")[2].partition("\n")[0].strip() or name
    return {
        "device": device.type,
        "name": name,
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }
