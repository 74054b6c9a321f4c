"""Random generators for dropout and initial weights, separate from torch's global generator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import init
from torch.overrides import TorchFunctionMode


class Dropout(nn.Dropout):
    """Dropout whose mask is drawn from `generator`; in compiled graphs from torch's default."""

    generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        drawing = self.training and self.p and self.generator is not None
        if not drawing or torch.compiler.is_compiling():
            return super().forward(x)
        keep = torch.empty_like(x).bernoulli_(1 - self.p, generator=self.generator)
        return x * keep.div_(1 - self.p)


def set_generator(model: nn.Module, generator: torch.Generator) -> None:
    """Set `generator` on all modules with an attribute of that name."""
    for module in model.modules():
        if hasattr(module, "generator"):
            module.generator = generator  # type: ignore[assignment]


@contextmanager
def rewind(generator: torch.Generator, state: Tensor) -> Iterator[None]:
    """Set the generator to `state` inside the block, and restore its old state afterwards."""
    before = generator.get_state()
    generator.set_state(state)
    try:
        yield
    finally:
        generator.set_state(before)


class SeededInit(TorchFunctionMode):
    """Draw this thread's initial weights inside the block from a generator seeded with `seed`."""

    DRAWS = (Tensor.normal_, Tensor.uniform_, init.normal_, init.uniform_, init.kaiming_uniform_)

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.DRAWS and (args[0] if args else kwargs["tensor"]).device.type == "cpu":
            kwargs["generator"] = self.generator
        return func(*args, **kwargs)
