"""Settings, data and held-out scores of a run in training/, compared when the run continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from moveimg.config import RunConfig
from moveimg.errors import shorten, validate
from moveimg.files import parse_json, read_json, read_text, read_yaml, write_json, write_text

# Settings that may differ when a run continues: no result depends on them, but for rounding.
MAY_CHANGE = ("out", "log_every", "validate_every", "preview_every", "checkpoint_every", "wandb",
              "keep_checkpoints", "distributed", "activation_checkpointing", "compile")  # fmt: skip


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
    directory with a run of other settings or on other data. More steps are the same run where the
    learning rate does not depend on their number.
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
                "choose another `out` (and `init_from`), or start over with --restart"
            )
        if data.is_file() and read_json(data) != identity:
            raise ValueError(f"{data}: of a run on other data; start over with --restart")
    write_text(described, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    write_json(data, identity)


def changed_settings(described: Path, config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Settings in which a run's config.yaml differs from `config`, by dotted key: before and now.

    A key that is newer than the run had its default then. Raises ValueError for a damaged file.
    """
    stored = read_yaml(described)
    if isinstance(stored, dict):  # without what later versions have dropped
        stored = {key: value for key, value in stored.items() if key in type(config).model_fields}
    before = flatten_settings(validate(type(config), stored, str(described)), MAY_CHANGE)
    return differing(before, flatten_settings(config, MAY_CHANGE))


def flatten_settings(config: RunConfig, left_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """The settings of a run by dotted key, without the keys `left_out` and all below them."""
    flat, nested = {}, config.model_dump(mode="json")
    while nested:
        key = next(iter(nested))
        value = nested.pop(key)
        if f"{key}.".startswith(tuple(f"{name}." for name in left_out)):
            continue
        if isinstance(value, dict):
            nested = {f"{key}.{inner}": v for inner, v in value.items()} | nested
        else:
            flat[key] = value
    return flat


def differing(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ in two flat dictionaries, with both values."""
    return {key: (a.get(key), b.get(key)) for key in a | b if a.get(key) != b.get(key)}
