"""Fixtures and helpers of the tests: tiny models with random weights, a demo, packed digits."""

from __future__ import annotations

import json
import shutil
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle
from types import SimpleNamespace

import pytest
import torch

import tokenizer as vq
from moveimg.checkpoint import ModelParts, save_model
from moveimg.config import ModelConfig, SamplingSettings
from moveimg.model import Transformer

# Tiny settings of every kind of the three slots.
ATTENTIONS = {"mha": {"kind": "mha"}, "mla": {"kind": "mla", "kv_rank": 12, "rope_dim": 4}}
MEMORIES = {
    "none": {"kind": "none"},
    "lave-x1": {"kind": "lave"},
    "move-3-class-rows": {"kind": "move", "slots": 3, "class_rows": True},
}
PRODUCT_KEYS = {"n_keys": 4, "key_heads": 2, "top_k": 3, "key_width": 6}
FEEDFORWARDS = {
    "swiglu": {"kind": "swiglu", "hidden": 24},
    "moe": {"kind": "moe", "n_experts": 4, "hidden": 8, "shared_hidden": 6},
    "product_key": {"kind": "product_key", **PRODUCT_KEYS},
    "peer": {"kind": "peer", **PRODUCT_KEYS},
    "ultramem": {"kind": "ultramem", **PRODUCT_KEYS, "value_width": 6, "delay": 0},
}
# Further settings of the kinds, tested with every attention.
MORE_MEMORIES = {
    "lave-x2-gated": {"kind": "lave", "layers": "all", "gate_standard": True},
    "lave-listed": {"kind": "lave", "layers": [0], "class_rows": True},
    "move-1": {"kind": "move", "slots": 1},
    "move-2-ungated": {"kind": "move", "slots": 2, "gate_standard": False},
    "move-2-shared-above": {"kind": "move", "slots": 2, "rows": 5, "gate_bias": [1.0, -1.0]}
    | {"context": "above", "context_rows": 7},
    "move-1-left": {"kind": "move", "slots": 1, "context": "left", "context_rows": 11},
}
LOW_RANK_QUERIES = {"kind": "mla", "kv_rank": 8, "rope_dim": 8, "q_rank": 10}
LISTED = {"layers": [1], "elsewhere": {"hidden": 24}}
MORE = {
    "mla-q-none-swiglu": {"attention": LOW_RANK_QUERIES, "ffn": FEEDFORWARDS["swiglu"]},
    "mla-q-move-moe-listed": {
        "attention": LOW_RANK_QUERIES,
        "memory": MEMORIES["move-3-class-rows"],
        "ffn": FEEDFORWARDS["moe"] | LISTED,
    },
    "mha-move-product_key-listed": {
        "memory": MORE_MEMORIES["move-1"],
        "ffn": FEEDFORWARDS["product_key"] | LISTED | {"value_width": 10},
    },
    "mha-move-ultramem-delayed": {
        "memory": MORE_MEMORIES["move-1"],
        "ffn": FEEDFORWARDS["ultramem"] | {"delay": 1, "layers": [0], "rank": 3, "cores": 3},
    },
}
# Every allowed combination of the kinds, then the options.
VARIANTS = {
    f"{a}-{m}-{f}": {"attention": ATTENTIONS[a], "memory": memory, "ffn": FEEDFORWARDS[f]}
    for a in ATTENTIONS
    for m, memory in (MEMORIES | MORE_MEMORIES).items()
    for f in FEEDFORWARDS
    if m in MEMORIES or f == "swiglu"
} | MORE
# For slow tests: each pair of attention and memory once, with the feed-forwards in turn.
PAIRS = [(a, m) for a in ATTENTIONS for m in MEMORIES]
PAIRED = [f"{a}-{m}-{f}" for (a, m), f in zip(PAIRS, cycle(FEEDFORWARDS), strict=False)]
VARIED = [*PAIRED, *MORE]
CPU = torch.device("cpu")
NAMES = ["tench, Tinca tinca", "goldfish", "crane", "crane", "black swan"]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Two test workers on two cores: more threads would only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A folder with some packed digits and their tokenizer, made once per worker."""
    from tests.test_training import encode_tiny_digits

    folder = tmp_path_factory.mktemp("digits")
    encode_tiny_digits(folder)
    return folder


@contextmanager
def serving(models, auth=(), allow_hosts=(), trust_proxy=False):
    """A running demo: its url and its FastAPI app."""
    from moveimg.demo.server import build_server

    running, listener = build_server(models, "127.0.0.1", 0, auth, allow_hosts, trust_proxy)
    thread = threading.Thread(target=running.run, args=([listener],), daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        yield SimpleNamespace(url=url, app=running.config.app)
    finally:
        running.should_exit = True
        thread.join(10)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A running demo with two models, one of them with class names like ImageNet's."""
    from starlette.routing import Mount

    from moveimg.checkpoint import BUNDLED
    from moveimg.demo.jobs import Models

    other = tmp_path_factory.mktemp("models") / "gallery"
    shutil.copytree(BUNDLED / "digits", other)
    names = ["goldfish, Carassius auratus", "golden retriever", *(f"thing {i}" for i in range(8))]
    (other / "classes.json").write_text(json.dumps(names))
    (other / "sampling.json").write_text("{}")  # every setting has a default
    models = Models(["digits", str(other)])
    models.get()
    with serving(models) as running:
        app = next(route.app for route in running.app.routes if isinstance(route, Mount))
        queued = app.get_blocks()._queue.event_ids_to_events
        yield SimpleNamespace(url=running.url, models=models, jobs=queued)


