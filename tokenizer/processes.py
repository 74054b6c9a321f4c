"""What the processes of a training tell each other; one process alone tells nobody anything."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def several() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def total(tensor: Tensor) -> Tensor:
    """The sum over processes of a tensor that each has, without a gradient; given alone, itself."""
    if not several():
        return tensor
    result = tensor.detach().clone()
    dist.all_reduce(result)
    return result


def mean(tensor: Tensor) -> Tensor:
    """The mean over processes, with the gradient of one's own: gradients are averaged later."""
    if not several():
        return tensor
    average = total(tensor) / dist.get_world_size()
    return tensor + (average - tensor.detach()) if tensor.requires_grad else average


def from_first(tensor: Tensor) -> None:
    """Overwrite a tensor with what the first process has in its place."""
    if several():
        dist.broadcast(tensor.detach(), src=0)
