"""Tokenizers published by others, read without running anything that their files hold.

PyTorch files are pickles; they are read with `weights_only=True`, which allows tensors and plain
containers and nothing else.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from torch import Tensor

from tokenizer.config import TamingConfig, VQConfig, one_line
from tokenizer.io import assemble, existing, read_safetensors
from tokenizer.taming import TamingTokenizer
from tokenizer.vq import VQTokenizer

CONTAINERS = ("ema", "model", "module", "state_dict")
"""Keys under which checkpoints keep their weights; averaged weights are preferred."""


def load_llamagen_vq(file: str | os.PathLike[str]) -> VQTokenizer:
    """Read a LlamaGen tokenizer such as `vq_ds16_c2i.pt` (VQ-16) or `vq_ds8_c2i.pt` (VQ-8), frozen.

    Sizes are read off the tensors. The weights stand under one of `CONTAINERS`, or bare; the file
    is a PyTorch file, or safetensors by its suffix.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, needs code to be read, or holds something else.
    """
    file = existing(Path(file))
    weights = read_weights(file)
    weights.pop("quantize.codebook_used", None)  # a record of training
    tokenizer = assemble(_llamagen_config(weights, file), weights, str(file))
    assert isinstance(tokenizer, VQTokenizer)
    return tokenizer


def load_taming(
    checkpoint: str | os.PathLike[str], model_yaml: str | os.PathLike[str]
) -> TamingTokenizer:
    """Read a VQGAN of taming-transformers, frozen.

    Args:
        checkpoint: a Lightning checkpoint (weights under `state_dict`); `loss.*` is ignored.
        model_yaml: the `model.yaml` beside it. Of it only `embed_dim`, `n_embed` and `ddconfig`
            under `model.params` (or `params`) are used; nothing it names is imported.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file is damaged, needs code to be read, or holds something else.
        ImportError: taming-transformers is not installed.
    """
    checkpoint, model_yaml = existing(Path(checkpoint)), existing(Path(model_yaml))
    config = _taming_config(model_yaml)
    weights = {
        name: tensor
        for name, tensor in read_weights(checkpoint).items()
        if not name.startswith("loss.")  # perceptual and adversarial networks of its training
    }
    tokenizer = assemble(config, weights, str(checkpoint))
    assert isinstance(tokenizer, TamingTokenizer)
    return tokenizer


def read_weights(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Names and tensors of a checkpoint, out of whatever container they are in.

    They stand under one of `CONTAINERS`, or bare, in a PyTorch file or, by its suffix, safetensors.
    Tensors stay in the file until they are used.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, needs code to be read, or holds something else.
    """
    file = existing(Path(file))
    if file.suffix == ".safetensors":
        return read_safetensors(file)
    content = _read_torch(file)
    if not isinstance(content, Mapping):
        raise ValueError(f"{file}: holds a {type(content).__name__}, expected a dict of weights")
    for container in CONTAINERS:
        if isinstance(content.get(container), Mapping):
            content = content[container]
            break
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{file}: {name} is a {type(value).__name__}, expected a tensor")
    return {str(name): tensor for name, tensor in content.items()}


def _read_torch(file: Path) -> Any:
    """torch.load that never runs code, with tensors left in the file until they are used."""
    with file.open("rb") as start:
        # only the zip format of torch 1.6 and later can be mapped into memory
        mappable = start.read(4) == b"PK\3\4"
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mappable)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it needs {named[1]}" if named else "it needs more, or is damaged"
        raise ValueError(
            f"{file}: not readable as plain tensors: {reason}. If you trust the file, extract its "
            "weights where its own packages are installed: torch.save(torch.load(file, "
            "weights_only=False)['state_dict'], 'weights.pt')"
        ) from None
    except Exception as error:  # a damaged pickle can end in any of them
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        raise ValueError(f"{file}: damaged or no PyTorch file ({reason})") from None


def _llamagen_config(weights: Mapping[str, Tensor], file: Path) -> VQConfig:
    """The sizes of a LlamaGen tokenizer; what its weights do not show is the same in all."""

    def shape(name: str, dimensions: int) -> torch.Size:
        if name not in weights:
            raise ValueError(f"{file}: not a LlamaGen tokenizer: weight {name} is missing")
        if weights[name].ndim != dimensions:
            found = list(weights[name].shape)
            raise ValueError(f"{file}: {name} has shape {found}, expected {dimensions} dimensions")
        return weights[name].shape

    def count(prefix: str) -> int:
        pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
        return len({found[1] for name in weights if (found := pattern.match(name))})

    width, in_channels = shape("encoder.conv_in.weight", 4)[:2]
    codebook_size, codebook_dim = shape("quantize.embedding.weight", 2)
    widths = [
        shape(f"encoder.conv_blocks.{level}.res.0.conv1.weight", 4)[0]
        for level in range(count("encoder.conv_blocks"))
    ]
    for channels in widths:
        if width == 0 or channels % width:
            raise ValueError(
                f"{file}: not a LlamaGen tokenizer: a level of {channels} channels is no multiple "
                f"of encoder.conv_in's {width}"
            )
    try:
        return VQConfig(
            in_channels=in_channels,
            width=width,
            multipliers=tuple(channels // width for channels in widths),
            n_res_blocks=count("encoder.conv_blocks.0.res"),
            z_channels=shape("encoder.conv_out.weight", 4)[0],
            codebook_size=codebook_size,
            codebook_dim=codebook_dim,
            attention="encoder.mid.1.q.weight" in weights,
        )
    except ValidationError as error:
        raise ValueError(f"{file}: not a LlamaGen tokenizer: {one_line(error)}") from None


def _taming_config(file: Path) -> TamingConfig:
    """The sizes of a VQGAN, from its YAML."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file}: not readable as plain YAML: {reason}") from None
    model = content.get("model", content) if isinstance(content, Mapping) else None
    params = model.get("params") if isinstance(model, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(params, Mapping):
        raise ValueError(f"{file}: model.params is missing")
    if str(model.get("target", "")).endswith("GumbelVQ"):
        raise ValueError(
            f"{file}: model.target is a GumbelVQ, which picks codes by a convolution over logits; "
            "only VQModel, which picks the nearest codebook vector, is supported"
        )
    if not isinstance(params.get("ddconfig"), Mapping):
        raise ValueError(f"{file}: model.params.ddconfig is missing")
    sizes = {name: params[name] for name in ("embed_dim", "n_embed") if name in params}
    try:
        return TamingConfig.model_validate({**params["ddconfig"], **sizes})
    except ValidationError as error:
        raise ValueError(f"{file}: model.params: {one_line(error)}") from None
