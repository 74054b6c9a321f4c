"""The training loop, the same for every task.

A step is a function of (seed, step): its batch, its dropout and its learning rate follow from
those two, so a run that was stopped and resumed computes what an uninterrupted one would have.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from PIL import Image
from pydantic import ValidationError
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from moveimg.config import RunConfig
from moveimg.device import peak_memory
from moveimg.files import atomic, write_text
from moveimg.progress import progress_bar
from moveimg.training.optimizer import clip_gradients, learning_rate, make_optimizer, set_rate

# What may differ between the start of a run and its continuation.
MAY_CHANGE = {"log_every", "validate_every", "preview_every", "checkpoint_every", "out"}


class Task(Protocol):
    """What is trained: a model, its loss, and what to show and keep of it."""

    model: nn.Module

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The step's loss with its graph, and scalars to log."""

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Held-out scalars; the first is what the run is judged by."""

    def preview(self, model: nn.Module) -> Image.Image:
        """A picture of what the model can do."""

    def export(self, model: nn.Module, directory: Path, about: dict[str, Any]) -> None:
        """Write what the run makes into its directory."""

    def extra_state(self) -> dict[str, Any]:
        """What a checkpoint must hold beside weights and optimizer."""

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take back what extra_state gave."""


def fit(task: Task, config: RunConfig, device: torch.device, restart: bool = False) -> dict:
    """Train `task` for config.steps steps in config.out; continue there if a run was stopped.

    Args:
        task: model (on `device`), loss and outputs.
        config: the run's settings.
        device: where the model is.
        restart: throw an earlier run in config.out away first.

    Returns:
        the last held-out scalars, with `seconds` of training so far.

    Raises:
        ValueError: config.out holds a run with other settings or a damaged checkpoint, or the
            loss is not finite.
    """
    run = Run(task, config, device)
    run.open(restart)
    bar = progress_bar(config.steps, "train", "step", run.step)
    with SummaryWriter(str(run.logs), purge_step=run.step) as writer, bar:
        while run.step < config.steps:
            scalars = run.advance()
            bar.update()
            run.report(scalars, writer, bar)
    return run.finish()


