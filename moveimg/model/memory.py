"""Value memories: tables of value vectors, indexed by code, mixed into attention's values.

    B batch   S positions   D width   H heads   K width of a head   M slots   V codebook size

The transformer owns one memory and gathers its rows once per forward pass, [B, S, H, M, K], for
all layers. Each attention layer holds a mixer made by the memory: `v = mixer(x, v, rows)`. A memory
lists the `sites` where it can be mixed in, preferred first, and uses the first that the attention
has: "value" in MHA and MLA; "latent" in MLA, where v [B, S, H, K] is the latent in H chunks.

MoVE (arXiv 2601.22887): M_t = E[w_t], gates g = 2 sigmoid(x W_G) in (0, 2), and for head h
V = g_0 V + sum_i g_i M_i. W_G is initialised to zero, so that every gate is 1. LaVE is the same sum
with a separate slot for each chosen layer and, by default, without g_0. Options of MoVE: similar
codes share a row, M_t = E[r(w_t)]; and rows for pairs of codes, M_t = E[w_t] + P[hash(w_t, w_u)],
where w_u is the code to the left or above (compare Engram, arXiv 2601.07372).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moveimg.config.model import (
    GatedMemoryConfig,
    LaVEConfig,
    ModelConfig,
    MoVEConfig,
    NoMemoryConfig,
    pick_layers,
)
from moveimg.model.bank_storage import QuantizedRows

Rows = Tensor | None


class PassThrough(nn.Module):
    """The mixer of a layer without memory: returns v."""

    value_width = 0

    def forward(self, x: Tensor, v: Tensor, rows: Rows) -> Tensor:
        return v


class GatedMixer(nn.Module):
    """v -> g_0 * v + sum_i g_i * rows_i per head, with gates 2 sigmoid(x W_G).

    Args:
        config: the transformer's config.
        spec: the memory's settings: gate_standard (whether v has a gate g_0), the gates' init.
        value_width: H * K, the width of v and of a row.
        slots: the slots of the gathered rows that this layer reads.
    """

    def __init__(
        self, config: ModelConfig, spec: GatedMemoryConfig, value_width: int, slots: range
    ) -> None:
        super().__init__()
        self.n_head, self.value_width, self.slots = config.n_head, value_width, slots
        self.spec, self.gate_standard = spec, spec.gate_standard
        n_gates = config.n_head * (len(slots) + self.gate_standard)
        self.router = nn.Linear(config.width, n_gates, bias=any(spec.gate_bias))

    def init_weights(self) -> None:
        """Initialise W_G and its bias by the settings; the default W_G = 0 gives gates of 1."""
        nn.init.normal_(self.router.weight, std=self.spec.router_std)
        if self.router.bias is not None:
            bias = self.router.bias.view(self.n_head, -1)
            nn.init.constant_(bias, self.spec.gate_bias[1])
            nn.init.constant_(bias[:, : int(self.gate_standard)], self.spec.gate_bias[0])

    def own_flops(self, context: float) -> float:
        """FLOPs per token of the weighted sum of M rows of `value_width`."""
        return 2.0 * len(self.slots) * self.value_width

    def gates(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """x [B, S, D] -> g_0 [B, S, H, 1] (None without gate_standard), g_1.. [B, S, H, M]."""
        gates = 2 * torch.sigmoid(self.router(x).unflatten(-1, (self.n_head, -1)))
        return (gates[..., :1], gates[..., 1:]) if self.gate_standard else (None, gates)

    def forward(self, x: Tensor, v: Tensor, rows: Rows) -> Tensor:
        """x [B, S, D], v [B, S, H, K], rows [B, S, H, all slots, K] -> v [B, S, H, K]."""
        assert rows is not None
        g_0, g_i = self.gates(x)
        own = rows[..., self.slots.start : self.slots.stop, :].to(g_i.dtype)
        # a matrix product would take twice as long at one position
        memory = (g_i[..., None] * own).sum(dim=-2).to(v.dtype)
        return memory + v if g_0 is None else torch.addcmul(memory, g_0.to(v.dtype), v)


Mixer = PassThrough | GatedMixer


class NoMemory(nn.Module):
    """The memory of the standard transformer, without table and rows."""

    sites = ("value",)
    context: str | None = None

    def __init__(self, config: ModelConfig, spec: NoMemoryConfig, value_width: int) -> None:
        super().__init__()

    def mixer(self, layer: int) -> Mixer:
        return PassThrough()

    def gather_rows(
        self, labels: Tensor | None, codes: Tensor | None, neighbours: Tensor | None = None
    ) -> Rows:
        return None


class ValueBank(nn.Module):
    """A table of `slots` value vectors per code and, with `class_rows`, per class.

    Row c of the table belongs to code c, or row `row_of_code[c]` where codes share rows.

    Args:
        config: the transformer's config.
        spec: the memory's settings; without `class_rows`, rows of the class token are zero.
        reads: the slots that each layer reads; None for a layer without memory.
        slots: value vectors of `value_width` per code.
        value_width: H * K, the width of v.
    """

    sites: tuple[str, ...]
    row_of_code: Tensor | None  # int64 [V]

    def __init__(
        self,
        config: ModelConfig,
        spec: Any,
        reads: list[range | None],
        slots: int,
        value_width: int,
    ) -> None:
        super().__init__()
        self.config, self.spec, self.reads = config, spec, reads
        self.slots, self.value_width = slots, value_width
        self.context: str | None = getattr(spec, "context", None)
        codes, width = config.codebook_size, slots * value_width
        self.n_rows = rows = getattr(spec, "rows", None) or codes
        bits = getattr(spec, "bits", None)
        self.bank: Any = (
            QuantizedRows(rows, slots, value_width, bits) if bits else nn.Embedding(rows, width)
        )
        self.register_buffer("row_of_code", torch.arange(codes) % rows if rows < codes else None)
        self.context_bank = nn.Embedding(spec.context_rows, width) if self.context else None
        self.class_bank = nn.Embedding(config.n_classes + 1, width) if spec.class_rows else None

    def init_weights(self) -> None:
        """Initialise the table of pairs to zero, so that unseen pairs add nothing."""
        if self.context_bank is not None:
            nn.init.zeros_(self.context_bank.weight)

    def mixer(self, layer: int) -> Mixer:
        """A new mixer for `layer` (from 0)."""
        slots = self.reads[layer]
        if slots is None:
            return PassThrough()
        return GatedMixer(self.config, self.spec, self.value_width, slots)

    def row_indices(self, codes: Tensor) -> Tensor:
        """The bank's row index of each code, int64 of any shape."""
        return codes if self.row_of_code is None else self.row_of_code[codes]

    def neighbours(self, codes: Tensor, indices: Tensor) -> Tensor:
        """The codes to the left of (or above) grid indices [S], int64 [B, S]; V outside the grid.

        codes [B, N] are the codes at grid indices 0..N-1.
        """
        width = self.config.grid[1]
        step = 1 if self.context == "left" else width
        inside = indices % width > 0 if self.context == "left" else indices >= width
        shifted = codes.index_select(1, (indices - step).clamp(min=0))
        return torch.where(inside, shifted, self.config.codebook_size)

    def gather_rows(
        self, labels: Tensor | None, codes: Tensor | None, neighbours: Tensor | None = None
    ) -> Tensor:
        """Gather the rows of all layers, [B, S or 1 + S, H, slots, K].

        labels [B] give the row of the class token, codes [B, S] the rows of the positions after it;
        either may be None. `neighbours` [B, S] is needed if the memory reads pairs. Under autocast
        the rows are cast once for all layers, so the layers' gradients add up in autocast's dtype.
        """
        rows = [] if codes is None else [self.bank(self.row_indices(codes))]
        if codes is not None and self.context_bank is not None:
            assert neighbours is not None
            pairs = hash_pairs(codes, neighbours, self.config.codebook_size)
            rows[0] = rows[0] + self.context_bank(pairs % self.spec.context_rows)
        if labels is not None and self.class_bank is not None:
            rows.insert(0, self.class_bank(labels)[:, None])
        elif labels is not None:
            shape = len(labels), 1, self.bank.embedding_dim
            dtype = rows[0].dtype if rows else None
            rows.insert(0, torch.zeros(shape, dtype=dtype, device=labels.device))
        gathered = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
        device = gathered.device.type
        if torch.is_autocast_enabled(device) and gathered.dtype == torch.float32:
            gathered = gathered.to(torch.get_autocast_dtype(device))
        heads = gathered.unflatten(-1, (self.slots, self.config.n_head, -1))
        return heads.transpose(2, 3).contiguous()  # once, so that no layer has to

    def check_rows(self, source: str) -> None:
        """Raise ValueError if `row_of_code` has an index outside the bank."""
        if self.row_of_code is not None:
            first, last = self.row_of_code.aminmax()
            if first < 0 or last >= self.n_rows:
                raise ValueError(
                    f"{source}: memory.row_of_code has row indices {first}..{last}: "
                    f"expected 0..{self.n_rows - 1}"
                )

    def cluster_codes(self, codebook: Tensor) -> None:
        """If rows < V, assign codes to rows by k-means over the tokenizer's codebook [V, width]."""
        if self.row_of_code is not None:
            from sklearn.cluster import KMeans  # importing it takes half a second

            means = KMeans(self.n_rows, n_init=1, random_state=0)
            clusters = means.fit(codebook.double().cpu().numpy()).labels_
            self.row_of_code.copy_(torch.from_numpy(clusters))


