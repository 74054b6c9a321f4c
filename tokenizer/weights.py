"""Weights files of any origin, read as plain tensors: no code in them is ever run."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from moveimg.dist import print_rank0
from moveimg.errors import describe, list_names
from moveimg.files import require_file

CONTAINERS = ("ema", "model", "module", "state_dict")
"""Keys under which checkpoints keep their weights; averaged weights are preferred."""


def read_weights(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Names and tensors of a safetensors file (by its suffix) or a PyTorch checkpoint.

    In a checkpoint they are the first of `CONTAINERS` that holds tensors, or at its top; where it
    has several, a line on stderr names the one that is read. The prefixes `module.` (DDP) and
    `_orig_mod.` (torch.compile) are removed. Tensors stay in the file until they are used.

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
        content = _find_weights(_unpickle(file), file)
    weights: dict[str, Tensor] = {}
    for key, value in content.items():
        name = str(key).replace("_orig_mod.", "").removeprefix("module.")
        if not isinstance(value, Tensor) or name in weights:
            reason = "is there twice" if name in weights else f"is a {type(value).__name__}"
            raise ValueError(f"{file}: {name} {reason}, expected one tensor")
        weights[name] = value
    return weights


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Set all weights of `module`, in float32; on the meta device it takes the tensors themselves.

    Raises ValueError, one line that starts with `source`, where names or shapes differ, or a
    tensor is not of finite floats.
    """
    expected, state = module.state_dict(), {}
    if names := sorted(expected.keys() ^ weights.keys()):
        kind = "missing" if names[0] in expected else "unexpected"
        raise ValueError(f"{source}: {kind} weight {list_names(names, 1)}")
    for name, parameter in expected.items():
        tensor, shape = weights[name], list(parameter.shape)
        if list(tensor.shape) != shape:
            raise ValueError(f"{source}: {name} has shape {list(tensor.shape)}, expected {shape}")
        if not tensor.is_floating_point():
            raise ValueError(f"{source}: {name} holds {tensor.dtype}, expected floats")
        state[name] = tensor.detach().to(torch.float32)
        if not state[name].isfinite().all():
            raise ValueError(f"{source}: {name} holds NaN or infinite values")
    module.load_state_dict(state, assign=next(module.parameters()).is_meta)


def _find_weights(content: Any, file: Path) -> Mapping[Any, Any]:
    """The mapping of a checkpoint that holds its weights."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{file}: holds a {type(content).__name__}, expected a dict of weights")
    there = [key for key in CONTAINERS if key in content]
    for chosen in (*(content[key] for key in there), content):
        if isinstance(chosen, Mapping) and any(isinstance(x, Tensor) for x in chosen.values()):
            if len(there) > 1:
                name = next(key for key in there if content[key] is chosen)
                print_rank0(f"{file}: reading {name!r} out of {', '.join(there)}")
            return chosen
    keys = list_names(str(key) for key in content)
    raise ValueError(f"{file}: no weights under any of {', '.join(CONTAINERS)} (keys: {keys})")


def _unpickle(file: Path) -> Any:
    """torch.load that never runs code; training arguments (argparse.Namespace) are plain data."""
    with file.open("rb") as opened:
        mappable = opened.read(4) == b"PK\3\4"  # the format of torch 1.6 and later
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mappable)
    except Exception as error:  # a damaged pickle can end in any; torch advises weights_only=False
        raise ValueError(
            f"{file}: damaged or no PyTorch file, or it holds Python objects beside tensors, which "
            f"are not read because that could run code ({type(error).__name__})"
        ) from None
