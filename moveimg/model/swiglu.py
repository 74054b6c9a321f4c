"""What every feed-forward has in common, and the plain one. B batch   S positions   D width"""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn
from torch.nn import functional as F

from moveimg.config.model import ModelConfig, SlotConfig, SwiGLUConfig


class FeedForward(nn.Module):
    """One layer's feed-forward: x [B, S, D], what the layers share -> [B, S, D]."""

    auxiliary: Tensor | None = None  # of the last pass in train mode; added to the cross-entropy
    load: Tensor | None = None  # of the last pass in train mode: share of tokens an expert had

    @staticmethod
    def shared(config: ModelConfig, spec: SlotConfig) -> nn.Module | None:
        """Weights that all layers of this kind share. The transformer owns them."""
        return None

    def train(self, mode: bool = True) -> Self:
        """As in nn.Module; the graph of an earlier pass, which could not be copied, is let go."""
        self.auxiliary = None
        return super().train(mode)

    def forward(self, x: Tensor, shared: nn.Module | None = None) -> Tensor:
        raise NotImplementedError


class SwiGLU(FeedForward):
    """w2(silu(w1 x) * w3 x) (arXiv 2002.05202), no biases."""

    def __init__(self, config: ModelConfig, spec: SwiGLUConfig) -> None:
        super().__init__()
        hidden = swiglu_hidden(config.width, spec)
        self.w1 = nn.Linear(config.width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, config.width, bias=False)
        self.w3 = nn.Linear(config.width, hidden, bias=False)

    def forward(self, x: Tensor, shared: nn.Module | None = None) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def swiglu_hidden(width: int, spec: SwiGLUConfig) -> int:
    """The hidden width: as given, or 2/3 of 4 * width rounded up to `multiple_of`."""
    if spec.hidden is not None:
        return spec.hidden
    return -(-(8 * width // 3) // spec.multiple_of) * spec.multiple_of
