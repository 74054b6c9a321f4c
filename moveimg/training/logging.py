"""The logs of a run in training/: settings, held-out scores, previews, TensorBoard, wandb."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from pydantic import BaseModel, ConfigDict
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from moveimg.config import RunConfig
from moveimg.errors import shorten, validate
from moveimg.files import parse_json, read_json, read_text, read_yaml, write_json, write_text
from moveimg.images import save_png
from moveimg.progress import progress_bar

# Settings that may differ when a run continues: they change results by rounding at most.
MAY_CHANGE = ("out", "log_every", "validate_every", "preview_every", "checkpoint_every", "wandb",
              "memory_every", "keep_checkpoints", "distributed", "activation_checkpointing",
              "compile")  # fmt: skip


MAX_LOG = 2**30  # bytes of a log that is read


class Measurement(BaseModel):
    """A line of metrics.jsonl (held-out scores at a step, and their cost) or records.jsonl."""

    model_config = ConfigDict(extra="allow")

    step: int
    seconds: float = 0.0
    peak_memory: int | None = None
    loss: float | None = None
    accuracy: float | None = None


def read_measurements(path: Path) -> list[Measurement]:
    """The parsed lines of a metrics or records file; [] if it is missing. ValueError if damaged.

    A last line without its end, as a full disk leaves it, is ignored.
    """
    text = read_text(path, MAX_LOG) if path.is_file() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [validate(Measurement, parse_json(line, str(path)), str(path)) for line in lines]


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics or records file as dictionaries (see read_measurements)."""
    return [line.model_dump(exclude_unset=True) for line in read_measurements(path)]


def check_or_write_settings(logs: Path, config: RunConfig, identity: dict[str, str]) -> None:
    """Write config.yaml and data.json into `logs`; ValueError for a run of other settings or data.

    `identity` has digests of the data by name. With a constant learning rate, `steps` may grow.
    """
    described, data = logs / "config.yaml", logs / "data.json"
    if described.is_file():
        changes = changed_settings(described, config)
        old, new = changes.get("steps", (0, 0))
        if new > old and config.optimizer.schedule == "constant":
            del changes["steps"]
        for key, (before, now) in changes.items():
            raise ValueError(
                f"{config.out}: holds a run with {key} {shorten(before)}, now {shorten(now)}; "
                "choose another `out` (`init_from` reuses the weights), or --restart"
            )
        if data.is_file() and read_json(data) != identity:
            raise ValueError(f"{data}: the run used other data; start over with --restart")
    write_text(described, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    write_json(data, identity)


def changed_settings(described: Path, config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Settings in which a run's config.yaml differs from `config`: {dotted key: (before, now)}.

    Keys that the file lacks have their defaults; unknown top-level keys are ignored.
    """
    stored = read_yaml(described)
    if isinstance(stored, dict):
        stored = {key: value for key, value in stored.items() if key in type(config).model_fields}
    before = flatten_settings(validate(type(config), stored, str(described)), MAY_CHANGE)
    return find_differences(before, flatten_settings(config, MAY_CHANGE))


def flatten_settings(config: RunConfig, left_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """The settings of a run by dotted key, without the keys `left_out` and all below them."""

    def flatten(value: Any, key: str = "") -> dict[str, Any]:
        if key.startswith(tuple(f"{name}." for name in left_out)):
            return {}
        if not isinstance(value, dict):
            return {key[:-1]: value}
        return {k: v for inner in value for k, v in flatten(value[inner], f"{key}{inner}.").items()}

    return flatten(config.model_dump(mode="json"))


def find_differences(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ in two flat dictionaries, with both values."""
    return {key: (a.get(key), b.get(key)) for key in a | b if a.get(key) != b.get(key)}


class RunLogger:
    """Writes the logs of a run, on rank 0 only."""

    def __init__(self, logs: Path, config: RunConfig, step: int, main: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter  # importing it takes a second

        self.logs, self.main, self.wandb = logs, main, None
        for path in (logs / "metrics.jsonl", logs / "records.jsonl") if main else ():
            if path.is_file():  # a resumed run writes its later lines again
                kept = [line for line in read_records(path) if line["step"] <= step]
                write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        if main and config.wandb:
            try:
                import wandb
            except ImportError:
                raise ValueError("wandb is not installed: pip install 'moveimg[wandb]'") from None
            options = {"name": config.out.name, "config": config.model_dump(mode="json")}
            self.wandb = wandb.init(
                project="moveimg", dir=str(logs), resume="auto", sync_tensorboard=True, **options
            )
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

    def record(self, step: int, record: dict[str, Any]) -> None:
        """Add a line to records.jsonl, and its numbers to TensorBoard, on rank 0."""
        self._append("records.jsonl", {"step": step, **record})
        self.scalars("memory", {k: v for k, v in record.items() if isinstance(v, float)}, step)
        for key in ("by_layer", "g_0", "slots"):
            values = {f"{key}/layer {layer}": v for layer, v in record.get(key, {}).items()}
            self.scalars("memory", values, step)

    def image(self, image: Image.Image, step: int) -> None:
        """Write preview-STEP.png, and add it to TensorBoard."""
        save_png(image, self.logs / f"preview-{step:06d}.png", {})
        if self.writer is not None:
            self.writer.add_image("preview", pil_to_tensor(image), step)

    def line(self, line: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl, and print it."""
        if self.main:
            self._append("metrics.jsonl", line)
            self.message(", ".join(f"{key} {value:.5g}" for key, value in line.items()))

    def _append(self, name: str, line: dict[str, Any]) -> None:
        with (self.logs / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def message(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.main:
            self.bar.write(text)
