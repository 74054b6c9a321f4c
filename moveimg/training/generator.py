"""Training a generator on packed codes, by the cross-entropy of each code given earlier ones.

It starts from a new model, or from another model's weights.
"""

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
    read_model_config,
    save_model,
)
from moveimg.config import ModelConfig, TrainConfig
from moveimg.data import MANIFEST, PackedCodes, draw_batch, sha256_file
from moveimg.device import shapes_only
from moveimg.dist import World, print_rank0
from moveimg.files import lock
from moveimg.images import labelled_grid, to_pil
from moveimg.model import GatedMixer, Transformer, ValueBank
from moveimg.model.analysis import bank_maps, gradient_sources
from moveimg.pipeline import resolve
from moveimg.rng import InitialValues
from moveimg.sampling import image_rngs, sample_codes
from moveimg.training.loop import Task, fit
from moveimg.training.parallel import Parallelism, choose_parallelism

PREVIEW_CLASSES, PREVIEW_COLUMNS = 10, 6
# Settings that a run chooses itself: no shape depends on them but that of the label tables.
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

    def loss(self, step: int, part: int) -> tuple[Tensor, dict[str, Tensor]]:
        size, seed = self.config.batch_size, self.config.seed
        codes, labels, _ = draw_batch(self.codes, size, seed, step, part, self.parallel.parts)
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

    def record(self, step: int) -> dict[str, Any]:
        """Every memory_every steps: the bank's gradient by layer, and the layers' mean gates.

        Those of the step's first micro-batch, without dropout (see gradient_sources).
        """
        every = self.config.memory_every
        if not every or step % every or not isinstance(self.model.memory, ValueBank):
            return {}
        size, parts = self.config.batch_size, self.parallel.parts
        codes, labels, _ = draw_batch(self.codes, size, self.config.seed, step - 1, 0, parts)
        batch = codes.to(self.device), labels.to(self.device)
        self.model.eval()
        record = gradient_sources(self.model, *batch)
        maps = bank_maps(self.model, *batch)
        self.model.train()
        for key in ("g_0", "slots", "share"):
            record[key] = {i + 1: getattr(m, key).mean().item() for i, m in maps.items()}
        return record

    def preview(self, model: Transformer) -> Image.Image:
        """A grid of samples, one row per class, always from the same seeds."""
        classes = list(range(min(PREVIEW_CLASSES, len(self.class_names))))
        labels = torch.tensor(classes, device=self.device).repeat_interleave(PREVIEW_COLUMNS)
        rngs = image_rngs(range(len(labels)))
        codes = sample_codes(model, labels, self.config.sampling, rngs)
        images = to_pil(self.tokenizer.decode(codes, model.config.grid))
        rows = [images[i : i + PREVIEW_COLUMNS] for i in range(0, len(images), PREVIEW_COLUMNS)]
        return labelled_grid(rows, [self.class_names[i] for i in classes])

    def export(self, model: Transformer, directory: Path, about: dict[str, Any]) -> None:
        parts = ModelParts(model, self.tokenizer, self.class_names, self.config.sampling)
        save_model(directory, parts, about)

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
    settings = fit_to_codes(config.model, train)
    with InitialValues(config.seed):
        model = initial_model(config, settings, train.class_names, tokenizer.fingerprint)
    if config.init_from is None and isinstance(model.memory, ValueBank):
        model.memory.share_rows(tokenizer.quantize.codebook())
    task = GeneratorTask(config, model.to(world.device), tokenizer, train, val, parallel)
    data = {"tokenizer": tokenizer.fingerprint}  # a manifest names every shard's digest
    for name, codes in (("train codes", train), ("val codes", val)):
        data[name] = sha256_file(codes.directory / MANIFEST)
    return fit(task, config, parallel, restart, data)


def fit_to_codes(config: ModelConfig, codes: PackedCodes) -> ModelConfig:
    """The config with codebook size, class count and grid of the codes.

    Raises ValueError if the config sets one of them to another value.
    """
    needed: dict[str, Any] = {"codebook_size": codes.codebook_size, "grid": tuple(codes.grid)}
    needed["n_classes"] = len(codes.class_names)
    for key in needed.keys() & config.model_fields_set:
        if (chosen := getattr(config, key)) != needed[key]:
            raise ValueError(f"model.{key} is {chosen}, but {codes.directory} has {needed[key]}")
    return config.model_copy(update=needed)


