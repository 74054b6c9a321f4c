"""What the machine can do at most: bytes read and products added up in a second."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

from moveimg.bench.timing import seconds_of

STREAM_BYTES = {"cpu": 2**28, "cuda": 2**32}  # far more than any cache holds
REPEATS = 7


def memory_bandwidth(device: torch.device) -> float:
    """Bytes a second of reading a large tensor once (a sum over it), the median of seven."""
    n = STREAM_BYTES.get(device.type, 2**28) // 4
    data = torch.ones(n, device=device)
    return 4 * n / statistics.median(seconds_of(data.sum, device, REPEATS))


Layout = Callable[[nn.Linear], nn.Module]


def matrix_rate(
    shapes: list[tuple[int, int, int]],
    dtype: torch.dtype,
    device: torch.device,
    layout: Layout = lambda linear: linear,
) -> float:
    """FLOPs a second of products W [n, k] x [k, rows] over all (rows, k, n) in turn.

    The matrices of one pass are different ones, so that small ones do not stay in a cache that
    the model's would not stay in. One product's FLOPs are 2 rows k n. `layout` makes of a linear
    layer what is measured; `takes` of that is its input's dtype, where it is another.
    """
    pairs = []
    for rows, k, n in shapes:
        linear = nn.Linear(k, n, bias=False, device=device, dtype=dtype).requires_grad_(False)
        made = layout(linear)
        x = torch.randn(rows, k, device=device)
        pairs.append((made, x.to(getattr(made, "takes", dtype))))

    def multiply() -> list[Tensor]:
        return [product(x) for product, x in pairs]

    with torch.inference_mode():
        seconds = statistics.median(seconds_of(multiply, device, REPEATS))
    return sum(2.0 * rows * k * n for rows, k, n in shapes) / seconds
