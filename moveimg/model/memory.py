"""Value memories: tables of value vectors, indexed by code, mixed into attention's values.

    B batch   S positions   D width   H heads   K width of a head   M slots   V codebook size

The transformer owns one memory and gathers its rows once per forward pass; each attention layer
holds a mixer made by that memory and calls `v = mixer(x, v, rows)`. Where the memory is mixed in
depends on the attention: a memory names the `sites` it can be injected at, best first, and the
first that the attention offers is used. MHA offers its values; MLA its compressed latent as well,
where v [B, S, H, K] is the latent cut into H chunks. Rows are [B, S, H, M, K]: contiguous per head.

MoVE (arXiv 2601.22887): M_t = E[w_t], gates g = 2 sigmoid(x W_G) in (0, 2), and for head h
V = g_0 V + sum_i g_i M_i. W_G starts at zero, where every gate is 1. LaVE is the same sum with
a table per chosen layer, one slot, and by default no g_0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moveimg.config.model import LaVEConfig, ModelConfig, MoVEConfig, NoMemoryConfig, pick_layers

# Gates below the first count as closed, gates above the second as fully open.
NEAR_ZERO, NEAR_TWO = 0.1, 1.9

Rows = Tensor | None


class PassThrough(nn.Module):
    """The mixer of a layer without memory: it returns v unchanged."""

    value_width = 0
    gate_standard = False

    def parts(self, x: Tensor, rows: Rows) -> tuple[None, None]:
        """No gate and no rows."""
        return None, None

    def forward(self, x: Tensor, v: Tensor, rows: Rows) -> Tensor:
        return v


class GatedMixer(nn.Module):
    """v -> g_0 * v + sum_i g_i * rows_i per head, with gates 2 sigmoid(x W_G).

    Args:
        config: the transformer's config; gates are computed from its hidden state, for H heads.
        value_width: H * K, of v and of the rows, which are cut into H chunks.
        slots: which slots of the looked-up rows this layer reads.
        gate_standard: whether v has a gate (g_0) of its own.
    """

    def __init__(
        self, config: ModelConfig, value_width: int, slots: range, gate_standard: bool
    ) -> None:
        super().__init__()
        self.n_head, self.value_width = config.n_head, value_width
        self.slots, self.gate_standard = slots, gate_standard
        n_gates = config.n_head * (len(slots) + gate_standard)
        self.router = nn.Linear(config.width, n_gates, bias=False)

    def logits(self, x: Tensor) -> Tensor:
        """x [B, S, D] -> x W_G [B, S, H, M], or [B, S, H, 1 + M] with g_0 first if v is gated."""
        return self.router(x).unflatten(-1, (self.n_head, -1))

    def gates(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """x [B, S, D] -> g_0 [B, S, H, 1] (None where ungated) and g_1.. [B, S, H, M]."""
        gates = 2 * torch.sigmoid(self.logits(x))
        if not self.gate_standard:
            return None, gates
        return gates[..., :1], gates[..., 1:]

    def own_flops(self, context: float) -> float:
        """The weighted sum of M rows of `value_width`."""
        return 2.0 * self.table_reads()

    def table_reads(self) -> int:
        """Numbers of the memory read per token."""
        return len(self.slots) * self.value_width

    def init_weights(self) -> None:
        """W_G = 0: every gate starts at 1 (the paper)."""
        nn.init.zeros_(self.router.weight)

    def parts(self, x: Tensor, rows: Rows) -> tuple[Tensor | None, Tensor]:
        """The factor of v and the term added to it, which do not depend on v.

        x [B, S, D], rows [B, S, H, all slots, K] -> g_0 [B, S, H, 1] or None, and the weighted sum
        of this layer's rows [B, S, H, K].
        """
        if rows is None:
            raise ValueError("this layer mixes value memory into V and got no rows")
        g_0, g_i = self.gates(x)  # [B, S, H, 1], [B, S, H, M]
        if rows.shape[-2] != len(self.slots):
            rows = rows[..., self.slots.start : self.slots.stop, :]
        rows = rows.to(g_i.dtype)  # [B, S, H, M, K]
        # Not a matrix product: with one row a head, that takes several times as long.
        return g_0, (g_i[..., None] * rows).sum(dim=-2)

    def forward(self, x: Tensor, v: Tensor, rows: Rows) -> Tensor:
        """x [B, S, D], v [B, S, H, K], rows [B, S, H, all slots, K] -> v [B, S, H, K]."""
        g_0, memory = self.parts(x, rows)
        memory = memory.to(v.dtype)
        return memory + v if g_0 is None else torch.addcmul(memory, g_0.to(v.dtype), v)


Mixer = PassThrough | GatedMixer


class NoMemory(nn.Module):
    """No table and no rows."""

    sites = ("value",)

    def __init__(self, config: ModelConfig, spec: NoMemoryConfig, value_width: int) -> None:
        super().__init__()
        self.n_layer = config.n_layer

    def mixer(self, layer: int) -> Mixer:
        return PassThrough()

    def rows(self, labels: Tensor | None, codes: Tensor | None) -> None:
        """No rows."""


class ValueBank(nn.Module):
    """A table of `slots` value vectors per code, and optionally as many per class.

    Row c of the table belongs to code c: inspection and upcycling count on it.

    Args:
        config: the transformer's config.
        spec: the memory's; with `class_rows`, classes (the null label included) have rows as
            codes do; without, the class token's rows are zero, since it has no code.
        reads: of each layer, the slots it reads, or None.
        slots: value vectors of `value_width` per code, over all layers.
        value_width: H * K, the width of the values mixed into.

    Raises ValueError where `value_width` cannot be cut into H heads.
    """

    sites: tuple[str, ...]

    def __init__(
        self, config: ModelConfig, spec: LaVEConfig | MoVEConfig, reads: list[range | None],
        slots: int, value_width: int,
    ) -> None:  # fmt: skip
        super().__init__()
        if value_width % config.n_head:
            raise ValueError(
                f"value memory of width {value_width} over {config.n_head} heads: must be a "
                "multiple of n_head (each head mixes its own chunk)"
            )
        self.config, self.spec, self.reads = config, spec, reads
        self.slots, self.value_width = slots, value_width
        self.bank = nn.Embedding(config.codebook_size, slots * value_width)
        self.class_bank = (
            nn.Embedding(config.n_classes + 1, slots * value_width) if spec.class_rows else None
        )

    def mixer(self, layer: int) -> Mixer:
        slots = self.reads[layer]
        if slots is None:
            return PassThrough()
        return GatedMixer(self.config, self.value_width, slots, self.spec.gate_standard)

    def rows(self, labels: Tensor | None, codes: Tensor | None) -> Tensor:
        """The rows of every position, [B, S or 1 + S, H, slots, K], gathered once for all layers.

        labels [B] for the class token's position, codes [B, S] for those after it; either can be
        left out.
        """
        rows = [] if labels is None else [self.class_rows(labels)]
        rows += [] if codes is None else [self.code_rows(codes)]
        device = self.bank.weight.device.type
        if torch.is_autocast_enabled(device):  # once here: a cast per layer would be kept per layer
            rows = [part.to(torch.get_autocast_dtype(device)) for part in rows]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)

    def class_rows(self, labels: Tensor) -> Tensor:
        """labels [B] -> rows of the class token [B, 1, H, slots, K]."""
        if self.class_bank is None:
            heads = self.config.n_head
            shape = (len(labels), 1, heads, self.slots, self.value_width // heads)
            return torch.zeros(shape, dtype=self.bank.weight.dtype, device=labels.device)
        return self._by_head(self.class_bank(labels)[:, None])

    def code_rows(self, codes: Tensor) -> Tensor:
        """codes [B, S] -> rows [B, S, H, slots, K]: M_t = E[w_t]."""
        return self._by_head(self.bank(codes))

    def _by_head(self, rows: Tensor) -> Tensor:
        """Stored order [B, S, slots * H * K] -> [B, S, H, slots, K]."""
        rows = rows.unflatten(-1, (self.slots, self.config.n_head, -1))
        return rows.transpose(2, 3).contiguous()


class LaVE(ValueBank):
    """A table for each chosen layer, concatenated, so that one lookup serves all.

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


