"""Training a generator on packed codes, by the cross-entropy of each code given earlier ones."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import tokenizer as vq
from moveimg.checkpoint import ModelParts, load_tokenizer, save_model
from moveimg.config import ModelConfig, TrainConfig
from moveimg.data import MANIFEST, Batches, PackedCodes, sha256_file
from moveimg.dist import World
from moveimg.files import lock
from moveimg.images import labelled_grid, to_pil
from moveimg.model import Transformer, model_cost
from moveimg.sampling import image_rngs, sample_codes
from moveimg.training.initial import initial_model
from moveimg.training.logging import data_sheet_peak, gate_statistics
from moveimg.training.loop import fit
from moveimg.training.parallel import Parallelism, choose_parallelism
from moveimg.training.task import Task

PREVIEW_CLASSES, PREVIEW_COLUMNS = 10, 6
GATE_IMAGES = 8  # held-out images whose gates are logged


class GeneratorTask(Task):
    """loss = mean over positions of -log p(code | label, codes before it)."""

    model: Transformer

    def __init__(
        self,
        config: TrainConfig,
        model: Transformer,
        tokenizer: vq.AutoencoderTokenizer,
        train: PackedCodes,
        val: PackedCodes,
        parallel: Parallelism,
    ) -> None:
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.parallel, self.world = parallel, parallel.world
        self.device = self.world.device
        self.forward = model
        self.codes, self.val = train, val
        self.class_names = train.class_names
        self.batches = Batches(train, config.batch_size, config.seed)
        if config.evaluation is not None:
            from moveimg.training.scoring import Scorer  # torch-fidelity is not loaded without need

            settings = (config.evaluation, config.sampling)
            self.scorer = Scorer(*settings, tokenizer, model.config.grid, self.world)
            self.score_every = config.evaluation.every

    def loss(self, step: int, part: int) -> tuple[Tensor, dict[str, Tensor]]:
        codes, labels, _ = self.batches.batch(step, part, self.parallel.parts)
        codes, labels = codes.to(self.device), labels.to(self.device)
        dropped = torch.rand(len(labels), device=self.device) < self.config.class_dropout
        labels = labels.masked_fill(dropped, self.model.null_label)
        loss, accuracy = self._loss(self.forward, codes, labels)
        scalars = {"accuracy": accuracy}
        if (load := self.model.expert_load()) is not None:
            scalars["expert_load_max"] = load.max() * load.shape[-1]  # 1 is even
        return loss + self.model.auxiliary_loss(), scalars

    @torch.no_grad()
    def validate(self, model: Transformer) -> dict[str, float]:
        """Held-out loss in nats per code and accuracy, over every image's first view.

        The processes share the batches; all return the same numbers.
        """
        world, size, n = self.world, self.config.batch_size, len(self.val)
        sums = torch.zeros(2, dtype=torch.float64)
        for start in range(world.rank * size, n, world.size * size):
            indices = np.arange(start, min(start + size, n))
            codes, labels = self.val.get(indices, 0 * indices)
            codes, labels = codes.to(self.device), labels.to(self.device)
            means = torch.stack(self._loss(model, codes, labels))
            sums += means.cpu().double() * len(indices)
        loss, accuracy = (world.mean(sums) * world.size / n).tolist()
        return {"loss": loss, "accuracy": accuracy}

    def preview(self, model: Transformer) -> Image.Image:
        """A grid of samples, one row per class, always from the same seeds."""
        classes = list(range(min(PREVIEW_CLASSES, len(self.class_names))))
        labels = torch.tensor(classes, device=self.device).repeat_interleave(PREVIEW_COLUMNS)
        rngs = image_rngs(range(len(labels)))
        codes = sample_codes(model, labels, self.config.sampling, rngs)
        images = to_pil(self.tokenizer.decode(codes, model.config.grid))
        rows = [images[i : i + PREVIEW_COLUMNS] for i in range(0, len(images), PREVIEW_COLUMNS)]
        return labelled_grid(rows, [self.class_names[i] for i in classes])

    def scores(self, model: Transformer) -> dict[str, float]:
        return self.scorer(model)

    def export(self, model: Transformer, directory: Path, about: dict[str, Any]) -> None:
        parts = ModelParts(model, self.tokenizer, self.class_names, self.config.sampling)
        save_model(directory, parts, about)

    def identity(self) -> dict[str, str]:
        """Digests of the codes (their manifests name every shard's) and of the tokenizer."""
        return {
            "tokenizer": self.tokenizer.fingerprint,
            "train codes": sha256_file(self.codes.directory / MANIFEST),
            "val codes": sha256_file(self.val.directory / MANIFEST),
        }

    def indices(self, step: int) -> list[int]:
        return self.batches.batch(step)[2].tolist()

    def watch(self, images_per_second: float) -> dict[str, dict[str, float]]:
        """Tokens per second, gate statistics and, on a known GPU, MFU.

        Training costs three times the matrix products of a forward pass: the backward pass has two.
        """
        config = self.model.config
        rates = {"tokens_per_second": images_per_second * config.seq_len}
        if self.device.type == "cuda":
            peak = data_sheet_peak(torch.cuda.get_device_name(self.device))
            flops = 3 * model_cost(config).flops_per_token * rates["tokens_per_second"]
            rates["mfu"] = flops / (peak * self.world.size) if peak else math.nan

        def forward() -> None:  # held-out images spread over the split, and so over its classes
            count = min(len(self.val), GATE_IMAGES)
            indices = np.linspace(0, len(self.val) - 1, count).round().astype(np.int64)
            codes, labels = self.val.get(indices, 0 * indices)
            self._loss(self.model, codes.to(self.device), labels.to(self.device))

        return {"train": rates, "gates": gate_statistics(self.model.eval(), forward)}

    def _loss(self, model: nn.Module, codes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss in nats per code, and the share of codes predicted right."""
        low = self.parallel.dtype == torch.bfloat16
        with torch.autocast(self.device.type, dtype=self.parallel.dtype, enabled=low):
            return model(codes, labels, loss=True)


def train_generator(
    config: TrainConfig, world: World | torch.device, restart: bool = False
) -> dict:
    """Train a generator into a model directory at config.out; return the held-out scalars.

    `restart` deletes an earlier run first, with the codes that it made.
    Raises ValueError or FileNotFoundError for codes, a tokenizer or an init_from that are missing
    or do not belong together, or for a batch that the processes cannot share.
    """
    world = World(device=world) if isinstance(world, torch.device) else world
    parallel = choose_parallelism(config, world)
    tokenizer = load_tokenizer(config.data.tokenizer, world.device)
    train, val = _open_codes(config, tokenizer, world, restart)
    for codes in (train, val):
        codes.require_tokenizer(tokenizer.fingerprint)
    torch.manual_seed(config.seed)
    settings = fit_to_codes(config.model, train)
    model = initial_model(config, settings, train.class_names, tokenizer.fingerprint)
    task = GeneratorTask(config, model.to(world.device), tokenizer, train, val, parallel)
    return fit(task, config, parallel, restart)


def fit_to_codes(config: ModelConfig, codes: PackedCodes) -> ModelConfig:
    """The config with codebook size, class count and grid of the codes.

    Raises ValueError if the config sets one of them to another value.
    """
    needed = {
        "codebook_size": codes.codebook_size,
        "n_classes": len(codes.class_names),
        "grid": tuple(codes.grid),
    }
    for key, value in needed.items():
        chosen = getattr(config, key)
        if key in config.model_fields_set and chosen != value:
            raise ValueError(f"model.{key} is {chosen}, but {codes.directory} has {value}")
    return config.model_copy(update=needed)


def _open_codes(
    config: TrainConfig, tokenizer: vq.AutoencoderTokenizer, world: World, restart: bool
) -> tuple[PackedCodes, PackedCodes]:
    """The train and val codes; encoded first if the config names images."""
    directory = config.data.codes
    if directory is None:
        from moveimg.data import ChangedSettingsError, encode_splits

        assert config.data.images is not None
        directory = config.out / "codes"
        if restart and world.main and directory.exists():
            with lock(config.out, "a training"):
                shutil.rmtree(directory)
        world.wait()
        try:
            encode_splits(config.data.images, tokenizer, directory, device=world.device)
        except ChangedSettingsError as error:
            raise ValueError(f"{error}; start over with --restart") from None
    return PackedCodes(directory / "train"), PackedCodes(directory / "val")
