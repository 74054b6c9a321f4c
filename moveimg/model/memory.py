"""Value memories: tables of value vectors, indexed by code, mixed into attention's values.

    B batch   S positions   D width   H heads   K width of a head   M slots   V codebook size

The transformer owns one memory and looks its rows up once per forward pass; each attention layer
holds a mixer made by that memory and calls `v = mixer(x, v, rows)`, with the rows as tensors or,
where look-up and sum are one (fused_mix.py), as the places to find them. What v is depends on the
attention: a memory names the `sites` it can be injected at, best first, and takes the first that
the attention offers. MHA offers its values; MLA its compressed latent, too, where v [B, S, H, K] is
the latent cut into H chunks. Rows are [B, S, H, M, K]: what a head mixes stands together, and no
layer has to move it.

MoVE (arXiv 2601.22887): M_t = E[w_t], gates g = 2 sigmoid(x W_G) in (0, 2), and for head h
V = g_0 V + sum_i g_i M_i. W_G starts at zero, where every gate is 1. LaVE is the same sum with
a table of its own, one slot, for each chosen layer, and by default no g_0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moveimg.config.model import LaVEConfig, ModelConfig, MoVEConfig, NoMemoryConfig, pick_layers
from moveimg.model.fused_mix import BankRows, look_up, mix, usable

# A gate below the first is as good as shut, one above the second as good as wide open.
NEAR_ZERO, NEAR_TWO = 0.1, 1.9

Rows = Tensor | BankRows | None


def gathered(rows: Rows) -> Tensor:
    """What a mixer was handed, as the rows themselves [B, S, H, M, K], to be looked at."""
    assert rows is not None
    return rows.gathered() if isinstance(rows, BankRows) else rows


class PassThrough(nn.Module):
    """The mixer of a layer without memory: v as it is."""

    value_width = 0  # of what it adds
    gate_standard = False

    def parts(self, x: Tensor, rows: Rows) -> tuple[None, None]:
        """Nothing gates v, nothing is added to it."""
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
        """x [B, S, D] -> x W_G [B, S, H, M], with one before that is of g_0, where v is gated."""
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
        """Numbers of the memory read for a token."""
        return len(self.slots) * self.value_width

    def init_weights(self) -> None:
        """W_G = 0: every gate starts at 1 (the paper)."""
        nn.init.zeros_(self.router.weight)

    def parts(self, x: Tensor, rows: Rows) -> tuple[Tensor | None, Tensor]:
        """What v is multiplied by and what is added to it, before v is there.

        x [B, S, D], rows [B, S, H, all slots, K] -> g_0 [B, S, H, 1] or None, and the weighted sum
        of this layer's rows [B, S, H, K].
        """
        if rows is None:
            raise ValueError("this layer mixes value memory into V and was handed no rows")
        if isinstance(rows, BankRows):
            logits = self.logits(x)
            g_0 = 2 * torch.sigmoid(logits[..., :1]) if self.gate_standard else None
            return g_0, self._fused(rows, logits, None)
        g_0, g_i = self.gates(x)  # [B, S, H, 1], [B, S, H, M]
        if rows.shape[-2] != len(self.slots):
            rows = rows[..., self.slots.start : self.slots.stop, :]
        rows = rows.to(g_i.dtype)  # [B, S, H, M, K]
        # Not a matrix product: with one row a head, that takes several times as long.
        return g_0, (g_i[..., None] * rows).sum(dim=-2)

    def forward(self, x: Tensor, v: Tensor, rows: Rows) -> Tensor:
        """x [B, S, D], v [B, S, H, K], rows [B, S, H, all slots, K] -> v [B, S, H, K]."""
        if isinstance(rows, BankRows):
            return self._fused(rows, self.logits(x), v)
        g_0, memory = self.parts(x, rows)
        memory = memory.to(v.dtype)
        return memory + v if g_0 is None else torch.addcmul(memory, g_0.to(v.dtype), v)

    def _fused(self, rows: BankRows, logits: Tensor, v: Tensor | None) -> Tensor:
        return mix(rows, logits, v, self.slots.start, self.gate_standard)


Mixer = PassThrough | GatedMixer


class NoMemory(nn.Module):
    """No table and no rows."""

    sites = ("value",)

    def __init__(self, config: ModelConfig, spec: NoMemoryConfig, value_width: int) -> None:
        super().__init__()
        self.n_layer = config.n_layer

    def mixer(self, layer: int) -> Mixer:
        return PassThrough()

    def rows(self, labels: Tensor | None, codes: Tensor | None) -> Sequence[Rows]:
        return [None] * self.n_layer


class ValueBank(nn.Module):
    """A table of `slots` value vectors a code, and optionally as many a class.

    Row c of the table is code c's: the fused mix, inspection and upcycling count on it.

    Args:
        config: the transformer's config.
        spec: the memory's; with `class_rows`, classes (the null label included) have rows as
            codes do; without, the class token's rows are zero, since no code stands there.
        reads: of each layer, the slots it reads, or None.
        slots: how many value vectors of `value_width` a code has in all.
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
                "multiple of n_head (each head mixes a chunk of its own)"
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

    def rows(self, labels: Tensor | None, codes: Tensor | None) -> Sequence[Rows]:
        """What each layer's mixer is to be handed.

        labels [B] for the class token's position, codes [B, S] for those behind it; either can be
        left out. Rows are looked up here, [B, S or 1 + S, H, slots, K], the same for all layers,
        unless the mix does it (fused_mix.py).
        """
        if usable(self.bank.weight, labels is not None and codes is not None):
            return self._places(labels, codes)
        parts = [] if labels is None else [self.class_rows(labels)]
        parts += [] if codes is None else [self.code_rows(codes)]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return [rows] * len(self.reads)

    def _places(self, labels: Tensor | None, codes: Tensor | None) -> Sequence[Rows]:
        """The same as places."""
        bank, classes = self.bank.weight, self.class_bank
        tables, ids = [bank], []
        if labels is not None and classes is None:
            ids.append(torch.full_like(labels, -1)[:, None])
        elif labels is not None and classes is not None:
            tables = [classes.weight] if codes is None else [bank, classes.weight]
            ids.append(labels[:, None] + (0 if codes is None else len(bank)))
        ids += [] if codes is None else [codes]
        firsts = [None if slots is None else slots.start for slots in self.reads]
        gated = self.spec.gate_standard
        gates = gated + next(len(slots) for slots in self.reads if slots is not None)
        heads, joint = self.config.n_head, torch.cat(ids, dim=1)
        return look_up(tables, joint, firsts, heads, self.slots, gates, gated)

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
        layers = pick_layers(spec.layers, config.n_layer)
        reads: list[range | None] = [None] * config.n_layer
        for slot, layer in enumerate(layers):
            reads[layer] = range(slot, slot + 1)
        super().__init__(config, spec, reads, len(layers), value_width)


class MoVE(ValueBank):
    """One global bank of M slots a code; every layer mixes all of them.

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
        def gather(mixer: GatedMixer, args: tuple[Tensor, Tensor, Rows]) -> None:
            x, v, rows = (part[:, 1:] for part in (*args[:2], gathered(args[2])))
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
