"""Mixture of experts: SwiGLU experts, chosen per token.

N tokens   D width   F hidden width of an expert   E experts   k experts per token
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moveimg.config.model import ModelConfig, MoEConfig, SwiGLUConfig
from moveimg.model.swiglu import FeedForward, SwiGLU


class MoE(FeedForward):
    """out = shared_expert(x) + sum_{i in top k} p_i expert_i(x), with SwiGLU experts.

    p = softmax(x W_r), scaled to sum to 1 over the chosen k (Mixtral, arXiv 2401.04088); shared
    expert as in DeepSeekMoE (arXiv 2401.06066). Experts have no capacity limit: the output
    at a position does not depend on other tokens, as cached decoding requires.

    A forward pass in train mode sets `load`, and `auxiliary` to the load-balancing loss: `balance`
    times E * sum_e load_e * mean probability_e (arXiv 2101.03961, eq. 4), which is 1 if balanced.
    """

    unpacked = ("expert_router",)  # forward reads its weight directly

    def __init__(self, config: ModelConfig, spec: MoEConfig) -> None:
        super().__init__()
        self.spec, self.width = spec, config.width
        self.expert_router = nn.Linear(config.width, spec.n_experts, bias=False)
        self.w_in = nn.Parameter(torch.empty(spec.n_experts, config.width, 2 * spec.hidden))
        self.w_out = nn.Parameter(torch.empty(spec.n_experts, spec.hidden, config.width))
        self.shared_expert = SwiGLU(config, SwiGLUConfig(hidden=spec.shared_hidden))

    def init_weights(self) -> None:
        """Draw the experts' weights from N(0, 0.02), like the other matrices."""
        nn.init.normal_(self.w_in, std=0.02)
        nn.init.normal_(self.w_out, std=0.02)

    def own_flops(self, context: float) -> float:
        """FLOPs per token of the k chosen experts and their weighted sum, without padding."""
        return 2.0 * (self.own_active() + self.spec.top_k * self.width)

    def own_active(self) -> int:
        """Parameters of the routed experts used per token."""
        return self.spec.top_k * 3 * self.width * self.spec.hidden

    def forward(self, x: Tensor, shared: Any = None) -> Tensor:
        tokens, n_experts = x.flatten(0, -2), self.spec.n_experts  # [N, D]
        router = self.expert_router.weight
        wide = torch.promote_types(router.dtype, torch.float32)
        # bfloat16 rounding would swap experts of nearly equal probability
        with torch.autocast(x.device.type, enabled=False):
            probabilities = F.linear(tokens.to(wide), router.to(wide)).softmax(dim=-1)  # [N, E]
        weights, chosen = probabilities.topk(self.spec.top_k, dim=-1)  # [N, k]
        weights = weights / weights.sum(dim=-1, keepdim=True)
        if self.training:
            self.load = F.one_hot(chosen, n_experts).float().mean(dim=(0, 1))
            loss = n_experts * (self.load * probabilities.mean(dim=0)).sum()
            self.auxiliary = self.spec.balance * loss
        shared_out = self.shared_expert(x)  # under autocast, in the dtype for the routed experts
        routed = self._experts(tokens.to(shared_out.dtype), chosen)  # [N, k, D]
        mixed = torch.einsum("nk,nkd->nd", weights.to(routed.dtype), routed)
        return shared_out + mixed.view_as(x)

    def _experts(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        """The outputs [N, k, D] of the experts `chosen` [N, k] for tokens [N, D].

        Rows are sorted by expert and padded so that each block of rows has one expert: a block is
        one matrix product. All shapes depend on N alone.
        """
        n, k = chosen.shape
        size, count = choose_block_shape(n * k, self.spec.n_experts)
        place, owner = sort_by_expert(chosen.flatten(), self.spec.n_experts, size, count)
        source = torch.arange(n, device=place.device).repeat_interleave(k)
        # padding rows are copies of token 0; their outputs are not read
        source = place.new_zeros(count * size).scatter(0, place, source)
        rows = tokens[source].unflatten(0, (count, size))  # [blocks, size, D]
        w_in, w_out = self.w_in.to(tokens.dtype), self.w_out.to(tokens.dtype)
        gate, up = torch.bmm(rows, w_in[owner]).chunk(2, dim=-1)  # [blocks, size, F]
        out = torch.bmm(F.silu(gate) * up, w_out[owner])
        return out.flatten(0, 1)[place].unflatten(0, (n, k))


def choose_block_shape(rows: int, n_experts: int) -> tuple[int, int]:
    """Rows per block, and the largest number of blocks that `rows` rows of E experts can need.

    Larger blocks add more padding (up to E (size - 1) rows); smaller blocks read each expert's
    weights more often.
    """
    fair = max(rows / (4 * n_experts), math.sqrt(8 * rows / n_experts), 1)
    size = 2 ** int(math.log2(fair))
    return size, (rows + n_experts * (size - 1)) // size


def sort_by_expert(experts: Tensor, n_experts: int, size: int, count: int) -> tuple[Tensor, Tensor]:
    """Sort rows by their expert, `experts` [R], into `count` blocks of `size` rows.

    Returns each row's position [R] in 0..count * size - 1, and each block's expert [count].
    """
    counts = torch.zeros(n_experts, dtype=experts.dtype, device=experts.device)
    counts = counts.scatter_add(0, experts, torch.ones_like(experts))
    padded = (counts + size - 1) // size  # blocks of each expert
    first = (padded.cumsum(0) - padded) * size  # each expert's first position
    order = experts.argsort(stable=True)
    ordered = experts[order]
    rank = torch.arange(len(experts), device=experts.device) - (counts.cumsum(0) - counts)[ordered]
    place = torch.zeros_like(experts).scatter(0, order, first[ordered] + rank)
    block = torch.arange(count, device=experts.device)
    owner = torch.searchsorted(padded.cumsum(0), block, right=True)
    return place, owner.clamp(max=n_experts - 1)  # an unused block may have any expert
