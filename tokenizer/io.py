"""Reading and writing of tokenizer directories, and reading of LlamaGen's and taming's checkpoints.

A directory holds `config.json` and `model.safetensors`. Code inside checkpoints is never run.
"""

from __future__ import annotations

import argparse
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moveimg.device import shapes_only
from moveimg.errors import shorten, validate
from moveimg.files import atomic, read_json, read_yaml, require_file, write_json
from tokenizer.config import TamingConfig, TokenizerConfig, VQConfig, parse_config
from tokenizer.vq import AutoencoderTokenizer, WinogradConv2d

PathLike = str | os.PathLike[str]
CONTAINERS = ("ema", "model", "module", "state_dict")  # keys of checkpoints; EMA weights first


def save(tokenizer: AutoencoderTokenizer, directory: PathLike) -> None:
    """Write a tokenizer's config and float32 weights into a directory, each file atomically."""
    weights = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in tokenizer.state_dict().items()
    }
    with atomic(Path(directory) / "model.safetensors") as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    write_json(Path(directory) / "config.json", tokenizer.config.model_dump(mode="json"))


def load(
    directory: PathLike, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> AutoencoderTokenizer:
    """Load the frozen tokenizer of a directory onto `device` in `dtype` (default: float32).

    On a CPU, NNPACK computes large convolutions, which rounds differently. Raises
    FileNotFoundError for a missing file, ValueError for damaged or mismatched files.
    """
    if not Path(directory).is_dir():
        raise FileNotFoundError(f"{directory}: no such tokenizer directory")
    config_file, weights_file = (Path(directory) / f for f in ("config.json", "model.safetensors"))
    config = parse_config(read_json(config_file), str(config_file))
    tokenizer = _assemble(config, weights_file, read_weights(weights_file))
    for module in tokenizer.modules() if torch.backends.nnpack.is_available() else ():
        if type(module) is nn.Conv2d and module.padding == module.stride == (1, 1):
            module.__class__ = WinogradConv2d  # it adds no state
    return tokenizer.to(device=device, dtype=dtype)


def load_llamagen_vq(file: PathLike) -> AutoencoderTokenizer:
    """Load LlamaGen's tokenizer, frozen, from a file such as `vq_ds16_c2i.pt` (VQ-16).

    Layer sizes are inferred from the tensors; for file layouts and errors see `read_weights`.
    """
    weights, source = read_weights(file), f"{file}: not a LlamaGen tokenizer"
    weights.pop("quantize.codebook_used", None)  # a statistic of training

    def count(pattern: str) -> int:
        return len({match[0] for name in weights if (match := re.match(pattern, name))})

    try:
        width, levels = len(weights["encoder.conv_in.weight"]), count(r"encoder.conv_blocks.\d+.")
        convolutions = [f"encoder.conv_blocks.{i}.res.0.conv1.weight" for i in range(levels)]
        codebook_size, codebook_dim = weights["quantize.embedding.weight"].shape
        settings = {
            "width": width,
            "multipliers": [len(weights[name]) // max(width, 1) for name in convolutions],
            "n_res_blocks": count(r"encoder.conv_blocks.0.res.\d+."),
            "z_channels": len(weights["encoder.conv_out.weight"]),
            "codebook_size": codebook_size,
            "codebook_dim": codebook_dim,
            "attention": "encoder.mid.1.q.weight" in weights,
        }
    except (KeyError, TypeError, ValueError) as error:  # a tensor is missing or misshapen
        raise ValueError(f"{source} (missing or misshapen tensor: {error})") from None
    return _assemble(validate(VQConfig, settings, source), file, weights)


def load_taming(checkpoint: PathLike, model_yaml: PathLike) -> AutoencoderTokenizer:
    """Load the VQGAN, frozen, of a checkpoint of taming-transformers or latent diffusion.

    `model_yaml` is the checkpoint's config; the classes that it names are not imported. Raises
    ValueError for quantizers other than nearest-vector lookup (Gumbel, IBQ, LFQ).
    """
    content: Any = read_yaml(Path(model_yaml))
    try:
        target, params = str(content["model"]["target"]), content["model"]["params"]
        sizes = {name: params[name] for name in ("embed_dim", "n_embed") if name in params}
        settings = dict(params["ddconfig"]) | sizes
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{model_yaml}: not the config of a VQGAN ({error!r:.60})") from None
    if not re.fullmatch(r"[\w.]+\.VQModel\w*", target):
        raise ValueError(f"{model_yaml}: target {shorten(target)}, expected a VQModel")
    config = validate(TamingConfig, settings, f"{model_yaml}: model.params")
    stored = read_weights(checkpoint)
    left_out = ("loss.", "model_ema.")
    weights = {name: x for name, x in stored.items() if not name.startswith(left_out)}
    return _assemble(config, checkpoint, weights)


def _assemble(
    config: TokenizerConfig, file: PathLike, weights: Mapping[str, Tensor]
) -> AutoencoderTokenizer:
    with shapes_only():
        tokenizer = AutoencoderTokenizer(config)
    load_weights(tokenizer, weights, str(file))
    return tokenizer.freeze()


def read_weights(file: PathLike) -> dict[str, Tensor]:
    """Read the tensors, by name, of a `.safetensors` file or a PyTorch checkpoint.

    The tensors are under the first key of `CONTAINERS` that holds any, or at the top level. The
    prefixes `module.` (DDP) and `_orig_mod.` (torch.compile) are removed. Raises FileNotFoundError,
    or ValueError for a file that is damaged, holds no tensors, or could run code.
    """
    file = require_file(file)
    try:
        if file.suffix == ".safetensors":
            top: Any = load_file(file)
        else:  # training arguments (argparse.Namespace) are plain data
            mappable = zipfile.is_zipfile(file)  # the format of torch 1.6 and later
            with torch.serialization.safe_globals([argparse.Namespace]):
                top = torch.load(file, map_location="cpu", weights_only=True, mmap=mappable)
    except Exception as error:  # damaged files raise many kinds; torch advises weights_only=False
        raise ValueError(
            f"{file}: expected tensors alone; the file is damaged, has another format, or holds "
            f"Python objects, which could run code ({type(error).__name__})"
        ) from None
    for content in (*(top.get(k) for k in CONTAINERS), top) if isinstance(top, dict) else ():
        if isinstance(content, dict) and any(isinstance(x, Tensor) for x in content.values()):
            break
    else:
        raise ValueError(f"{file}: expected tensors, bare or under one of {', '.join(CONTAINERS)}")
    weights: dict[str, Tensor] = {}
    for key, value in content.items():
        name = str(key).replace("_orig_mod.", "").removeprefix("module.")
        if not isinstance(value, Tensor) or name in weights:
            reason = "occurs twice" if name in weights else f"is a {type(value).__name__}"
            raise ValueError(f"{file}: {name} {reason}, expected one tensor")
        weights[name] = value
    return weights


def load_weights(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    source: str,
    dtype: torch.dtype | None = torch.float32,
) -> None:
    """Load all weights of `module`, cast to `dtype` (None: the stored dtype).

    A module on the meta device gets the tensors uncopied. Raises ValueError, one line that starts
    with `source`, for a tensor that is missing or unknown, for a wrong shape or dtype, and for a
    norm or bias that is not finite (matrices are unchecked: that would take seconds).
    """
    expected, state = module.state_dict(), {}
    for name in sorted(expected.keys() | weights.keys()):
        stored, wanted = (
            list(tensors[name].shape) if name in tensors else "absent"
            for tensors in (weights, expected)
        )
        if stored != wanted:
            raise ValueError(f"{source}: {name[:200]!r} is {stored}, expected {wanted}")
        value, floats = weights[name].detach(), expected[name].is_floating_point()
        if not value.is_floating_point() if floats else value.dtype != expected[name].dtype:
            needed = "floats" if floats else expected[name].dtype
            raise ValueError(f"{source}: {name!r} holds {value.dtype}, expected {needed}")
        state[name] = value.to(dtype=dtype) if floats else value
        if state[name].ndim == 1 and not state[name].isfinite().all():
            raise ValueError(f"{source}: {name!r} holds NaN or infinity, expected finite weights")
    module.load_state_dict(state, assign=next(module.parameters()).is_meta)
