"""Weights files of any origin, read as plain tensors: no code in them is ever run."""

from __future__ import annotations

import argparse
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from moveimg.errors import describe
from moveimg.files import require_file

CONTAINERS = ("ema", "model", "module", "state_dict")
"""Keys under which checkpoints keep their weights; averaged weights are preferred."""


def read_weights(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Names and tensors of a safetensors file (by its suffix) or a PyTorch checkpoint.

    In a checkpoint they are the first of `CONTAINERS` that holds tensors, or at its top. The
    prefixes `module.` (DDP) and `_orig_mod.` (torch.compile) are removed. Tensors stay in the file
    until they are used.

    Raises FileNotFoundError, or ValueError for a file that is damaged, holds no weights, or needs
    code to be run.
    """
    file = require_file(file)
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as stored:
                content: Any = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"{file}: damaged or not a safetensors file ({describe(error, 200)})"
            ) from None
    else:
        whole = _unpickle(file)
        candidates = [whole.get(key) for key in CONTAINERS] if isinstance(whole, dict) else []
        for content in (*candidates, whole):
            if isinstance(content, dict) and any(isinstance(x, Tensor) for x in content.values()):
                break
        else:
            raise ValueError(f"{file}: no weights, neither bare nor in {', '.join(CONTAINERS)}")
    weights: dict[str, Tensor] = {}
    for key, value in content.items():
        name = str(key).replace("_orig_mod.", "").removeprefix("module.")
        if not isinstance(value, Tensor) or name in weights:
            reason = "is there twice" if name in weights else f"is a {type(value).__name__}"
            raise ValueError(f"{file}: {name} {reason}, expected one tensor")
        weights[name] = value
    return weights


def load_weights(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    source: str,
    dtype: torch.dtype | None = torch.float32,
) -> None:
    """Set all weights of `module`, floats cast to `dtype` (None: not cast).

    A module on the meta device takes the tensors themselves. Raises ValueError, one line that
    starts with `source`, for a tensor that is missing, unknown, misshapen or of another kind of
    number, and for a norm or bias that is not finite (reading every matrix would take seconds).
    """
    expected, state = module.state_dict(), {}
    for name in sorted(expected.keys() | weights.keys()):
        there, wanted = (
            list(tensors[name].shape) if name in tensors else "nothing"
            for tensors in (weights, expected)
        )
        if there != wanted:
            raise ValueError(f"{source}: {name[:200]!r} is {there}, expected {wanted}")
        value, floats = weights[name].detach(), expected[name].is_floating_point()
        if not value.is_floating_point() if floats else value.dtype != expected[name].dtype:
            needed = "floats" if floats else expected[name].dtype
            raise ValueError(f"{source}: {name!r} holds {value.dtype}, expected {needed}")
        state[name] = value.to(dtype=dtype) if floats else value
        if state[name].ndim == 1 and not state[name].isfinite().all():
            raise ValueError(f"{source}: {name!r} holds NaN or infinite values: damaged weights")
    module.load_state_dict(state, assign=next(module.parameters()).is_meta)


def _unpickle(file: Path) -> Any:
    """torch.load that never runs code; training arguments (argparse.Namespace) are plain data."""
    mappable = zipfile.is_zipfile(file)  # the format of torch 1.6 and later
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mappable)
    except Exception as error:  # a damaged pickle can end in any; torch advises weights_only=False
        raise ValueError(
            f"{file}: damaged or no PyTorch file, or it holds Python objects beside tensors, which "
            f"are not read because that could run code ({type(error).__name__})"
        ) from None
