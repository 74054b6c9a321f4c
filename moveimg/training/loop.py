"""The training loop of every task, in any number of processes.

The batch, the dropout and the learning rate of a step follow from (seed, step) alone, so a resumed
run computes the same weights as an uninterrupted one.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from safetensors import SafetensorError
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict

from moveimg.config import RunConfig
from moveimg.device import peak_memory
from moveimg.dist import handle_signals
from moveimg.files import lock, remove_temporaries
from moveimg.rng import set_generator
from moveimg.training.checkpoints import Checkpoints
from moveimg.training.logging import RunLogger, check_or_write_settings
from moveimg.training.optimizer import clip_gradients, learning_rate, make_optimizers
from moveimg.training.parallel import (
    Parallelism,
    gather_full_model,
    micro_batch_seed,
    parallelize,
    sync_gradients,
)


class Task(Protocol):
    """A model with its loss, validation and preview; a Run sets `forward` and `rng`."""

    model: Any
    forward: nn.Module  # the model, or DDP around it
    rng: torch.Generator | None = None  # seeded by step

    def loss(self, step: int, micro_batch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a step's micro-batch, and scalars to log."""

    def validate(self, model: Any) -> dict[str, float]:
        """Held-out scalars; the model with the smallest first one is the best."""

    def record(self, step: int) -> dict[str, Any]:
        """Plain data on the model after a step, for a line of records.jsonl; {} writes no line."""
        return {}

    def preview(self, model: Any) -> Image.Image:
        """An image of samples or reconstructions."""

    def export(self, model: Any, directory: Path, about: dict[str, Any]) -> None:
        """Write the model into a directory."""

    def extra_state(self) -> dict[str, Any]:
        """Plain data and tensors that a checkpoint needs besides weights and optimizer."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the result of extra_state."""
        return


def fit(
    task: Task,
    config: RunConfig,
    parallel: Parallelism,
    restart: bool = False,
    data: dict[str, str] | None = None,
) -> dict[str, float]:
    """Train `task` up to config.steps steps in config.out, from its newest checkpoint if any.

    SIGTERM and SIGINT (Ctrl-C) end the run after the current step, with a checkpoint and exit code
    143 or 130. `restart` deletes an earlier run; `data` has digests of the data, which must be
    equal for a run to continue. Returns the last held-out scalars, and `seconds` of training.
    Raises ValueError for a directory in use or of another run, a damaged checkpoint or a loss that
    is not finite; OSError if a file cannot be written.
    """
    with lock(config.out, "a training run"):
        run = Run(task, config, parallel)
        run.resume(restart, data or {})
        with (
            RunLogger(run.logs, config, run.step, run.world.main) as logger,
            catch_stop() as stop_signals,
        ):
            while run.step < config.steps:
                scalars = run.advance()
                logger.bar.update()
                run.report(scalars, logger)
                # world.any waits for a GPU
                every_step = run.device.type == "cpu" or run.world.size == 1
                if (every_step or run.step % 10 == 0) and run.world.any(bool(stop_signals)):
                    run.require_finite()
                    run.save(gather_full_model(run.averaged))
                    run.checkpoints.wait()
                    logger.message(f"stopped at step {run.step}; the same command continues")
                    number = stop_signals[0] if stop_signals else signal.SIGTERM
                    raise SystemExit(128 + number)
        run.checkpoints.wait()
        return {**run.held_out, "seconds": run.seconds}


