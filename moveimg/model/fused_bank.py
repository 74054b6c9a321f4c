"""The gradient of a value bank that all layers mix from, added up once, in float32 and in order.

    B batch   S positions   T = B S tokens   H heads   K width of a head   L layers
    N codes   A slots of a code   G gates of a head: those of slots, after that of v if it is gated

It is the sum over layers of gates (x) d (d: the gradient of the layer's mixed V), two factors that
each layer has at hand. They are kept until the last layer is through; then one kernel adds up
everything that belongs to a row and writes it once (on a CPU: bag_mix.py). Tokens are sorted by
code for it, so there are no atomics, and the same inputs give the same bits. Had each layer added
its products to the bank's gradient as they come, 2 L A H K numbers a token would be moved, not L H
K.

The factors travel by autograd's own ways: `carriers` makes, from the bank, two tensors a layer
that hold no numbers (one element, expanded); a layer's mix takes them as inputs and returns the
factors as their gradients; those of all layers arrive together in the backward of `carriers`. So
it holds in recomputed and in compiled blocks. A pair of carriers serves one mix: gradients of two
would be added, which is not what factors are for.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from moveimg.model.bag_mix import bag_bank_gradient

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CHUNK = 64  # tokens of one code that one program adds up
ALIGNED = 16  # bytes: addresses that may be read in wide pieces
OPTIONS = {"enable_fp_fusion": True}  # whatever Triton's own default, which changes with 3.10


def on_cpu(tensor: Tensor) -> bool:
    """Whether bag_mix.py is what mixes here."""
    return tensor.device.type == "cpu" and not INTERPRETED


def on_device(tensor: Tensor) -> Any:
    """A context in which Triton launches where this tensor is."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@torch.library.custom_op("moveimg::carriers", mutates_args=())
def carriers(
    tables: list[Tensor], ids: Tensor, firsts: list[int], sizes: list[int], gated: bool,
    dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """The carriers of the layers' mixed values [B, S, H, K], then those of their logits.

    Args:
        tables: [N_i, A * H * K] each; the sum of N_i is N.
        ids: int64 [B, S] of rows, one table after another; -1 where none stands.
        firsts: of each layer that reads, the first slot it reads.
        sizes: H, A and G.
        gated: whether gate 0 is that of v.
        dtype: of the gradients; autograd casts what arrives in another.
    """
    return _empty_carriers(tables, ids, firsts, sizes, dtype)


@carriers.register_fake
def _(tables, ids, firsts, sizes, gated, dtype):
    return _empty_carriers(tables, ids, firsts, sizes, dtype)


def _empty_carriers(
    tables: list[Tensor], ids: Tensor, firsts: list[int], sizes: list[int], dtype: torch.dtype
) -> list[Tensor]:
    heads, slots, gates = sizes
    width = tables[0].shape[1] // (slots * heads)
    return [
        tables[0].new_empty((), dtype=dtype).expand(*ids.shape, heads, last)
        for last in (width, gates)
        for _ in firsts
    ]


def _keep(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    tables, ids, ctx.firsts, ctx.sizes, ctx.gated, _ = inputs
    ctx.save_for_backward(ids)
    ctx.lengths, ctx.dtypes = [len(table) for table in tables], [table.dtype for table in tables]


def _gradients(ctx: Any, factors: list[Tensor]) -> tuple:
    (ids,) = ctx.saved_tensors
    n = len(ctx.firsts)
    outs, logits = factors[:n], factors[n:]
    joint = bank_gradient(
        outs, logits, ids, ctx.firsts, ctx.gated, [sum(ctx.lengths), ctx.sizes[1]]
    )
    parts = joint.flatten(1).split(ctx.lengths)
    grads = [part.to(dtype) for part, dtype in zip(parts, ctx.dtypes, strict=True)]
    return grads, None, None, None, None, None


carriers.register_autograd(_gradients, setup_context=_keep)


# Addresses are written into a tensor from the host, which a CUDA graph could not replay.
@torch.library.custom_op(
    "moveimg::bank_gradient", mutates_args=(), tags=[torch.Tag.cudagraph_unsafe]
)
def bank_gradient(
    outs: list[Tensor], logits: list[Tensor], ids: Tensor, firsts: list[int], gated: bool,
    shape: list[int],
) -> Tensor:  # fmt: skip
    """Sums over layers and tokens of 2 sigmoid(logits) (x) outs, by code: float32 [N, A, H, K].

    Args:
        outs: of each layer, the gradient of its mixed values [B, S, H, K]; one dtype.
        logits: of each layer, [B, S, H, G]; one dtype.
        ids: int64 [B, S], -1 where no row stands.
        firsts: of each layer, the first slot it reads.
        gated: whether gate 0 is that of v.
        shape: N and A.
    """
    if on_cpu(ids):
        return bag_bank_gradient(outs, logits, ids, firsts, gated, shape)
    import triton

    from moveimg.model import mix_kernels

    outs, logits = [_aligned(out) for out in outs], [z.contiguous() for z in logits]
    (length, slots), (heads, width), device = shape, outs[0].shape[2:], ids.device
    tokens, numbers = ids.numel(), slots * heads * width
    ids, order = ids.flatten().sort(stable=True)
    begin = torch.searchsorted(ids, ids, out_int32=True)
    end = torch.searchsorted(ids, ids, out_int32=True, right=True)
    # A code of many tokens is cut: each of its chunks has a row of partial sums.
    places = torch.arange(tokens, device=device)
    cut = (ids >= 0) & (end - begin > CHUNK) & ((places - begin) % CHUNK == 0)
    rows_before = cut.cumsum(0)
    rows = 2 * tokens // CHUNK  # at most: a code of n > CHUNK tokens has less than 2 n / CHUNK
    place_of = torch.searchsorted(rows_before, torch.arange(1, rows + 1, device=device))
    block_a, block_k = (max(16, triton.next_power_of_2(n)) for n in (slots, width))
    total = torch.zeros(length, slots, heads, width, device=device)
    partial = torch.empty(rows, numbers, device=device)
    where = torch.tensor([_distances(outs), _distances(logits), firsts]).to(device)
    with on_device(total):
        mix_kernels.bank_gradient[(tokens, heads)](
            total, partial, rows_before - 1, ids, order, begin, end, outs[0], logits[0],
            *where, len(outs), ALIGNED=ALIGNED // outs[0].element_size(), ALL=slots, HEADS=heads,
            WIDTH=width, SLOTS=logits[0].shape[-1] - gated, GATED=int(gated), CHUNK=CHUNK,
            PRECISION="ieee" if torch.version.hip else "tf32x3", BLOCK_L=16,
            BLOCK_A=block_a, BLOCK_K=block_k, num_warps=4 if block_a * block_k <= 4096 else 8,
            **OPTIONS,
        )  # fmt: skip
        if rows:
            mix_kernels.add_chunks[(rows, triton.cdiv(numbers, 1024))](
                total, partial, place_of, ids, begin, end, tokens,
                ROW=numbers, CHUNK=CHUNK, BLOCK=1024, **OPTIONS,
            )  # fmt: skip
    return total


@bank_gradient.register_fake
def _(outs, logits, ids, firsts, gated, shape):
    wide = torch.promote_types(outs[0].dtype, torch.float32)
    return ids.new_empty((*shape, *outs[0].shape[2:]), dtype=wide)


def _aligned(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNED else tensor


def _distances(tensors: list[Tensor]) -> list[int]:
    """How many numbers after the first tensor each of them begins."""
    first, size = tensors[0].data_ptr(), tensors[0].element_size()
    return [(tensor.data_ptr() - first) // size for tensor in tensors]
