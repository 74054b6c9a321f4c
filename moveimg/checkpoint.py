"""Model directories: everything that sampling needs, in readable files.

config.json  model.safetensors  tokenizer/{config.json,model.safetensors}
classes.json  sampling.json
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

import tokenizer as vq
from moveimg.config import ModelConfig, SamplingSettings
from moveimg.device import shapes_only
from moveimg.errors import validate
from moveimg.files import atomic, read_json, write_json
from moveimg.model import Transformer

FORMAT = 1
BUNDLED = Path(__file__).parent / "bundled"


@dataclass(frozen=True)
class ModelParts:
    """What a model directory holds, loaded."""

    generator: Transformer
    tokenizer: vq.AutoencoderTokenizer
    class_names: list[str]
    sampling: SamplingSettings


def save_model(directory: str | Path, parts: ModelParts, about: dict[str, Any]) -> None:
    """Write a model directory; each file appears whole.

    Args:
        directory: made if missing; files of an earlier save are replaced.
        parts: the model. Weights are stored in the type they have.
        about: plain data on how it was made, kept in config.json for the reader.
    """
    directory = Path(directory)
    if _stored_fingerprint(directory) != parts.tokenizer.fingerprint:
        vq.save(parts.tokenizer, directory / "tokenizer")
    save_weights(parts.generator, directory / "model.safetensors")
    write_json(directory / "classes.json", parts.class_names)
    write_json(directory / "sampling.json", parts.sampling.model_dump())
    config = parts.generator.config.model_dump(mode="json")
    described = {
        "format": FORMAT,
        "tokenizer": parts.tokenizer.fingerprint,
        "model": config,
        "about": about,
    }
    write_json(directory / "config.json", described)


def load_model(
    directory: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ModelParts:
    """Read a model directory.

    Args:
        directory: of `save_model`.
        device: where the weights go.
        dtype: of the generator. The tokenizer's is no shorter than float32: pixels are a share of
            the time, and their bits count in FID (LlamaGen samples so, too).

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or disagrees with another; one line says which and how.
    """
    directory = Path(directory)
    generator = load_generator(directory, device, dtype)
    config = generator.config
    precise = torch.promote_types(dtype, torch.float32)
    tokenizer = vq.load(directory / "tokenizer", device=device, dtype=precise)
    tokenizer = vq.fast_tokenizer(tokenizer)
    if tokenizer.codebook_size != config.codebook_size:
        raise ValueError(
            f"{directory}: the generator has {config.codebook_size} codes, "
            f"its tokenizer {tokenizer.codebook_size}: expected equal"
        )
    stored = _stored_fingerprint(directory)
    if stored not in (None, tokenizer.fingerprint):
        raise ValueError(
            f"{directory}: the generator speaks the codes of tokenizer {str(stored)[:12]}, but "
            f"tokenizer/ holds {tokenizer.fingerprint[:12]}"
        )
    names = read_json(directory / "classes.json")
    if not isinstance(names, list) or len(names) != config.n_classes:
        raise ValueError(f"{directory / 'classes.json'}: expected {config.n_classes} class names")
    path = directory / "sampling.json"
    sampling = validate(SamplingSettings, read_json(path), str(path))
    return ModelParts(generator, tokenizer, [str(name) for name in names], sampling)


def read_model_config(directory: str | Path) -> ModelConfig:
    """The generator's config of a model directory."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory}: no model here (it has no config.json)")
    data = read_json(path)
    if not isinstance(data, dict) or data.get("format") != FORMAT or "model" not in data:
        raise ValueError(f"{path}: not a moveimg model of format {FORMAT}")
    return validate(ModelConfig, data["model"], str(path))


def read_about(directory: str | Path) -> dict[str, Any]:
    """What a model directory says on how it was made; empty where it says nothing."""
    data = read_json(Path(directory) / "config.json")
    about = data.get("about") if isinstance(data, dict) else None
    return about if isinstance(about, dict) else {}


def _stored_fingerprint(directory: Path) -> str | None:
    """The fingerprint of the tokenizer a model was saved with, if there is one."""
    path = directory / "config.json"
    data = read_json(path) if path.is_file() else None
    return data.get("tokenizer") if isinstance(data, dict) else None


def load_generator(
    directory: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Transformer:
    """The generator of a model directory, in eval mode (errors as of load_model)."""
    config = read_model_config(directory)
    with shapes_only():
        generator = Transformer(config)
    load_weights(generator, Path(directory) / "model.safetensors", device, dtype)
    return generator.eval()


def save_weights(module: nn.Module, path: Path) -> None:
    """Every weight of `module` into one safetensors file, atomically."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
    with atomic(path) as temporary:
        save_file(tensors, temporary)


def load_weights(
    module: nn.Module, path: Path, device: str | torch.device, dtype: torch.dtype
) -> None:
    """Fill `module` (built on the meta device) from a safetensors file, a tensor at a time.

    Raises FileNotFoundError, or ValueError naming what is missing, unknown, or of wrong shape.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            check_shapes(expected, found, str(path))
            state = {key: file.get_tensor(key).to(dtype) for key in expected}
    except SafetensorError as error:
        size = os.path.getsize(path)
        raise ValueError(f"{path} ({size} bytes): truncated or damaged weights: {error}") from None
    module.load_state_dict(state, assign=True)


def check_shapes(
    expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], origin: str
) -> None:
    """Raise a one-line ValueError that names the first key missing, unknown or misshapen."""
    if missing := sorted(expected.keys() - found.keys()):
        raise ValueError(f"{origin}: lacks {missing[0]!r}{_and_more(missing)}")
    if unknown := sorted(found.keys() - expected.keys()):
        raise ValueError(f"{origin}: has {unknown[0]!r}{_and_more(unknown)}, not in the model")
    if wrong := [key for key in expected if expected[key] != found[key]]:
        key = wrong[0]
        raise ValueError(
            f"{origin}: {key!r} is {list(found[key])}, expected {list(expected[key])}"
            f"{_and_more(wrong)}"
        )


def _and_more(keys: list[str]) -> str:
    return f" and {len(keys) - 1} more" if len(keys) > 1 else ""


def load_tokenizer(path: Path, device: torch.device) -> vq.AutoencoderTokenizer:
    """A tokenizer in a directory, of its own or a model's, or a bundled one: frozen, in float32.

    Raises FileNotFoundError or ValueError as tokenizer.load.
    """
    directory = path if path.exists() or not (BUNDLED / path).is_dir() else BUNDLED / path
    inside = directory / "tokenizer"
    if (inside / "config.json").is_file():
        directory = inside
    return vq.fast_tokenizer(vq.load(directory, device=device))
