"""What the loop asks of what it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from PIL import Image
from torch import Tensor, nn


class Task(Protocol):
    """What is trained: a model, its loss, and what to show and keep of it."""

    model: nn.Module
    forward: nn.Module  # what loss is to call in the place of the model; set by the loop

    def loss(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """A micro-batch's loss with its graph, and scalars to log.

        `index` counts micro-batches from the start of the run; with one a step it is the step.
        """

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Held-out scalars; the first is what the run is judged by: less is better."""

    def preview(self, model: nn.Module) -> Image.Image:
        """A picture of what the model can do."""

    def export(self, model: nn.Module, directory: Path, about: dict[str, Any]) -> None:
        """Write what the run makes into its directory."""

    def extra_state(self) -> dict[str, Any]:
        """What a checkpoint must hold beside weights and optimizer: plain data and tensors."""

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take back what extra_state gave."""


@runtime_checkable
class Watched(Protocol):
    """What a task may have beside that: more to log, and names for what it is trained on."""

    def identity(self) -> dict[str, str]:
        """What the run's data is; a run on other data is another run."""

    def indices(self, step: int) -> list[int]:
        """The images of a step's batch."""

    def watch(self, images_per_second: float) -> dict[str, dict[str, float]]:
        """More scalars of a log line, by prefix; every process calls it."""


@runtime_checkable
class Scored(Protocol):
    """What a task may have to be scored now and then by more than a loss."""

    score_every: int  # steps; 0 is never

    def scores(self, model: nn.Module) -> dict[str, float]:
        """Numbers for TensorBoard; every process calls it."""
