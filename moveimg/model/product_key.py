"""Large tables read by product keys: Memory+ (arXiv 2412.09764) and PEER (arXiv 2407.04153).

    B batch   S positions   D width   h look-ups per token   n keys per half   k rows per look-up
    K width of a query   W width of a value

A look-up scores all n^2 rows of a table at the cost of 2 n: a query's halves are scored against n
keys each, the score of row (i, j) is the sum of score i and score j, and the k best rows are among
the k best of each half (arXiv 1907.05242).

Memory+ has one value table for all its layers, and keys and queries per layer (official code).
PEER shares nothing here: keys, queries and experts are a layer's own, and queries are not
normalised (the paper applies batch norm to them).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moveimg.config.model import ModelConfig, PEERConfig, ProductKeyConfig, ProductKeyLookup
from moveimg.model.swiglu import FeedForward


class ProductKeys(nn.Module):
    """x -> for each of h look-ups the k best rows and their softmax weights."""

    def __init__(self, config: ModelConfig, spec: ProductKeyLookup) -> None:
        super().__init__()
        self.spec = spec
        self.query = nn.Linear(config.width, spec.key_heads * spec.key_width)
        half = spec.key_width // 2
        self.keys = nn.Parameter(torch.empty(spec.key_heads, 2, spec.n_keys, half))

    def init_weights(self) -> None:
        """Keys U(-1/sqrt(K), 1/sqrt(K)), queries Xavier-uniform with zero bias (Memory+)."""
        bound = self.spec.key_width**-0.5
        nn.init.uniform_(self.keys, -bound, bound)
        nn.init.xavier_uniform_(self.query.weight)
        nn.init.zeros_(self.query.bias)

    def own_flops(self, context: float) -> float:
        """Scores of both halves."""
        return 2.0 * self.spec.key_heads * self.spec.n_keys * self.spec.key_width

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, S, D] -> rows int64 [B, S, h, k] in 0..n^2-1, weights [B, S, h, k]."""
        spec = self.spec
        query = self.query(x).unflatten(-1, (spec.key_heads, 2, -1))  # [B, S, h, 2, K / 2]
        scores = torch.einsum("bshpc,hpnc->bshpn", query, self.keys)
        best, index = scores.topk(spec.top_k, dim=-1)  # [B, S, h, 2, k]
        sums = best[..., 0, :, None] + best[..., 1, None, :]  # [B, S, h, k, k]
        rows = index[..., 0, :, None] * spec.n_keys + index[..., 1, None, :]
        best, index = sums.flatten(-2).topk(spec.top_k, dim=-1)
        wide = torch.promote_types(best.dtype, torch.float32)
        return rows.flatten(-2).gather(-1, index), best.softmax(dim=-1, dtype=wide)


class Table(nn.Module):
    """n^2 rows of width W; a call returns weighted sums of rows."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def init_weights(self) -> None:
        """N(0, W^(-1/2)) (Memory+)."""
        nn.init.normal_(self.weight, std=self.weight.shape[-1] ** -0.5)

    def active_own(self) -> int:
        """Counted where it is read, see the layers' active_own."""
        return 0

    def forward(self, rows: Tensor, weights: Tensor) -> Tensor:
        """rows int64 [B, S, k], weights [B, S, k] -> [B, S, W]."""
        flat = weights.flatten(0, 1).to(self.weight.dtype)
        out = F.embedding_bag(rows.flatten(0, 1), self.weight, mode="sum", per_sample_weights=flat)
        return out.unflatten(0, rows.shape[:2])


class ValueTable(Table):
    """The values of a product-key memory. They have their own learning rate and clip."""


class ProductKeyMemory(FeedForward):
    """Memory+: out = W_o(m * silu(W_g x)), m the weighted sum of values over all look-ups.

    Query, keys and both matrices are the layer's; the values are one table for all layers.
    """

    def __init__(self, config: ModelConfig, spec: ProductKeyConfig) -> None:
        super().__init__()
        self.spec = spec
        self.value_width = spec.value_width or config.width
        self.lookup = ProductKeys(config, spec)
        self.gate = nn.Linear(config.width, self.value_width)
        self.out = nn.Linear(self.value_width, config.width)

    @staticmethod
    def shared(config: ModelConfig, spec: ProductKeyConfig) -> ValueTable:  # type: ignore[override]
        """The values, [n^2, W]."""
        return ValueTable(spec.n_keys**2, spec.value_width or config.width)

    def init_weights(self) -> None:
        """Both matrices N(0, D^(-1/2)), biases zero (Memory+)."""
        for linear in (self.gate, self.out):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)

    def own_flops(self, context: float) -> float:
        """The weighted sum of values."""
        return 2.0 * self.table_reads()

    def active_own(self) -> int:
        """Values read per token."""
        return self.table_reads()

    def table_reads(self) -> int:
        """Numbers of the table read per token."""
        return self.spec.key_heads * self.spec.top_k * self.value_width

    def forward(self, x: Tensor, shared: nn.Module | None = None) -> Tensor:
        if shared is None:
            raise ValueError("a product-key memory got no value table")
        rows, weights = self.lookup(x)
        memory = shared(rows.flatten(-2), weights.flatten(-2))  # [B, S, W]
        return self.out(memory * F.silu(self.gate(x)))


class PEER(FeedForward):
    """sum_i s_i gelu(u_i . x) v_i over the rows of all look-ups: experts of a single neuron."""

    def __init__(self, config: ModelConfig, spec: PEERConfig) -> None:
        super().__init__()
        self.spec, self.width = spec, config.width
        self.lookup = ProductKeys(config, spec)
        self.u = Table(spec.n_keys**2, config.width)
        self.v = Table(spec.n_keys**2, config.width)

    def own_flops(self, context: float) -> float:
        """u_i . x and the weighted sum of v_i."""
        return 2.0 * self.table_reads()

    def active_own(self) -> int:
        """Parameters of the experts used per token."""
        return self.table_reads()

    def table_reads(self) -> int:
        """Numbers of both tables read per token."""
        return 2 * self.spec.key_heads * self.spec.top_k * self.width

    def forward(self, x: Tensor, shared: nn.Module | None = None) -> Tensor:
        rows, weights = (part.flatten(-2) for part in self.lookup(x))  # [B, S, h * k]
        neurons = torch.einsum("bsd,bskd->bsk", x, F.embedding(rows, self.u.weight))
        return self.v(rows, weights * F.gelu(neurons))
