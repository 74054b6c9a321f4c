"""Feed-forward layers that look up a few rows of large tables by product keys.

B batch   S positions   D width   h look-ups per token   n keys of a half   k rows per look-up
Q width of a query   W width of a value
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moveimg.config.model import ModelConfig, PEERConfig, ProductKeyConfig, ProductKeyLookup
from moveimg.model.swiglu import FeedForward


class ProductKeys(nn.Module):
    """Look up the k best of n^2 rows, h times per token, with softmax weights.

    Each half of a query is scored against n keys, and the score of row (i, j) is score i + score j:
    2 n products score n^2 rows, and the k best rows lie among the k best keys of each half
    (arXiv 1907.05242).
    """

    def __init__(self, config: ModelConfig, spec: ProductKeyLookup) -> None:
        super().__init__()
        self.spec = spec
        self.query = nn.Linear(config.width, spec.key_heads * spec.key_width)
        half = spec.key_width // 2
        self.keys = nn.Parameter(torch.empty(spec.key_heads, 2, spec.n_keys, half))

    def init_weights(self) -> None:
        """Initialise as Memory+: keys U(-1/sqrt(Q), 1/sqrt(Q)), query Xavier-uniform, bias 0."""
        bound = self.spec.key_width**-0.5
        nn.init.uniform_(self.keys, -bound, bound)
        # nn.init.xavier_uniform_ would compute on the meta device (see moveimg.device.shapes_only)
        xavier = math.sqrt(6 / sum(self.query.weight.shape))
        nn.init.uniform_(self.query.weight, -xavier, xavier)
        nn.init.zeros_(self.query.bias)

    def own_flops(self, context: float) -> float:
        """FLOPs per token of scoring the keys of both halves."""
        return 2.0 * self.spec.key_heads * self.spec.n_keys * self.spec.key_width

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, S, D] -> rows int64 in 0..n^2-1 and weights of all look-ups, [B, S, h * k]."""
        spec = self.spec
        query = self.query(x).unflatten(-1, (spec.key_heads, 2, -1))  # [B, S, h, 2, Q / 2]
        scores = torch.einsum("bshpc,hpnc->bshpn", query, self.keys)
        best, index = scores.topk(spec.top_k, dim=-1)  # [B, S, h, 2, k]
        sums = best[..., 0, :, None] + best[..., 1, None, :]  # [B, S, h, k, k]
        rows = index[..., 0, :, None] * spec.n_keys + index[..., 1, None, :]
        best, index = sums.flatten(-2).topk(spec.top_k, dim=-1)
        weights = best.softmax(dim=-1, dtype=torch.promote_types(best.dtype, torch.float32))
        return rows.flatten(-2).gather(-1, index).flatten(-2), weights.flatten(-2)


class Table(nn.Module):
    """A table of rows of width W, initialised as N(0, std); forward sums weighted rows."""

    def __init__(self, rows: int, width: int, std: float | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))
        self.std = std or width**-0.5  # Memory+

    def init_weights(self) -> None:
        nn.init.normal_(self.weight, std=self.std)

    def own_active(self) -> int:
        """0, because TableLayer.own_active counts the rows that a layer reads."""
        return 0

    def forward(self, rows: Tensor, weights: Tensor) -> Tensor:
        """rows int64 [B, S, k], weights [B, S, k] -> [B, S, W]."""
        flat = weights.flatten(0, 1).to(self.weight.dtype)
        out = F.embedding_bag(rows.flatten(0, 1), self.weight, mode="sum", per_sample_weights=flat)
        return out.unflatten(0, rows.shape[:2])


class ValueTable(Table):
    """A table of values, which the optimizer gives the learning rate table_lr and table_clip."""


class TableLayer(FeedForward):
    """A feed-forward layer that looks up rows of `row_width` elements by product keys."""

    lookup: Any

    def __init__(self, spec: ProductKeyLookup, lookup: nn.Module, row_width: int) -> None:
        super().__init__()
        self.spec, self.lookup, self.row_width = spec, lookup, row_width

    def own_active(self) -> int:
        """Table elements read per token."""
        return self.spec.key_heads * self.spec.top_k * self.row_width

    def own_flops(self, context: float) -> float:
        """FLOPs per token: a multiply-add per table element read."""
        return 2.0 * self.own_active()


class ProductKeyMemory(TableLayer):
    """Memory+ (arXiv 2412.09764): out = W_o(m * silu(W_g x)), m the weighted sum of values.

    Each layer has a query, keys, W_g and W_o; all layers share one table of values.
    """

    def __init__(self, config: ModelConfig, spec: ProductKeyConfig) -> None:
        width = spec.value_width or config.width
        super().__init__(spec, ProductKeys(config, spec), width)
        self.gate = nn.Linear(config.width, width)
        self.out = nn.Linear(width, config.width)

    def init_weights(self) -> None:
        """Initialise as Memory+: W_g and W_o N(0, D^(-1/2)), biases zero."""
        for linear in (self.gate, self.out):
            nn.init.normal_(linear.weight, std=self.out.out_features**-0.5)
            nn.init.zeros_(linear.bias)

    @staticmethod
    def shared(config: ModelConfig, spec: ProductKeyConfig) -> ValueTable:  # type: ignore[override]
        """The table of values [n^2, W]."""
        return ValueTable(spec.n_keys**2, spec.value_width or config.width)

    def forward(self, x: Tensor, shared: Any = None) -> Tensor:
        return self.out(shared(*self.lookup(x)) * F.silu(self.gate(x)))


class PEER(TableLayer):
    """sum_i s_i gelu(u_i . x) v_i over the rows of all look-ups: experts of one neuron each.

    Unlike in the paper (arXiv 2407.04153), each look-up has separate keys, and queries are not
    batch-normalised.
    """

    def __init__(self, config: ModelConfig, spec: PEERConfig) -> None:
        super().__init__(spec, ProductKeys(config, spec), row_width=2 * config.width)
        self.u = Table(spec.n_keys**2, config.width)
        self.v = Table(spec.n_keys**2, config.width)

    def forward(self, x: Tensor, shared: Any = None) -> Tensor:
        rows, weights = self.lookup(x)
        neurons = torch.einsum("bsd,bskd->bsk", x, F.embedding(rows, self.u.weight))
        return self.v(rows, weights * F.gelu(neurons))
