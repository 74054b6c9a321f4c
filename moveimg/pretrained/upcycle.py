"""Dense models upcycled: the same model with a zero-initialised value memory.

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
from moveimg.device import shapes_only
from moveimg.errors import validate
from moveimg.files import atomic_directory
from moveimg.model import Transformer


def convert_upcycle(source: str | Path, memory: dict[str, Any], out: str | Path) -> ModelConfig:
    """Write the dense model directory `source` as one with a memory, which appears whole.

    `memory` holds settings as in a config: `{"kind": "move", "slots": 6}`. Raises FileExistsError
    where `out` is there already; other errors are those of load_model and upcycle.
    """
    with atomic_directory(out) as temporary:
        parts = load_model(source)
        model = upcycle(parts.generator, memory)
        about = {"source": "upcycled", "from": Path(source).name, "before": parts.about}
        save_model(temporary, replace(parts, generator=model), about)
    return model.config


def upcycle(dense: Transformer, memory: dict[str, Any]) -> Transformer:
    """A transformer with a zero memory that shares the dense one's weights.

    Raises ValueError if the model has a memory already, or for settings that are not valid.
    """
    if dense.config.memory.kind != "none":
        kind = dense.config.memory.kind
        raise ValueError(f"the model has a memory of kind {kind!r} already: expected none")
    config = validate(ModelConfig, dense.config.model_dump() | {"memory": memory}, "upcycle")
    if config.memory.kind == "none":
        raise ValueError("upcycle: memory.kind is none: expected lave or move")
    with shapes_only():
        model = Transformer(config)
    state, like = dense.state_dict(), dense.head.weight
    for key, value in model.state_dict().items():
        if key not in state:
            state[key] = torch.zeros(value.shape, dtype=like.dtype, device=like.device)
    model.load_state_dict(state, assign=True)
    return model.train(dense.training)
