"""What a run shows while it trains: TensorBoard, Weights & Biases, the bar, metrics.jsonl."""

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
from moveimg.model import NEAR_TWO, NEAR_ZERO, GatedMixer, Transformer
from moveimg.progress import progress_bar

# Dense bfloat16 FLOP/s of the vendor's data sheets, by a part of the device's name; the first wins.
PEAKS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12,
    "L40S": 362e12, "L4": 121e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


class Journal:
    """The files and the bar of a run; in processes other than the first, nothing happens.

    Raises ValueError where Weights & Biases is asked for and not installed.
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
        threading.excepthook = self._quiet
        self.writer = SummaryWriter(str(logs), purge_step=step)
        self.bar = progress_bar(config.steps, "train", "step", step)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
        self._events(SummaryWriter.close)
        if self.main:
            threading.excepthook = self.hook
        if self.wandb is not None:
            self.wandb.finish(exit_code=int(error[0] is not None))

    def scalars(self, prefix: str, values: dict[str, float], step: int) -> None:
        """Add numbers to TensorBoard as `prefix/key`."""
        for key, value in values.items():
            self._events(SummaryWriter.add_scalar, f"{prefix}/{key}", value, step)

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        """Write preview-STEP[-NAME].png, and add it to TensorBoard."""
        if not self.main:
            return
        ending = f"-{name}" if name else ""
        path = self.logs / f"preview-{step:06d}{ending}.png"
        with self._spared(f"the preview of step {step}"), atomic(path) as temporary:
            picture.save(temporary)
        self._events(SummaryWriter.add_image, f"preview{ending}", pil_to_tensor(picture), step)

    def line(self, line: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl, dropping lines of steps that a crash undid."""
        if not self.main:
            return
        path = self.logs / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        kept = [text for text in lines if json.loads(text)["step"] < line["step"]]
        with self._spared(path.name):
            write_text(path, "\n".join([*kept, json.dumps(line)]) + "\n")

    def _events(self, call: Callable[..., None], *values: Any) -> None:
        """call(writer, *values), until a full disk ends the writer's thread: that is told once."""
        if self.writer is None:
            return
        try:
            call(self.writer, *values)
        except OSError as error:
            self.writer = None
            why = error.strerror or error
            self.message(f"warning: TensorBoard gets nothing more ({why}); training continues")

    def _quiet(self, failure: threading.ExceptHookArgs) -> None:
        """No traceback of that thread: what ended it is raised again by the writer's next call."""
        events = type(failure.thread).__module__.startswith("tensorboard.")
        if not (events and isinstance(failure.exc_value, OSError)):
            self.hook(failure)

    @contextmanager
    def _spared(self, what: str) -> Iterator[None]:
        """A full disk costs what is shown of a run, not the run."""
        try:
            yield
        except OSError as error:
            self.message(
                f"warning: {what} not written ({error.strerror or error}); training goes on"
            )

    def message(self, text: str) -> None:
        """A line above the bar."""
        if self.main:
            self.bar.write(text)


def start_wandb(logs: Path, config: RunConfig) -> Any:
    """A Weights & Biases run that mirrors TensorBoard; a resumed training goes on in its own."""
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
    """FLOP/s that the device could do in `dtype`: its data sheet's, or a matrix product's.

    What no table here knows is measured once: the best of some products of square matrices.
    """
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
    """Dense bfloat16 FLOP/s of a device by its name; None where the table lacks it."""
    found = (peak for part, peak in PEAKS.items() if re.search(rf"\b{part}\b", name))
    return next(found, None)


# --- gates ---------------------------------------------------------------------------------


@torch.no_grad()
def gate_statistics(model: Transformer, read: Callable[[], object]) -> dict[str, float]:
    """Means of the gates over layers, heads and positions, and their shares near 0 and 2.

    g_0 is the gate of the standard values, g_i those of the memory. Empty without memory.

    Args:
        model: whose gates.
        read: runs it over some codes.
    """
    seen: dict[str, list[Tensor]] = {"g_0": [], "g_i": []}

    def hook(mixer: GatedMixer, args: tuple[Tensor, ...]) -> None:
        x = args[0][:, 1:]  # no code stands at the class token's place
        for name, gates in zip(seen, mixer.gates(x), strict=True):
            if gates is not None:
                seen[name].append(gates.float().flatten())

    mixers = [module for module in model.modules() if isinstance(module, GatedMixer)]
    handles = [mixer.register_forward_pre_hook(hook) for mixer in mixers]
    try:
        if mixers:
            read()
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, parts in seen.items():
        if parts:
            gates = torch.cat(parts)
            found[name] = gates.mean().item()
            found[f"{name}_near_0"] = (gates < NEAR_ZERO).float().mean().item()
            found[f"{name}_near_2"] = (gates > NEAR_TWO).float().mean().item()
    return found