@pytest.fixture
def slow_model(server, monkeypatch):
    """Slow down decoding steps, so that a test can stop them; returns the list of their codes."""
    generator, steps = type(server.models.get("digits").generator), []
    step = generator.step

    def step_slowly(self, codes, cache):
        time.sleep(0.05)
        steps.append(codes)
        return step(self, codes, cache)

    monkeypatch.setattr(generator, "step", step_slowly)
    return steps


def tiny_config(**changes) -> ModelConfig:
    """A config of two layers and 3 x 4 codes, not a square, so that swapped sides show."""
    settings = {
        "n_layer": 2,
        "n_head": 2,
        "width": 16,
        "codebook_size": 11,
        "n_classes": 5,
        "grid": [3, 4],
    }
    return ModelConfig.model_validate(settings | changes)


def random_model(
    config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Transformer:
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


def tiny_model(name: str, dtype: torch.dtype = torch.float64, **changes) -> Transformer:
    """The model of a variant, with random weights."""
    return random_model(tiny_config(**VARIANTS[name], **changes), dtype=dtype)


def tiny_tokenizer(codebook_size: int = 11) -> vq.AutoencoderTokenizer:
    torch.manual_seed(0)
    config = vq.VQConfig(
        width=8, multipliers=(1, 1, 1), n_res_blocks=1, z_channels=8, norm_groups=4,
        codebook_size=codebook_size, codebook_dim=4, attention=False,
    )  # fmt: skip
    return vq.AutoencoderTokenizer(config).freeze()


def tiny_parts(generator: Transformer | None = None, **sampling) -> ModelParts:
    """A model with its tokenizer and class names; by default with a memory of two slots."""
    if generator is None:
        generator = random_model(
            tiny_config(memory={"kind": "move", "slots": 2}), dtype=torch.float32
        )
    return ModelParts(generator, tiny_tokenizer(), NAMES, SamplingSettings(**sampling))


@pytest.fixture
def directory(tmp_path):
    """A model directory."""
    about = {"step": 30, "val": {"loss": 1.23456, "accuracy": 0.5}, "run": {"out": "/home/anna/x"}}
    save_model(tmp_path / "model", replace(tiny_parts(cfg_scale=1.5, top_k=9), about=about))
    return tmp_path / "model"


def random_inputs(config: ModelConfig, batch: int = 3, seed: int = 0):
    """codes [B, T] and labels [B], the null label among them."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(config.codebook_size, (batch, config.seq_len), generator=g)
    labels = torch.randint(config.n_classes + 1, (batch,), generator=g)
    labels[0] = config.n_classes
    return codes, labels


def decode_all(model, codes, labels):
    """Logits [B, T, V] by cached decoding."""
    cache = model.make_cache(len(labels))
    steps = [model.prefill(labels, cache)]
    steps += [model.step(codes[:, t], cache) for t in range(codes.shape[1] - 1)]
    return torch.stack(steps, dim=1)
