"""Value memories: tables of value vectors, indexed by code, mixed into attention's values.

    B batch   S positions   D width   H heads   K width of a head   M slots   V codebook size

The transformer owns one memory and gathers its rows once per forward pass, [B, S, H, M, K], for
all layers. Each attention layer holds a mixer made by the memory: `v = mixer(x, v, rows)`. A memory
lists the `sites` where it can be mixed in, best first; the attention offers some of them. MHA has
its values; MLA also its compressed latent, where v [B, S, H, K] is the latent in H chunks.

MoVE (arXiv 2601.22887): M_t = E[w_t], gates g = 2 sigmoid(x W_G) in (0, 2), and for head h
V = g_0 V + sum_i g_i M_i. W_G starts at zero, where every gate is 1. LaVE is the same sum with
one slot of its own for each chosen layer and, by default, no g_0. Options of MoVE: similar codes
share a row, M_t = E[r(w_t)]; and rows of pairs of codes, M_t = E[w_t] + P[hash(w_t, w_u)], with
w_u the code to the left or above (compare Engram, arXiv 2601.07372).
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
from moveimg.model.bank import QuantizedRows

Rows = Tensor | None


class PassThrough(nn.Module):
    """The mixer of a layer without memory: returns v."""

    value_width = 0

    def forward(self, x: Tensor, v: Tensor, rows: Rows) -> Tensor:
        return v


class GatedMixer(nn.Module):
    """v -> g_0 * v + sum_i g_i * rows_i per head, with gates 2 sigmoid(x W_G).

    Args:
        config: the transformer's config; gates are computed from its hidden state, for H heads.
        spec: the memory's settings: gate_standard (whether v has a gate g_0), and the gates' start.
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
        """W_G = 0 and no bias: every gate starts at 1 (the paper), unless the settings differ."""
        nn.init.normal_(self.router.weight, std=self.spec.router_std)
        if self.router.bias is not None:
            bias = self.router.bias.view(self.n_head, -1)
            nn.init.constant_(bias, self.spec.gate_bias[1])
            nn.init.constant_(bias[:, : int(self.gate_standard)], self.spec.gate_bias[0])

    def own_flops(self, context: float) -> float:
        """The weighted sum of M rows of `value_width`."""
        return 2.0 * len(self.slots) * self.value_width

    def gates(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """x [B, S, D] -> g_0 [B, S, H, 1] (None where ungated) and g_1.. [B, S, H, M]."""
        gates = 2 * torch.sigmoid(self.router(x).unflatten(-1, (self.n_head, -1)))
        return (gates[..., :1], gates[..., 1:]) if self.gate_standard else (None, gates)

    def own_rows(self, rows: Tensor) -> Tensor:
        """The rows of this layer's slots, [B, S, H, M, K]."""
        return rows[..., self.slots.start : self.slots.stop, :]

    def forward(self, x: Tensor, v: Tensor, rows: Rows) -> Tensor:
        """x [B, S, D], v [B, S, H, K], rows [B, S, H, all slots, K] -> v [B, S, H, K]."""
        assert rows is not None
        g_0, g_i = self.gates(x)
        # Not a matrix product, which takes twice as long at one position.
        memory = (g_i[..., None] * self.own_rows(rows).to(g_i.dtype)).sum(dim=-2).to(v.dtype)
        return memory + v if g_0 is None else torch.addcmul(memory, g_0.to(v.dtype), v)


Mixer = PassThrough | GatedMixer


class NoMemory(nn.Module):
    """The memory of the standard transformer: no table and no rows."""

    sites = ("value",)
    context: str | None = None

    def __init__(self, config: ModelConfig, spec: NoMemoryConfig, value_width: int) -> None:
        super().__init__()

    def mixer(self, layer: int) -> Mixer:
        return PassThrough()

    def rows(
        self, labels: Tensor | None, codes: Tensor | None, neighbours: Tensor | None = None
    ) -> Rows:
        return None


class ValueBank(nn.Module):
    """A table of `slots` value vectors per code and, optionally, as many per class.

    Row c of the table belongs to code c, or row `row_of_code[c]` where codes share rows.

    Args:
        config: the transformer's config.
        spec: the memory's settings; without `class_rows`, rows of the class token are zero.
        reads: for each layer, the slots it reads, or None.
        slots: value vectors of `value_width` per code.
        value_width: H * K, the width of the values mixed into.
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
        """Rows of pairs start at zero, so that unseen pairs add nothing."""
        if self.context_bank is not None:
            nn.init.zeros_(self.context_bank.weight)

    def mixer(self, layer: int) -> Mixer:
        """The mixer of a layer, which reads the layer's slots."""
        slots = self.reads[layer]
        if slots is None:
            return PassThrough()
        return GatedMixer(self.config, self.spec, self.value_width, slots)

    def row_indices(self, codes: Tensor) -> Tensor:
        """The row of each code, int64 of any shape."""
        return codes if self.row_of_code is None else self.row_of_code[codes]

    def neighbours(self, codes: Tensor, indices: Tensor) -> Tensor:
        """The code to the left of grid indices [S], or above them, int64 [B, S]; V where none is.

        codes [B, N] are those of the indices 0..N-1.
        """
        width = self.config.grid[1]
        step = 1 if self.context == "left" else width
        inside = indices % width > 0 if self.context == "left" else indices >= width
        found = codes.index_select(1, (indices - step).clamp(min=0))
        return torch.where(inside, found, self.config.codebook_size)

    def rows(
        self, labels: Tensor | None, codes: Tensor | None, neighbours: Tensor | None = None
    ) -> Tensor:
        """Gather the rows of all layers, [B, S or 1 + S, H, slots, K].

        labels [B] for the position of the class token, codes [B, S] for those after it, with their
        `neighbours` where the memory reads pairs; labels or codes may be None. Under autocast the
        rows are cast here, once for all layers, and the layers' gradients add up in that type.
        """
        rows = [] if codes is None else [self.bank(self.row_indices(codes))]
        if codes is not None and self.context_bank is not None:
            assert neighbours is not None
            pairs = hash_pairs(codes, neighbours, self.config.codebook_size)
            rows[0] = rows[0] + self.context_bank(pairs % self.spec.context_rows)
        if labels is not None and self.class_bank is not None:
            rows.insert(0, self.class_bank(labels)[:, None])
        elif labels is not None:
            shape, dtype = (
                (len(labels), 1, self.bank.embedding_dim),
                rows[0].dtype if rows else None,
            )
            rows.insert(0, torch.zeros(shape, dtype=dtype, device=labels.device))
        gathered = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
        device = gathered.device.type
        if torch.is_autocast_enabled(device) and gathered.dtype == torch.float32:
            gathered = gathered.to(torch.get_autocast_dtype(device))
        heads = gathered.unflatten(-1, (self.slots, self.config.n_head, -1))
        return heads.transpose(2, 3).contiguous()  # once, so that no layer has to

    def check_rows(self, source: str) -> None:
        """Raise ValueError where a code's row is not one of the bank's."""
        if self.row_of_code is not None:
            first, last = self.row_of_code.aminmax()
            if first < 0 or last >= self.n_rows:
                raise ValueError(
                    f"{source}: memory.row_of_code has rows {first}..{last}: "
                    f"expected 0..{self.n_rows - 1}"
                )

    def share_rows(self, codebook: Tensor) -> None:
        """Map codes to rows by k-means over the tokenizer's codebook [V, width], where rows < V."""
        if self.row_of_code is not None:
            from sklearn.cluster import KMeans  # half a second of a start

            means = KMeans(self.n_rows, n_init=1, random_state=0)
            clusters = means.fit(codebook.double().cpu().numpy()).labels_
            self.row_of_code.copy_(torch.from_numpy(clusters))


def hash_pairs(codes: Tensor, neighbours: Tensor, codebook_size: int) -> Tensor:
    """A hash in 0..2^32-1 of each pair of a code and its neighbour, int64 (murmur3's finalizer)."""
    h = (codes * (codebook_size + 1) + neighbours) & 0xFFFFFFFF
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        h = ((h ^ (h >> 15)) * factor) & 0xFFFFFFFF
    return h ^ (h >> 16)


class LaVE(ValueBank):
    """A table for each chosen layer; all are slots of one bank, gathered together.

    On MLA it is added to the values after their up-projection (inferred; the paper is silent).
    """

    sites = ("value",)

    def __init__(self, config: ModelConfig, spec: LaVEConfig, value_width: int) -> None:
        layers = pick_layers(spec.layers, config.n_layer)
        reads: list[range | None] = [None] * config.n_layer
        for slot, layer in enumerate(layers):
            reads[layer] = range(slot, slot + 1)
        super().__init__(config, spec, reads, len(layers), value_width)


class MoVE(ValueBank):
    """One global bank of M slots per code; every layer mixes all of them.

    On MLA it is mixed into the compressed latent, before the up-projection (the paper).
    """

    sites = ("latent", "value")

    def __init__(self, config: ModelConfig, spec: MoVEConfig, value_width: int) -> None:
        reads: list[range | None] = [range(spec.slots)] * config.n_layer
        super().__init__(config, spec, reads, spec.slots, value_width)


MEMORIES: dict[str, Any] = {"none": NoMemory, "lave": LaVE, "move": MoVE}


def mixers_by_layer(model: nn.Module) -> dict[int, GatedMixer]:
    """The mixer of each layer that has value memory, by layer index (from 0)."""
    blocks: Any = enumerate(model.layers)  # type: ignore[arg-type]
    modules = ((layer, module) for layer, block in blocks for module in block.modules())
    return {layer: module for layer, module in modules if isinstance(module, GatedMixer)}


@contextmanager
def record_mixing(model: nn.Module, record: Callable[..., None]) -> Iterator[None]:
    """Call `record(layer, g_0, g_i, values, rows)` for each layer with memory, at every pass.

    Without the class token's position: the gates of the standard values [B, S, H, 1] (or None) and
    of the slots [B, S, H, M], the ungated values [B, S, H, K], the slots' rows [B, S, H, M, K].
    """

    def make_hook(layer: int) -> Callable[..., None]:
        def hook(mixer: GatedMixer, args: tuple[Tensor, Tensor, Tensor]) -> None:
            x, v, rows = (part[:, 1:] for part in args)
            record(layer, *mixer.gates(x), v, mixer.own_rows(rows))

        return hook

    mixers = mixers_by_layer(model)
    handles = [m.register_forward_pre_hook(make_hook(layer)) for layer, m in mixers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
