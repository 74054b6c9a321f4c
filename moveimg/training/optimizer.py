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
    """One AdamW, or Muon and AdamW, over the trainable parameters of a model.

    AdamW with weight decay on tensors of two or more dimensions only (LlamaGen); product-key value
    tables have the learning rate table_lr. With kind muon, Muon updates the blocks' linear weights
    except routers, scaled to the size of AdamW's updates (arXiv 2502.16982).
    """
    tables = [p for m in model.modules() if isinstance(m, ValueTable) for p in m.parameters()]
    matrices = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("layers.") and "router" not in name
    ]
    matrices = [p for p in matrices if p.requires_grad and config.kind == "muon"]
    tables = [p for p in tables if p.requires_grad]
    known, decay = {id(p) for p in (*matrices, *tables)}, config.weight_decay
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    if tables:
        factor = config.table_lr / config.lr
        groups.append({"params": tables, "weight_decay": decay, "lr_factor": factor})
    fused = rest[0].device.type in ("cpu", "cuda")
    adam = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)
    if not matrices:
        return [adam]
    options: dict[str, Any] = {"momentum": config.momentum, "adjust_lr_fn": "match_rms_adamw"}
    return [torch.optim.Muon(matrices, config.lr, decay, **options), adam]


def clip_gradients(optimizers: Sequence[Optimizer], config: OptimizerConfig) -> Tensor:
    """Clip the gradients of value tables and of all other parameters, each group by its norm.

    Returns the norm [] of the other parameters, or of the tables if that norm is not finite.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    norms = []
    for tables, most in ((False, config.clip), (True, config.table_clip)):
        if chosen := [p for g in groups if ("lr_factor" in g) == tables for p in g["params"]]:
            norm = nn.utils.clip_grad_norm_(chosen, most)
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return torch.where(norms[-1].isfinite(), norms[0], norms[-1])


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of a step: linear warm-up, then constant, or cosine to lr * final_lr."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup) / max(1, steps - config.warmup)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)
