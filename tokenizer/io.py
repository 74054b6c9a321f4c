"""Tokenizer directories: `config.json` beside `model.safetensors`.

Weights are stored in float32. Both files appear by renaming, so that no half-written one is seen.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tokenizer.base import AutoencoderTokenizer, fingerprint
from tokenizer.config import TamingConfig, VQConfig, parse_config
from tokenizer.taming import TamingTokenizer
from tokenizer.vq import VQTokenizer

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

TOKENIZERS: dict[str, Callable[[Any], AutoencoderTokenizer]] = {
    "vq": VQTokenizer,
    "taming": TamingTokenizer,
}


def build(config: VQConfig | TamingConfig) -> AutoencoderTokenizer:
    """A new, trainable tokenizer of the config's kind."""
    return TOKENIZERS[config.kind](config)


def save(tokenizer: AutoencoderTokenizer, directory: str | os.PathLike[str]) -> None:
    """Write a tokenizer into a directory, which is made if need be.

    Raises:
        ValueError: a frozen tokenizer was cast to a narrower dtype since: what would be written
            has another fingerprint.
    """
    weights = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in tokenizer.state_dict().items()
    }
    if fingerprint(tokenizer.config, weights) != tokenizer.fingerprint:
        raise ValueError(
            f"{directory}: the tokenizer's weights changed since it was loaded (it is in "
            f"{tokenizer.quant_conv.weight.dtype} now); save it before casting it"
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with _replacing(directory / WEIGHTS_FILE) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    with _replacing(directory / CONFIG_FILE) as temporary:
        temporary.write_text(json.dumps(tokenizer.config.model_dump(mode="json"), indent=2) + "\n")


def load(
    directory: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> AutoencoderTokenizer:
    """Read a tokenizer, frozen.

    Args:
        directory: what `save` wrote.
        device: where its weights go.
        dtype: cast the weights, float32 when not given. The fingerprint is that of the file.

    Raises:
        FileNotFoundError: the directory or one of its files is missing.
        ValueError: a file is damaged, or config and weights do not fit each other.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such tokenizer directory")
    config_file = existing(directory / CONFIG_FILE)
    try:
        values = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{config_file}: not readable as JSON: {error}") from None
    config = parse_config(values, str(config_file))
    weights_file = existing(directory / WEIGHTS_FILE)
    tokenizer = assemble(config, read_safetensors(weights_file), str(weights_file))
    return tokenizer.to(device=device, dtype=dtype)


class _NoInit(TorchFunctionMode):
    """Leaves tensors as they are made, as moveimg.device.shapes_only: it saves a start's second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def assemble(
    config: VQConfig | TamingConfig, weights: Mapping[str, Tensor], source: str
) -> AutoencoderTokenizer:
    """A frozen tokenizer that takes the given tensors as its own, without a copy.

    Raises:
        ValueError: names, shapes or dtypes do not fit the config; one line that starts with
            `source`.
    """
    with torch.device("meta"), _NoInit():
        tokenizer = build(config)
    expected = tokenizer.state_dict()
    for what, names in (
        ("missing", expected.keys() - weights.keys()),
        ("unexpected", weights.keys() - expected.keys()),
    ):
        if names:
            first, more = min(names), f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{source}: {what} weight {first}{more}")
    for name, parameter in expected.items():
        found, wanted = list(weights[name].shape), list(parameter.shape)
        if found != wanted:
            raise ValueError(f"{source}: {name} has shape {found}, expected {wanted}")
        if not weights[name].is_floating_point():
            raise ValueError(f"{source}: {name} holds {weights[name].dtype}, expected floats")
    tokenizer.load_state_dict(
        {name: weights[name].detach().to(torch.float32) for name in expected}, assign=True
    )
    return tokenizer.freeze()


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with safe_open(file, framework="pt") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged or not a safetensors file: {error}") from None


def existing(file: Path) -> Path:
    """`file` itself.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    return file


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A temporary file beside `target` that takes its place if all goes well."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.touch()
    mode = temporary.stat().st_mode  # what the umask allows; safetensors makes its files private
    try:
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
