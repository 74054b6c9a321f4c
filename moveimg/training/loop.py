"""The training loop, the same for every task and any number of processes.

A step is a function of (seed, step): its batch, its dropout and its learning rate follow from
those two, so a run that was stopped and resumed computes what an uninterrupted one would have.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from moveimg.config import RunConfig
from moveimg.device import has_bfloat16, peak_memory
from moveimg.dist import World, print_rank0
from moveimg.files import lock, remove_temporaries
from moveimg.training.checkpoints import Checkpoints, reason
from moveimg.training.optimizer import clip_gradients, learning_rate, make_optimizers, set_rate
from moveimg.training.parallel import Plan, averaging, part_seed, spread, whole
from moveimg.training.record import keep_record, non_finite
from moveimg.training.task import Scored, Task, Watched
from moveimg.training.watch import Journal

AGREE_EVERY = 10  # steps between questions whether to stop, where asking costs a synchronisation


def fit(
    task: Task,
    config: RunConfig,
    device: torch.device,
    restart: bool = False,
    plan: Plan | None = None,
) -> dict:
    """Train `task` for config.steps steps in config.out; continue there if a run was stopped.

    SIGTERM and SIGINT (Ctrl-C) end it after the step under way, with a checkpoint and exit code 143
    or 130; a second SIGINT ends it at once.

    Args:
        task: model (on `device`), loss and outputs.
        config: the run's settings.
        device: where the model is.
        restart: throw an earlier run in config.out away first.
        plan: how it is spread over processes; left out: one process, one batch a step.

    Returns:
        the last held-out scalars, with `seconds` of training so far.

    Raises:
        ValueError: config.out holds a run with other settings or other data, or damaged
            checkpoints alone, or the loss is not finite.
        OSError: the last checkpoint could not be written.
    """
    with lock(config.out, "a training"):
        run = Run(task, config, device, plan or Plan(World(device=device)))
        run.open(restart)
        with Journal(run.logs, config, run.step, run.world.main) as journal, catch_stop() as asked:
            while run.step < config.steps:
                scalars = run.advance()
                journal.bar.update()
                run.report(scalars, journal)
                if run.must_stop(bool(asked)):
                    number = asked[0] if asked else signal.SIGTERM
                    run.stop(signal.Signals(number).name, journal)
                    raise SystemExit(128 + number)
        return run.finish()


class Run:
    """A run's state: step, weights, their average, optimizers, and the files they live in."""

    def __init__(self, task: Task, config: RunConfig, device: torch.device, plan: Plan) -> None:
        if plan.dtype == torch.bfloat16 and device.type == "cpu" and not has_bfloat16():
            print_rank0("warning: bfloat16 is slow on this CPU: --set dtype=float32 is faster")
        self.task, self.config, self.device = task, config, device
        self.plan, self.world = plan, plan.world
        self.logs = config.out / "training"
        self.ema = ModelEmaV3(task.model, decay=config.ema, use_warmup=True) if config.ema else None
        self.called = spread(task.model, None if self.ema is None else self.ema.module, plan)
        task.forward = self.called
        self.optimizers = make_optimizers(task.model, config.optimizer)
        self.checkpoints = Checkpoints(
            self.logs / "checkpoints", config.keep_checkpoints, self.world
        )
        self.step = 0
        self.seconds = 0.0
        self.held_out: dict[str, float] = {}
        self.validated: int | None = None  # the step that held_out is of
        self.best: float | None = None
        self.saved: int | None = None
        self.logged = (0, 0.0)  # step and seconds of the last log line
        self.failure: OSError | None = None
        self.recent: deque[Tensor] = deque(maxlen=config.log_every)

    @property
    def averaged(self) -> nn.Module:
        """The weights that are validated, shown and exported."""
        return self.task.model if self.ema is None else self.ema.module

    def advance(self) -> dict[str, Tensor]:
        """One optimizer step; returns its scalars, still on the device."""
        begun = time.perf_counter()
        config, model, mine = self.config, self.task.model, self.plan.mine
        model.train()
        rate = learning_rate(config.optimizer, self.step, config.steps)
        set_rate(self.optimizers, rate)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        found: list[dict[str, Tensor]] = []
        for part in mine:
            torch.manual_seed(part_seed(config.seed, self.step, part))
            with averaging(self.called, last=part == mine[-1]):
                loss, scalars = self.task.loss(self.step * self.plan.parts + part)
                (loss / len(mine)).backward()
            found.append({"loss": loss.detach(), **scalars})
        norm = clip_gradients(self.optimizers, config.optimizer)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        if self.ema is not None:
            self.ema.update(model, step=self.step)
        means = {key: torch.stack([x[key].float() for x in found]).mean() for key in found[0]}
        # A gradient that is not finite has spoilt the weights already: no checkpoint may follow.
        self.recent.append(torch.where(norm.isfinite(), means["loss"], torch.nan))
        self.seconds += time.perf_counter() - begun
        return {**means, "grad_norm": norm, "lr": torch.tensor(rate)}

    def report(self, scalars: dict[str, Tensor], journal: Journal) -> None:
        """Log, validate, preview and checkpoint, each when it is due."""
        config = self.config
        if self._due(config.log_every):
            self._log(scalars, journal)
        every = (config.validate_every, config.preview_every, config.checkpoint_every)
        validate, preview, save = (self._due(steps) for steps in every)
        often = self.task.score_every if isinstance(self.task, Scored) else 0
        score = bool(often) and self._due(often)
        if not (validate or preview or save or score):
            return
        model = whole(self.averaged)
        if validate:
            self._validate(model, journal)
        if preview:
            self._preview(model, journal)
        if score and isinstance(self.task, Scored):
            journal.scalars("eval", self.task.scores(model), self.step)
        if save:
            self.require_finite()
            self.save(model)

    def must_stop(self, asked: bool) -> bool:
        """Whether any process was asked to stop; all get the same answer at the same step."""
        if self.device.type == "cuda" and self.world.size > 1 and self.step % AGREE_EVERY:
            return False
        return self.world.any(asked)

    def stop(self, reason: str, journal: Journal) -> None:
        """Write a checkpoint of the step that was just done."""
        self.require_finite()
        self.save(whole(self.averaged))
        self.checkpoints.finish()
        journal.message(f"stopped by {reason} at step {self.step}; the same command continues")

    def save(self, model: nn.Module) -> None:
        """Export what the run makes so far, and begin to write a checkpoint.

        A full disk, or anything else that keeps them from being written, does not end the run:
        what was there before stays, and `finish` raises if that is still so at the last step.
        """
        if self.saved == self.step:
            return
        self.saved = self.step
        score = next(iter(self.held_out.values()), None) if self.validated == self.step else None
        best = score is not None and (self.best is None or score < self.best)
        self.best = score if best else self.best
        if self.world.main:
            self._export(model, best)
        about = {
            "seconds": self.seconds,
            "held_out": self.held_out,
            "validated": self.validated,
            "score": score,
            "best": self.best,
            "processes": self.world.size,
        }
        # After the model, so that a run never counts as finished before what it makes is there.
        self.checkpoints.save(self.step, self.state(), self.task.extra_state(), about)

    def state(self) -> dict[str, Any]:
        """Weights, average and optimizers, by the names of the parameters."""
        model = self.task.model
        state: dict[str, Any] = {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, self.optimizers),
        }
        if self.ema is not None:
            state["ema"] = get_model_state_dict(self.ema.module)
        return state

    def open(self, restart: bool) -> None:
        """Make the run's directory, or load the newest intact checkpoint that is in it."""
        if self.world.main:
            if restart and self.logs.exists():
                shutil.rmtree(self.logs)
            identity = self.task.identity() if isinstance(self.task, Watched) else {}
            keep_record(self.logs, self.config, identity)
            for directory in (self.config.out, self.logs, self.logs / "best"):
                remove_temporaries(directory)
        self.checkpoints.sweep()
        if (path := self.checkpoints.newest()) is not None:
            self._load(path)

    def finish(self) -> dict:
        """Wait for the last checkpoint; OSError if it, or the model, could not be written."""
        self.checkpoints.finish()
        if self.failure is not None:
            raise self.failure
        return {**self.held_out, "seconds": self.seconds}

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def _export(self, model: nn.Module, best: bool) -> None:
        about = {"step": self.step, "seconds": round(self.seconds, 1), "val": self.held_out}
        about["run"] = self.config.model_dump(mode="json")
        self.failure = None
        try:
            self.task.export(model, self.config.out, about)
            if best:
                self.task.export(model, self.logs / "best", about)
        except (OSError, SafetensorError) as error:
            self.failure = OSError(f"model of step {self.step} not written ({reason(error)})")
            print_rank0(f"warning: {self.failure}; the one before stays")

    def _load(self, path: Path) -> None:
        state = self.state()
        extra, index = self.checkpoints.load(path, state)
        set_model_state_dict(self.task.model, state["model"])
        set_optimizer_state_dict(self.task.model, self.optimizers, state["optimizer"])
        if self.ema is not None:
            set_model_state_dict(self.ema.module, state["ema"])
        self.task.load_extra_state(extra)
        self.step, self.seconds = index["step"], index["seconds"]
        self.held_out, self.validated = index["held_out"], index["validated"]
        self.best, self.saved = index["best"], self.step
        self.logged = (self.step, self.seconds)

    def _validate(self, model: nn.Module, journal: Journal) -> None:
        self.held_out, self.validated = self.task.validate(model), self.step
        journal.scalars("val", self.held_out, self.step)
        spent = {"seconds": round(self.seconds, 2), "peak_memory": peak_memory(self.device)}
        journal.line({"step": self.step, **spent, **self.held_out})
        numbers = ", ".join(f"{key} {value:.4f}" for key, value in self.held_out.items())
        journal.message(f"step {self.step}: {numbers}")

    def _preview(self, model: nn.Module, journal: Journal) -> None:
        """Pictures by the average and by the weights themselves."""
        raw = None if self.ema is None else whole(self.task.model)
        if self.world.main:
            journal.picture("", self.task.preview(model), self.step)
            if raw is not None:
                journal.picture("raw", self.task.preview(raw), self.step)

    def _log(self, scalars: dict[str, Tensor], journal: Journal) -> None:
        begun = time.perf_counter()
        loss = self.require_finite()
        values = self.world.mean(torch.stack([value.float() for value in scalars.values()]))
        self.seconds += time.perf_counter() - begun  # where steps run ahead, they end here
        step, seconds = self.logged
        rate = (self.step - step) * self.config.batch_size / max(self.seconds - seconds, 1e-9)
        self.logged = (self.step, self.seconds)
        means = dict(zip(scalars, values.tolist(), strict=True))
        journal.scalars("train", means | {"images_per_second": rate}, self.step)
        if isinstance(self.task, Watched):
            for prefix, more in self.task.watch(rate).items():
                journal.scalars(prefix, more, self.step)
        journal.bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s")

    def require_finite(self) -> float:
        """The mean of the recent losses; ValueError if one, or its gradient, is not finite."""
        losses = self.world.mean(torch.stack(list(self.recent)))
        if not losses.isfinite().all():
            first = self.step - len(losses) + int((~losses.isfinite()).nonzero()[0])
            indices = self.task.indices(first) if isinstance(self.task, Watched) else []
            raise non_finite(
                self.logs if self.world.main else None, self.config, first, losses, indices
            )
        return losses.mean().item()


@contextmanager
def catch_stop() -> Iterator[list[int]]:
    """A list that receives the number of the first SIGTERM or SIGINT.

    Neither ends the process by itself, but for a second SIGINT, which raises KeyboardInterrupt.
    """
    received: list[int] = []

    def receive(number: int, frame: object) -> None:
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        before = {n: signal.signal(n, receive) for n in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # only a main thread may set handlers
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
