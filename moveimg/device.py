"""Which device and number type to run on: detected, unless the user says."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def pick_device(name: str | None = None) -> torch.device:
    """The named device, or the accelerator that is there, or the CPU. ValueError if unusable."""
    if name is None or name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here: {reason}") from None
    return device


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The named type; left out: bfloat16 on CUDA, float32 elsewhere (bfloat16 is slow there)."""
    if name is None or name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r}: expected one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]
