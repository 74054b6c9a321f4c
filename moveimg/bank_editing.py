"""Editing a value bank: erase rows of codes, or interpolate with the bank of another model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from moveimg.model import Transformer, ValueBank


def erase_rows(model: Transformer, codes: Sequence[int]) -> Transformer:
    """A copy of `model` whose bank rows of `codes` are zero; all other weights are shared.

    Other codes that share these rows lose them, too. Raises ValueError for a model without a bank
    of floating-point rows, or a code outside the codebook.
    """
    edited, size = copy_bank(model), model.config.codebook_size
    if wrong := [code for code in codes if not 0 <= code < size]:
        raise ValueError(f"code {wrong[0]}: expected 0..{size - 1}")
    memory: Any = edited.memory
    with torch.no_grad():
        rows = memory.row_indices(torch.tensor(list(codes), device=memory.bank.weight.device))
        memory.bank.weight[rows.long()] = 0
    return edited


def blend_banks(model: Transformer, other: Transformer, share: float) -> Transformer:
    """A copy of `model` with the bank (1 - share) * model's bank + share * other's bank.

    Raises ValueError for models without a bank, banks of unequal shapes, or share outside 0..1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share {share}: expected 0..1")
    edited: Any = copy_bank(model)
    own, theirs = edited.memory.bank.weight, require_bank(other).bank.weight
    if own.shape != theirs.shape:
        raise ValueError(f"banks {[*own.shape]} and {[*theirs.shape]}: expected equal shapes")
    with torch.no_grad():
        own.lerp_(theirs.to(own), share)
    return edited


def copy_bank(model: Transformer) -> Transformer:
    """A copy of `model` with a copied memory; all other weights are shared. See require_bank."""
    edited = copy.copy(model)
    edited._modules = {**model._modules, "memory": copy.deepcopy(require_bank(model))}
    return edited


def require_bank(model: Transformer) -> ValueBank:
    """The model's memory; ValueError unless it has a bank of floating-point rows in memory."""
    memory = model.memory
    if not isinstance(memory, ValueBank) or not isinstance(memory.bank, nn.Embedding):
        raise ValueError(
            f"memory of kind {model.config.memory.kind}: expected a bank of floating-point rows"
        )
    return memory