def hash_pairs(codes: Tensor, neighbours: Tensor, codebook_size: int) -> Tensor:
    """A hash in 0..2^32-1 of each (code, neighbour) pair, int64 (murmur3's, with other shifts)."""
    h = (codes * (codebook_size + 1) + neighbours) & 0xFFFFFFFF
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        h = ((h ^ (h >> 15)) * factor) & 0xFFFFFFFF
    return h ^ (h >> 16)


class LaVE(ValueBank):
    """One table per chosen layer, stored as the slots of one bank and gathered together.

    In MLA, rows are mixed into the up-projected values; the paper does not specify it.
    """

    sites = ("value",)

    def __init__(self, config: ModelConfig, spec: LaVEConfig, value_width: int) -> None:
        layers = pick_layers(spec.layers, config.n_layer)
        reads: list[range | None] = [None] * config.n_layer
        for slot, layer in enumerate(layers):
            reads[layer] = range(slot, slot + 1)
        super().__init__(config, spec, reads, len(layers), value_width)


class MoVE(ValueBank):
    """One global bank of M slots per code; every layer mixes all slots.

    In MLA, rows are mixed into the compressed latent, before the up-projection (the paper).
    """

    sites = ("latent", "value")

    def __init__(self, config: ModelConfig, spec: MoVEConfig, value_width: int) -> None:
        reads: list[range | None] = [range(spec.slots)] * config.n_layer
        super().__init__(config, spec, reads, spec.slots, value_width)


