"""A dense model -> the same model with a value memory that does not speak yet.

With a zero bank and zero routers every gate is 2 sigmoid(0) = 1 and every row 0, so V stays
1 * V + 0: the logits do not change in any bit, and training can go on from there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moveimg.checkpoint import ModelParts, load_model, read_about, save_model
from moveimg.config import ModelConfig
from moveimg.device import shapes_only
from moveimg.errors import validate
from moveimg.files import atomic_directory
from moveimg.model import Transformer


def convert_upcycle(source: str | Path, memory: dict[str, Any], out: str | Path) -> ModelConfig:
    """A model directory without memory -> one with it, which appears whole.

    Args:
        source: the dense model's directory.
        memory: settings of the memory, as in a config: `{"kind": "move", "slots": 6}`.
        out: the directory to make.

    Raises:
        FileNotFoundError, ValueError: as of load_model; or the model has a memory already, or the
            settings are not valid.
        FileExistsError: `out` is there already.
    """
    with atomic_directory(out) as temporary:
        parts = load_model(source)
        grown = upcycle(parts.generator, memory)
        about = {"source": "upcycled", "from": Path(source).name, "before": read_about(source)}
        grown_parts = ModelParts(grown, parts.tokenizer, parts.class_names, parts.sampling)
        save_model(temporary, grown_parts, about)
    return grown.config


def upcycle(dense: Transformer, memory: dict[str, Any]) -> Transformer:
    """A transformer with a zero memory over the dense one's own weights (shared, not copied).

    A memory's zero state must be silent: all that the dense model lacks is zero.
    Raises ValueError if it has a memory already, or for settings that are not valid.
    """
    if dense.config.memory.kind != "none":
        raise ValueError(
            f"the model has a memory of kind {dense.config.memory.kind!r} already: "
            "expected a dense one (none)"
        )
    settings = dense.config.model_dump() | {"memory": memory}
    config = validate(ModelConfig, settings, "upcycle")
    if config.memory.kind == "none":
        raise ValueError("upcycle: memory is of kind none: expected one that holds something")
    with shapes_only():
        grown = Transformer(config)
    state = dense.state_dict()
    like = dense.head.weight
    for key, value in grown.state_dict().items():
        if key not in state:
            state[key] = torch.zeros(value.shape, dtype=like.dtype, device=like.device)
    grown.load_state_dict(state, assign=True)
    return grown.train(dense.training)
