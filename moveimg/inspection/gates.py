"""Statistics of gates, gathered by hooks while the model reads codes.

B batch   S positions (the class token's is left out)   H heads   M slots   G gates: g_0, slots
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moveimg.model import NEAR_TWO, NEAR_ZERO, GatedMixer, MoE, Transformer, shares


def mixers(model: Transformer) -> dict[int, GatedMixer]:
    """The mixer of each layer that has one, by layer."""
    found = {}
    for layer, block in enumerate(model.layers):
        for module in block.modules():
            if isinstance(module, GatedMixer):
                found[layer] = module
    return found


@dataclass
class LayerGates:
    """Running sums of one layer's gates.

    Attributes:
        slots: the memory's slots that the layer reads; gate 0 is g_0 where it has one.
        count: positions seen.
        total, squares, near_zero, near_two: sums over positions of g, g^2, and of [g < 0.1],
            [g > 1.9], [H, G] each.
        by_class, by_position: sums of g over the rest, heads averaged, [C + 1, G], [S, G].
        class_count: positions of each class, [C + 1].
        added, memory, kept: sums of the norms of each slot's g_i M_i [M], of their sum, of g_0 V.
    """

    slots: range
    gated: bool
    count: int = 0
    total: Tensor | Any = 0
    squares: Tensor | Any = 0
    near_zero: Tensor | Any = 0
    near_two: Tensor | Any = 0
    by_class: Tensor | Any = 0
    class_count: Tensor | Any = 0
    by_position: Tensor | Any = 0
    added: Tensor | Any = 0
    memory: float = 0.0
    kept: float = 0.0
    images: int = 0
    maps: list[Tensor] = field(default_factory=list)  # gates of the first image, [S, G]

    def add(self, gates: Tensor, labels: Tensor, n_labels: int) -> None:
        """Count gates [B, S, H, G] of images with labels [B] in."""
        gates = gates.double()
        self.count += gates.shape[0] * gates.shape[1]
        self.images += len(gates)
        self.total = self.total + gates.sum((0, 1))
        self.squares = self.squares + gates.square().sum((0, 1))
        self.near_zero = self.near_zero + (gates < NEAR_ZERO).double().sum((0, 1))
        self.near_two = self.near_two + (gates > NEAR_TWO).double().sum((0, 1))
        averaged = gates.mean(2)  # [B, S, G]
        of_class = nn.functional.one_hot(labels, n_labels).double()  # [B, C + 1]
        self.by_class = self.by_class + of_class.T @ averaged.sum(1)
        self.class_count = self.class_count + of_class.sum(0) * gates.shape[1]
        self.by_position = self.by_position + averaged.sum(0)
        if not self.maps:
            self.maps.append(averaged[0])

    def add_norms(self, kept: Tensor, memory: Tensor, g_i: Tensor, rows: Tensor) -> None:
        """Count the sizes of what is mixed in.

        kept: g_0 V [B, S, H, K]; memory: what is added to it, [B, S, H, K]; its parts are gates
        g_i [B, S, H, M] times rows [B, S, H, M, K].
        """
        self.kept += kept.double().flatten(2).norm(dim=-1).sum().item()
        self.memory += memory.double().flatten(2).norm(dim=-1).sum().item()
        per_head = rows.double().norm(dim=-1) * g_i.double()  # [B, S, H, M]
        self.added = self.added + per_head.norm(dim=2).sum((0, 1))

    def as_dict(self) -> dict[str, Any]:
        """Means and shares, nested lists: a head a row, a gate a column."""
        mean = self.total / self.count
        spread = (self.squares / self.count - mean.square()).clamp(min=0).sqrt()
        of_class = (self.by_class / self.class_count[:, None].clamp(min=1)).tolist()
        names = ["g_0"] if self.gated else []
        return {
            "gates": names + [f"slot {slot}" for slot in self.slots],
            "mean": mean.tolist(),
            "spread": spread.tolist(),
            "near_zero": (self.near_zero / self.count).tolist(),
            "near_two": (self.near_two / self.count).tolist(),
            "by_class": [
                row if seen else [None] * len(row)  # a class that no image had
                for row, seen in zip(of_class, self.class_count.tolist(), strict=True)
            ],
            "by_position": (self.by_position / self.images).tolist(),
            "norm_of_gated_values": self.kept / self.count,
            "norm_of_memory": self.memory / self.count,
            "norm_of_each_slot": (self.added / self.count).tolist(),
            "memory_share": self.memory / max(self.memory + self.kept, 1e-12),
        }


@contextmanager
def hooked(handles: list[Any]) -> Iterator[None]:
    """Remove hooks at the end, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def gather_gates(model: Transformer, batches: list[tuple[Tensor, Tensor]]) -> dict[int, LayerGates]:
    """Statistics of every layer with a mixer, over batches of codes [B, T] and labels [B]."""
    found = {
        layer: LayerGates(mixer.slots, mixer.gate_standard)
        for layer, mixer in mixers(model).items()
    }
    labels = torch.empty(0)  # of the batch that the hooks below see

    def hook(layer: int) -> Any:
        def gather(mixer: GatedMixer, args: tuple[Tensor, Tensor, Tensor]) -> None:
            # no code stands at the class token's
            x, v, rows = (part[:, 1:] for part in args)
            g_0, g_i = mixer.gates(x)
            _, memory = mixer.parts(x, rows)
            gates = g_i if g_0 is None else torch.cat([g_0, g_i], dim=-1)
            found[layer].add(gates, labels, model.config.n_classes + 1)
            mine = rows[..., mixer.slots.start : mixer.slots.stop, :]
            found[layer].add_norms(v if g_0 is None else g_0 * v, memory, g_i, mine)

        return gather

    handles = [m.register_forward_pre_hook(hook(layer)) for layer, m in mixers(model).items()]
    with hooked(handles):
        for codes, labels in batches:
            model(codes, labels)
    return found


@torch.no_grad()
def expert_loads(model: Transformer, batches: list[tuple[Tensor, Tensor]]) -> dict[int, list]:
    """Each expert's share of the choices, of every layer with experts."""
    sums: dict[int, Tensor] = {}

    def hook(layer: int, ffn: MoE) -> Any:
        def gather(router: nn.Module, args: Any, logits: Tensor) -> None:
            load = shares(logits.topk(ffn.spec.top_k, dim=-1).indices, ffn.spec.n_experts)
            sums[layer] = sums.get(layer, torch.zeros_like(load)) + load / len(batches)

        return gather

    handles = [
        ffn.expert_router.register_forward_hook(hook(layer, ffn))
        for layer, ffn in enumerate(model.feedforwards())
        if isinstance(ffn, MoE)
    ]
    with hooked(handles):
        for codes, labels in batches if handles else ():
            model(codes, labels)
    return {layer: load.tolist() for layer, load in sums.items()}