@dataclass(frozen=True)
class Mixing:
    """What one layer mixes into its values, without the class token's position.

    B batch   S positions   H heads   M slots   K width of a head

    Attributes:
        g_0: gate of the standard values [B, S, H, 1]; None where the layer has none.
        g_i: gates of the slots [B, S, H, M].
        values: the standard values before the gate [B, S, H, K].
        rows: bank rows of the slots [B, S, H, M, K].
    """

    g_0: Tensor | None
    g_i: Tensor
    values: Tensor
    rows: Tensor


def mixers_by_layer(model: nn.Module) -> dict[int, GatedMixer]:
    """The mixer of each layer that has value memory, by layer index (from 0)."""
    found = {}
    for layer, block in enumerate(model.layers):  # type: ignore[arg-type]
        for module in block.modules():
            if isinstance(module, GatedMixer):
                found[layer] = module
    return found


@contextmanager
def record_mixing(model: nn.Module, record: Callable[[int, Mixing], None]) -> Iterator[None]:
    """Call `record(layer, mixing)` for each layer with memory, at every forward pass inside."""

    def hook(layer: int) -> Callable[..., None]:
        def gather(mixer: GatedMixer, args: tuple[Tensor, Tensor, Tensor]) -> None:
            x, v, rows = (part[:, 1:] for part in args)
            rows = rows[..., mixer.slots.start : mixer.slots.stop, :]
            record(layer, Mixing(*mixer.gates(x), v, rows))

        return gather

    mixers = mixers_by_layer(model)
    handles = [mixer.register_forward_pre_hook(hook(layer)) for layer, mixer in mixers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
