"""The base of all feed-forward layers, and SwiGLU.

`forward(x, shared)` maps x [B, S, D] to [B, S, D]; `shared` is the module that all layers share.
"""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor, nn
from torch.nn import functional as F

from moveimg.config.model import ModelConfig, SlotConfig, SwiGLUConfig


class FeedForward(nn.Module):
    """The base of all feed-forward layers.

    Attributes:
        auxiliary: a loss of the last forward pass in train mode, to be added to the cross-entropy.
        load: the share of routing choices of each expert in that pass, [E].
        delay: how many layers later `delayed_output` is added to the stream; None: there is none.
    """

    auxiliary: Tensor | None = None
    load: Tensor | None = None
    delay: int | None = None

    @staticmethod
    def shared(config: ModelConfig, spec: SlotConfig) -> nn.Module | None:
        """The module that all layers of this kind share, owned by the transformer, or None."""
        return None

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and drop the auxiliary loss, whose graph would make a deepcopy fail."""
        self.auxiliary = None
        return super().train(mode)

    def forward(self, x: Tensor, shared: Any = None) -> Tensor:
        raise NotImplementedError

    def delayed_output(self, x: Tensor) -> Tensor:
        """The output [B, S, D] added `delay` layers later, from the stream x after this block."""
        raise NotImplementedError


class SwiGLU(FeedForward):
    """w2(silu(w1 x) * w3 x) (arXiv 2002.05202), without biases."""

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
