"""Logging of a run: TensorBoard, Weights & Biases, progress bar, metrics.jsonl, gates, MFU."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from moveimg.config import RunConfig
from moveimg.files import write_text
from moveimg.images import save_png
from moveimg.model import (
    NEAR_TWO,
    NEAR_ZERO,
    PEAK_FLOPS,
    Mixing,
    Transformer,
    mixers_by_layer,
    record_mixing,
)
from moveimg.progress import progress_bar
from moveimg.training.settings import read_measurements


class RunLogger:
    """Writes the logs of a run, on rank 0 only; a full disk costs logs, not the run.

    Raises ValueError if Weights & Biases is wanted and not installed.
    """

    def __init__(self, logs: Path, config: RunConfig, step: int, main: bool) -> None:
        self.logs, self.main = logs, main
        self.wandb: Any = start_wandb(logs, config) if main and config.wandb else None
        self.writer = SummaryWriter(str(logs), purge_step=step) if main else None
        self.bar = progress_bar(config.steps, "train", "step", step) if main else tqdm(disable=True)

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
        if self.writer is not None:
            self._survive("TensorBoard's last events", self.writer.close)
        if self.wandb is not None:
            self.wandb.finish(exit_code=int(error[0] is not None))

    def scalars(self, prefix: str, values: dict[str, float], step: int) -> None:
        """Add numbers to TensorBoard as `prefix/key`; after a full disk nothing more."""
        for key, value in values.items():
            if self.writer is not None and not self._survive(
                "TensorBoard", self.writer.add_scalar, f"{prefix}/{key}", value, step
            ):
                self.writer = None

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """Write preview-STEP[-NAME].png, and add it to TensorBoard."""
        ending = f"-{name}" if name else ""
        path = self.logs / f"preview-{step:06d}{ending}.png"
        self._survive(path.name, save_png, image, path, {})
        if self.writer is not None:
            pixels = pil_to_tensor(image)
            self._survive("TensorBoard", self.writer.add_image, f"preview{ending}", pixels, step)

    def line(self, line: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl, dropping lines of steps after the last checkpoint."""
        if not self.main:
            return
        path = self.logs / "metrics.jsonl"
        lines = [one.model_dump(exclude_unset=True) for one in read_measurements(path)]
        kept = [json.dumps(one) for one in lines if one["step"] < line["step"]]
        self._survive(path.name, write_text, path, "\n".join([*kept, json.dumps(line)]) + "\n")

    def _survive(self, what: str, write: Callable[..., object], *values: Any) -> bool:
        """Call write(*values); an OSError gives a warning, and False."""
        try:
            write(*values)
        except OSError as error:
            why = error.strerror or error
            self.message(f"warning: {what} not written ({why}); training continues")
            return False
        return True

    def message(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.main:
            self.bar.write(text)


def start_wandb(logs: Path, config: RunConfig) -> Any:
    """The Weights & Biases run of this training, new or resumed; it mirrors TensorBoard."""
    try:
        import wandb
    except ImportError:
        raise ValueError("wandb is not installed: pip install 'moveimg[wandb]'") from None
    path = logs / "wandb-id"
    if not path.is_file():
        write_text(path, secrets.token_hex(4))
    return wandb.init(
        project="moveimg",
        name=config.out.name,
        id=path.read_text(encoding="utf-8"),
        resume="allow",
        dir=str(logs),
        config=config.model_dump(mode="json"),
        sync_tensorboard=True,
    )


def data_sheet_peak(name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device by its name; None if it is not in PEAK_FLOPS."""
    peaks = (flops for key, flops in PEAK_FLOPS.items() if re.search(rf"\b{key}\b", name))
    return next(peaks, None)


@torch.no_grad()
def gate_statistics(model: Transformer, forward: Callable[[], object]) -> dict[str, float]:
    """Means of the gates over layers, heads and positions, and their shares near 0 and 2.

    g_0 gates the standard values, g_i the slots. `forward` runs the model over some codes. Without
    value memory, nothing is run and the result is empty.
    """
    if not mixers_by_layer(model):
        return {}
    gates: dict[str, list[Tensor]] = {"g_0": [], "g_i": []}

    def record(layer: int, mixing: Mixing) -> None:
        for name, seen in gates.items():
            if (values := getattr(mixing, name)) is not None:
                seen.append(values.float().flatten())

    with record_mixing(model, record):
        forward()
    scalars = {}
    for name, values in ((name, torch.cat(seen)) for name, seen in gates.items() if seen):
        scalars[name] = values.mean().item()
        scalars[f"{name}_near_0"] = (values < NEAR_ZERO).float().mean().item()
        scalars[f"{name}_near_2"] = (values > NEAR_TWO).float().mean().item()
    return scalars
