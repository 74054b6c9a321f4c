"""The table of feed-forward classes by `ffn.kind`."""

from __future__ import annotations

from typing import Any

from moveimg.model.moe import MoE
from moveimg.model.product_keys import PEER, ProductKeyMemory
from moveimg.model.swiglu import SwiGLU
from moveimg.model.ultramem import UltraMem

FEEDFORWARDS: dict[str, Any] = {
    "swiglu": SwiGLU,
    "moe": MoE,
    "product_key": ProductKeyMemory,
    "peer": PEER,
    "ultramem": UltraMem,
}