class Run:
    """The state of a run: step, weights, average, optimizers, checkpoints, held-out scores."""

    def __init__(self, task: Task, config: RunConfig, parallel: Parallelism) -> None:
        self.task, self.config, self.parallel = task, config, parallel
        self.world, self.device = parallel.world, parallel.world.device
        self.logs = config.out / "training"
        self.ema = ModelEmaV3(task.model, decay=config.ema, use_warmup=True) if config.ema else None
        self.rng = task.rng = torch.Generator(self.device)
        set_generator(task.model, self.rng)
        self.models = {"model": task.model} | ({"ema": self.ema.module} if self.ema else {})
        self.averaged: nn.Module = self.models.get("ema", task.model)  # validated and exported
        task.forward = parallelize(task.model, self.models.get("ema"), parallel)
        self.optimizers = make_optimizers(task.model, config.optimizer)
        folder = self.logs / "checkpoints"
        self.checkpoints = Checkpoints(folder, config.keep_checkpoints, self.world)
        self.step, self.seconds = 0, 0.0
        self.held_out: dict[str, float] = {}
        self.best: float | None = None  # smallest first value of held_out in the run
        self.saved: int | None = None
        self.recent: deque[Tensor] = deque(maxlen=config.log_every)  # losses

    def advance(self) -> dict[str, Tensor]:
        """Do one optimizer step; return the scalars to log, as tensors."""
        begun = time.perf_counter()
        config, task, mine = self.config, self.task, self.parallel.local_micro_batches
        task.model.train()
        rate = learning_rate(config.optimizer, self.step, config.steps)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_factor", 1.0)
        scalars: list[dict[str, Tensor]] = []
        for micro_batch in mine:
            seed = micro_batch_seed(config.seed, self.step, micro_batch)
            self.rng.manual_seed(seed)
            if self.parallel.compiled:  # compiled graphs draw from torch's default generator
                torch.manual_seed(seed)
            with sync_gradients(task.forward, last=micro_batch == mine[-1]):
                loss, more = task.loss(self.step, micro_batch)
                (loss / len(mine)).backward()
            scalars.append({"loss": loss.detach(), **more})
        norm = clip_gradients(self.optimizers, config.optimizer)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        if self.ema is not None:
            self.ema.update(task.model, step=self.step)
        means = {key: torch.stack([x[key].float() for x in scalars]).mean() for key in scalars[0]}
        # a non-finite gradient damages the weights: NaN here prevents the next checkpoint
        self.recent.append(torch.where(norm.isfinite(), means["loss"], torch.nan))
        self.seconds += time.perf_counter() - begun
        return {**means, "grad_norm": norm, "lr": torch.tensor(rate)}

    def report(self, scalars: dict[str, Tensor], logger: RunLogger) -> None:
        """Log, validate, preview and checkpoint, each when it is due."""
        kinds, last = ("log", "validate", "preview", "checkpoint"), self.step == self.config.steps
        due = {k for k in kinds if last or self.step % getattr(self.config, f"{k}_every") == 0}
        if self.world.main and (record := self.task.record(self.step)):
            logger.record(self.step, record)
        if not due:
            return
        begun = time.perf_counter()
        self.require_finite()
        self.seconds += time.perf_counter() - begun  # require_finite waited for queued GPU work
        if "log" in due:
            values = self.world.mean(torch.stack([value.float() for value in scalars.values()]))
            means = dict(zip(scalars, values.tolist(), strict=True))
            means["images_per_second"] = self.step * self.config.batch_size / self.seconds
            logger.scalars("train", means, self.step)
            logger.bar.set_postfix_str(f"loss {means['loss']:.4f}")
        if due <= {"log"}:
            return
        model = gather_full_model(self.averaged)
        if "validate" in due:
            self._validate(model, logger)
        if "preview" in due and self.world.main:
            logger.image(self.task.preview(model), self.step)
        if "checkpoint" in due:
            self.save(model)

    def save(self, model: nn.Module) -> None:
        """Export the model, and begin to write a checkpoint."""
        if self.saved == self.step:
            return
        self.saved = self.step
        self.export(model, self.config.out)
        index = {"seconds": self.seconds, "held_out": self.held_out, "best": self.best}
        # after the export, so that a run with its last checkpoint always has its model
        self.checkpoints.save(self.step, self.state(), self.task.extra_state(), index)

    def export(self, model: nn.Module, directory: Path) -> None:
        """Write the model into a directory, on rank 0."""
        about = {"step": self.step, "seconds": round(self.seconds, 1), "val": self.held_out}
        about["run"] = self.config.model_dump(mode="json")
        try:
            if self.world.main:
                self.task.export(model, directory, about)
        except SafetensorError as error:  # a full disk
            raise OSError(f"{directory}: model not written ({error})") from None

    def state(self) -> dict[str, Any]:
        """Weights, average and optimizer states, by parameter name."""
        state = {k: state_dict.get_model_state_dict(m) for k, m in self.models.items()}
        moments = state_dict.get_optimizer_state_dict(self.task.model, self.optimizers)
        return {**state, "optimizer": moments}

    def resume(self, restart: bool, data: dict[str, str]) -> None:
        """Create the run's directory, or load its newest checkpoint."""
        if self.world.main:
            if restart:
                shutil.rmtree(self.logs, ignore_errors=True)
            check_or_write_settings(self.logs, self.config, data)
            for directory in (self.logs, self.logs / "best"):
                remove_temporaries(directory)
        if (path := self.checkpoints.newest()) is None:
            return
        state = self.state()
        extra, index = self.checkpoints.load(path, state)
        for name, model in self.models.items():
            state_dict.set_model_state_dict(model, state[name])
        model, optimizers = self.task.model, self.optimizers
        state_dict.set_optimizer_state_dict(model, optimizers, state["optimizer"])
        self.task.load_extra_state(extra)
        self.step, self.saved, self.seconds = index.step, index.step, index.seconds
        self.held_out, self.best = index.held_out, index.best

    def _validate(self, model: nn.Module, logger: RunLogger) -> None:
        self.held_out = self.task.validate(model)
        logger.scalars("val", self.held_out, self.step)
        spent = {"seconds": round(self.seconds, 2), "peak_memory": peak_memory(self.device)}
        logger.line({"step": self.step, **spent, **self.held_out})
        score = next(iter(self.held_out.values()))
        if self.best is None or score < self.best:
            self.best = score
            self.export(model, self.logs / "best")

    def require_finite(self) -> None:
        """Raise ValueError if a recent loss or gradient is not finite."""
        losses = self.world.mean(torch.stack(list(self.recent)))
        if len(bad := (~losses.isfinite()).nonzero()):
            step = self.step - len(losses) + int(bad[0])
            raise ValueError(
                f"loss or gradient not finite at step {step} (counted from 0): try a lower "
                f"optimizer.lr (now {self.config.optimizer.lr}) or a longer warmup, and --restart"
            )


@contextmanager
def catch_stop() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in the yielded list; a further SIGINT raises KeyboardInterrupt."""
    received: list[int] = []

    def receive(number: int, frame: object) -> None:
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(number)

    with handle_signals((signal.SIGTERM, signal.SIGINT), receive):
        yield received
