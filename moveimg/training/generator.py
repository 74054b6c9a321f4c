"""Training a generator on packed codes: the cross-entropy of each code given those before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import tokenizer as vq
from moveimg.checkpoint import ModelParts, save_model
from moveimg.config import ModelConfig, TrainConfig
from moveimg.data.codes import Batches, PackedCodes
from moveimg.device import pick_dtype
from moveimg.model import Transformer
from moveimg.pictures import labelled_grid, to_pil
from moveimg.sampling import image_rngs, sample_codes
from moveimg.training.initial import initial_model
from moveimg.training.loop import fit

PREVIEW_CLASSES, PREVIEW_COLUMNS = 10, 6


class GeneratorTask:
    """loss = mean over positions of -log p(code | label, codes before it)."""

    model: nn.Module

    def __init__(
        self,
        config: TrainConfig,
        model: Transformer,
        tokenizer: vq.AutoencoderTokenizer,
        train: PackedCodes,
        val: PackedCodes,
        device: torch.device,
    ) -> None:
        self.config, self.model, self.tokenizer, self.device = config, model, tokenizer, device
        self.val = val
        self.class_names = train.class_names
        self.batches = Batches(train, config.batch_size, config.seed)
        self.dtype = pick_dtype(config.dtype, device)

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        codes, labels, _ = self.batches.batch(step)
        codes, labels = codes.to(self.device), labels.to(self.device)
        dropped = torch.rand(len(labels), device=self.device) < self.config.class_dropout
        labels = labels.masked_fill(dropped, self.config_of_model.n_classes)
        logits = self._logits(self.model, codes, labels)
        accuracy = (logits.detach().argmax(-1) == codes).float().mean()
        scalars = {"accuracy": accuracy}
        assert isinstance(self.model, Transformer)
        if (load := self.model.expert_load()) is not None:
            scalars["expert_load_max"] = load.max() * load.shape[-1]  # 1 is even
        return _cross_entropy(logits, codes).mean() + self.model.auxiliary_loss(), scalars

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """Held-out loss in nats a code, over every image's first view, and accuracy."""
        losses, hits = [], []
        for start in range(0, len(self.val), self.config.batch_size):
            indices = torch.arange(start, min(start + self.config.batch_size, len(self.val)))
            codes, labels = self.val.get(indices.numpy(), torch.zeros_like(indices).numpy())
            codes, labels = codes.to(self.device), labels.to(self.device)
            logits = self._logits(model, codes, labels)
            losses.append(_cross_entropy(logits, codes).flatten())
            hits.append((logits.argmax(-1) == codes).flatten())
        return {
            "loss": torch.cat(losses).double().mean().item(),
            "accuracy": torch.cat(hits).double().mean().item(),
        }

    def preview(self, model: nn.Module) -> Image.Image:
        """A grid of samples, a class a row, always from the same seeds."""
        assert isinstance(model, Transformer)
        classes = list(range(min(PREVIEW_CLASSES, len(self.class_names))))
        labels = torch.tensor(classes, device=self.device).repeat_interleave(PREVIEW_COLUMNS)
        rngs = image_rngs(range(len(labels)))
        codes = sample_codes(model, labels, self.config.sampling, rngs)
        images = to_pil(self.tokenizer.decode(codes, model.config.grid))
        rows = [images[i : i + PREVIEW_COLUMNS] for i in range(0, len(images), PREVIEW_COLUMNS)]
        return labelled_grid(rows, [self.class_names[i] for i in classes])

    def export(self, model: nn.Module, directory: Path, about: dict[str, Any]) -> None:
        assert isinstance(model, Transformer)
        parts = ModelParts(model, self.tokenizer, self.class_names, self.config.sampling)
        save_model(directory, parts, about)

    def extra_state(self) -> dict[str, Any]:
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        pass

    @property
    def config_of_model(self) -> ModelConfig:
        assert isinstance(self.model, Transformer)
        return self.model.config

    def _logits(self, model: nn.Module, codes: Tensor, labels: Tensor) -> Tensor:
        low = self.dtype == torch.bfloat16
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=low):
            return model(codes, labels)


def train_generator(config: TrainConfig, device: torch.device, restart: bool = False) -> dict:
    """`moveimg train`: make a model directory at config.out. Returns the held-out scalars.

    Raises ValueError or FileNotFoundError for codes, a tokenizer or a model to start from that
    are missing or do not belong together.
    """
    tokenizer = load_tokenizer(config.data.tokenizer, device)
    train, val = _open_codes(config, tokenizer, device)
    for codes in (train, val):
        codes.require_tokenizer(tokenizer.fingerprint)
    torch.manual_seed(config.seed)
    settings = fit_to_codes(config.model, train)
    model = initial_model(config, settings, train.class_names, tokenizer.fingerprint).to(device)
    return fit(GeneratorTask(config, model, tokenizer, train, val, device), config, device, restart)


def fit_to_codes(config: ModelConfig, codes: PackedCodes) -> ModelConfig:
    """Fill the codebook size, class count and grid that were left out of the config.

    Raises ValueError where one was given and differs from the codes.
    """
    found = {
        "codebook_size": codes.codebook_size,
        "n_classes": len(codes.class_names),
        "grid": tuple(codes.grid),
    }
    for key, value in found.items():
        given = getattr(config, key)
        if key in config.model_fields_set and given != value:
            raise ValueError(f"model.{key} is {given}, but {codes.directory} has {value}")
    return config.model_copy(update=found)


def _open_codes(
    config: TrainConfig, tokenizer: vq.AutoencoderTokenizer, device: torch.device
) -> tuple[PackedCodes, PackedCodes]:
    """The train and val codes; made first where the config names images."""
    directory = config.data.codes
    if directory is None:
        from moveimg.data.encode import encode_splits

        assert config.data.images is not None
        directory = config.out / "codes"
        encode_splits(config.data.images, tokenizer, directory, device=device)
    return PackedCodes(directory / "train"), PackedCodes(directory / "val")


def load_tokenizer(path: Path, device: torch.device) -> vq.AutoencoderTokenizer:
    """The tokenizer in its own directory, or that of a model directory."""
    inside = path / "tokenizer"
    return vq.load(inside if (inside / "config.json").is_file() else path, device=device)


def _cross_entropy(logits: Tensor, codes: Tensor) -> Tensor:
    """logits [B, T, V], codes [B, T] -> nats [B, T]."""
    losses = F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none")
    return losses.view_as(codes)
