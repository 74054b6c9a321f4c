"""Models converted: a dense one with a zero-initialised value memory, a bank in fewer bits.

With a zero bank and zero routers every gate is 2 sigmoid(0) = 1 and every row 0, so V stays
1 * V + 0: the logits do not change in any bit, and training can continue from there.
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
from moveimg.model.bank import QuantizedRows


def convert_upcycle(source: str | Path, memory: dict[str, Any], out: str | Path) -> ModelConfig:
    """Write the dense model directory `source` as one with a memory, which appears whole.

    `memory` holds settings as in a config: `{"kind": "move", "slots": 6}`. Raises FileExistsError
    where `out` is there already; other errors are those of load_model and upcycle.
    """
    with atomic_directory(out) as temporary:
        parts = load_model(source)
        model = upcycle(parts.generator, memory)
        if isinstance(model.memory, ValueBank):
            model.memory.share_rows(parts.tokenizer.quantize.codebook())
        about = {"source": "upcycled", "from": Path(source).name, "before": parts.about}
        save_model(temporary, replace(parts, generator=model), about)
    return model.config


def convert_quantize_bank(source: str | Path, bits: int, out: str | Path) -> ModelConfig:
    """Write the model directory `source` with its bank's rows in 8 or 4 bits.

    Raises FileExistsError where `out` is there already, ValueError for a model without MoVE's bank
    of floating-point rows.
    """
    with atomic_directory(out) as temporary:
        parts = load_model(source)
        old = parts.generator
        spec = old.config.memory
        if spec.kind != "move" or spec.bits is not None:
            raise ValueError(f"{source}: memory {spec}: expected a bank of kind move without bits")
        memory: Any = spec.model_copy(update={"bits": bits})
        model = Transformer(old.config.model_copy(update={"memory": memory})).eval()
        rows = QuantizedRows.of(old.memory.bank.weight, spec.slots, bits)
        old.memory.bank = rows
        model.load_state_dict(old.state_dict())
        about = {"source": "quantized bank", "from": Path(source).name, "before": parts.about}
        save_model(temporary, replace(parts, generator=model), about)
    return model.config


def upcycle(dense: Transformer, memory: dict[str, Any]) -> Transformer:
    """A transformer with a zero memory and a dense one's weights, in train mode as that one.

    Raises ValueError if the model has a memory already, or for settings that are not valid.
    """
    config = validate(ModelConfig, dense.config.model_dump() | {"memory": memory}, "upcycle")
    if dense.config.memory.kind != "none" or config.memory.kind == "none":
        raise ValueError(
            f"upcycle: memory of kind {dense.config.memory.kind!r} to {config.memory.kind!r}: "
            "expected 'none' to lave or move"
        )
    model = Transformer(config).to(dense.head.weight)
    zeros = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    model.load_state_dict(zeros | dense.state_dict())
    return model.train(dense.training)