def _open_codes(
    config: TrainConfig, tokenizer: vq.AutoencoderTokenizer, world: World, restart: bool
) -> tuple[PackedCodes, PackedCodes]:
    """The train and val codes; encoded first if the config names images."""
    directory = config.data.codes
    if directory is None:
        from moveimg.data import encode_splits

        assert config.data.images is not None
        directory = config.out / "codes"
        if restart and world.main and directory.exists():
            with lock(config.out, "a training"):
                shutil.rmtree(directory)
        world.wait()
        encode_splits(config.data.images, tokenizer, directory, device=world.device)
    return PackedCodes(directory / "train"), PackedCodes(directory / "val")


# --- the model at step 0 ---------------------------------------------------------------------


def initial_model(
    config: TrainConfig, model: ModelConfig, class_names: list[str], fingerprint: str
) -> Transformer:
    """The model at step 0; with `train: memory`, all but the memory is frozen.

    `model` is config.model completed by the codes; `fingerprint` that of their tokenizer.
    Raises FileNotFoundError without a model at config.init_from; ValueError where its settings or
    tokenizer differ, or `train: memory` has no memory to train or a new label table.
    """
    if bits := getattr(model.memory, "bits", None):
        raise ValueError(f"memory.bits {bits}: a quantized bank cannot be trained")
    if config.init_from is None:
        return Transformer(model)
    directory = resolve(config.init_from)
    if directory.resolve() == config.out.resolve():
        raise ValueError(f"out and init_from are both {config.out}: expected another `out`")
    theirs = vq.load(directory / "tokenizer").fingerprint
    if theirs != fingerprint:
        raise ValueError(
            f"{directory} was trained on codes of tokenizer {theirs[:12]}, not of the data's "
            f"{fingerprint[:12]}: the same code would mean something else"
        )
    started = start_from(directory, model, class_names)
    if config.train == "memory":
        same_classes = started.config.n_classes == read_model_config(directory).n_classes
        if started.config.memory.kind == "none" or not same_classes:
            raise ValueError(
                f"train: memory, but {directory} has none (give it one by `moveimg convert "
                "upcycle`), or other classes, whose label table must learn: expected train: all"
            )
        freeze_backbone(started)
    return started


def start_from(directory: Path, config: ModelConfig, class_names: list[str]) -> Transformer:
    """A model of `config` with the weights of a model directory.

    Settings that `config` leaves out are adopted. For another number of classes a message says
    that the label table is drawn from N(0, 0.02), except the null label's row.
    Raises ValueError naming both values if another setting differs.
    """
    source = load_generator(directory)
    config = adopt(config, source.config, directory)
    with shapes_only():
        model = Transformer(config)
    state = source.state_dict()
    before, now = source.config.n_classes, config.n_classes
    if before != now:
        for key in LABEL_TABLES:
            if key in state:
                rows = torch.empty(now, state[key].shape[1]).normal_(std=0.02)
                state[key] = torch.cat([rows, state[key][-1:]])  # the null label's row stays
        print_rank0(f"{directory} has {before} classes, the codes {now}: new label table")
    elif read_class_names(directory) != class_names:
        print_rank0(f"{directory} has classes of other names than the codes: label table kept")
    model.load_state_dict(state, assign=True)
    break_symmetry(model)
    return model


def adopt(config: ModelConfig, source: ModelConfig, directory: Path) -> ModelConfig:
    """`config` completed by the settings of `source`. Raises ValueError if they differ."""
    left_out = ModelConfig.model_fields.keys() - config.model_fields_set - FREE
    config = config.model_copy(update={key: getattr(source, key) for key in left_out})
    there = source.model_dump(exclude=FREE)
    for key, value in config.model_dump(exclude=FREE).items():
        if value != there[key]:
            hint = ": see `moveimg convert upcycle`" if key == "memory" else ""
            raise ValueError(f"model.{key} is {value}, but {directory} has {there[key]}{hint}")
    return config


def freeze_backbone(model: Transformer) -> None:
    """Switch off the gradients of all parameters except the bank and the routers."""
    model.requires_grad_(False)
    model.memory.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, GatedMixer):
            module.router.requires_grad_(True)


@torch.no_grad()
def break_symmetry(model: Transformer) -> None:
    """Initialise the routers of a zero-initialised value memory, without a change of the logits.

    With zero bank and routers, all slots of a code would get equal gradients at every step, and M
    slots would learn no more than one. So the routers' rows for g_1.. are drawn from N(0, 0.02),
    which has no effect while the bank is zero; those for g_0 stay zero.
    """
    memory = model.memory
    if not isinstance(memory, ValueBank) or memory.bank.weight.any():
        return
    for module in model.modules():
        if isinstance(module, GatedMixer) and len(module.slots) > 1:
            weight = module.router.weight
            if not weight.any():
                slots = weight.unflatten(0, (module.n_head, -1))[:, int(module.gate_standard) :]
                nn.init.normal_(slots, std=0.02)
