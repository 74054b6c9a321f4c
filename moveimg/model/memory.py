"""Value memories: tables of value vectors, indexed by code, mixed into attention's values.

    B batch   S positions   D width   H heads   K width of a head   M slots   V codebook size

The transformer owns one memory and looks its rows up once per forward pass; each attention
layer holds a mixer made by that memory and calls `v = mixer(x, v, rows)`. What v is depends on the
attention: a memory names the `sites` it can be injected at, best first, and takes the first that
the attention offers. MHA offers its values; MLA its compressed latent, too, where v [B, S, H, K]
is the latent cut into H chunks. Rows are [B, S, H, M, K]: what a head mixes stands together, and
no layer has to move it.

MoVE (arXiv 2601.22887): M_t = E[w_t], gates g = 2 sigmoid(x W_G) in (0, 2), and for head h
V = g_0 V + sum_i g_i M_i. W_G starts at zero, where every gate is 1. LaVE is the same sum with
a table of its own, one slot, for each chosen layer, and by default no g_0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moveimg.config_model import (
    LaVEConfig,
    ModelConfig,
    MoVEConfig,
    NoMemoryConfig,
    pick_layers,
)

# A gate below the first is as good as shut, one above the second as good as wide open.
NEAR_ZERO, NEAR_TWO = 0.1, 1.9


class PassThrough(nn.Module):
    """The mixer of a layer without memory: v as it is."""

    value_width = 0  # of what it adds
    gate_standard = False

    def parts(self, x: Tensor, rows: Tensor | None) -> tuple[None, None]:
        """Nothing gates v, nothing is added to it."""
        return None, None

    def forward(self, x: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
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

    def gates(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """x [B, S, D] -> g_0 [B, S, H, 1] (None where ungated) and g_1.. [B, S, H, M]."""
        gates = 2 * torch.sigmoid(self.router(x)).unflatten(-1, (self.n_head, -1))
        if not self.gate_standard:
            return None, gates
        return gates[..., :1], gates[..., 1:]

    def own_flops(self, context: float) -> float:
        """The weighted sum of M rows of `value_width`."""
        return 2.0 * self.table_reads()

    def table_reads(self) -> int:
        """Numbers of the memory read for a token."""
        return len(self.slots) * self.value_width

    def init_weights(self) -> None:
        """W_G = 0: every gate starts at 1 (the paper)."""
        nn.init.zeros_(self.router.weight)

    def parts(self, x: Tensor, rows: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """What v is multiplied by and what is added to it, before v is there.

        x [B, S, D], rows [B, S, H, all slots, K] -> g_0 [B, S, H, 1] or None, and the weighted sum
        of this layer's rows [B, S, H, K].
        """
        if rows is None:
            raise ValueError("this layer mixes value memory into V and was handed no rows")
        g_0, g_i = self.gates(x)  # [B, S, H, 1], [B, S, H, M]
        rows = rows[..., self.slots.start : self.slots.stop, :].to(g_i.dtype)  # [B, S, H, M, K]
        # Not a matrix product: with one row a head, that takes several times as long.
        return g_0, (g_i[..., None] * rows).sum(dim=-2)

    def forward(self, x: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
        """x [B, S, D], v [B, S, H, K], rows [B, S, H, all slots, K] -> v [B, S, H, K]."""
        g_0, memory = self.parts(x, rows)
        return memory.to(v.dtype) + (v if g_0 is None else g_0.to(v.dtype) * v)


Mixer = PassThrough | GatedMixer


class NoMemory(nn.Module):
    """No table and no rows."""

    sites = ("value",)

    def __init__(self, config: ModelConfig, spec: NoMemoryConfig, value_width: int) -> None:
        super().__init__()

    def mixer(self, layer: int) -> Mixer:
        return PassThrough()

    def class_rows(self, labels: Tensor) -> Tensor | None:
        return None

    def code_rows(self, codes: Tensor) -> Tensor | None:
        return None


class ValueBank(nn.Module):
    """A table of `slots` value vectors a code, and optionally as many a class.

    Args:
        config: the transformer's config.
        spec: the memory's; with `class_rows`, classes (the null label included) have rows as
            codes do; without, the class token's rows are zero, since no code stands there.
        slots: how many value vectors of `value_width` a code has in all.
        value_width: H * K, the width of the values mixed into.
    """

    sites: tuple[str, ...]

    def __init__(
        self, config: ModelConfig, spec: LaVEConfig | MoVEConfig, slots: int, value_width: int
    ) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        self.slots, self.value_width = slots, value_width
        self.bank = nn.Embedding(config.codebook_size, slots * value_width)
        self.class_bank = (
            nn.Embedding(config.n_classes + 1, slots * value_width) if spec.class_rows else None
        )

    def _mixer(self, slots: range) -> GatedMixer:
        return GatedMixer(self.config, self.value_width, slots, self.spec.gate_standard)

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
        """[B, S, slots * H * K], as they are stored -> [B, S, H, slots, K]."""
        rows = rows.unflatten(-1, (self.slots, self.config.n_head, -1))
        return rows.transpose(2, 3).contiguous()


class LaVE(ValueBank):
    """A table for each chosen layer. They are kept side by side, so that one lookup serves all.

    On MLA it is added to the values after their up-projection (inferred; the paper is silent).
    """

    sites = ("value",)

    def __init__(self, config: ModelConfig, spec: LaVEConfig, value_width: int) -> None:
        self.layers = pick_layers(spec.layers, config.n_layer)
        super().__init__(config, spec, len(self.layers), value_width)

    def mixer(self, layer: int) -> Mixer:
        if layer not in self.layers:
            return PassThrough()
        slot = self.layers.index(layer)
        return self._mixer(range(slot, slot + 1))


class MoVE(ValueBank):
    """One global bank of M slots a code; every layer mixes all of them.

    On MLA it is mixed into the compressed latent, before the up-projection (the paper).
    """

    sites = ("latent", "value")

    def __init__(self, config: ModelConfig, spec: MoVEConfig, value_width: int) -> None:
        super().__init__(config, spec, spec.slots, value_width)

    def mixer(self, layer: int) -> Mixer:
        return self._mixer(range(self.slots))


MEMORIES: dict[str, Any] = {"none": NoMemory, "lave": LaVE, "move": MoVE}
