"""Value memories: tables of value vectors, indexed by code, mixed into attention's values.

    B batch   S positions   D width   H heads   K width of a head   M slots   V codebook size

The transformer owns one memory and gathers its rows once per forward pass, [B, S, H, M, K], for
all layers. Each attention layer holds a mixer made by the memory: `v = mixer(x, v, rows)`. A memory
lists the `sites` where it can be mixed in, best first; the attention offers some of them. MHA has
its values; MLA also its compressed latent, where v [B, S, H, K] is the latent in H chunks.

MoVE (arXiv 2601.22887): M_t = E[w_t], gates g = 2 sigmoid(x W_G) in (0, 2), and for head h
V = g_0 V + sum_i g_i M_i. W_G starts at zero, where every gate is 1. LaVE is the same sum with
one slot of its own for each chosen layer and, by default, no g_0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moveimg.config.model import LaVEConfig, ModelConfig, MoVEConfig, NoMemoryConfig, pick_layers

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
        value_width: H * K, the width of v and of a row.
        slots: the slots of the gathered rows that this layer reads.
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

    def init_weights(self) -> None:
        """W_G = 0: every gate starts at 1 (the paper)."""
        nn.init.zeros_(self.router.weight)

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

    def __init__(self, config: ModelConfig, spec: NoMemoryConfig, value_width: int) -> None:
        super().__init__()

    def mixer(self, layer: int) -> Mixer:
        return PassThrough()

    def rows(self, labels: Tensor | None, codes: Tensor | None) -> Rows:
        return None


class ValueBank(nn.Module):
    """A table of `slots` value vectors per code and, optionally, as many per class.

    Row c of the table belongs to code c: inspection and upcycling rely on it.

    Args:
        config: the transformer's config.
        spec: the memory's settings; without `class_rows`, rows of the class token are zero.
        reads: for each layer, the slots it reads, or None.
        slots: value vectors of `value_width` per code.
        value_width: H * K, the width of the values mixed into.
    """

    sites: tuple[str, ...]

    def __init__(
        self, config: ModelConfig, spec: LaVEConfig | MoVEConfig, reads: list[range | None],
        slots: int, value_width: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config, self.spec, self.reads = config, spec, reads
        self.slots, self.value_width = slots, value_width
        self.bank: Any = nn.Embedding(config.codebook_size, slots * value_width)
        self.class_bank = (
            nn.Embedding(config.n_classes + 1, slots * value_width) if spec.class_rows else None
        )

    def mixer(self, layer: int) -> Mixer:
        """The mixer of a layer, which reads the layer's slots."""
        slots = self.reads[layer]
        if slots is None:
            return PassThrough()
        return GatedMixer(self.config, self.value_width, slots, self.spec.gate_standard)

    def rows(self, labels: Tensor | None, codes: Tensor | None) -> Tensor:
        """Gather the rows of all layers, [B, S or 1 + S, H, slots, K]; M_t = E[w_t].

        labels [B] for the position of the class token, codes [B, S] for those after it; one of the
        two may be None. Under autocast the rows are cast here, once for all layers, and the layers'
        gradients add up in that type.
        """
        rows = [] if codes is None else [self.bank(codes)]
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
