"""Parallel training: micro-batches, DDP and FSDP2.

A step's batch is cut into the same micro-batches for any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from moveimg.config import TrainConfig
from moveimg.device import pick_dtype, shapes_only
from moveimg.dist import World
from moveimg.model import Transformer


@dataclass(frozen=True)
class Parallelism:
    """The processes, micro-batches, sharding and dtype of a training run."""

    world: World = field(default_factory=World)
    micro_batches: int = 1  # micro-batches per step, over all processes
    sharded: bool = False  # FSDP2 (a process holds a shard of the weights), not DDP (a replica)
    dtype: torch.dtype = torch.float32  # of the forward pass
    checkpointing: bool = False  # recompute a block's activations in the backward pass
    compiled: bool = False  # run each block through torch.compile

    @property
    def local_micro_batches(self) -> range:
        """The micro-batches of this process."""
        count = self.micro_batches // self.world.size
        return range(self.world.rank * count, (self.world.rank + 1) * count)


def choose_parallelism(config: TrainConfig, world: World) -> Parallelism:
    """The Parallelism of a training run. ValueError for a batch size that does not divide."""
    size, micro = config.batch_size, config.micro_batch or config.batch_size
    if size % (micro * world.size):
        raise ValueError(
            f"batch_size {size}: expected a multiple of micro_batch ({micro}) x processes "
            f"({world.size})"
        )
    if config.distributed == "fsdp" and config.optimizer.kind == "muon":
        raise ValueError("optimizer.kind muon needs whole matrices: expected `distributed: ddp`")
    sharded, dtype = config.distributed == "fsdp", pick_dtype(config.dtype, world.device)
    recompute, compiled = config.activation_checkpointing, config.compile
    return Parallelism(world, size // micro, sharded, dtype, recompute, compiled)


def micro_batch_seed(seed: int, step: int, micro_batch: int) -> int:
    """The seed of a micro-batch's random numbers (dropout, dropped labels)."""
    if micro_batch == 0:
        return seed * 1_000_003 + step
    return int(np.random.SeedSequence((seed, step, micro_batch)).generate_state(1)[0])


def parallelize(model: nn.Module, average: nn.Module | None, parallel: Parallelism) -> nn.Module:
    """Wrap or shard `model`, and shard its EMA; return the module whose forward a step calls.

    FSDP2 works in place, a unit per block and one for the tables and the head: the optimizer
    updates float32 shards, forward passes gather them in parallel.dtype.
    """
    if isinstance(model, Transformer):
        model.checkpointing = parallel.checkpointing
        if parallel.compiled:
            from torch._dynamo import config as limits

            # LaVE needs a graph per layer, and torch's limit is 8 graphs of the same code
            limits.recompile_limit = max(limits.recompile_limit, len(model.layers) + 8)
            for block in model.layers:
                block.compile()
    device, size = parallel.world.device, parallel.world.size
    if size == 1:
        return model
    if not parallel.sharded:
        ids = [device] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    mesh = init_device_mesh(device.type, (size,))
    policy = MixedPrecisionPolicy(
        param_dtype=None if parallel.dtype == torch.float32 else parallel.dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the rotations stay float32
    )
    for module in filter(None, (model, average)):
        for unit in (*module.get_submodule("layers").children(), module):
            fully_shard(unit, mesh=mesh, mp_policy=policy)
    return model


@contextmanager
def sync_gradients(called: nn.Module, last: bool) -> Iterator[None]:
    """Let the processes reduce gradients only in a step's last micro-batch."""
    if isinstance(called, FSDPModule):
        called.set_requires_gradient_sync(last)
    if isinstance(called, DistributedDataParallel) and not last:
        with called.no_sync():
            yield
    else:
        yield


def gather_full_model(model: nn.Module) -> nn.Module:
    """The model in eval mode, or an unsharded copy of a sharded model, on every process."""
    if not isinstance(model, FSDPModule):
        return model.eval()
    assert isinstance(model, Transformer)
    with shapes_only():
        copy = Transformer(model.config)
    whole = StateDictOptions(full_state_dict=True)
    copy.load_state_dict(get_model_state_dict(model, options=whole), assign=True)
    return copy.eval()
