"""AdamW with the recipe's parameter groups, and the learning rate of each step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from moveimg.config import OptimizerConfig
from moveimg.model.product_key import ValueTable


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on tensors of two or more dimensions only (LlamaGen's recipe).

    Product-key value tables, where there are any, are a group of their own, with a higher rate.
    """
    tables = [p for m in model.modules() if isinstance(m, ValueTable) for p in m.parameters()]
    known = {id(p) for p in tables}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    if tables := [p for p in tables if p.requires_grad]:
        decay = config.weight_decay
        groups.append({"params": tables, "weight_decay": decay, "lr_factor": config.table_lr})
    fused = rest[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its rate: `rate` times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_factor", 1.0)


def clip_gradients(optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> Tensor:
    """Clip all gradients together, those of value tables apart; the norm of the former."""
    groups = optimizer.param_groups
    tables = [p for group in groups if "lr_factor" in group for p in group["params"]]
    rest = [p for group in groups if "lr_factor" not in group for p in group["params"]]
    nn.utils.clip_grad_norm_(tables, config.table_clip)
    return nn.utils.clip_grad_norm_(rest, config.clip)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of a step, a function of the step alone, so that resuming needs no state.

    Linear warm-up, then constant or half a cosine from lr to lr * final_lr at the last step.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup) / max(1, steps - config.warmup)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)
