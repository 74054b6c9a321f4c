"""Training a generator on packed codes, by the cross-entropy of each code given earlier codes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import tokenizer as vq
from moveimg.checkpoint import (
    ModelParts,
    load_generator,
    load_tokenizer,
    read_class_names,
    save_model,
)
from moveimg.config import ModelConfig, TrainConfig
from moveimg.data import MANIFEST, PackedCodes, draw_batch, encode_splits, sha256_file
from moveimg.device import shapes_only
from moveimg.dist import World, print_rank0
from moveimg.files import lock
from moveimg.images import draw_grid, to_pil
from moveimg.model import GatedMixer, Transformer, ValueBank
from moveimg.model.analysis import compute_bank_maps, compute_gradient_sources
from moveimg.pipeline import resolve
from moveimg.rng import SeededInit
from moveimg.sampling import image_rngs, sample_codes
from moveimg.training.loop import Task, fit
from moveimg.training.parallel import Parallelism, choose_parallelism

PREVIEW_CLASSES, PREVIEW_COLUMNS = 10, 6
# Settings that may differ from those of init_from; n_classes sizes only the label tables.
FREE = {"token_dropout", "resid_dropout", "ffn_dropout", "n_classes"}
# Tables with one row per class; the last row is the null label's.
LABEL_TABLES = ("label_embedding.weight", "memory.class_bank.weight")


class GeneratorTask(Task):
    """loss = mean over positions of -log p(code | label, codes before it)."""

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
        self.parallel, self.world, self.device = parallel, parallel.world, parallel.world.device
        self.forward, self.codes, self.val = model, train, val
        self.class_names = train.class_names

    def loss(self, step: int, micro_batch: int) -> tuple[Tensor, dict[str, Tensor]]:
        size, seed = self.config.batch_size, self.config.seed
        count = self.parallel.micro_batches
        codes, labels, _ = draw_batch(self.codes, size, seed, step, micro_batch, count)
        codes, labels = codes.to(self.device), labels.to(self.device)
        draws = torch.rand(len(labels), device=self.device, generator=self.rng)
        dropped = draws < self.config.class_dropout
        labels = labels.masked_fill(dropped, self.model.null_label)
        loss, accuracy = self._loss(self.forward, codes, labels)
        scalars = {"accuracy": accuracy}
        if (load := self.model.expert_load()) is not None:
            scalars["expert_load_max"] = load.max() * load.shape[-1]  # 1 is even
        return loss + self.model.auxiliary_loss(), scalars

    @torch.no_grad()
    def validate(self, model: Transformer) -> dict[str, float]:
        """Held-out loss in nats per code and accuracy, over every image's first view."""
        world, size, n = self.world, self.config.batch_size, len(self.val)
        sums = torch.zeros(2, dtype=torch.float64)
        for start in range(world.rank * size, n, world.size * size):
            indices = np.arange(start, min(start + size, n))
            codes, labels = self.val.get(indices, 0 * indices)
            means = torch.stack(self._loss(model, codes.to(self.device), labels.to(self.device)))
            sums += means.cpu().double() * len(indices)
        loss, accuracy = (world.mean(sums) * world.size / n).tolist()
        return {"loss": loss, "accuracy": accuracy}

    def record(self, step: int) -> dict[str, Any]:
        """Every memory_every steps: statistics of the bank's gradient, and each layer's mean gates.

        Computed on the step's first micro-batch, without dropout (see compute_gradient_sources).
        """
        every = self.config.memory_every
        if not every or step % every or not isinstance(self.model.memory, ValueBank):
            return {}
        size, count = self.config.batch_size, self.parallel.micro_batches
        codes, labels, _ = draw_batch(self.codes, size, self.config.seed, step - 1, 0, count)
        batch = codes.to(self.device), labels.to(self.device)
        self.model.eval()
        record = compute_gradient_sources(self.model, *batch)
        maps = compute_bank_maps(self.model, *batch)
        self.model.train()
        for key in ("g_0", "slots", "share"):
            record[key] = {i + 1: getattr(m, key).mean().item() for i, m in maps.items()}
        return record

    def preview(self, model: Transformer) -> Image.Image:
        """A grid of samples, one row per class, always from the same seeds."""
        names = self.class_names[:PREVIEW_CLASSES]
        labels = torch.arange(len(names), device=self.device).repeat_interleave(PREVIEW_COLUMNS)
        codes = sample_codes(model, labels, self.config.sampling, image_rngs(range(len(labels))))
        images = to_pil(self.tokenizer.decode(codes, model.config.grid))
        rows = [images[i : i + PREVIEW_COLUMNS] for i in range(0, len(images), PREVIEW_COLUMNS)]
        return draw_grid(rows, names)

    def export(self, model: Transformer, directory: Path, about: dict[str, Any]) -> None:
        parts = ModelParts(model, self.tokenizer, self.class_names, self.config.sampling, about)
        save_model(directory, parts)

    def _loss(self, model: nn.Module, codes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss in nats per code, and the share of codes predicted right."""
        low = self.parallel.dtype == torch.bfloat16
        with torch.autocast(self.device.type, dtype=self.parallel.dtype, enabled=low):
            return model(codes, labels, loss=True)


def train_generator(
    config: TrainConfig, world: World | torch.device, restart: bool = False
) -> dict:
    """Train a generator into a model directory at config.out; return the held-out scalars.

    `restart` first deletes an earlier run and its codes. Raises FileNotFoundError for missing
    codes, tokenizer or init_from, ValueError if they do not belong together, or for a batch size
    that does not divide among the processes.
    """
    world = World(device=world) if isinstance(world, torch.device) else world
    parallel = choose_parallelism(config, world)
    tokenizer = load_tokenizer(config.data.tokenizer, world.device)
    directory, images = config.data.codes, config.data.images
    if directory is None:
        assert images is not None
        directory = config.out / "codes"
        if restart and world.main and directory.exists():
            with lock(config.out, "a training run"):
                shutil.rmtree(directory)
        world.wait()
        encode_splits(images, tokenizer, directory, device=world.device)
    train, val = PackedCodes(directory / "train"), PackedCodes(directory / "val")
    data = {"tokenizer": tokenizer.fingerprint}  # a manifest names every shard's digest
    for name, codes in (("train codes", train), ("val codes", val)):
        codes.require_tokenizer(tokenizer.fingerprint)
        data[name] = sha256_file(codes.directory / MANIFEST)
    with SeededInit(config.seed):
        model = initial_model(config, train, tokenizer.fingerprint)
    if config.init_from is None and isinstance(model.memory, ValueBank):
        model.memory.cluster_codes(tokenizer.quantize.codebook())
    task = GeneratorTask(config, model.to(world.device), tokenizer, train, val, parallel)
    return fit(task, config, parallel, restart, data)


def initial_model(config: TrainConfig, codes: PackedCodes, fingerprint: str) -> Transformer:
    """The model at step 0; with `train: memory`, only bank and routers are trainable.

    `fingerprint` is the fingerprint of the codes' tokenizer. Raises ValueError if config.model
    contradicts the codes or config.init_from, or if there is no memory to train.
    """
    needed: dict[str, Any] = {"codebook_size": codes.codebook_size, "grid": tuple(codes.grid)}
    needed["n_classes"] = len(codes.class_names)
    for key in needed.keys() & config.model.model_fields_set:
        if (chosen := getattr(config.model, key)) != needed[key]:
            raise ValueError(f"model.{key} is {chosen}, but {codes.directory} has {needed[key]}")
    settings = config.model.model_copy(update=needed)
    if config.init_from is None:
        refuse_quantized(settings)
        return Transformer(settings)
    directory = resolve(config.init_from)
    if directory.resolve() == config.out.resolve():
        raise ValueError(f"out and init_from are both {config.out}: expected another `out`")
    theirs = vq.load(directory / "tokenizer").fingerprint
    if theirs != fingerprint:
        raise ValueError(
            f"{directory} was trained on codes of tokenizer {theirs[:12]}: expected "
            f"{fingerprint[:12]}, the tokenizer of the data"
        )
    model = start_from(directory, settings, codes.class_names)
    if config.train == "memory":
        if not isinstance(model.memory, ValueBank):
            upcycle = "see `moveimg convert upcycle`"
            raise ValueError(f"train: memory: {directory} has no value memory ({upcycle})")
        if len(read_class_names(directory)) != len(codes.class_names):
            raise ValueError(f"train: memory: {directory} has other classes, expected train: all")
        freeze_backbone(model)
    return model


def start_from(directory: Path, config: ModelConfig, class_names: list[str]) -> Transformer:
    """A model of `config` with the weights of a model directory.

    Settings that `config` leaves out are adopted; raises ValueError for a setting that differs. For
    another number of classes, prints a message and draws the label tables from N(0, 0.02), except
    the null label's row.
    """
    source = load_generator(directory)
    left_out = ModelConfig.model_fields.keys() - config.model_fields_set - FREE
    config = config.model_copy(update={key: getattr(source.config, key) for key in left_out})
    refuse_quantized(config)
    there = source.config.model_dump(exclude=FREE)
    for key, value in config.model_dump(exclude=FREE).items():
        if value != there[key]:
            hint = ": see `moveimg convert upcycle`" if key == "memory" else ""
            raise ValueError(f"model.{key} is {value}, but {directory} has {there[key]}{hint}")
    with shapes_only():
        model = Transformer(config)
    state = source.state_dict()
    if (before := source.config.n_classes) != (now := config.n_classes):
        for key in filter(state.__contains__, LABEL_TABLES):
            rows = torch.empty(now, state[key].shape[1]).normal_(std=0.02)
            state[key] = torch.cat([rows, state[key][-1:]])
        print_rank0(f"{directory} has {before} classes, the codes {now}: new label table")
    elif read_class_names(directory) != class_names:
        print_rank0(f"{directory} has classes of other names than the codes: label table kept")
    model.load_state_dict(state, assign=True)
    break_symmetry(model)
    return model


def refuse_quantized(config: ModelConfig) -> None:
    """Raise ValueError for a model whose bank is quantized: it has no gradient."""
    if bits := getattr(config.memory, "bits", None):
        raise ValueError(f"memory.bits {bits}: a quantized bank cannot be trained")


def freeze_backbone(model: Transformer) -> None:
    """Switch off the gradients of all parameters except the bank and the routers."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("memory.") or ".router." in name)


@torch.no_grad()
def break_symmetry(model: Transformer) -> None:
    """Draw the gates of a zero-initialised value memory from N(0, 0.02), except those for g_0.

    With zero bank and routers, all slots of a code would get equal gradients at every step. The
    logits do not change, because the bank is zero.
    """
    if not isinstance(model.memory, ValueBank) or model.memory.bank.weight.any():
        return
    for module in model.modules():
        if isinstance(module, GatedMixer) and len(module.slots) > 1:
            gates = module.router.weight.unflatten(0, (module.n_head, -1))
            if not gates.any():
                nn.init.normal_(gates[:, int(module.gate_standard) :], std=0.02)
