"""Shared by the tests: tiny models with lively weights, one thread a worker."""

from __future__ import annotations

import pytest
import torch

from moveimg.config import ModelConfig
from moveimg.model import Transformer

# Every combination of the three slots that the config allows, on tiny sizes.
ATTENTIONS = {"mha": {"kind": "mha"}}
MEMORIES = {
    "none": {"kind": "none"},
    "lave-x1": {"kind": "lave"},
    "lave-x2-gated": {"kind": "lave", "layers": "all", "gate_standard": True},
    "lave-listed": {"kind": "lave", "layers": [0], "class_rows": True},
    "move-1": {"kind": "move", "slots": 1},
    "move-3-class-rows": {"kind": "move", "slots": 3, "class_rows": True},
    "move-2-ungated": {"kind": "move", "slots": 2, "gate_standard": False},
}
FEEDFORWARDS = {"swiglu": {"kind": "swiglu", "hidden": 24}}
VARIANTS = {
    f"{a}-{m}-{f}": {"attention": ATTENTIONS[a], "memory": MEMORIES[m], "ffn": FEEDFORWARDS[f]}
    for a in ATTENTIONS
    for m in MEMORIES
    for f in FEEDFORWARDS
}


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Two test workers on two cores: more threads would only wait for each other."""
    torch.set_num_threads(1)


def tiny_config(**changes) -> ModelConfig:
    """A config of two layers and 3 x 4 codes; the grid is not square, so mix-ups show."""
    settings = {
        "n_layer": 2,
        "n_head": 2,
        "width": 16,
        "codebook_size": 11,
        "n_classes": 5,
        "grid": [3, 4],
    }
    return ModelConfig.model_validate(settings | changes)


def lively(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> Transformer:
    """A model whose every weight matters: the initial zeros (head, routers) are replaced."""
    torch.manual_seed(seed)
    model = Transformer(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.5)
    return model


def random_inputs(config: ModelConfig, batch: int = 3, seed: int = 0):
    """codes [B, T] and labels [B], the null label among them."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(config.codebook_size, (batch, config.seq_len), generator=g)
    labels = torch.randint(config.n_classes + 1, (batch,), generator=g)
    labels[0] = config.n_classes
    return codes, labels


@pytest.fixture(params=VARIANTS, ids=list(VARIANTS))
def variant(request) -> ModelConfig:
    """Each allowed combination of attention, memory and feed-forward."""
    return tiny_config(**VARIANTS[request.param])
