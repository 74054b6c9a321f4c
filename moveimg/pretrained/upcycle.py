"""Conversions of models: add a zero-initialised value memory, or quantize a bank.

With a zero bank and zero routers every gate is 2 sigmoid(0) = 1 and every row 0, so V becomes
1 * V + 0: the logits stay the same to the bit, and training can continue from these weights.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moveimg.checkpoint import load_model, save_model
from moveimg.config import ModelConfig
from moveimg.errors import validate
from moveimg.files import atomic_directory
from moveimg.model import Transformer, ValueBank
from moveimg.model.bank_storage import QuantizedRows


def convert_upcycle(source: Path, memory: dict[str, Any], out: Path) -> ModelConfig:
    """Write the dense model of `source` with a memory to `out`; for errors see upcycle."""
    with atomic_directory(out) as temporary:
        parts = load_model(source)
        model = upcycle(parts.generator, memory)
        if isinstance(model.memory, ValueBank):
            model.memory.cluster_codes(parts.tokenizer.quantize.codebook())
        about = {"source": "upcycled", "from": source.name, "before": parts.about}
        save_model(temporary, replace(parts, generator=model, about=about))
    return model.config


def convert_quantize_bank(source: Path, bits: int, out: Path) -> ModelConfig:
    """Write the model of `source` with the rows of its bank in 8 or 4 bits to `out`.

    Raises FileExistsError if `out` exists, ValueError for a model without a MoVE bank of floats.
    """
    with atomic_directory(out) as temporary:
        parts = load_model(source)
        old = parts.generator
        spec = old.config.memory
        if spec.kind != "move" or spec.bits is not None:
            raise ValueError(f"{source}: memory {spec}: expected kind move without bits")
        memory: Any = spec.model_copy(update={"bits": bits})
        model = Transformer(old.config.model_copy(update={"memory": memory})).eval()
        rows = QuantizedRows.quantize(old.memory.bank.weight, spec.slots, bits)
        old.memory.bank = rows
        model.load_state_dict(old.state_dict())
        about = {"source": "quantized bank", "from": source.name, "before": parts.about}
        save_model(temporary, replace(parts, generator=model, about=about))
    return model.config


def upcycle(dense: Transformer, memory: dict[str, Any]) -> Transformer:
    """Return `dense` with a zero `memory`, for example `{"kind": "move", "slots": 6}`.

    Raises ValueError if the model has a memory already, or for invalid settings.
    """
    config = validate(ModelConfig, dense.config.model_dump() | {"memory": memory}, "upcycle")
    kinds = dense.config.memory.kind, config.memory.kind
    if kinds[0] != "none" or kinds[1] == "none":
        raise ValueError(f"upcycle: memory {kinds[0]} to {kinds[1]}: expected none to lave or move")
    model = Transformer(config).to(dense.head.weight)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(model.state_dict() | dense.state_dict())
    return model.train(dense.training)
