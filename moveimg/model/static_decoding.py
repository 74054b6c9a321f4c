"""Decoding as recorded steps: what CUDA would be told kernel by kernel, told at once.

    R rows (images, twice as many with guidance)   V codebook size

A step of decoding is a few hundred small kernels, and telling a GPU to run them takes longer than
running them. A CUDA graph is told once and replayed. Here every position has a graph of its own:
it is recorded from the step that any device takes, with the shapes that it has at that position, so
attention reads exactly the filled part of the cache and the numbers are those of the plain path.
What is done with the logits (guidance, filters, the draw) is one graph more, for all positions.
Replays wait for nothing: the next is queued while the one before it still runs.
"""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moveimg.model.transformer import Cache, Transformer


class StaticTransformer(Transformer):
    """`model`, whose decoding is recorded when a batch size comes up for the second time.

    The first time takes the plain path: a single call gains nothing by recording, and kernels must
    have run before they are recorded. It shares every weight with `model`, which must keep them
    where they are. Decodings may be under way side by side; each has steps of its own, and those of
    the last one to end are kept for the next.
    """

    def __init__(self, model: Transformer) -> None:
        torch.nn.Module.__init__(self)
        self.__dict__.update(model.__dict__)
        self._seen: set[int] = set()
        self._idle: list[Steps] = []  # one at the most
        self._lock = threading.Lock()

    def make_cache(self, batch: int) -> Any:
        with self._lock:
            known = batch in self._seen
            self._seen.add(batch)
            steps = self._idle.pop() if known and self._idle else None
        if not known:
            return super().make_cache(batch)
        if steps is None or steps.batch != batch:
            del steps  # its memory is free before new steps take some
            with torch.inference_mode():
                steps = Steps(self, batch)
        handle = Handle(steps)
        weakref.finalize(handle, self._idle.__setitem__, slice(None), [steps]).atexit = False
        return handle

    @torch.inference_mode()
    def start(self, labels: Tensor, cache: Any) -> Tensor:
        return self._take(super().start, labels, cache)

    @torch.inference_mode()
    def decode(self, codes: Tensor, cache: Any) -> Tensor:
        return self._take(super().decode, codes, cache)

    def _take(self, plain: Callable[..., Tensor], inputs: Tensor, cache: Any) -> Tensor:
        if not isinstance(cache, Handle):
            return plain(inputs, cache)
        logits = cache.steps.take(plain, inputs, cache.position)
        cache.position += 1
        return logits


class Handle:
    """One decoding under way: steps that nobody else takes meanwhile, and how far it is."""

    def __init__(self, steps: Steps) -> None:
        self.steps, self.position = steps, 0

    def recorded(self, key: Hashable, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """As Cache.recorded; the last function is kept for the next decoding."""
        steps = self.steps
        if steps.call is None or steps.call[0] != key:
            steps.call = (key, Call(steps.recorder, function))
        return steps.call[1]


class Steps:
    """Decoding R rows, position by position, from fixed inputs to fixed outputs.

    Attributes:
        batch: R.
        inputs: the labels or codes of a step, int64 [R].
        logits: what it gives, [R, V].
    """

    def __init__(self, model: Transformer, batch: int) -> None:
        like = model.norm.weight
        wide = torch.promote_types(like.dtype, torch.float32)
        self.batch = batch
        self.cache = Cache(model, batch)
        self.inputs = torch.zeros(batch, dtype=torch.int64, device=like.device)
        self.logits = like.new_empty(batch, model.config.codebook_size, dtype=wide)
        self.recorder = Recorder(like.device)
        self.recorded: list[Callable[[], None]] = []
        self.call: tuple[Hashable, Call] | None = None

    def take(self, plain: Callable[..., Tensor], inputs: Tensor, position: int) -> Tensor:
        """The step at `position`, by `plain` where it is not recorded -> logits [R, V]."""
        if len(inputs) != self.batch or position > len(self.recorded):
            raise ValueError(
                f"step {position} of {len(inputs)} rows: expected {self.batch} rows, at most "
                f"step {len(self.recorded)}"
            )
        self.inputs.copy_(inputs)
        if position == len(self.recorded):
            self.recorded.append(self.recorder.record(partial(self._step, plain, position)))
        self.recorded[position]()
        return self.logits.clone()

    def _step(self, plain: Callable[..., Tensor], position: int) -> None:
        self.cache.rewind(position)
        self.logits.copy_(plain(self.inputs, self.cache))


class Call:
    """A function of tensors and numbers, recorded when it is called for the second time.

    By then its kernels have run. It is handed tensors in place of numbers. Tensors keep their
    shapes; the first argument is one.
    """

    def __init__(self, recorder: Recorder, function: Callable[..., Tensor]) -> None:
        self.recorder, self.function = recorder, function
        self.inputs: list[Tensor] = []
        self.take: Callable[[], None] = self._take
        self.calls = 0

    def __call__(self, first: Tensor, *rest: Tensor | float) -> Tensor:
        self.calls += 1
        given = (first, *rest)
        if not self.inputs:
            shapes = [part.shape if isinstance(part, Tensor) else () for part in given]
            self.inputs = [first.new_empty(shape) for shape in shapes]
        for fixed, value in zip(self.inputs, given, strict=True):
            fixed.copy_(value) if isinstance(value, Tensor) else fixed.fill_(value)
        if self.calls == 2:
            self.take = self.recorder.record(self._take)
        self.take()
        return self.out.clone()  # other graphs may use the memory that it lies in

    def _take(self) -> None:
        self.out = self.function(*self.inputs)


RECORDING = threading.Lock()  # what another thread waits for would end up in a graph, or break it


class Recorder:
    """Makes CUDA graphs that share their memory: they are replayed one after the other."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self.pool = torch.cuda.graph_pool_handle()
            self.stream = torch.cuda.Stream(device)

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """`step` as a graph; on other devices, and where it cannot be one, `step` itself."""
        if self.device.type != "cuda":
            return step
        with RECORDING:
            return self._graph(step)

    def _graph(self, step: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        collecting = gc.isenabled()
        gc.disable()  # a graph that is collected meanwhile would break this one
        try:
            torch.cuda.synchronize(self.device)
            with torch.cuda.stream(self.stream):
                # torch.cuda.graph would collect garbage first, at every position
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    step()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            first = str(error).split("\n")[0]
            warnings.warn(f"a part of decoding is not a CUDA graph: {first}", stacklevel=2)
            return step
        finally:
            if collecting:
                gc.enable()
        return graph.replay