class Run:
    """A run's state: step, weights, their average, the optimizer, and the files they live in."""

    def __init__(self, task: Task, config: RunConfig, device: torch.device) -> None:
        self.task, self.config, self.device = task, config, device
        self.logs = config.out / "training"
        self.optimizer = make_optimizer(task.model, config.optimizer)
        self.ema = ModelEmaV3(task.model, decay=config.ema, use_warmup=True) if config.ema else None
        self.step = 0
        self.seconds = 0.0
        self.held_out: dict[str, float] = {}
        self.recent: deque[Tensor] = deque(maxlen=config.log_every)

    @property
    def averaged(self) -> nn.Module:
        """The weights that are validated, shown and exported."""
        return self.task.model if self.ema is None else self.ema.module

    def advance(self) -> dict[str, Tensor]:
        """One optimizer step; returns its scalars, still on the device."""
        begun = time.perf_counter()
        config, model = self.config, self.task.model
        model.train()
        torch.manual_seed(config.seed * 1_000_003 + self.step)
        rate = learning_rate(config.optimizer, self.step, config.steps)
        set_rate(self.optimizer, rate)
        loss, scalars = self.task.loss(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = clip_gradients(self.optimizer, config.optimizer)
        self.optimizer.step()
        self.step += 1
        if self.ema is not None:
            self.ema.update(model, step=self.step)
        self.recent.append(loss.detach())
        self.seconds += time.perf_counter() - begun
        return {"loss": loss.detach(), **scalars, "grad_norm": norm, "lr": torch.tensor(rate)}

    def report(self, scalars: dict[str, Tensor], writer: SummaryWriter, bar: tqdm) -> None:
        """Log, validate, preview and checkpoint, each when it is due."""
        config, last = self.config, self.step == self.config.steps
        if self.step % config.log_every == 0 or last:
            self._log(scalars, writer, bar)
        if self.step % config.validate_every == 0 or last:
            self.held_out = self.task.validate(self.averaged.eval())
            for key, value in self.held_out.items():
                writer.add_scalar(f"val/{key}", value, self.step)
            spent = {"seconds": round(self.seconds, 2), "peak_memory": peak_memory(self.device)}
            self._append({"step": self.step, **spent, **self.held_out})
            bar.write(f"step {self.step}: {_join(self.held_out)}")
        if self.step % config.preview_every == 0 or last:
            picture = self.task.preview(self.averaged.eval())
            with atomic(self.logs / f"preview-{self.step:06d}.png") as path:
                picture.save(path)
            writer.add_image("preview", pil_to_tensor(picture), self.step)
        if self.step % config.checkpoint_every == 0 or last:
            self._require_finite()
            self.save()

    def save(self) -> None:
        """Write the checkpoint and what the run makes so far, each by atomic rename."""
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "held_out": self.held_out,
            "model": self.task.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "extra": self.task.extra_state(),
        }
        about = {"step": self.step, "seconds": round(self.seconds, 1), "val": self.held_out}
        about["run"] = self.config.model_dump(mode="json")
        self.task.export(self.averaged.eval(), self.config.out, about)
        # Last, so that a run never counts as finished before what it makes is there.
        with atomic(self.logs / "state.pt") as path:
            torch.save(state, path)

    def open(self, restart: bool) -> None:
        """Make the run's directory, or load the checkpoint that is in it."""
        described = self.logs / "config.yaml"
        if restart and self.logs.exists():
            shutil.rmtree(self.logs)
        settings = self.config.model_dump(mode="json")
        if described.is_file():
            require_same(described, self.config)
        write_text(described, yaml.safe_dump(settings, sort_keys=False))
        if (self.logs / "state.pt").is_file():
            self._load(self.logs / "state.pt")

    def finish(self) -> dict:
        return {**self.held_out, "seconds": self.seconds}

    def _load(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            self.task.model.load_state_dict(state["model"])
            if self.ema is not None:
                self.ema.module.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.task.load_extra_state(state["extra"])
        except (RuntimeError, EOFError, KeyError, OSError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"{path}: damaged checkpoint ({reason}); start again with --restart"
            ) from None
        self.step, self.seconds = state["step"], state["seconds"]
        self.held_out = state["held_out"]

    def _log(self, scalars: dict[str, Tensor], writer: SummaryWriter, bar: tqdm) -> None:
        loss = self._require_finite()
        for key, value in scalars.items():
            writer.add_scalar(f"train/{key}", value.item(), self.step)
        rate = self.step * self.config.batch_size / max(self.seconds, 1e-9)
        writer.add_scalar("train/images_per_second", rate, self.step)
        bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s")

    def _require_finite(self) -> float:
        """The mean of the recent losses; ValueError if it is not a number to go on with."""
        loss = torch.stack(list(self.recent)).mean().item()
        if not math.isfinite(loss):
            raise ValueError(
                f"loss {loss} at step {self.step}: not finite; try a lower optimizer.lr "
                f"(now {self.config.optimizer.lr}) or a longer optimizer.warmup, and --restart"
            )
        return loss

    def _append(self, line: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl, dropping lines of steps that a crash undid."""
        path = self.logs / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        kept = [text for text in lines if json.loads(text)["step"] < line["step"]]
        write_text(path, "\n".join([*kept, json.dumps(line)]) + "\n")


def changed_settings(described: Path, config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Settings of the run whose config.yaml is `described` that differ in `config`: before, now.

    A key that is newer than the run had its default then.
    """
    before = yaml.safe_load(described.read_text(encoding="utf-8"))
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


def _join(scalars: dict[str, float]) -> str:
    return ", ".join(f"{key} {value:.4f}" for key, value in scalars.items())
