"""The interface between the training loop and a model that it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from PIL import Image
from torch import Tensor, nn


class Task(Protocol):
    """A model, its loss, its validation, and what to keep of it."""

    model: nn.Module
    forward: nn.Module  # called by `loss`: the model, or DDP around it; set by the loop

    def loss(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch with its graph, and scalars to log.

        `index` counts micro-batches from the start of the run.
        """

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Held-out scalars; the checkpoint with the smallest first one is the best."""

    def preview(self, model: nn.Module) -> Image.Image:
        """An image of samples or reconstructions."""

    def export(self, model: nn.Module, directory: Path, about: dict[str, Any]) -> None:
        """Write the model into a directory."""

    def extra_state(self) -> dict[str, Any]:
        """Plain data and tensors that a checkpoint needs besides weights and optimizer."""

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the result of extra_state."""


@runtime_checkable
class Monitored(Protocol):
    """What a task may offer besides: the identity of its data, more scalars, scores of samples."""

    score_every: int  # steps between scores; 0 is never

    def identity(self) -> dict[str, str]:
        """Digests of the run's data by name; a run on other data is another run."""

    def indices(self, step: int) -> list[int]:
        """The images of a step's batch."""

    def watch(self, images_per_second: float) -> dict[str, dict[str, float]]:
        """More scalars of a log line, by prefix; every process calls it."""

    def scores(self, model: nn.Module) -> dict[str, float]:
        """Scores of samples for TensorBoard; every process calls it."""
