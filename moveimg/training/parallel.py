"""Processes that share a training: who is who, what they tell each other, and how work is cut.

A step's batch is cut into micro-batches, the same ones however many processes there are; each has
random numbers of its own. A process takes some of them, gradients are added up, and then averaged
by PyTorch's DistributedDataParallel or FSDP2. One process is the same code with nothing to average.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from moveimg.config import TrainConfig
from moveimg.device import pick_dtype, shapes_only
from moveimg.dist import World
from moveimg.model import Transformer

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
