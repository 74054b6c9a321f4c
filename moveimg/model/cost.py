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
    """What one model costs.

    Attributes:
        parameters: all of them; backbone, embeddings, router and bank add up to it.
        active: those that a code's position uses: a row of each table looked up by code, the
            chosen experts, the rows that product keys find.
        backbone, embeddings, router, bank: blocks, norms and head; label and code tables;
            gates' W_G; value memory.
        flops_per_token: of a forward pass, averaged over the T positions of an image.
        router_share: part of those spent on gates (MoVE's and LaVE's routers), 2 D H (gates a
            head) a token and layer.
        flops_per_image: of generating T codes with the cache, without guidance, which doubles it.
        cache_bytes_per_token: kept for a position while generating, all layers.
        mha_cache_bytes_per_token: the same for plain multi-head attention of the same size.
        bank_bytes_per_token: of the value memory, looked up for a position, once for all layers.
        bank_bytes_per_layer: of those, read for a position by each layer, first to last: its slots.
        table_bytes_per_layer: read for a position by each layer: the rows its product keys find.
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
    config, length = model.config, model.config.seq_len
    parts = count_parameters(model)
    context = (length + 1) / 2  # position t attends to t + 1
    flops = token_flops(model, context)
    mixers = [m for m in model.modules() if isinstance(m, GatedMixer)]
    router = sum(token_flops(mixer.router, 0) for mixer in mixers)
    bank = model.memory
    bank_width = bank.slots * bank.value_width if isinstance(bank, ValueBank) else 0
    caches = [layer.make_cache(1, length, model.norm.weight) for layer in model.attentions()]
    cached = sum(cache.numel_per_token() for cache in caches)
    reads = [table_reads(layer) for layer in model.layers]
    slots = [mixer_reads(layer) for layer in model.layers]
    return Cost(
        parameters=sum(parts.values()),
        active=active_parameters(model),
        **parts,
        flops_per_token=flops,
        router_share=router / flops,
        flops_per_image=token_flops(model, context, decoding=True) * length,
        cache_bytes_per_token=cached * dtype.itemsize,
        mha_cache_bytes_per_token=2 * config.n_layer * config.width * dtype.itemsize,
        bank_bytes_per_token=bank_width * dtype.itemsize,
        bank_bytes_per_layer=tuple(n * dtype.itemsize for n in slots),
        table_bytes_per_layer=tuple(
            (both - n) * dtype.itemsize for both, n in zip(reads, slots, strict=True)
        ),
        seq_len=length,
    )


def describe_cost(cost: Cost, dtype: str) -> str:
    """The cost as lines for people."""
    parts = {key: getattr(cost, key) for key in ("backbone", "embeddings", "router", "bank")}
    lines = [f"parameters            {cost.parameters:>15,}"]
    lines += [f"  {part:<20}{count:>15,}" for part, count in parts.items()]
    lines.append(f"  active a token      {cost.active:>15,}")
    cache = dtype
    if cost.cache_bytes_per_token != cost.mha_cache_bytes_per_token:
        cache = f"{dtype}; with MHA {cost.mha_cache_bytes_per_token:,}"
    router = f"router {cost.router_share:.2%} of FLOPs"
    lines += [
        f"FLOPs a token         {cost.flops_per_token:>15,.0f}  ({router})",
        f"FLOPs an image        {cost.flops_per_image:>15,.0f}  ({cost.seq_len} codes, unguided)",
        f"cache bytes a token   {cost.cache_bytes_per_token:>15,}  ({cache})",
        f"bank bytes a token    {cost.bank_bytes_per_token:>15,}  ({dtype}, one look-up a pass)",
        f"  read by a layer     {max(cost.bank_bytes_per_layer):>15,}  "
        f"({_readers(cost.bank_bytes_per_layer)})",
    ]
    if any(cost.table_bytes_per_layer):
        lines += [
            f"product-key bytes     {sum(cost.table_bytes_per_layer):>15,}  "
            f"({dtype}, rows that a token finds)",
            f"  read by a layer     {max(cost.table_bytes_per_layer):>15,}  "
            f"({_readers(cost.table_bytes_per_layer)})",
        ]
    return "\n".join(lines)


def _readers(by_layer: tuple[int, ...]) -> str:
    """`6 of 12 layers`: those that read anything."""
    return f"{sum(size > 0 for size in by_layer)} of {len(by_layer)} layers"


def count_parameters(model: Transformer) -> dict[str, int]:
    """Parameters by part."""
    parts = {"backbone": 0, "embeddings": 0, "router": 0, "bank": 0}
    for name, parameter in model.named_parameters():
        part = "backbone"
        if name.startswith("memory."):
            part = "bank"
        elif ".router." in name:
            part = "router"
        elif name.startswith(("label_embedding.", "code_embedding.")):
            part = "embeddings"
        parts[part] += parameter.numel()
    return parts


def active_parameters(model: Transformer) -> int:
    """Parameters that a code's position uses (see Cost.active).

    A module that uses only some of its own says how many in a method `active_own()`.
    """
    unread = {id(model.label_embedding), id(getattr(model.memory, "class_bank", None))}

    def active(module: nn.Module) -> int:
        if id(module) in unread:  # rows of labels, which stand at no code's position
            return 0
        if isinstance(module, nn.Embedding):
            return module.embedding_dim
        own = sum(p.numel() for p in module.parameters(recurse=False))
        own = getattr(module, "active_own", lambda: own)()
        return own + sum(active(child) for child in module.children())

    return active(model)


def table_reads(module: nn.Module) -> int:
    """Numbers read from tables for a token, by every module that says so in `table_reads()`."""
    own = getattr(module, "table_reads", lambda: 0)()
    return own + sum(table_reads(child) for child in module.children())


def mixer_reads(module: nn.Module) -> int:
    """Those of them that are slots of the value memory."""
    return sum(m.table_reads() for m in module.modules() if isinstance(m, GatedMixer))


def token_flops(module: nn.Module, context: float, decoding: bool = False) -> float:
    """FLOPs of a token through `module` when attention sees `context` positions on average.

    A linear layer takes 2 FLOPs a weight. A module whose own products are not linear layers says
    so in a method `own_flops(context)`, or, where decoding with the cache takes another way, for
    that in `decoding_flops(context)`.
    """
    own_flops = getattr(module, "own_flops", lambda _: 0.0)
    own = (getattr(module, "decoding_flops", own_flops) if decoding else own_flops)(context)
    if isinstance(module, nn.Linear):
        own += 2.0 * module.weight.numel()
    return own + sum(token_flops(child, context, decoding) for child in module.children())
