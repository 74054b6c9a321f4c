"""The cost of a model and of its training, from the config alone: parameters, FLOPs, bytes.

A multiply-add is two FLOPs; only matrix products count, as in torch's FlopCounterMode.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from moveimg.config import TrainConfig
from moveimg.config.model import ModelConfig, SwiGLUConfig
from moveimg.device import shapes_only
from moveimg.model import loss
from moveimg.model.memory import GatedMixer, ValueBank
from moveimg.model.product_keys import TableLayer
from moveimg.model.swiglu import SwiGLU, swiglu_hidden
from moveimg.model.transformer import Transformer


@dataclass(frozen=True)
class Cost:
    """The cost of one model; bytes are in the dtype given to `model_cost`."""

    parameters: int
    active: int  # parameters used per token: one row per table, chosen experts, looked-up rows
    backbone: int  # blocks, norms and head
    embeddings: int  # label and code tables
    router: int  # W_G of the gates
    bank: int  # value memory
    flops_per_token: float  # of a forward pass, averaged over the T positions of an image
    flops_per_image: float  # of generating T codes with the cache; guidance doubles them
    cache_bytes_per_token: int  # of the KV cache, all layers
    bank_bytes_per_token: int  # of value memory rows, gathered once for all layers
    table_bytes_per_token: int  # of rows looked up by product keys, all layers


@cache
def model_cost(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Cost:
    """The cost of the model of `config`, with its cache and bank in `dtype`."""
    with shapes_only():
        model = Transformer(config)
    memory, length = model.memory, config.seq_len
    context = (length + 1) / 2  # position t attends to t + 1
    caches = [layer.make_cache(1, length, model.norm.weight) for layer in model.attentions()]
    bank = memory.slots * memory.value_width if isinstance(memory, ValueBank) else 0
    bank *= 1 + (memory.context is not None)
    reads = sum(ffn.own_active() for ffn in model.feedforwards() if isinstance(ffn, TableLayer))
    return Cost(
        parameters=sum(p.numel() for p in model.parameters()),
        active=active_parameters(model),
        **count_parameters(model),
        flops_per_token=token_flops(model, context),
        flops_per_image=token_flops(model, context, decoding=True) * length,
        cache_bytes_per_token=sum(c.numel_per_token() for c in caches) * dtype.itemsize,
        bank_bytes_per_token=bank * dtype.itemsize,
        table_bytes_per_token=reads * dtype.itemsize,
    )


def count_parameters(model: Transformer) -> dict[str, int]:
    """The number of parameters in the backbone, embeddings, routers and bank."""
    counts = {"backbone": 0, "embeddings": 0, "router": 0, "bank": 0}
    groups = {"memory": "bank", "label_embedding": "embeddings", "code_embedding": "embeddings"}
    for name, parameter in model.named_parameters():
        group = groups.get(name.partition(".")[0], "router" if ".router." in name else "backbone")
        counts[group] += parameter.numel()
    return counts


def active_parameters(model: Transformer) -> int:
    """Parameters used per token (see Cost.active).

    A module that uses only a part of its parameters returns their number from `own_active()`.
    """

    def active(module: nn.Module) -> int:
        if module in (model.label_embedding, getattr(model.memory, "class_bank", None)):
            return 0  # only the class token reads these tables
        if isinstance(module, nn.Embedding):
            return module.embedding_dim
        own = sum(p.numel() for p in module.parameters(recurse=False))
        return getattr(module, "own_active", lambda: own)()

    return sum(active(module) for module in model.modules())


def token_flops(module: nn.Module, context: float, decoding: bool = False) -> float:
    """FLOPs per token through `module` when attention sees `context` positions on average.

    A linear layer takes 2 FLOPs per weight. A module with other matrix products counts these in
    `own_flops(context)`, and in `decoding_flops(context)` if decoding with a cache differs.
    """

    def own(module: nn.Module) -> float:
        if isinstance(module, nn.Linear):
            return 2.0 * module.weight.numel()
        flops = getattr(module, "own_flops", lambda _: 0.0)
        return (getattr(module, "decoding_flops", flops) if decoding else flops)(context)

    return sum(own(m) for m in module.modules())


PEAK_FLOPS = {  # dense bfloat16 FLOPs per second, from the data sheets
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12,
    "L40S": 362e12, "L4": 121e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
IMAGENET_CLASSES, IMAGENET_IMAGES, IMAGENET_VIEWS = 1000, 1_281_167, 20


def train_budget(config: TrainConfig, gpus: int = 8, gpu: str = "H100") -> dict[str, Any]:
    """The estimated memory, hours and disk space of a training on `gpus` devices, as plain data.

    Memory is in bytes per device, without CUDA's context (about 1 GB); `state` is float32 weights,
    gradients, Adam's moments and the EMA. `checkpoints` and ImageNet's `codes` are bytes on disk.
    Raises ValueError for an unknown GPU, or a batch that does not divide among `gpus`.
    """
    if gpu not in PEAK_FLOPS:
        raise ValueError(f"gpu {gpu!r}: expected one of {', '.join(PEAK_FLOPS)}")
    micro = min(config.micro_batch or config.batch_size, config.batch_size)
    if gpus < 1 or config.batch_size % (micro * gpus):
        raise ValueError(
            f"batch_size {config.batch_size} in micro-batches of {micro}: "
            f"expected a multiple of {micro} x {gpus} GPUs"
        )
    with shapes_only():
        model = Transformer(config.model)
    cost, length = model_cost(config.model, torch.bfloat16), config.model.seq_len
    total, tokens, recompute = cost.parameters, micro * length, config.activation_checkpointing
    state = total * (20 if config.ema else 16) // (gpus if config.distributed == "fsdp" else 1)
    by_block = [block_activations(config.model, block) for block in model.layers]
    kept = sum(by_block)
    if recompute:
        kept = config.model.n_layer * 4 * config.model.width + max(by_block)
    kept += 2 * cost.bank_bytes_per_token  # the gathered rows and their gradient
    size, width = config.model.codebook_size, config.model.width
    # The loss keeps a chunk's float32 logits and log-softmax, the head's weight in bfloat16 and its
    # gradient in float32, and the gradient of the head's input.
    logits = min(max(loss.CHUNK, size), tokens * size)
    activations = tokens * (kept + 4 * width) + 8 * logits + 6 * size * width
    flops = (3 + recompute) * cost.flops_per_token * length * config.batch_size
    hours = config.steps * flops / gpus / PEAK_FLOPS[gpu] / 3600
    imagenet = config.model.n_classes == IMAGENET_CLASSES
    return {
        "memory": state + 2 * total + activations,  # and autocast's bfloat16 copies of the weights
        "state": state,
        "activations": activations,
        "flops_per_step": flops,
        "hours": (2 * hours, 4 * hours),  # at 50 % and at 25 % of the peak FLOPs
        # keep_checkpoints and the one being written; the exported and the best model
        "checkpoints": total * (16 * (config.keep_checkpoints + 1) + 2 * 4),
        "codes": IMAGENET_IMAGES * (IMAGENET_VIEWS * length * 2 + 4) if imagenet else 0,
    }


def block_activations(config: ModelConfig, block: nn.Module) -> int:
    """Bytes per token of activations that a block of MHA and SwiGLU saves, in bfloat16."""
    ffn: Any = block.ffn
    hidden = swiglu_hidden(config.width, SwiGLUConfig())
    if isinstance(ffn, SwiGLU):
        hidden = ffn.w1.out_features
    mixers = [module for module in block.modules() if isinstance(module, GatedMixer)]
    mixed = sum(4 * m.value_width + 4 * m.router.out_features for m in mixers)
    mixed -= sum(6 * config.width for m in mixers if not m.gate_standard)  # V itself is not kept
    return 38 * config.width + 8 * hidden + 4 * config.n_head + 8 + mixed
