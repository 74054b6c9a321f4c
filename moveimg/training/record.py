"""What a run says of itself in training/: its settings, its data, and why it stopped."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from torch import Tensor

from moveimg.config import RunConfig
from moveimg.errors import shorten
from moveimg.files import read_json, read_yaml, write_text

# What may differ between the start of a run and its continuation: no result depends on it, but
# for rounding.
MAY_CHANGE = {
    "log_every", "validate_every", "preview_every", "checkpoint_every", "out", "keep_checkpoints",
    "wandb", "distributed", "activation_checkpointing", "compile", "evaluation",
}  # fmt: skip
SHOWN = 8  # image indices in an error line


def keep_record(logs: Path, config: RunConfig, identity: dict[str, str]) -> None:
    """Write training/config.yaml and data.json, or compare with what is there.

    Args:
        logs: the run's training folder.
        config: its settings.
        identity: digests of what it is trained on.

    Raises ValueError, naming the first difference, where a run of other settings or data is there.
    """
    described, data = logs / "config.yaml", logs / "data.json"
    if described.is_file():
        require_same(described, config)
        present = read_json(data) if data.is_file() else identity  # older runs did not say
        if not isinstance(present, dict):
            raise ValueError(f"{data}: damaged, expected digests; start over with --restart")
        for key, now in identity.items():
            if present.get(key) != now:
                raise ValueError(
                    f"{config.out}: holds a run on other data (the {key} have changed since it "
                    "began); choose another `out`, or start over with --restart"
                )
    write_text(described, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    write_text(data, json.dumps(identity, indent=1) + "\n")


def changed_settings(described: Path, config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Settings of the run whose config.yaml is `described` that differ in `config`: before, now.

    A key that is newer than the run had its default then. Raises ValueError for a damaged file.
    """
    try:
        before = read_yaml(described)
    except ValueError:
        before = None
    if not isinstance(before, dict):
        raise ValueError(f"{described}: damaged, no settings in it; start over with --restart")
    with suppress(ValidationError):  # of a run by another version, compared as it stands
        before = type(config).model_validate(before).model_dump(mode="json")
    now = config.model_dump(mode="json")
    keys = [k for k in now if k not in MAY_CHANGE and before.get(k) != now[k]]
    return {key: (before.get(key), now[key]) for key in keys}


def require_same(described: Path, config: RunConfig) -> None:
    """Raise ValueError, naming the keys, unless the run there has these settings.

    More steps are the same run where the learning rate does not depend on their number.
    """
    changes = changed_settings(described, config)
    if "steps" in changes:
        before, now = changes.pop("steps")
        if config.optimizer.schedule == "cosine":
            raise ValueError(
                f"{config.out}: holds a run of {before} steps, {now} asked: its cosine schedule "
                f"ends at step {before}, so it cannot be continued; start a new run from it by "
                f"--init-from {config.out} and another `out`"
            )
        if now < before:
            raise ValueError(
                f"{config.out}: holds a run of {before} steps, {now} asked: expected more"
            )
    if changes:
        details = "; ".join(
            f"{key} is {shorten(before)} there, {shorten(now)} asked"
            for key, (before, now) in list(flatten_changes(changes).items())[:SHOWN]
        )
        raise ValueError(
            f"{config.out}: holds a run with other settings ({details}); choose another `out`, or "
            "start over with --restart"
        )


def flatten_changes(changes: dict[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    """Changed values by their full key path, such as model.memory.slots."""
    flat: dict[str, tuple[Any, Any]] = {}
    for key, (before, now) in changes.items():
        if isinstance(before, dict) and isinstance(now, dict):
            inner = {k: (before.get(k), now.get(k)) for k in before | now}
            differ = {k: pair for k, pair in inner.items() if pair[0] != pair[1]}
            flat |= {f"{key}.{k}": pair for k, pair in flatten_changes(differ).items()}
        else:
            flat[key] = (before, now)
    return flat


def non_finite(
    logs: Path | None, config: RunConfig, step: int, losses: Tensor, indices: list[int]
) -> ValueError:
    """The error of a loss that is not finite (nan, too, where its gradient is not).

    With `logs`, training/non-finite.json is written, too.

    Args:
        logs: where to write the whole story.
        config: the run's settings.
        step: the first step, from 0, whose loss is not finite.
        losses: of the recent steps, that one among them.
        indices: the images of its batch.
    """
    bad = losses[~losses.isfinite()][0].item()
    of = ""
    if indices:
        more = ", ..." if len(indices) > SHOWN else ""
        of = f" on images {', '.join(map(str, indices[:SHOWN]))}{more}"
    where = ""
    if logs is not None:
        story = {"step": step, "losses": [str(x) for x in losses.tolist()], "images": indices}
        write_text(logs / "non-finite.json", json.dumps(story) + "\n")
        where = f" (all in {logs / 'non-finite.json'})"
    return ValueError(
        f"loss {bad} at step {step}{of}: not finite{where}; try a lower optimizer.lr (now "
        f"{config.optimizer.lr}), a longer optimizer.warmup or a smaller optimizer.clip, and "
        "--restart; checkpoints are from before"
    )
