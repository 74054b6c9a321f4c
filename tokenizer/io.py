"""Tokenizer directories (`config.json`, `model.safetensors`), and the files of other projects."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from moveimg.device import shapes_only
from moveimg.errors import shorten, validate
from moveimg.files import atomic, read_json, read_yaml, write_json
from tokenizer.base import AutoencoderTokenizer, fingerprint
from tokenizer.config import TamingConfig, TokenizerConfig, VQConfig, parse_config
from tokenizer.vq import TamingTokenizer, VQTokenizer
from tokenizer.weights import load_weights, read_weights

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
TOKENIZERS: dict[str, Callable[[Any], AutoencoderTokenizer]] = {
    "vq": VQTokenizer,
    "taming": TamingTokenizer,
}


def build(config: TokenizerConfig) -> AutoencoderTokenizer:
    """A new, trainable tokenizer."""
    return TOKENIZERS[config.kind](config)


def save(tokenizer: AutoencoderTokenizer, directory: str | os.PathLike[str]) -> None:
    """Write a tokenizer into a directory, in float32; each file appears whole.

    Raises ValueError for a frozen tokenizer that was cast to a narrower dtype: what would be
    written has another fingerprint.
    """
    weights = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in tokenizer.state_dict().items()
    }
    if fingerprint(tokenizer.config, weights) != tokenizer.fingerprint:
        raise ValueError(
            f"{directory}: the weights have changed since the tokenizer was loaded (it is in "
            f"{tokenizer.quant_conv.weight.dtype} now): save it before casting it"
        )
    with atomic(Path(directory) / WEIGHTS_FILE) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    write_json(Path(directory) / CONFIG_FILE, tokenizer.config.model_dump(mode="json"))


def load(
    directory: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> AutoencoderTokenizer:
    """The frozen tokenizer of a directory, on `device`, its weights cast to `dtype` (float32).

    Raises FileNotFoundError for a missing file, ValueError where a file is damaged or config and
    weights do not fit each other.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such tokenizer directory")
    config_file = directory / CONFIG_FILE
    config = parse_config(read_json(config_file), str(config_file))
    weights = read_weights(directory / WEIGHTS_FILE)
    return _assemble(config, directory / WEIGHTS_FILE, weights).to(device=device, dtype=dtype)


def load_llamagen_vq(file: str | os.PathLike[str]) -> VQTokenizer:
    """LlamaGen's tokenizer of a file such as `vq_ds16_c2i.pt` (VQ-16) or `vq_ds8_c2i.pt`, frozen.

    Sizes are read off the tensors; see `read_weights` for the layouts and errors.
    """
    weights = read_weights(file)
    weights.pop("quantize.codebook_used", None)  # a statistic of its training
    if foreign := [
        name for name in weights if re.match(r"first_stage_model\.|encoder\.down", name)
    ]:
        raise ValueError(
            f"{file} holds {foreign[0]!r}: a checkpoint of taming-transformers or latent "
            "diffusion, expected one of LlamaGen. Convert it by `moveimg convert taming`"
        )
    return cast(VQTokenizer, _assemble(_llamagen_config(weights, str(file)), file, weights))


def load_taming(
    checkpoint: str | os.PathLike[str], model_yaml: str | os.PathLike[str]
) -> TamingTokenizer:
    """The VQGAN of a checkpoint of taming-transformers or latent diffusion, frozen.

    Of a Net2Net or latent-diffusion model the first stage (`first_stage_model.*`) is read. The
    networks of its training (`loss.*`) and a moving average (`model_ema.*`) are left out.

    The YAML beside it has `target` and `params` (or Lightning's `class_path` and `init_args`);
    nothing that it names is imported. Raises ValueError where codes are not those of the nearest
    vector (Gumbel, IBQ, LFQ).
    """
    config = _taming_config(Path(model_yaml))
    weights, stage = read_weights(checkpoint), "first_stage_model."
    prefix = stage if any(name.startswith(stage) for name in weights) else ""
    weights = {
        name.removeprefix(prefix): weight
        for name, weight in weights.items()
        if name.startswith(prefix)
        and not name.removeprefix(prefix).startswith(("loss.", "model_ema."))
    }
    return cast(TamingTokenizer, _assemble(config, checkpoint, weights))


def _assemble(
    config: TokenizerConfig, file: str | os.PathLike[str], weights: Mapping[str, Tensor]
) -> AutoencoderTokenizer:
    """A frozen tokenizer with the weights of a file, without a copy of them."""
    with shapes_only():
        tokenizer = build(config)
    load_weights(tokenizer, weights, str(file))
    return tokenizer.freeze()


def _llamagen_config(weights: Mapping[str, Tensor], source: str) -> VQConfig:
    """The sizes of a LlamaGen tokenizer; all other settings are the same in all of them."""

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
        raise ValueError(f"{source}: not a LlamaGen tokenizer ({error})") from None
    if width == 0 or any(channels % width for channels in widths):
        raise ValueError(
            f"{source}: not a LlamaGen tokenizer: {widths} channels of the levels are no multiples "
            f"of the {width} of encoder.conv_in"
        )
    settings = {
        "in_channels": in_channels,
        "width": width,
        "multipliers": tuple(channels // width for channels in widths),
        "n_res_blocks": count("encoder.conv_blocks.0.res"),
        "z_channels": z_channels,
        "codebook_size": codebook_size,
        "codebook_dim": codebook_dim,
        "attention": "encoder.mid.1.q.weight" in weights,
    }
    return validate(VQConfig, settings, f"{source}: not a LlamaGen tokenizer")


def _taming_config(file: Path) -> TamingConfig:
    """The sizes of a VQGAN, from its YAML."""
    content = read_yaml(file)
    model = content.get("model", content) if isinstance(content, dict) else {}
    while True:
        model = model if isinstance(model, dict) else {}
        params = model.get("params", model.get("init_args"))
        if not isinstance(params, dict):
            raise ValueError(f"{file}: model.params (or model.init_args) is missing")
        if "first_stage_config" not in params:
            break
        model = params["first_stage_config"]
    named = [model.get("target"), model.get("class_path")]
    named += [value for key, value in params.items() if "quant" in str(key)]
    for name in named:
        if re.search("gumbel|ibq|lfq|fsq", str(name), re.IGNORECASE):
            raise ValueError(f"{file}: {shorten(name)}: expected a VQModel (nearest vector)")
    sizes = {name: params[name] for name in ("embed_dim", "n_embed") if name in params}
    ddconfig = params.get("ddconfig")
    if not isinstance(ddconfig, dict):
        raise ValueError(f"{file}: model.params.ddconfig is {shorten(ddconfig)}: expected sizes")
    return validate(TamingConfig, ddconfig | sizes, f"{file}: model.params")
