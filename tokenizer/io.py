"""Tokenizer directories (`config.json`, `model.safetensors`), and the files of other projects."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from moveimg.device import shapes_only
from moveimg.errors import shorten, validate
from moveimg.files import atomic, read_json, read_yaml, write_json
from tokenizer.config import TamingConfig, TokenizerConfig, VQConfig, parse_config
from tokenizer.vq import AutoencoderTokenizer, TamingTokenizer, VQTokenizer, WinogradConv2d
from tokenizer.weights import load_weights, read_weights


def build(config: TokenizerConfig) -> AutoencoderTokenizer:
    """A new, trainable tokenizer."""
    return VQTokenizer(config) if isinstance(config, VQConfig) else TamingTokenizer(config)


def save(tokenizer: AutoencoderTokenizer, directory: str | os.PathLike[str]) -> None:
    """Write a tokenizer into a directory, in float32; each file appears whole."""
    weights = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in tokenizer.state_dict().items()
    }
    with atomic(Path(directory) / "model.safetensors") as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    write_json(Path(directory) / "config.json", tokenizer.config.model_dump(mode="json"))


def load(
    directory: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> AutoencoderTokenizer:
    """The frozen tokenizer of a directory, on `device`, its weights cast to `dtype` (float32).

    On a CPU, large convolutions are computed by NNPACK: values differ by rounding, and so may codes
    at near-ties. Raises FileNotFoundError for a missing file, ValueError where a file is damaged or
    config and weights do not fit each other.
    """
    if not Path(directory).is_dir():
        raise FileNotFoundError(f"{directory}: no such tokenizer directory")
    config_file, weights_file = (Path(directory) / f for f in ("config.json", "model.safetensors"))
    config = parse_config(read_json(config_file), str(config_file))
    tokenizer = _assemble(config, weights_file, read_weights(weights_file))
    if torch.backends.nnpack.is_available():
        for module in tokenizer.modules():
            if type(module) is nn.Conv2d and module.padding == module.stride == (1, 1):
                module.__class__ = WinogradConv2d  # it adds no state
    return tokenizer.to(device=device, dtype=dtype)


def load_llamagen_vq(file: str | os.PathLike[str]) -> AutoencoderTokenizer:
    """LlamaGen's tokenizer of a file such as `vq_ds16_c2i.pt` (VQ-16) or `vq_ds8_c2i.pt`, frozen.

    Sizes are read off the tensors; see `read_weights` for the layouts and errors.
    """
    weights, source = read_weights(file), f"{file}: not a LlamaGen tokenizer"
    weights.pop("quantize.codebook_used", None)  # a statistic of its training

    def count(prefix: str) -> int:
        pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
        return len({match[1] for name in weights if (match := pattern.match(name))})

    try:
        width, in_channels, _, _ = weights["encoder.conv_in.weight"].shape
        codebook_size, codebook_dim = weights["quantize.embedding.weight"].shape
        levels = [f"encoder.conv_blocks.{i}" for i in range(count("encoder.conv_blocks"))]
        widths = [len(weights[f"{level}.res.0.conv1.weight"]) for level in levels]
        z_channels = len(weights["encoder.conv_out.weight"])
    except (KeyError, ValueError) as error:  # a tensor is missing, or has other dimensions
        raise ValueError(f"{source} ({error})") from None
    settings = {
        "in_channels": in_channels,
        "width": width,
        "multipliers": tuple(channels // max(width, 1) for channels in widths),
        "n_res_blocks": count("encoder.conv_blocks.0.res"),
        "z_channels": z_channels,
        "codebook_size": codebook_size,
        "codebook_dim": codebook_dim,
        "attention": "encoder.mid.1.q.weight" in weights,
    }
    return _assemble(validate(VQConfig, settings, source), file, weights)


def load_taming(
    checkpoint: str | os.PathLike[str], model_yaml: str | os.PathLike[str]
) -> AutoencoderTokenizer:
    """The VQGAN of a checkpoint of taming-transformers or latent diffusion, frozen.

    The networks of its training (`loss.*`) and a moving average (`model_ema.*`) are left out. The
    YAML beside it has `model.target` and `model.params`; nothing that it names is imported. Raises
    ValueError where codes are not those of the nearest vector (Gumbel, IBQ, LFQ).
    """
    content: Any = read_yaml(Path(model_yaml))
    try:
        target, params = str(content["model"]["target"]), content["model"]["params"]
        ddconfig = dict(params["ddconfig"])
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{model_yaml}: not the config of a VQGAN ({error!r:.60})") from None
    if not re.fullmatch(r"[\w.]+\.VQModel\w*", target):
        raise ValueError(f"{model_yaml}: {shorten(target)}: expected a VQModel (nearest vector)")
    sizes = {name: params[name] for name in ("embed_dim", "n_embed") if name in params}
    config = validate(TamingConfig, ddconfig | sizes, f"{model_yaml}: model.params")
    weights = {
        name: weight
        for name, weight in read_weights(checkpoint).items()
        if not name.startswith(("loss.", "model_ema."))
    }
    return _assemble(config, checkpoint, weights)


def _assemble(
    config: TokenizerConfig, file: str | os.PathLike[str], weights: Mapping[str, Tensor]
) -> AutoencoderTokenizer:
    """A frozen tokenizer with the weights of a file, without a copy of them."""
    with shapes_only():
        tokenizer = build(config)
    load_weights(tokenizer, weights, str(file))
    return tokenizer.freeze()
