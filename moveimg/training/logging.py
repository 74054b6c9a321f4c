"""Logging of a run: TensorBoard, Weights & Biases, progress bar, previews, metrics.jsonl."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from moveimg.config import RunConfig
from moveimg.files import write_text
from moveimg.images import save_png
from moveimg.progress import progress_bar
from moveimg.training.settings import read_measurements


class RunLogger:
    """Writes the logs of a run, on rank 0 only.

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
            self.writer.close()
        if self.wandb is not None:
            self.wandb.finish(exit_code=int(error[0] is not None))

    def scalars(self, prefix: str, values: dict[str, float], step: int) -> None:
        """Add numbers to TensorBoard as `prefix/key`."""
        for key, value in values.items():
            if self.writer is not None:
                self.writer.add_scalar(f"{prefix}/{key}", value, step)

    def image(self, image: Image.Image, step: int) -> None:
        """Write preview-STEP.png, and add it to TensorBoard."""
        save_png(image, self.logs / f"preview-{step:06d}.png", {})
        if self.writer is not None:
            self.writer.add_image("preview", pil_to_tensor(image), step)

    def line(self, line: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl, dropping lines of steps after the last checkpoint."""
        if self.main:
            path = self.logs / "metrics.jsonl"
            lines = [one.model_dump(exclude_unset=True) for one in read_measurements(path)]
            kept = [json.dumps(one) for one in lines if one["step"] < line["step"]]
            write_text(path, "\n".join([*kept, json.dumps(line)]) + "\n")
            self.message(", ".join(f"{key} {value:.5g}" for key, value in line.items()))

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
