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
from moveimg.files import read_json, write_text

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
        there = read_json(data) if data.is_file() else identity  # older runs did not say
        for key, now in identity.items():
            if there.get(key) != now:
                raise ValueError(
                    f"{config.out}: holds a run on other data ({key}: {str(there.get(key))[:12]}, "
                    f"now {now[:12]}); choose another `out`, or start over with --restart"
                )
    write_text(described, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    write_text(data, json.dumps(identity, indent=1) + "\n")


def changed_settings(described: Path, config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Settings of the run whose config.yaml is `described` that differ in `config`: before, now.

    A key that is newer than the run had its default then. Raises ValueError for a damaged file.
    """
    try:
        before = yaml.safe_load(described.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        before = None
    if not isinstance(before, dict):
        raise ValueError(f"{described}: damaged, no settings in it; start over with --restart")
    with suppress(ValidationError):  # of a run by another version, compared as it stands
        before = type(config).model_validate(before).model_dump(mode="json")
    now = config.model_dump(mode="json")
    keys = [k for k in now if k not in MAY_CHANGE and before.get(k) != now[k]]
    return {key: (before.get(key), now[key]) for key in keys}


def require_same(described: Path, config: RunConfig) -> None:
    """Raise ValueError, naming the first difference, unless the run there has these settings."""
    for key, (before, now) in changed_settings(described, config).items():
        raise ValueError(
            f"{config.out}: holds a run with other settings ({key}: {before}, now {now}); "
            "choose another `out`, or start over with --restart"
        )


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
