"""The runs of a comparison: which there are, whether they are comparable, what they have left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moveimg.checkpoint import read_about
from moveimg.config import TrainConfig, load_config
from moveimg.training.record import changed_settings

# What the configs may differ in: the three slots and the size.
COMPARED = {"attention", "memory", "ffn", "n_layer", "n_head", "width"}
OF_THE_CODES = {"codebook_size", "n_classes", "grid"}  # the same for all where they are left out


@dataclass(frozen=True)
class OneRun:
    """A config with a seed, and where it is trained."""

    name: str
    seed: int
    path: Path
    config: TrainConfig

    @property
    def directory(self) -> Path:
        return self.config.out

    def measurements(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl: step, seconds, peak_memory, loss, ..."""
        path = self.directory / "training" / "metrics.jsonl"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        return [json.loads(line) for line in text.splitlines()]

    def finished(self) -> bool:
        """Whether its directory holds this run, measured and exported at its last step."""
        described = self.directory / "training" / "config.yaml"
        exported = [self.directory / name for name in ("config.json", "model.safetensors")]
        if not all(path.is_file() for path in (described, *exported)):
            return False
        steps, lines = self.config.steps, self.measurements()
        if not lines or lines[-1]["step"] != steps:
            return False
        # Killed after its last measurement, a run still has an earlier step's model.
        return read_about(self.directory).get("step") == steps and not self.changed()

    def changed(self) -> dict[str, tuple[Any, Any]]:
        """Settings in which a run that its directory holds differs from this one: before, now."""
        described = self.directory / "training" / "config.yaml"
        return changed_settings(described, self.config) if described.is_file() else {}


def plan(
    configs: Sequence[Path], seeds: Sequence[int], out: Path, overrides: Sequence[str]
) -> list[OneRun]:
    """Every config with every seed, as runs in out/NAME-seedN.

    Raises ValueError when two configs have one name or differ in more than their slots and size,
    or when a run's folder holds another run.
    """
    loaded = {path.stem: (path, load_config(path, TrainConfig, overrides)) for path in configs}
    if len(loaded) != len(configs):
        raise ValueError("two configs have the same file name: expected different ones")
    (first, (_, config)), *others = loaded.items()
    wanted = flat(shared_settings(config))
    for name, (_, other) in others:
        found = flat(shared_settings(other))
        for key in (*wanted, *(key for key in found if key not in wanted)):
            if key.removeprefix("model.") in OF_THE_CODES and not (key in wanted and key in found):
                continue
            if wanted.get(key) != found.get(key):
                raise ValueError(
                    f"{first} and {name} differ in {key} ({wanted.get(key)}, {found.get(key)}): "
                    "expected the same settings but for the model's attention, memory, ffn and size"
                )
    runs = [
        OneRun(name, seed, path, config.model_copy(update={"seed": seed, "out": directory}))
        for name, (path, config) in loaded.items()
        for seed in seeds
        for directory in [out / f"{name}-seed{seed}"]
    ]
    for run in runs:
        for key, (before, now) in run.changed().items():
            raise ValueError(
                f"{run.directory}: holds a run with other settings ({key}: {before}, now {now}); "
                f"choose another --out, or remove {run.directory}"
            )
    return runs


def shared_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that runs of one comparison have in common."""
    settings = config.model_dump(mode="json", exclude={"out", "seed"})
    given = config.model.model_fields_set
    settings["model"] = {
        key: value
        for key, value in settings["model"].items()
        if key not in COMPARED and (key not in OF_THE_CODES or key in given)
    }
    return settings


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def outcome(runs: Sequence[OneRun]) -> dict[str, Any]:
    """The finished runs of one config: each one's last measurement, and all held-out losses.

    `peak_memory` is the largest of all lines: a run that was stopped has had several processes.
    """
    found = []
    for run in runs:
        lines = run.measurements()
        last = lines[-1]
        found.append(
            {
                "seed": run.seed,
                "loss": last["loss"],
                "accuracy": last.get("accuracy"),
                "steps_per_second": last["step"] / max(last["seconds"], 1e-9),
                "peak_memory": max(line.get("peak_memory") or 0 for line in lines) or None,
                "curve": [[line["step"], line["loss"]] for line in lines],
            }
        )
    return {"runs": found}
