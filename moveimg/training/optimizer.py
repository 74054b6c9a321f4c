"""AdamW with the recipe's parameter groups, Muon for matrices, and the learning rate of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from moveimg.config import OptimizerConfig
from moveimg.model import ValueTable


def make_optimizers(model: nn.Module, config: OptimizerConfig) -> list[Optimizer]:
    """The optimizers of a model; each trainable parameter is in one of them.

    AdamW; weight decay on tensors of two or more dimensions only (LlamaGen's recipe). Product-key
    value tables have their own rate, table_lr, under the same schedule. With kind muon the weights
    of the blocks' linear layers, except routers, go to Muon instead, its updates scaled to AdamW's
    size (arXiv 2502.16982), so that rate and decay mean the same for both.
    """
    tables = [p for m in model.modules() if isinstance(m, ValueTable) for p in m.parameters()]
    matrices = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("layers.") and "router" not in name
    ]
    muon = {id(p) for p in matrices if config.kind == "muon" and p.requires_grad}
    known, decay = muon | {id(p) for p in tables}, config.weight_decay
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    if tables := [p for p in tables if p.requires_grad]:
        factor = config.table_lr / config.lr
        groups.append({"params": tables, "weight_decay": decay, "lr_factor": factor})
    found: list[Optimizer] = []
    if muon:
        chosen = [p for p in matrices if id(p) in muon]
        options: dict[str, Any] = {"momentum": config.momentum, "adjust_lr_fn": "match_rms_adamw"}
        found.append(torch.optim.Muon(chosen, config.lr, decay, **options))
    fused = rest[0].device.type in ("cpu", "cuda")
    found.append(torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused))
    return found


def set_rate(optimizers: Sequence[Optimizer], rate: float) -> None:
    """Set the learning rate of every group to `rate` times the group's factor."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_factor", 1.0)


def clip_gradients(optimizers: Sequence[Optimizer], config: OptimizerConfig) -> Tensor:
    """Clip the gradients of value tables and those of all other parameters, each by its norm.

    Returns the norm [] of the others, or that of the tables if it is not finite.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    tables = [p for group in groups if "lr_factor" in group for p in group["params"]]
    norm = _clip([p for g in groups if "lr_factor" not in g for p in g["params"]], config.clip)
    of_tables = _clip(tables, config.table_clip) if tables else norm
    return torch.where(of_tables.isfinite(), norm, of_tables)


def _clip(parameters: list[Tensor], most: float) -> Tensor:
    norm = nn.utils.clip_grad_norm_(parameters, most)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of a step.

    Linear warm-up, then constant, or half a cosine from lr to lr * final_lr (at step `steps`).
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup) / max(1, steps - config.warmup)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)
