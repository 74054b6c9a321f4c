"""Model directories: weights, config, tokenizer, class names and sampling settings of a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field, TypeAdapter
from safetensors.torch import save_file

import tokenizer as vq
from moveimg.config import ModelConfig, SamplingSettings
from moveimg.device import shapes_only
from moveimg.errors import shorten, validate
from moveimg.files import atomic, read_json, write_json
from moveimg.model import Transformer, ValueBank
from moveimg.model.bank_storage import make_bank_storage

BUNDLED = Path(__file__).parent / "bundled"
BANKS = ("memory.bank.weight", "memory.context_bank.weight")
REQUIRED = {"n_layer", "n_head", "width", "codebook_size", "n_classes", "grid"}
ClassNames = TypeAdapter(list[Annotated[str, Field(strict=True, max_length=256)]])


class ModelDescription(BaseModel):
    """The content of config.json."""

    format: Literal[1]
    tokenizer: str | None = None  # fingerprint
    model: ModelConfig
    about: dict[str, Any] = {}


@dataclass(frozen=True)
class ModelParts:
    """The loaded content of a model directory; `about` says how the model was made."""

    generator: Transformer
    tokenizer: vq.AutoencoderTokenizer
    class_names: list[str]
    sampling: SamplingSettings
    about: dict[str, Any] = field(default_factory=dict)


def save_model(directory: str | Path, parts: ModelParts) -> None:
    """Write a model directory, each file atomically.

    Raises ValueError for a generator that was loaded with the option `bank`.
    """
    weights = parts.generator.state_dict()
    with shapes_only():
        expected = Transformer(parts.generator.config).state_dict()
    if weights.keys() != expected.keys():
        raise ValueError("a model loaded with `bank` cannot be saved: expected one without it")
    directory, fingerprint = Path(directory), parts.tokenizer.fingerprint
    path = directory / "config.json"
    stored = read_json(path) if path.is_file() else None
    if not isinstance(stored, dict) or stored.get("tokenizer") != fingerprint:
        vq.save(parts.tokenizer, directory / "tokenizer")
    stored_weights = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    with atomic(directory / "model.safetensors") as temporary:
        save_file(stored_weights, temporary)
    write_json(directory / "classes.json", parts.class_names)
    write_json(directory / "sampling.json", parts.sampling.model_dump())
    config = parts.generator.config.model_dump(mode="json")
    contents = {"format": 1, "tokenizer": fingerprint, "model": config, "about": parts.about}
    write_json(path, contents)


def load_model(
    directory: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    bank: str | None = None,
) -> ModelParts:
    """Read a model directory; `dtype` is the generator's; for `bank` see load_generator.

    The tokenizer has float32 at least: its precision shows in FID. Raises FileNotFoundError for a
    missing file, ValueError for a damaged file or files that contradict each other.
    """
    directory = Path(directory)
    description = read_description(directory)
    names, sampling = read_class_names(directory), read_sampling(directory)
    if len(names) != description.model.n_classes:
        raise ValueError(
            f"{directory}: {len(names)} class names, expected {description.model.n_classes}"
        )
    generator = load_generator(directory, device, dtype, bank)
    tokenizer = vq.load(directory / "tokenizer", device, torch.promote_types(dtype, torch.float32))
    if tokenizer.codebook_size != description.model.codebook_size:
        raise ValueError(
            f"{directory}: the generator has {description.model.codebook_size} codes, "
            f"its tokenizer {tokenizer.codebook_size}: expected equal"
        )
    if description.tokenizer not in (None, tokenizer.fingerprint):
        raise ValueError(
            f"{directory}: the generator was trained on codes of tokenizer "
            f"{shorten(description.tokenizer, 16)}, but tokenizer/ is {tokenizer.fingerprint[:12]}"
        )
    return ModelParts(generator, tokenizer, names, sampling, description.about)


def read_description(directory: str | Path) -> ModelDescription:
    """The config.json of a model directory; ValueError if a setting in REQUIRED is missing."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory}: expected a model directory, with config.json")
    description = validate(ModelDescription, read_json(path), str(path))
    if missing := REQUIRED - description.model.model_fields_set:
        raise ValueError(f"{path}: model.{min(missing)}: missing")
    return description


def read_model_config(directory: str | Path) -> ModelConfig:
    """The generator's config in a model directory."""
    return read_description(directory).model


def read_about(directory: str | Path) -> dict[str, Any]:
    """The notes in a model directory on how it was made."""
    return read_description(directory).about


def read_class_names(directory: str | Path) -> list[str]:
    """The class names in a model directory."""
    path = Path(directory) / "classes.json"
    return validate(ClassNames, read_json(path), str(path))


def read_sampling(directory: str | Path) -> SamplingSettings:
    """The sampling settings in a model directory."""
    path = Path(directory) / "sampling.json"
    return validate(SamplingSettings, read_json(path), str(path))


def load_generator(
    directory: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    bank: str | None = None,
) -> Transformer:
    """The generator of a model directory, in eval mode (for errors see load_model).

    bank: int8 or int4 rounds the rows of the value bank, disk reads them from the file when they
    are used, cpu keeps them in CPU memory. Such a model cannot be trained.
    """
    path = Path(directory) / "model.safetensors"
    with shapes_only():
        generator = Transformer(read_model_config(directory))
    weights = vq.read_weights(path)
    tables = {name: weights[name] for name in BANKS if bank and name in weights}
    if bank and BANKS[0] not in tables:
        raise ValueError(f"bank {bank!r}: {directory} has no value bank of floating-point rows")
    weights |= {name: torch.empty_like(rows, device="meta") for name, rows in tables.items()}
    vq.load_weights(generator, weights, str(path), dtype)
    memory: Any = generator.memory
    if isinstance(memory, ValueBank):
        memory.check_rows(str(path))
    for name, rows in tables.items():
        storage = make_bank_storage(str(bank), path, name, rows, memory.slots)
        setattr(memory, name.split(".")[1], storage)
    return generator.to(device).eval()


def load_tokenizer(path: Path, device: torch.device) -> vq.AutoencoderTokenizer:
    """The frozen tokenizer, in float32, of a tokenizer or model directory or of a bundled model."""
    directory = BUNDLED / path if not path.exists() and (BUNDLED / path).is_dir() else path
    if (directory / "tokenizer" / "config.json").is_file():
        directory = directory / "tokenizer"
    return vq.load(directory, device)
