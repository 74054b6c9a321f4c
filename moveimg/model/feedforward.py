"""Feed-forward layers: SwiGLU, a mixture of experts, and tables read by product keys.

    B batch   S positions   N = B S tokens   D width   F hidden width of an expert   E experts
    h look-ups per token   n keys of a half   k experts per token, or rows per look-up
    Q width of a query   W width of a value

`forward(x, shared)` maps x [B, S, D] to [B, S, D]; `shared` is the module that all layers share.
"""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moveimg.config.model import (
    ModelConfig,
    MoEConfig,
    PEERConfig,
    ProductKeyConfig,
    ProductKeyLookup,
    SlotConfig,
    SwiGLUConfig,
)


class FeedForward(nn.Module):
    """The base of all feed-forward layers.

    Attributes:
        auxiliary: a loss of the last forward pass in train mode, to be added to the cross-entropy.
        load: each expert's share of the choices in that pass, [E].
    """

    auxiliary: Tensor | None = None
    load: Tensor | None = None

    @staticmethod
    def shared(config: ModelConfig, spec: SlotConfig) -> nn.Module | None:
        """The module that all layers of this kind share; the transformer owns it."""
        return None

    def train(self, mode: bool = True) -> Self:
        """As in nn.Module; also drops the last auxiliary loss, whose graph cannot be copied."""
        self.auxiliary = None
        return super().train(mode)

    def forward(self, x: Tensor, shared: Any = None) -> Tensor:
        raise NotImplementedError


