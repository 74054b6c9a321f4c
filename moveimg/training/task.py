"""The interface between the training loop and a model that it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn


class Task:
    """A model, its loss, its validation, and what to keep of it.

    Attributes:
        model: what is trained, on its device.
        forward: called by `loss`: the model, or DDP around it; set by the loop.
        rng: of the random numbers of `loss`; set by the loop, which seeds it by step.
        score_every: steps between scores; 0 is never.
    """

    model: nn.Module
    forward: nn.Module
    rng: torch.Generator | None = None
    score_every = 0

    def loss(self, step: int, part: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a step's micro-batch `part` with its graph, and scalars to log."""
        raise NotImplementedError

    def validate(self, model: Any) -> dict[str, float]:
        """Held-out scalars; the model with the smallest first one is the best."""
        raise NotImplementedError

    def preview(self, model: Any) -> Image.Image:
        """An image of samples or reconstructions."""
        raise NotImplementedError

    def export(self, model: Any, directory: Path, about: dict[str, Any]) -> None:
        """Write the model into a directory."""
        raise NotImplementedError

    def scores(self, model: Any) -> dict[str, float]:
        """Scores of samples for TensorBoard; every process calls it."""
        return {}

    def extra_state(self) -> dict[str, Any]:
        """Plain data and tensors that a checkpoint needs besides weights and optimizer."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the result of extra_state."""

    def identity(self) -> dict[str, str]:
        """Digests of the data by name; a run continues on the same data only."""
        return {}

    def indices(self, step: int) -> list[int]:
        """The images of a step's batch, where they are known."""
        return []

    def watch(self, images_per_second: float) -> dict[str, dict[str, float]]:
        """More scalars of a log line, by prefix; every process calls it."""
        return {}
