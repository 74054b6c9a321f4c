"""A mixture of experts in the place of the feed-forward.

    N tokens   D width   E experts   k experts a token   F hidden width of an expert

out = shared(x) + sum_{i in top k} p_i expert_i(x), p = softmax(x W_r) scaled to sum to 1 over the
chosen k (Mixtral, arXiv 2401.04088); shared expert as in DeepSeekMoE (arXiv 2401.06066). No expert
has a capacity and no token is dropped, so a token's way depends on that token alone: decoding a
token at a time takes the same experts as the whole sequence does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moveimg.config.model import ModelConfig, MoEConfig, SwiGLUConfig
from moveimg.model.swiglu import FeedForward, SwiGLU


class Router(nn.Linear):
    """x [N, D] -> logits of the experts [N, E], in float32 at the least.

    Under autocast, too: in bfloat16 two experts that are nearly alike would change places.
    """

    def __init__(self, width: int, n_experts: int) -> None:
        super().__init__(width, n_experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(wide), self.weight.to(wide))


class MoE(FeedForward):
    """Routed SwiGLU experts and a shared one.

    In train mode a pass keeps the load-balancing loss in `auxiliary` and the experts' shares of
    the choices in `load` [E].
    """

    def __init__(self, config: ModelConfig, spec: MoEConfig) -> None:
        super().__init__()
        self.spec, self.width = spec, config.width
        self.expert_router = Router(config.width, spec.n_experts)
        self.w_in = nn.Parameter(torch.empty(spec.n_experts, config.width, 2 * spec.hidden))
        self.w_out = nn.Parameter(torch.empty(spec.n_experts, spec.hidden, config.width))
        self.shared_expert = SwiGLU(config, SwiGLUConfig(hidden=spec.shared_hidden))

    absorbed = ("expert_router",)  # keeps its number type where a model is prepared for decoding

    def init_weights(self) -> None:
        """N(0, 0.02), as every matrix of the recipe."""
        nn.init.normal_(self.w_in, std=0.02)
        nn.init.normal_(self.w_out, std=0.02)

    def own_flops(self, context: float) -> float:
        """The k chosen experts and their weighted sum; not the padding of blocks."""
        return 2.0 * self.spec.top_k * (self._expert_size() + self.width)

    def active_own(self) -> int:
        """Parameters of the routed experts that a token uses."""
        return self.spec.top_k * self._expert_size()

    def _expert_size(self) -> int:
        return 3 * self.width * self.spec.hidden

    def forward(self, x: Tensor, shared: nn.Module | None = None) -> Tensor:
        tokens = x.flatten(0, -2)  # [N, D]
        probabilities = self.expert_router(tokens).softmax(dim=-1)  # [N, E]
        weights, chosen = probabilities.topk(self.spec.top_k, dim=-1)  # [N, k]
        weights = weights / weights.sum(dim=-1, keepdim=True)
        if self.training:
            self.load = shares(chosen, self.spec.n_experts)
            self.auxiliary = self.spec.balance * balance_loss(probabilities, self.load)
        shared_out = self.shared_expert(x)  # in autocast's type, which a cast of all weights needs
        routed = self._experts(tokens.to(shared_out.dtype), chosen)  # [N, k, D]
        mixed = torch.einsum("nk,nkd->nd", weights.to(routed.dtype), routed)
        return shared_out + mixed.view_as(x)

    def _experts(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        """tokens [N, D] through their experts chosen [N, k] -> [N, k, D].

        Rows are brought into the order of their experts, each expert's padded to whole blocks, so
        that a block is one matrix product with one expert's weights. All shapes follow from N.
        """
        n, k = chosen.shape
        size, count = blocks(n * k, self.spec.n_experts)
        place, owner = arrange(chosen.flatten(), self.spec.n_experts, size, count)
        source = torch.arange(n, device=place.device).repeat_interleave(k)
        # padding rows repeat token 0; nobody reads what comes out of them
        source = place.new_zeros(count * size).scatter(0, place, source)
        rows = tokens[source].unflatten(0, (count, size))  # [blocks, size, D]
        w_in, w_out = self.w_in.to(tokens.dtype), self.w_out.to(tokens.dtype)
        gate, up = torch.bmm(rows, w_in[owner]).chunk(2, dim=-1)  # [blocks, size, F]
        out = torch.bmm(F.silu(gate) * up, w_out[owner])
        return out.flatten(0, 1)[place].unflatten(0, (n, k))


def shares(chosen: Tensor, n_experts: int) -> Tensor:
    """chosen [N, k] -> each expert's share of the choices [E]; they add up to 1."""
    return F.one_hot(chosen, n_experts).float().mean(dim=(0, 1))


def balance_loss(probabilities: Tensor, load: Tensor) -> Tensor:
    """E * sum_e load_e * mean probability_e (arXiv 2101.03961, equation 4): 1 when balanced."""
    return load.numel() * (load * probabilities.mean(dim=0)).sum()


def blocks(rows: int, n_experts: int) -> tuple[int, int]:
    """Size and greatest number of the blocks that `rows` rows of E experts fill.

    A larger block pads more rows (up to E (size - 1) in all); a smaller one fetches an expert's
    weights more often. The power of two balances the two, whatever way the rows fall.
    """
    fair = max(rows / (4 * n_experts), math.sqrt(8 * rows / n_experts), 1)
    size = 2 ** int(math.log2(fair))
    return size, (rows + n_experts * (size - 1)) // size


def arrange(experts: Tensor, n_experts: int, size: int, count: int) -> tuple[Tensor, Tensor]:
    """Where each row goes when rows stand by expert, in blocks of one expert each.

    Args:
        experts: the expert of each row, [R].
        n_experts, size, count: E, and what `blocks` says.

    Returns:
        place [R] in 0..count * size - 1, and the expert of each block [count].
    """
    n = torch.zeros(n_experts, dtype=experts.dtype, device=experts.device)
    n = n.scatter_add(0, experts, torch.ones_like(experts))
    padded = (n + size - 1) // size  # blocks of each expert
    first = (padded.cumsum(0) - padded) * size  # its first place
    order = experts.argsort(stable=True)
    ordered = experts[order]
    rank = torch.arange(len(experts), device=experts.device) - (n.cumsum(0) - n)[ordered]
    place = torch.zeros_like(experts).scatter(0, order, first[ordered] + rank)
    block = torch.arange(count, device=experts.device)
    owner = torch.searchsorted(padded.cumsum(0), block, right=True)
    return place, owner.clamp(max=n_experts - 1)  # blocks left over belong to anyone