class SwiGLU(FeedForward):
    """w2(silu(w1 x) * w3 x) (arXiv 2002.05202), no biases."""

    def __init__(self, config: ModelConfig, spec: SwiGLUConfig) -> None:
        super().__init__()
        hidden = swiglu_hidden(config.width, spec)
        self.w1 = nn.Linear(config.width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, config.width, bias=False)
        self.w3 = nn.Linear(config.width, hidden, bias=False)

    def forward(self, x: Tensor, shared: Any = None) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def swiglu_hidden(width: int, spec: SwiGLUConfig) -> int:
    """The hidden width: `spec.hidden`, or 2/3 of 4 * width rounded up to `multiple_of`."""
    return spec.hidden or -(-(8 * width // 3) // spec.multiple_of) * spec.multiple_of


# --- mixture of experts ----------------------------------------------------------------------


class MoE(FeedForward):
    """out = shared(x) + sum_{i in top k} p_i expert_i(x), SwiGLU experts.

    p = softmax(x W_r), scaled to sum to 1 over the chosen k (Mixtral, arXiv 2401.04088); shared
    expert as in DeepSeekMoE (arXiv 2401.06066). No expert has a capacity and no token is dropped,
    so experts are chosen per token, as cached decoding requires.

    In train mode a forward pass keeps `load` and the load-balancing loss in `auxiliary`: E * sum_e
    load_e * mean probability_e (arXiv 2101.03961, equation 4), times its weight; 1 when balanced.
    """

    unpacked = ("expert_router",)  # keeps its number type in a model prepared for inference

    def __init__(self, config: ModelConfig, spec: MoEConfig) -> None:
        super().__init__()
        self.spec, self.width = spec, config.width
        self.expert_router = nn.Linear(config.width, spec.n_experts, bias=False)
        self.w_in = nn.Parameter(torch.empty(spec.n_experts, config.width, 2 * spec.hidden))
        self.w_out = nn.Parameter(torch.empty(spec.n_experts, spec.hidden, config.width))
        self.shared_expert = SwiGLU(config, SwiGLUConfig(hidden=spec.shared_hidden))

    def init_weights(self) -> None:
        """N(0, 0.02), as every matrix of the recipe."""
        nn.init.normal_(self.w_in, std=0.02)
        nn.init.normal_(self.w_out, std=0.02)

    def own_flops(self, context: float) -> float:
        """The k chosen experts and their weighted sum, without the padding of blocks."""
        return 2.0 * (self.active_own() + self.spec.top_k * self.width)

    def active_own(self) -> int:
        """Parameters of the routed experts that a token uses."""
        return self.spec.top_k * 3 * self.width * self.spec.hidden

    def forward(self, x: Tensor, shared: Any = None) -> Tensor:
        tokens, n_experts = x.flatten(0, -2), self.spec.n_experts  # [N, D]
        router = self.expert_router.weight
        wide = torch.promote_types(router.dtype, torch.float32)
        # in bfloat16 two nearly equal experts would change places
        with torch.autocast(x.device.type, enabled=False):
            probabilities = F.linear(tokens.to(wide), router.to(wide)).softmax(dim=-1)  # [N, E]
        weights, chosen = probabilities.topk(self.spec.top_k, dim=-1)  # [N, k]
        weights = weights / weights.sum(dim=-1, keepdim=True)
        if self.training:
            self.load = F.one_hot(chosen, n_experts).float().mean(dim=(0, 1))
            balance = n_experts * (self.load * probabilities.mean(dim=0)).sum()
            self.auxiliary = self.spec.balance * balance
        shared_out = self.shared_expert(x)  # its dtype is autocast's, to which tokens are cast
        routed = self._experts(tokens.to(shared_out.dtype), chosen)  # [N, k, D]
        mixed = torch.einsum("nk,nkd->nd", weights.to(routed.dtype), routed)
        return shared_out + mixed.view_as(x)

    def _experts(self, tokens: Tensor, chosen: Tensor) -> Tensor:
        """tokens [N, D] through their experts chosen [N, k] -> [N, k, D].

        Rows are sorted by expert, and each expert's are padded to whole blocks, so that a block is
        one matrix product with one expert's weights. All shapes follow from N.
        """
        n, k = chosen.shape
        size, count = block_shape(n * k, self.spec.n_experts)
        place, owner = sort_by_expert(chosen.flatten(), self.spec.n_experts, size, count)
        source = torch.arange(n, device=place.device).repeat_interleave(k)
        # padding rows repeat token 0; their results are not read
        source = place.new_zeros(count * size).scatter(0, place, source)
        rows = tokens[source].unflatten(0, (count, size))  # [blocks, size, D]
        w_in, w_out = self.w_in.to(tokens.dtype), self.w_out.to(tokens.dtype)
        gate, up = torch.bmm(rows, w_in[owner]).chunk(2, dim=-1)  # [blocks, size, F]
        out = torch.bmm(F.silu(gate) * up, w_out[owner])
        return out.flatten(0, 1)[place].unflatten(0, (n, k))


def block_shape(rows: int, n_experts: int) -> tuple[int, int]:
    """Rows per block, and the number of blocks that `rows` rows of E experts need at most.

    A larger block pads more rows (up to E (size - 1) in all); a smaller one reads an expert's
    weights more often.
    """
    fair = max(rows / (4 * n_experts), math.sqrt(8 * rows / n_experts), 1)
    size = 2 ** int(math.log2(fair))
    return size, (rows + n_experts * (size - 1)) // size


def sort_by_expert(experts: Tensor, n_experts: int, size: int, count: int) -> tuple[Tensor, Tensor]:
    """The place of each row when rows are sorted by expert, in `count` blocks of `size` rows.

    `experts` [R] is the expert of each row. Returns the places [R] in 0..count * size - 1, and the
    one expert of each block [count].
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
    return place, owner.clamp(max=n_experts - 1)  # the owner of an unused block does not matter


# --- tables read by product keys -------------------------------------------------------------


class ProductKeys(nn.Module):
    """x -> for each of h look-ups the k best of n^2 rows and their softmax weights.

    Scoring n^2 rows costs 2 n: the halves of a query are scored against n keys each, the score of
    row (i, j) is the sum of score i and score j, and the k best rows lie among the k best of each
    half (arXiv 1907.05242).
    """

    def __init__(self, config: ModelConfig, spec: ProductKeyLookup) -> None:
        super().__init__()
        self.spec = spec
        self.query = nn.Linear(config.width, spec.key_heads * spec.key_width)
        half = spec.key_width // 2
        self.keys = nn.Parameter(torch.empty(spec.key_heads, 2, spec.n_keys, half))

    def init_weights(self) -> None:
        """Memory+'s code: keys U(-1/sqrt(Q), 1/sqrt(Q)), queries Xavier-uniform; zero biases."""
        bound = self.spec.key_width**-0.5
        nn.init.uniform_(self.keys, -bound, bound)
        # nn.init.xavier_uniform_ would compute on the meta device (see moveimg.device.shapes_only)
        xavier = math.sqrt(6 / sum(self.query.weight.shape))
        nn.init.uniform_(self.query.weight, -xavier, xavier)
        nn.init.zeros_(self.query.bias)

    def own_flops(self, context: float) -> float:
        """Scores of both halves."""
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
    """n^2 rows of width W; forward is a weighted sum of some."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def init_weights(self) -> None:
        """N(0, W^(-1/2)) (Memory+)."""
        nn.init.normal_(self.weight, std=self.weight.shape[-1] ** -0.5)

    def active_own(self) -> int:
        """0: the layers count the rows that they read."""
        return 0

    def forward(self, rows: Tensor, weights: Tensor) -> Tensor:
        """rows int64 [B, S, k], weights [B, S, k] -> [B, S, W]."""
        flat = weights.flatten(0, 1).to(self.weight.dtype)
        out = F.embedding_bag(rows.flatten(0, 1), self.weight, mode="sum", per_sample_weights=flat)
        return out.unflatten(0, rows.shape[:2])


class ValueTable(Table):
    """The values of a product-key memory, which have a learning rate and a clip of their own."""


class TableLayer(FeedForward):
    """A feed-forward that looks rows up by product keys, and reads `row_width` numbers of each."""

    def __init__(self, config: ModelConfig, spec: ProductKeyLookup, row_width: int) -> None:
        super().__init__()
        self.spec, self.row_width = spec, row_width
        self.lookup = ProductKeys(config, spec)

    def active_own(self) -> int:
        """Numbers of the tables read per token."""
        return self.spec.key_heads * self.spec.top_k * self.row_width

    def own_flops(self, context: float) -> float:
        """A multiply and an add per number read."""
        return 2.0 * self.active_own()


class ProductKeyMemory(TableLayer):
    """Memory+ (arXiv 2412.09764): out = W_o(m * silu(W_g x)), m the weighted sum of values.

    Query, keys and both matrices belong to the layer; the values are one table for all layers.
    """

    def __init__(self, config: ModelConfig, spec: ProductKeyConfig) -> None:
        width = spec.value_width or config.width
        super().__init__(config, spec, width)
        self.gate = nn.Linear(config.width, width)
        self.out = nn.Linear(width, config.width)

    def init_weights(self) -> None:
        """Memory+'s code: both matrices N(0, D^(-1/2)); zero biases."""
        for linear in (self.gate, self.out):
            nn.init.normal_(linear.weight, std=self.out.out_features**-0.5)
            nn.init.zeros_(linear.bias)

    @staticmethod
    def shared(config: ModelConfig, spec: ProductKeyConfig) -> ValueTable:  # type: ignore[override]
        """The values, [n^2, W]."""
        return ValueTable(spec.n_keys**2, spec.value_width or config.width)

    def forward(self, x: Tensor, shared: Any = None) -> Tensor:
        return self.out(shared(*self.lookup(x)) * F.silu(self.gate(x)))


class PEER(TableLayer):
    """sum_i s_i gelu(u_i . x) v_i over the rows of all look-ups: experts of a single neuron.

    Differs from the paper (arXiv 2407.04153) in two points: each look-up has its own keys, where
    the paper's look-ups share one set, and queries are not batch-normalised.
    """

    def __init__(self, config: ModelConfig, spec: PEERConfig) -> None:
        super().__init__(config, spec, row_width=2 * config.width)
        self.u = Table(spec.n_keys**2, config.width)
        self.v = Table(spec.n_keys**2, config.width)

    def forward(self, x: Tensor, shared: Any = None) -> Tensor:
        rows, weights = self.lookup(x)
        neurons = torch.einsum("bsd,bskd->bsk", x, F.embedding(rows, self.u.weight))
        return self.v(rows, weights * F.gelu(neurons))


FEEDFORWARDS: dict[str, Any] = {
    "swiglu": SwiGLU,
    "moe": MoE,
    "product_key": ProductKeyMemory,
    "peer": PEER,
}
