"""Feed-forward layers: x [B, S, D] -> [B, S, D]."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from moveimg.config import ModelConfig, SwiGLUConfig


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x) (arXiv 2002.05202), no biases."""

    def __init__(self, config: ModelConfig, spec: SwiGLUConfig) -> None:
        super().__init__()
        hidden = swiglu_hidden(config.width, spec)
        self.w1 = nn.Linear(config.width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, config.width, bias=False)
        self.w3 = nn.Linear(config.width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def swiglu_hidden(width: int, spec: SwiGLUConfig) -> int:
    """The hidden width: as given, or 2/3 of 4 * width rounded up to `multiple_of`."""
    if spec.hidden is not None:
        return spec.hidden
    return -(-(8 * width // 3) // spec.multiple_of) * spec.multiple_of


FEEDFORWARDS: dict[str, Any] = {"swiglu": SwiGLU}
