"""The training loop, the same for every task and any number of processes.

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
from moveimg.dist import print_rank0
from moveimg.files import lock, remove_temporaries
from moveimg.rng import set_generator
from moveimg.training.checkpoints import Checkpoints, reason
from moveimg.training.logging import RunLogger
from moveimg.training.optimizer import clip_gradients, learning_rate, make_optimizers, set_rate
from moveimg.training.parallel import (
    Parallelism,
    gather_full_model,
    micro_batch_seed,
    parallelize,
    sync_gradients,
)
from moveimg.training.settings import check_or_write_settings
from moveimg.training.task import Task

STOP_CHECK_EVERY = 10  # steps, where the ranks' check for a signal synchronises the GPUs


def fit(
    task: Task, config: RunConfig, parallel: Parallelism, restart: bool = False
) -> dict[str, float]:
    """Train `task` up to config.steps steps in config.out, from its newest checkpoint if any.

    SIGTERM and SIGINT (Ctrl-C) end the run after the current step, with a checkpoint and exit code
    143 or 130; a second SIGINT ends it at once. `restart` deletes an earlier run first.
    Returns the last held-out scalars, with `seconds` of training in all.

    Raises:
        ValueError: config.out holds a run of other settings or data, or only damaged checkpoints,
            or is in use, or the loss is not finite.
        OSError: the last checkpoint could not be written.
    """
    with lock(config.out, "a training"):
        run = Run(task, config, parallel)
        run.open(restart)
        with RunLogger(run.logs, config, run.step, run.world.main) as logger, catch_stop() as asked:
            while run.step < config.steps:
                scalars = run.advance()
                logger.bar.update()
                run.report(scalars, logger)
                if run.must_stop(bool(asked)):
                    number = asked[0] if asked else signal.SIGTERM
                    run.save(gather_full_model(run.averaged))
                    run.checkpoints.finish()
                    name = signal.Signals(number).name
                    logger.message(
                        f"stopped by {name} at step {run.step}; the same command continues"
                    )
                    raise SystemExit(128 + number)
        run.checkpoints.finish()
        if run.failure is not None:
            raise run.failure
        return {**run.held_out, "seconds": run.seconds}


class Run:
    """The state of a run: step, weights, average, optimizers, checkpoints, held-out scores."""

    def __init__(self, task: Task, config: RunConfig, parallel: Parallelism) -> None:
        self.task, self.config, self.parallel = task, config, parallel
        self.world, self.device = parallel.world, parallel.world.device
        if parallel.dtype == torch.bfloat16 and self.device.type == "cpu" and not has_bfloat16():
            print_rank0("warning: bfloat16 is slow on this CPU: --set dtype=float32 is faster")
        self.logs = config.out / "training"
        self.ema = ModelEmaV3(task.model, decay=config.ema, use_warmup=True) if config.ema else None
        average = None if self.ema is None else self.ema.module
        self.rng = task.rng = torch.Generator(self.device)
        set_generator(task.model, self.rng)
        task.forward = parallelize(task.model, average, parallel)
        self.optimizers = make_optimizers(task.model, config.optimizer)
        folder = self.logs / "checkpoints"
        self.checkpoints = Checkpoints(folder, config.keep_checkpoints, self.world)
        self.step = 0
        self.seconds = 0.0
        self.held_out: dict[str, float] = {}
        self.validated: int | None = None  # the step of held_out
        self.best: float | None = None
        self.saved: int | None = None
        self.logged = (0, 0.0)  # step and seconds of the last log line
        self.failure: OSError | None = None
        self.recent: deque[Tensor] = deque(maxlen=config.log_every)

    @property
    def averaged(self) -> nn.Module:
        """The model that is validated and exported: the average, if there is one."""
        return self.task.model if self.ema is None else self.ema.module

    def advance(self) -> dict[str, Tensor]:
        """Do one optimizer step; return its scalars, on the device."""
        begun = time.perf_counter()
        config, task, mine = self.config, self.task, self.parallel.mine
        model = task.model
        model.train()
        rate = learning_rate(config.optimizer, self.step, config.steps)
        set_rate(self.optimizers, rate)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        scalars: list[dict[str, Tensor]] = []
        for part in mine:
            seed = micro_batch_seed(config.seed, self.step, part)
            self.rng.manual_seed(seed)
            if self.parallel.compiled:  # compiled graphs draw from torch's default generator
                torch.manual_seed(seed)
            with sync_gradients(task.forward, last=part == mine[-1]):
                loss, more = task.loss(self.step, part)
                (loss / len(mine)).backward()
            scalars.append({"loss": loss.detach(), **more})
        norm = clip_gradients(self.optimizers, config.optimizer)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        if self.ema is not None:
            self.ema.update(model, step=self.step)
        means = {key: torch.stack([x[key].float() for x in scalars]).mean() for key in scalars[0]}
        # After a gradient that is not finite the weights are not, too: no checkpoint may follow.
        self.recent.append(torch.where(norm.isfinite(), means["loss"], torch.nan))
        self.seconds += time.perf_counter() - begun
        return {**means, "grad_norm": norm, "lr": torch.tensor(rate)}

    def report(self, scalars: dict[str, Tensor], logger: RunLogger) -> None:
        """Log, validate, preview, score and checkpoint, each when it is due."""

        def due(every: int) -> bool:
            return every > 0 and (self.step % every == 0 or self.step == config.steps)

        config, task = self.config, self.task
        if due(config.log_every):
            self._log(scalars, logger)
        every = (config.validate_every, config.preview_every, config.checkpoint_every)
        validate, preview, save, score = map(due, (*every, task.score_every))
        if not (validate or preview or save or score):
            return
        model = gather_full_model(self.averaged)
        if validate:
            self._validate(model, logger)
        if preview:
            raw = None if self.ema is None else gather_full_model(task.model)
            if self.world.main:
                logger.image("", task.preview(model), self.step)
                if raw is not None:
                    logger.image("raw", task.preview(raw), self.step)
        if score:
            logger.scalars("eval", task.scores(model), self.step)
        if save:
            self.save(model)

    def must_stop(self, asked: bool) -> bool:
        """Whether any process has received a signal; the same in all processes at each step."""
        if self.device.type == "cuda" and self.world.size > 1 and self.step % STOP_CHECK_EVERY:
            return False
        return self.world.any(asked)

    def save(self, model: nn.Module) -> None:
        """Export the model, and begin to write a checkpoint.

        A failure to write, such as a full disk, does not end the run: earlier files stay, and
        `fit` raises in the end if the last write has failed.
        """
        self.require_finite()
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
            "best": self.best,
        }
        # After the model, so that a run with its last checkpoint always has its model.
        self.checkpoints.save(self.step, self.state(), self.task.extra_state(), about)

    def state(self) -> dict[str, Any]:
        """Weights, average and optimizer states, by parameter name."""
        model = self.task.model
        state: dict[str, Any] = {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, self.optimizers),
        }
        if self.ema is not None:
            state["ema"] = get_model_state_dict(self.ema.module)
        return state

    def open(self, restart: bool) -> None:
        """Create the run's directory, or load its newest intact checkpoint."""
        if self.world.main:
            if restart and self.logs.exists():
                shutil.rmtree(self.logs)
            check_or_write_settings(self.logs, self.config, self.task.identity())
            for directory in (self.config.out, self.logs, self.logs / "best"):
                remove_temporaries(directory)
        self.checkpoints.sweep()
        if (path := self.checkpoints.newest()) is None:
            return
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

    def _validate(self, model: nn.Module, logger: RunLogger) -> None:
        self.held_out, self.validated = self.task.validate(model), self.step
        logger.scalars("val", self.held_out, self.step)
        spent = {"seconds": round(self.seconds, 2), "peak_memory": peak_memory(self.device)}
        logger.line({"step": self.step, **spent, **self.held_out})
        numbers = ", ".join(f"{key} {value:.4f}" for key, value in self.held_out.items())
        logger.message(f"step {self.step}: {numbers}")

    def _log(self, scalars: dict[str, Tensor], logger: RunLogger) -> None:
        begun = time.perf_counter()
        loss = self.require_finite()
        values = self.world.mean(torch.stack([value.float() for value in scalars.values()]))
        self.seconds += time.perf_counter() - begun  # the device's queued steps end here
        step, seconds = self.logged
        rate = (self.step - step) * self.config.batch_size / max(self.seconds - seconds, 1e-9)
        self.logged = (self.step, self.seconds)
        means = dict(zip(scalars, values.tolist(), strict=True))
        logger.scalars("train", means | {"images_per_second": rate}, self.step)
        for prefix, more in self.task.watch(rate).items():
            logger.scalars(prefix, more, self.step)
        logger.bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s")

    def require_finite(self) -> float:
        """The mean of the recent losses. Raises ValueError if a loss or gradient is not finite.

        The error names the step (from 0) and its images.
        """
        losses = self.world.mean(torch.stack(list(self.recent)))
        bad = (~losses.isfinite()).nonzero()
        if not len(bad):
            return losses.mean().item()
        step = self.step - len(losses) + int(bad[0])
        raise ValueError(
            f"loss {losses[bad[0]].item()} at step {step} on images {self.task.indices(step)[:8]}: "
            f"not finite; try a lower optimizer.lr (now {self.config.optimizer.lr}), a longer "
            "optimizer.warmup or a smaller optimizer.clip, and --restart"
        )


@contextmanager
def catch_stop() -> Iterator[list[int]]:
    """A list that receives the numbers of SIGTERM and SIGINT, which do not end the process.

    A SIGINT after another signal raises KeyboardInterrupt.
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
