"""The model at the start of a run: a new one, or one with another model's weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import tokenizer as vq
from moveimg.checkpoint import load_generator, read_class_names, read_model_config
from moveimg.config import ModelConfig, TrainConfig
from moveimg.device import shapes_only
from moveimg.dist import print_rank0
from moveimg.model import GatedMixer, Transformer, ValueBank
from moveimg.pipeline import resolve

# Settings that a run chooses itself: no shape depends on them but that of the label tables.
FREE = {"token_dropout", "resid_dropout", "ffn_dropout", "n_classes"}
# Tables with one row per class; the last row is the null label's.
LABEL_TABLES = ("label_embedding.weight", "memory.class_bank.weight")


def initial_model(
    config: TrainConfig, model: ModelConfig, class_names: list[str], fingerprint: str
) -> Transformer:
    """The model at step 0; with `train: memory`, all but the memory is frozen.

    `model` is config.model completed by the codes; `fingerprint` that of their tokenizer.
    Raises FileNotFoundError without a model at config.init_from; ValueError where its settings or
    tokenizer differ, or `train: memory` has no memory to train or a new label table.
    """
    if config.init_from is None:
        return Transformer(model)
    directory = resolve(config.init_from)
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
                f"train: memory needs a memory (`moveimg convert upcycle`) and the classes of the "
                f"codes in {directory}: expected train: all"
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
    wanted, there = config.model_dump(exclude=FREE), source.model_dump(exclude=FREE)
    for key, value in wanted.items():
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