MEMORIES: dict[str, Any] = {"none": NoMemory, "lave": LaVE, "move": MoVE}


def mixers_by_layer(model: nn.Module) -> dict[int, GatedMixer]:
    """The mixers of the layers that have value memory, by layer index (from 0)."""
    blocks: Any = enumerate(model.layers)  # type: ignore[arg-type]
    modules = ((layer, module) for layer, block in blocks for module in block.modules())
    return {layer: module for layer, module in modules if isinstance(module, GatedMixer)}


@contextmanager
def hook_mixers(model: nn.Module, callback: Callable[..., None]) -> Iterator[None]:
    """Call `callback(layer, g_0, g_i, values, rows)` for each layer with memory in a forward pass.

    g_0 [B, S, H, 1] (or None) gates the standard values, g_i [B, S, H, M] the slots; `values`
    [B, S, H, K] are ungated, rows [B, S, H, M, K]. The class token's position is left out.
    """

    def make_hook(layer: int) -> Callable[..., None]:
        def hook(mixer: GatedMixer, args: tuple[Tensor, Tensor, Tensor]) -> None:
            x, v, rows = (tensor[:, 1:] for tensor in args)
            own = rows[..., mixer.slots.start : mixer.slots.stop, :]
            callback(layer, *mixer.gates(x), v, own)

        return hook

    mixers = mixers_by_layer(model)
    handles = [m.register_forward_pre_hook(make_hook(layer)) for layer, m in mixers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
