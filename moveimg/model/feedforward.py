"""The table of feed-forward layers: x [B, S, D] -> [B, S, D]."""

from __future__ import annotations

from typing import Any

from moveimg.model.moe import MoE
from moveimg.model.product_key import PEER, ProductKeyMemory
from moveimg.model.swiglu import FeedForward, SwiGLU, swiglu_hidden

FEEDFORWARDS: dict[str, Any] = {
    "swiglu": SwiGLU,
    "moe": MoE,
    "product_key": ProductKeyMemory,
    "peer": PEER,
}

__all__ = ["FEEDFORWARDS", "FeedForward", "SwiGLU", "swiglu_hidden"]
