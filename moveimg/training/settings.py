"""Settings and data of a run in training/, compared when the run continues."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from moveimg.config import RunConfig
from moveimg.errors import shorten, validate
from moveimg.files import parse_json, read_json, read_text, read_yaml, write_text

# Settings that may differ when a run continues: no result depends on them, but for rounding.
MAY_CHANGE = {
    "log_every", "validate_every", "preview_every", "checkpoint_every", "out", "keep_checkpoints",
    "wandb", "distributed", "activation_checkpointing", "compile", "evaluation",
}  # fmt: skip
SHOWN = 8  # changed settings in an error line


class Measurement(BaseModel):
    """A line of metrics.jsonl: held-out scores at a step, and what it took to get there."""

    model_config = ConfigDict(extra="allow")

    step: int
    seconds: float = 0.0
    peak_memory: int | None = None
    loss: float | None = None
    accuracy: float | None = None


def read_measurements(path: Path) -> list[Measurement]:
    """The lines of a metrics.jsonl; none without the file. ValueError for other content."""
    lines = read_text(path).splitlines() if path.is_file() else []
    return [validate(Measurement, parse_json(line, str(path)), str(path)) for line in lines]


def check_or_write_settings(logs: Path, config: RunConfig, identity: dict[str, str]) -> None:
    """Write training/config.yaml and data.json, after a comparison with those of an earlier start.

    `identity` has digests of the data by name. Raises ValueError, naming what differs, for a
    directory with a run of other settings or on other data.
    """
    described, data = logs / "config.yaml", logs / "data.json"
    if described.is_file():
        require_same_settings(described, config)
        present = read_json(data) if data.is_file() else identity  # older runs had no data.json
        present = validate(dict[str, str], present, f"{data}: damaged, start over with --restart")
        for key, now in identity.items():
            if present.get(key) != now:
                raise ValueError(
                    f"{config.out}: holds a run on other data (the {key} have changed since it "
                    "began); choose another `out`, or start over with --restart"
                )
    write_text(described, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    write_text(data, json.dumps(identity, indent=1) + "\n")


def require_same_settings(described: Path, config: RunConfig) -> None:
    """Raise ValueError, naming keys and values, unless config.yaml has the settings of `config`.

    More steps are the same run where the learning rate does not depend on their number. A key
    that is newer than the run had its default then.
    """
    before = None
    with suppress(ValueError):
        before = read_yaml(described)
    if not isinstance(before, dict):
        raise ValueError(f"{described}: damaged, no settings in it; start over with --restart")
    with suppress(ValidationError):  # settings of another version are compared unchanged
        before = type(config).model_validate(before).model_dump(mode="json")
    changes = find_changes(
        {key: value for key, value in before.items() if key not in MAY_CHANGE},
        config.model_dump(mode="json", exclude=MAY_CHANGE),
    )
    if "steps" in changes:
        old, new = changes.pop("steps")
        if config.optimizer.schedule == "cosine":
            raise ValueError(
                f"{config.out}: holds a run of {old} steps, {new} asked: its cosine schedule "
                f"ends at step {old}, so it cannot be continued; start a new run from it by "
                f"--init-from {config.out} and another `out`"
            )
        if new < old:
            raise ValueError(f"{config.out}: holds a run of {old} steps, {new} asked: too few")
    if changes:
        details = "; ".join(
            f"{key[:100]} is {shorten(old)} there, {shorten(new)} asked"
            for key, (old, new) in list(changes.items())[:SHOWN]
        )
        raise ValueError(
            f"{config.out}: holds a run with other settings ({details}); choose another `out`, or "
            "start over with --restart"
        )


def find_changes(before: Any, now: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Values that differ, old and new, by their key path, such as model.memory.slots."""
    if before == now:
        return {}
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return {path: (before, now)}
    found: dict[str, tuple[Any, Any]] = {}
    for key in before | now if path else now:  # settings that a newer version has dropped are none
        inner = f"{path}.{key}" if path else key
        found |= find_changes(before.get(key), now.get(key), inner)
    return found
