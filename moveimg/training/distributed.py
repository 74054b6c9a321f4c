"""Processes that share a training: who is who, what they tell each other, and how work is cut.

A step's batch is cut into micro-batches, the same ones however many processes there are; each has
random numbers of its own. A process takes some of them, gradients are added up, and then averaged
by PyTorch's DistributedDataParallel or FSDP2. One process is the same code with nothing to average.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from moveimg.config import TrainConfig
from moveimg.device import own_device, pick_device, pick_dtype, shapes_only
from moveimg.model import Transformer

GRACE = 10.0  # seconds in which the launcher ends the other processes after the first one's error
LOST = ("connection closed by peer", "connection reset", "connection was likely closed", "nccl")


@dataclass(frozen=True)
class World:
    """The processes of a training, and which one this is; alone by default."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def main(self) -> bool:
        """Whether this process is the one that prints, logs and exports."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean over processes of a tensor that each has, on the CPU, in float64."""
        if self.size == 1:
            return values.detach().cpu().double()
        values = values.detach().to(self.device, torch.float64, copy=True)
        dist.all_reduce(values)
        return (values / self.size).cpu()

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process."""
        if self.size == 1:
            return flag
        return bool(self.mean(torch.tensor(float(flag), device=self.device)) > 0)

    def from_main(self, value: object) -> object:
        """What the first process says, in all of them; the others' own value is not looked at."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def wait(self) -> None:
        """Go on when every process is here."""
        self.any(False)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Around what fetches a file: the first process does it, then the others find it there."""
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()


@contextmanager
def processes(device: str | None) -> Iterator[World]:
    """Join the processes that torchrun started, if it did, each with a device of its own.

    nccl carries tensors on CUDA, gloo those on the CPU. An error ends every process: the first one
    says its line at once; the others speak only if it had none to say.
    Raises ValueError for a device that cannot be used, or when another process is gone.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if size == 1:
        yield World(device=pick_device(device))
        return
    try:
        chosen = pick_device(own_device(device))
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
        yield World(rank, size, chosen)
        dist.destroy_process_group()
    except (ValueError, OSError) as error:
        if rank == 0:
            raise
        time.sleep(GRACE)
        raise ValueError(f"process {rank} of {size}: {error}") from error
    except RuntimeError as error:
        if not any(sign in str(error).lower() for sign in LOST):
            raise
        why = " ".join(str(error).split())[:200]  # nccl's own troubles, too, come this way
        raise ValueError(
            f"process {rank} of {size}: another process of this run ended ({why})"
        ) from error


# --- cutting the batch ---------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How a training is spread: processes, micro-batches of a step, and what holds the weights.

    Attributes:
        world: the processes.
        parts: micro-batches of a step, over all processes.
        sharded: FSDP2 (weights cut over the processes) instead of DDP (whole in each).
        dtype: of the forward pass.
        checkpointing: compute a block's activations again in the backward pass, keep none.
        compiled: run each block through torch.compile.
    """

    world: World = field(default_factory=World)
    parts: int = 1
    sharded: bool = False
    dtype: torch.dtype = torch.float32
    checkpointing: bool = False
    compiled: bool = False

    @property
    def mine(self) -> range:
        """The micro-batches of this process."""
        share = self.parts // self.world.size
        return range(self.world.rank * share, (self.world.rank + 1) * share)


def plan(config: TrainConfig, world: World) -> Plan:
    """The plan of a generator's run. Raises ValueError where the batch cannot be cut so."""
    micro = config.micro_batch or config.batch_size
    if config.batch_size % micro:
        raise ValueError(
            f"micro_batch {micro}: expected a divisor of batch_size ({config.batch_size})"
        )
    parts = config.batch_size // micro
    if parts % world.size:
        fits = config.batch_size % world.size == 0
        advice = f"set micro_batch to {config.batch_size // world.size} or a divisor of it"
        raise ValueError(
            f"micro_batch {micro} cuts batch_size {config.batch_size} into {parts}, which "
            f"{world.size} processes cannot share: "
            + (advice if fits else f"expected a batch_size that {world.size} divides")
        )
    if config.distributed == "fsdp" and config.optimizer.kind == "muon":
        raise ValueError(
            "optimizer.kind muon needs whole matrices, and `distributed: fsdp` cuts them: expected "
            "`distributed: ddp`, or optimizer.kind adamw"
        )
    return Plan(
        world,
        parts,
        sharded=config.distributed == "fsdp" and world.size > 1,
        dtype=pick_dtype(config.dtype, world.device),
        checkpointing=config.activation_checkpointing,
        compiled=config.compile,
    )


def part_seed(seed: int, step: int, part: int) -> int:
    """The seed of a micro-batch's random numbers (dropout, dropped labels)."""
    if part == 0:
        return seed * 1_000_003 + step
    return int(np.random.SeedSequence((seed, step, part)).generate_state(1)[0])


# --- the model -----------------------------------------------------------------------------


def spread(model: nn.Module, average: nn.Module | None, plan: Plan) -> nn.Module:
    """Make `model` and its average ready for the plan; return what a step is to call.

    In place: FSDP2 turns the parameters of both into shards (DTensor), each block a unit of its
    own, the tables and the head another; the float32 shards are what the optimizer sees, the
    forward pass gathers them in plan.dtype, gradients are added up in float32.
    """
    if isinstance(model, Transformer):
        model.checkpointing = plan.checkpointing
        if plan.compiled:
            allow_graphs(len(model.layers))
            for block in model.layers:
                compile_training(block)
    if plan.world.size == 1:
        return model
    if not plan.sharded:
        ids = [plan.world.device] if plan.world.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    mesh = init_device_mesh(plan.world.device.type, (plan.world.size,))
    policy = MixedPrecisionPolicy(
        param_dtype=None if plan.dtype == torch.float32 else plan.dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # or the rotations would be rounded, too
    )
    for module in (model, average):
        if module is not None:
            assert isinstance(module, Transformer)
            for block in module.layers:
                fully_shard(block, mesh=mesh, mp_policy=policy)
            fully_shard(module, mesh=mesh, mp_policy=policy)
    return model


def allow_graphs(n: int) -> None:
    """Let blocks be compiled to n graphs and some more.

    They share their code, and like ones share a graph; but every layer of LaVE reads another slot,
    and beyond torch's limit of 8 graphs the later layers would stay eager, with a warning.
    """
    import torch._dynamo

    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, n + 8)


def compile_training(block: nn.Module) -> None:
    """Compile a block's forward pass in train mode; decoding, with its growing cache, stays."""
    eager = block.forward
    compiled = torch.compile(eager)

    def forward(*args: object, **kwargs: object) -> Tensor:
        return (compiled if block.training else eager)(*args, **kwargs)

    block.forward = forward


@contextmanager
def averaging(called: nn.Module, last: bool) -> Iterator[None]:
    """Around a micro-batch's passes: processes exchange gradients in the last one alone."""
    if isinstance(called, DistributedDataParallel) and not last:
        with called.no_sync():
            yield
        return
    if isinstance(called, FSDPModule):
        called.set_requires_gradient_sync(last)
    yield


def whole(model: nn.Module) -> nn.Module:
    """The model with all its weights here, to validate, show and export: a copy if it is cut.

    Every process must call it.
    """
    if not isinstance(model, FSDPModule):
        return model.eval()
    assert isinstance(model, Transformer)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    with shapes_only():
        copy = Transformer(model.config)
    copy.load_state_dict(state, assign=True)
    return copy.eval()


def tell(message: str) -> None:
    """A line on stderr, above the bar if there is one; said by the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(message, file=sys.stderr)
