"""What a model costs, from its config alone: parameters, FLOPs, bytes.

FLOPs count a multiply and an add as two, in matrix products only, as torch's FlopCounterMode does.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from moveimg.config.model import ModelConfig
from moveimg.device import shapes_only
from moveimg.model.memory import GatedMixer, ValueBank
from moveimg.model.transformer import Transformer


@dataclass(frozen=True)
class Cost:
    """The cost of one model; bytes are those of the cache's and the bank's number type.

    Attributes:
        parameters: all of them; backbone, embeddings, router and bank add up to it.
        active: those used per code: a row of each table looked up by code, the chosen experts,
            the rows that product keys find.
        backbone, embeddings, router, bank: blocks, norms and head; label and code tables;
            gates' W_G; value memory.
        flops_per_token: of a forward pass, averaged over the T positions of an image.
        router_share: the gates' share of it, 2 D H (gates per head) per token and layer.
        flops_per_image: of generating T codes with the cache, without guidance, which doubles it.
        cache_bytes_per_token: kept per position while generating, all layers.
        mha_cache_bytes_per_token: the same for multi-head attention of the same size.
        bank_bytes_per_token: of value memory gathered per position, once for all layers.
        bank_bytes_per_layer: of those, the bytes that each layer reads.
        table_bytes_per_layer: read per position by each layer from rows that product keys find.
        seq_len: T.
    """

    parameters: int
    active: int
    backbone: int
    embeddings: int
    router: int
    bank: int
    flops_per_token: float
    router_share: float
    flops_per_image: float
    cache_bytes_per_token: int
    mha_cache_bytes_per_token: int
    bank_bytes_per_token: int
    bank_bytes_per_layer: tuple[int, ...]
    table_bytes_per_layer: tuple[int, ...]
    seq_len: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@cache
def model_cost(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Cost:
    """The cost of the model of `config`, with its cache and bank in `dtype`."""
    with shapes_only():
        return cost_of(Transformer(config), dtype)


def cost_of(model: Transformer, dtype: torch.dtype = torch.float32) -> Cost:
    """The cost of a model, which may be on the meta device."""
    config, length, memory = model.config, model.config.seq_len, model.memory
    context = (length + 1) / 2  # position t attends to t + 1
    flops = token_flops(model, context)
    router = sum(token_flops(m.router, 0) for m in model.modules() if isinstance(m, GatedMixer))
    bank = memory.slots * memory.value_width if isinstance(memory, ValueBank) else 0
    caches = [layer.make_cache(1, length, model.norm.weight) for layer in model.attentions()]
    bank_reads, table_reads = [], []
    for layer in model.layers:
        readers: list[Any] = [m for m in layer.modules() if hasattr(m, "table_reads")]
        mixers = [m for m in readers if isinstance(m, GatedMixer)]
        bank_reads.append(sum(m.table_reads() for m in mixers) * dtype.itemsize)
        all_reads = sum(m.table_reads() for m in readers) * dtype.itemsize
        table_reads.append(all_reads - bank_reads[-1])
    return Cost(
        parameters=sum(p.numel() for p in model.parameters()),
        active=active_parameters(model),
        **count_parameters(model),
        flops_per_token=flops,
        router_share=router / flops,
        flops_per_image=token_flops(model, context, decoding=True) * length,
        cache_bytes_per_token=sum(c.numel_per_token() for c in caches) * dtype.itemsize,
        mha_cache_bytes_per_token=2 * config.n_layer * config.width * dtype.itemsize,
        bank_bytes_per_token=bank * dtype.itemsize,
        bank_bytes_per_layer=tuple(bank_reads),
        table_bytes_per_layer=tuple(table_reads),
        seq_len=length,
    )


def count_parameters(model: Transformer) -> dict[str, int]:
    """The number of parameters by part (see Cost)."""
    counts = {"backbone": 0, "embeddings": 0, "router": 0, "bank": 0}
    for name, parameter in model.named_parameters():
        part = "backbone"
        if name.startswith("memory."):
            part = "bank"
        elif ".router." in name:
            part = "router"
        elif name.startswith(("label_embedding.", "code_embedding.")):
            part = "embeddings"
        counts[part] += parameter.numel()
    return counts


def active_parameters(model: Transformer) -> int:
    """Parameters used per code (see Cost.active).

    A module that uses only some of its own returns their number from a method `active_own()`.
    """

    def active(module: nn.Module) -> int:
        if module in (model.label_embedding, getattr(model.memory, "class_bank", None)):
            return 0  # no code reads them
        if isinstance(module, nn.Embedding):
            return module.embedding_dim
        own = sum(p.numel() for p in module.parameters(recurse=False))
        return getattr(module, "active_own", lambda: own)()

    return sum(active(module) for module in model.modules())


def token_flops(module: nn.Module, context: float, decoding: bool = False) -> float:
    """FLOPs per token through `module` when attention sees `context` positions on average.

    A linear layer takes 2 FLOPs per weight. A module with other products returns their FLOPs from a
    method `own_flops(context)`, or, where cached decoding differs, `decoding_flops(context)`.
    """

    def own(module: nn.Module) -> float:
        if isinstance(module, nn.Linear):
            return 2.0 * module.weight.numel()
        flops = getattr(module, "own_flops", lambda _: 0.0)
        return (getattr(module, "decoding_flops", flops) if decoding else flops)(context)

    return sum(own(m) for m in module.modules())


def describe_cost(cost: Cost, dtype: str) -> str:
    """The cost as text for people."""
    cache = dtype
    if cost.cache_bytes_per_token != cost.mha_cache_bytes_per_token:
        cache = f"{dtype}; with MHA {cost.mha_cache_bytes_per_token:,}"
    rows: list[tuple[str, float, str]] = [("parameters", cost.parameters, "")]
    rows += [(f"  {p}", getattr(cost, p), "") for p in ("backbone", "embeddings", "router", "bank")]
    rows += [
        ("  active per token", cost.active, ""),
        ("FLOPs per token", cost.flops_per_token, f"router {cost.router_share:.2%} of FLOPs"),
        ("FLOPs per image", cost.flops_per_image, f"{cost.seq_len} codes, unguided"),
        ("cache bytes per token", cost.cache_bytes_per_token, cache),
        ("bank bytes per token", cost.bank_bytes_per_token, f"{dtype}, gathered once per pass"),
        ("  read by a layer", *_layers(cost.bank_bytes_per_layer)),
    ]
    if any(cost.table_bytes_per_layer):
        total = sum(cost.table_bytes_per_layer)
        rows.append(("product-key bytes", total, f"{dtype}, rows found per token"))
        rows.append(("  read by a layer", *_layers(cost.table_bytes_per_layer)))
    return "\n".join(
        f"{name:<22}{value:>15,.0f}" + (f"  ({note})" if note else "") for name, value, note in rows
    )


def _layers(by_layer: tuple[int, ...]) -> tuple[int, str]:
    return max(by_layer), f"{sum(size > 0 for size in by_layer)} of {len(by_layer)} layers"
