"""Logging of a run: TensorBoard, Weights & Biases, progress bar, metrics.jsonl, gates, MFU."""

from __future__ import annotations

import json
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from moveimg.config import RunConfig
from moveimg.files import atomic, write_text
from moveimg.model import (
    DEVICES,
    NEAR_TWO,
    NEAR_ZERO,
    Mixing,
    Transformer,
    mixers_by_layer,
    record_mixing,
)
from moveimg.progress import progress_bar
from moveimg.training.settings import read_measurements


class RunLogger:
    """Writes the logs of a run, on rank 0 only.

    Raises ValueError if Weights & Biases is wanted and not installed.
    """

    def __init__(self, logs: Path, config: RunConfig, step: int, main: bool) -> None:
        self.logs, self.main = logs, main
        self.writer: SummaryWriter | None = None
        self.wandb: Any = None
        if not main:
            self.bar = tqdm(disable=True)
            return
        if config.wandb:
            self.wandb = start_wandb(logs, config)
        self.hook = threading.excepthook
        threading.excepthook = self._hide_writer_errors
        self.writer = SummaryWriter(str(logs), purge_step=step)
        self.bar = progress_bar(config.steps, "train", "step", step)

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
        self._write_event(SummaryWriter.close)
        if self.main:
            threading.excepthook = self.hook
        if self.wandb is not None:
            self.wandb.finish(exit_code=int(error[0] is not None))

    def scalars(self, prefix: str, values: dict[str, float], step: int) -> None:
        """Add numbers to TensorBoard as `prefix/key`."""
        for key, value in values.items():
            self._write_event(SummaryWriter.add_scalar, f"{prefix}/{key}", value, step)

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """Write preview-STEP[-NAME].png, and add it to TensorBoard."""
        if not self.main:
            return
        ending = f"-{name}" if name else ""
        path = self.logs / f"preview-{step:06d}{ending}.png"
        with self._survive_full_disk(path.name), atomic(path) as temporary:
            image.save(temporary)
        self._write_event(SummaryWriter.add_image, f"preview{ending}", pil_to_tensor(image), step)

    def line(self, line: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl, dropping lines of steps after the last checkpoint."""
        if not self.main:
            return
        path = self.logs / "metrics.jsonl"
        lines = [one.model_dump(exclude_unset=True) for one in read_measurements(path)]
        kept = [json.dumps(one) for one in lines if one["step"] < line["step"]]
        with self._survive_full_disk(path.name):
            write_text(path, "\n".join([*kept, json.dumps(line)]) + "\n")

    def _write_event(self, call: Callable[..., None], *values: Any) -> None:
        """call(writer, *values), until a full disk ends the writer's thread, with a warning."""
        if self.writer is None:
            return
        try:
            call(self.writer, *values)
        except OSError as error:
            self.writer = None
            why = error.strerror or error
            self.message(f"warning: TensorBoard gets nothing more ({why}); training continues")

    def _hide_writer_errors(self, failure: threading.ExceptHookArgs) -> None:
        """Print no traceback of TensorBoard's thread, whose error its next call raises again."""
        events = type(failure.thread).__module__.startswith("tensorboard.")
        if not (events and isinstance(failure.exc_value, OSError)):
            self.hook(failure)

    @contextmanager
    def _survive_full_disk(self, name: str) -> Iterator[None]:
        """Turn an OSError into a warning."""
        try:
            yield
        except OSError as error:
            why = error.strerror or error
            self.message(f"warning: {name} not written ({why}); training continues")

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


# --- rates ---------------------------------------------------------------------------------


@cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s of a device in `dtype`: by its data sheet, or measured by matrix products."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        known = data_sheet_peak(torch.cuda.get_device_name(device))
        if known is not None:
            return known
    side, tries = (512, 20) if device.type == "cpu" else (8192, 5)
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    seconds = []
    for _ in range(tries):
        begun = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        seconds.append(time.perf_counter() - begun)
    return 2 * side**3 / min(seconds)


def data_sheet_peak(name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device by its name; None if it is not in DEVICES."""
    peaks = (device.flops for key, device in DEVICES.items() if re.search(rf"\b{key}\b", name))
    return next(peaks, None)


# --- gates ---------------------------------------------------------------------------------


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
    for name, seen in gates.items():
        if seen:
            values = torch.cat(seen)
            scalars[name] = values.mean().item()
            scalars[f"{name}_near_0"] = (values < NEAR_ZERO).float().mean().item()
            scalars[f"{name}_near_2"] = (values > NEAR_TWO).float().mean().item()
    return scalars
