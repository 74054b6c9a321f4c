"""UltraMem (arXiv 2411.12364): values looked up by Tucker-decomposed query-key retrieval.

    B batch   S positions   D width   h look-ups per token   n keys of a half   k cells per look-up
    r scores per key   G cores   E virtual tables per physical table   W width of a value

A look-up scores n keys for rows and n for columns, r scores each: S_row, S_col [r, n]. The score of
cell (i, j) is S_row[:, i]^T C S_col[:, j] with a learned core C [r, r], the sum of G cores. The k
best cells are searched among the k best rows and columns by C's rank-1 approximation. Core g weighs
segment g of a cell's value. Cells are spread over E virtual tables, which share one physical table
and have an output projection each. Scores are not normalised by a softmax.

Unlike in the paper, queries have no causal convolution, and each look-up has a separate query.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moveimg.config.model import ModelConfig, UltraMemConfig
from moveimg.model.product_keys import TableLayer, ValueTable
from moveimg.model.swiglu import SwiGLU

CANDIDATES = 128  # most candidate rows, and columns, per look-up (the paper)


class UltraMem(TableLayer):
    """A SwiGLU, and a memory whose output enters the stream `delay` layers later.

    In train mode `delayed_output` sets `auxiliary` to penalty * mean_i max(0, sigma_i - margin)^2
    over the singular values sigma_2.. of C, which keeps C near its rank-1 approximation.
    """

    spec: UltraMemConfig

    def __init__(self, config: ModelConfig, spec: UltraMemConfig) -> None:
        width, cells = spec.value_width or config.width // 2, spec.n_keys**2
        super().__init__(spec, TuckerKeys(config, spec), row_width=width)
        self.delay = spec.delay
        self.dense = SwiGLU(config, spec.elsewhere)
        self.memory_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.values = ValueTable(cells // spec.expansion, width, std=0.02)
        self.out = nn.Linear(spec.expansion * width, config.width, bias=False)
        # cell * step mod n^2 is a permutation that spreads neighbouring cells over the tables
        start = int(cells * 0.618) or 1
        self.step = next(s for s in range(start, 2 * cells) if math.gcd(s, cells) == 1)

    def init_weights(self) -> None:
        """Initialise the output projection as N(0, (E W)^(-1/2)) (the authors' code)."""
        nn.init.normal_(self.out.weight, std=self.out.in_features**-0.5)

    def own_flops(self, context: float) -> float:
        """FLOPs per token of the weighted sums of values in E tables."""
        return 2.0 * self.own_active() * self.spec.expansion

    def forward(self, x: Tensor, shared: Any = None) -> Tensor:
        return self.dense(x)

    def delayed_output(self, x: Tensor) -> Tensor:
        spec, rows = self.spec, len(self.values.weight)
        if self.training and spec.rank > 1:
            excess = torch.linalg.svdvals(self.lookup.core.sum(0).float())[..., 1:] - spec.margin
            self.auxiliary = spec.penalty * excess.relu().square().mean()
        cells, weights = self.lookup(self.memory_norm(x))
        cells = cells * self.step % spec.n_keys**2
        values = F.embedding(cells % rows, self.values.weight).unflatten(-1, (spec.cores, -1))
        weighted = (values * weights[..., None]).flatten(-2)  # [B, S, h * k, W]
        tables = F.one_hot(cells // rows, spec.expansion).to(weighted.dtype)
        return self.out(torch.einsum("bske,bskw->bsew", tables, weighted).flatten(-2))


class TuckerKeys(nn.Module):
    """Look up the k best of n^2 cells, h times per token, with a score per core."""

    def __init__(self, config: ModelConfig, spec: UltraMemConfig) -> None:
        super().__init__()
        self.spec, half, heads = spec, spec.key_width // 2, spec.key_heads
        self.query = nn.Linear(config.width, heads * spec.key_width, bias=False)
        self.keys = nn.Parameter(torch.empty(heads, 2, spec.rank, spec.n_keys, half))
        self.query_norm = nn.LayerNorm(half, bias=False)
        self.key_norm = nn.LayerNorm(half, bias=False)
        self.core = nn.Parameter(torch.empty(spec.cores, heads, spec.rank, spec.rank))

    def init_weights(self) -> None:
        """Initialise as the authors' code: N(0, c^(-1/2)), c = key_width / 2; norms c^(-0.4)."""
        half = self.keys.shape[-1]
        for weight in (self.query.weight, self.keys):
            nn.init.normal_(weight, std=half**-0.5)
        for norm in (self.query_norm, self.key_norm):
            nn.init.constant_(norm.weight, half**-0.4)
        nn.init.uniform_(self.core)

    def own_flops(self, context: float) -> float:
        """FLOPs per token of all keys' scores, their rank-1 sums, and candidate cells' scores."""
        rows = min(self.spec.top_k, CANDIDATES)
        grid = self.core[:, :, 0].numel() * rows * (self.spec.rank + rows)
        return 2.0 * (self.keys.numel() + self.keys[..., 0].numel() + grid)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, S, D] -> cells int64 in 0..n^2-1 [B, S, h * k], weights [B, S, h * k, G]."""
        spec = self.spec
        query = self.query_norm(self.query(x).unflatten(-1, (spec.key_heads, 2, -1)))
        scores = torch.einsum("bshpc,hprnc->bshprn", query, self.key_norm(self.keys))
        leading = torch.stack(leading_vectors(self.core.detach().sum(0)), dim=1).to(scores.dtype)
        coarse = torch.einsum("bshprn,hpr->bshpn", scores, leading)
        index = coarse.topk(min(spec.top_k, CANDIDATES), dim=-1).indices  # [B, S, h, 2, k]
        near = scores.gather(-1, index[..., None, :].expand(*scores.shape[:-1], -1))
        rows, columns = near.unbind(3)  # [B, S, h, r, k]
        left = torch.einsum("bshri,ghrq->bshgiq", rows, self.core.to(rows.dtype))
        grid = torch.einsum("bshgiq,bshqj->bshgij", left, columns).flatten(-2)  # [.., G, k * k]
        cells = index[..., 0, :, None] * spec.n_keys + index[..., 1, None, :]
        best = grid.sum(3).topk(spec.top_k, dim=-1).indices  # [B, S, h, k]
        weights = grid.gather(-1, best[..., None, :].expand(*grid.shape[:-1], -1))
        cells = cells.flatten(-2).gather(-1, best)
        return cells.flatten(-2), weights.transpose(-1, -2).flatten(2, 3)


def leading_vectors(core: Tensor) -> tuple[Tensor, Tensor]:
    """The leading left and right singular vectors [h, r] of core [h, r, r].

    The largest entry of the left vector is positive. C C^T is squared seven times, because a CUDA
    graph cannot hold an SVD; the vectors are undefined if the first singular values are equal.
    """
    core = core.to(torch.promote_types(core.dtype, torch.float32))
    power = core @ core.mT
    for _ in range(7):
        power = power / power.norm(dim=(-2, -1), keepdim=True)
        power = power @ power
    largest = power.diagonal(dim1=-2, dim2=-1).argmax(dim=-1)
    left = F.normalize(power.gather(-1, largest[:, None, None].expand(*core.shape[:2], 1))[..., 0])
    return left, F.normalize(torch.einsum("hrq,hr->hq", core, left))
