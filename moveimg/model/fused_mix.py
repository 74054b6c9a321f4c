"""The value mix without gathered rows: from bank, code ids, router logits and V to the mixed V.

    B batch   S positions   H heads   K width of a head   N codes   A slots of a code   L layers
    M slots a layer reads   G gates of a head: M, or M + 1 where gate 0 is that of v

Nothing of the size [B, S, M, H * K] is ever made, forward or backward; how the gradient reaches
the bank is told in fused_bank.py. On CUDA it is one kernel, which Triton's interpreter runs on a
CPU to be tested (TRITON_INTERPRET=1). On a CPU whole sequences go by bag_mix.py. Elsewhere the
memory gathers its rows (see memory.py).
"""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moveimg.model.bag_mix import bag_mix, places
from moveimg.model.fused_bank import INTERPRETED, OPTIONS, carriers, on_cpu, on_device

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPABILITY = (8, 0)  # what Triton supports


class BankRows(NamedTuple):
    """What a layer's mixer is handed instead of rows: where they are.

    Attributes:
        table: [N, A, H, K].
        ids: int64 [B, S], -1 where no row stands.
        carriers: [B, S, H, K] and [B, S, H, G], through which gradients reach the bank, or None.
        bags: what bag_mix.places says of the slots that the layer reads, where that mixes.
    """

    table: Tensor
    ids: Tensor
    carriers: tuple[Tensor, Tensor] | None = None
    bags: Tensor | None = None

    def gathered(self) -> Tensor:
        """The rows themselves, [B, S, H, A, K], without a gradient."""
        rows = self.table.detach()[self.ids.clamp(min=0)].transpose(2, 3)
        return rows.masked_fill((self.ids < 0)[..., None, None, None], 0)


def usable(weight: Tensor, whole: bool) -> bool:
    """Whether this table can be mixed from here; `whole`: for sequences, not a step of decoding."""
    if on_cpu(weight):  # a few rows are gathered faster
        return whole and weight.dtype in (torch.float32, torch.float64)
    if weight.dtype not in DTYPES:
        return False
    if INTERPRETED:
        return True
    return weight.is_cuda and (torch.compiler.is_compiling() or _works(weight.device))


@cache
def _works(device: torch.device) -> bool:
    """Whether a kernel compiles and runs on this device; says so once where it should and fails."""
    missing = importlib.util.find_spec("triton") is None
    if missing or torch.cuda.get_device_capability(device) < CAPABILITY:
        return False
    try:
        table, ids = torch.ones(1, 1, 1, 16, device=device), torch.zeros(1, 1, device=device)
        mix(BankRows(table, ids.long()), torch.zeros(1, 1, 1, 1, device=device), None, 0, False)
        torch.cuda.synchronize(device)
    except Exception as error:  # no compiler, a driver too old: the plain formulation serves
        line = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"the value mix is not fused here, and slower: {line}", stacklevel=2)
        return False
    return True


# --- what the model calls ------------------------------------------------------------------


def look_up(
    tables: list[Tensor], ids: Tensor, firsts: list[int | None], heads: int, slots: int,
    gates: int, gated: bool,
) -> list[BankRows]:  # fmt: skip
    """What each layer's mixer is to be handed.

    Args:
        tables: [N_i, A * H * K], of which ids [B, S] count the rows, one table after another.
        firsts: of each layer, the first slot it reads; None where it reads none.
        heads, slots, gates: H, A and G.
        gated: whether gate 0 is that of v.
    """
    ids = ids.contiguous()
    table = tables[0] if len(tables) == 1 else torch.cat([t.detach() for t in tables])
    table, dtype, kind = table.detach(), table.dtype, table.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        # Rounding the whole table reads and writes it once; each layer reads its rows twice.
        if ids.numel() * len(firsts) > 2 * len(table) and not on_cpu(table):
            table = table.to(dtype)
    table = table.unflatten(1, (slots, heads, -1))
    readers = [layer for layer, first in enumerate(firsts) if first is not None]
    if not on_cpu(table):
        rows = [BankRows(table, ids) for _ in firsts]
    else:
        named = {None: None} | {
            first: places(ids, first, gates - gated, slots, heads)
            for first in set(firsts)
            if first is not None
        }
        rows = [BankRows(table, ids, bags=named[first]) for first in firsts]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tables):
        at = [first for first in firsts if first is not None]
        pairs = carriers(tables, ids, at, [heads, slots, gates], gated, dtype)
        for layer, *pair in zip(readers, pairs[: len(at)], pairs[len(at) :], strict=True):
            rows[layer] = rows[layer]._replace(carriers=(pair[0], pair[1]))
    return rows


def mix(rows: BankRows, logits: Tensor, v: Tensor | None, first: int, gated: bool) -> Tensor:
    """sum_i g_i rows_i, plus (g_0) v where there is v: [B, S, H, K], of v's dtype or the logits'.

    Args:
        rows: what `look_up` gave this layer.
        logits: [B, S, H, G]; the gates are 2 sigmoid(logits).
        v: [B, S, H, K], or None for the sum alone.
        first: the first of the slots to read; there are as many as gates for them.
        gated: whether gate 0 is that of v; without v it is not looked at.
    """
    if rows.bags is not None:
        return bag_mix(rows.table, rows.ids, rows.bags, logits, v, gated, rows.carriers)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        pair = rows.carriers or (None, None)
        return mix_op(rows.table, rows.ids, logits, v, first, gated, *pair)
    return _mix(rows.table, rows.ids, logits, v, first, gated)  # spared: the dispatcher's time


# --- the mix -------------------------------------------------------------------------------


@torch.library.custom_op("moveimg::mix", mutates_args=())
def mix_op(
    table: Tensor, ids: Tensor, logits: Tensor, v: Tensor | None, first: int, gated: bool,
    of_out: Tensor | None, of_logits: Tensor | None,
) -> Tensor:  # fmt: skip
    """`mix`, with its carriers."""
    return _mix(table, ids, logits, v, first, gated)


def _mix(
    table: Tensor, ids: Tensor, logits: Tensor, v: Tensor | None, first: int, gated: bool
) -> Tensor:
    from moveimg.model.mix_kernels import mix_forward

    out = _empty_out(table, logits, v)
    _launch(mix_forward, (out,), table, ids, logits, v, first, gated)
    return out


@mix_op.register_fake
def _(table, ids, logits, v, first, gated, of_out, of_logits):
    return _empty_out(table, logits, v)


def _empty_out(table: Tensor, logits: Tensor, v: Tensor | None) -> Tensor:
    like = logits if v is None else v
    return like.new_empty(*logits.shape[:3], table.shape[-1])


@torch.library.custom_op("moveimg::mix_backward", mutates_args=())
def mix_backward_op(
    d_out: Tensor, table: Tensor, ids: Tensor, logits: Tensor, v: Tensor | None, first: int,
    gated: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What reaches the logits, and v where it is gated (else nothing: an empty tensor)."""
    from moveimg.model.mix_kernels import mix_backward

    d_logits, d_v = _empty_gradients(d_out, logits, v, gated)
    outputs = (d_logits, d_v, d_out.contiguous())
    _launch(mix_backward, outputs, table, ids, logits, v, first, gated)
    return d_logits, d_v


@mix_backward_op.register_fake
def _(d_out, table, ids, logits, v, first, gated):
    return _empty_gradients(d_out, logits, v, gated)


def _empty_gradients(
    d_out: Tensor, logits: Tensor, v: Tensor | None, gated: bool
) -> tuple[Tensor, Tensor]:
    shape = d_out.shape if gated and v is not None else (0,)
    return logits.new_empty(logits.shape), d_out.new_empty(shape)


def _keep_for_mix(ctx: Any, inputs: tuple, output: Tensor) -> None:
    table, ids, logits, v, ctx.first, ctx.gated, of_out, _ = inputs
    ctx.save_for_backward(table, ids, logits, v)
    ctx.reaches_bank = of_out is not None


def _mix_gradients(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    table, ids, logits, v = ctx.saved_tensors
    d_out = d_out.contiguous()
    d_logits, d_v = mix_backward_op(d_out, table, ids, logits, v, ctx.first, ctx.gated)
    of_v = None if v is None else (d_v if ctx.gated else d_out)
    factors = (d_out, logits) if ctx.reaches_bank else (None, None)
    return None, None, d_logits, of_v, None, None, *factors


mix_op.register_autograd(_mix_gradients, setup_context=_keep_for_mix)


def _launch(
    kernel: Any, outputs: tuple[Tensor, ...], table: Tensor, ids: Tensor, logits: Tensor,
    v: Tensor | None, first: int, gated: bool,
) -> None:  # fmt: skip
    """Run a kernel of the mix over all tokens."""
    import triton

    _, slots, heads, width = table.shape
    tokens = ids.numel()
    block_k = triton.next_power_of_2(width)
    numbers = 1024 if tokens >= 1024 else 256  # a program's; few tokens (decoding) are cut finer
    block_h = max(1, min(triton.next_power_of_2(heads), numbers // block_k))
    v, stride = _by_token(v)
    with on_device(table):
        kernel[(tokens, triton.cdiv(heads, block_h))](
            *outputs, table, ids.contiguous(), logits.contiguous(),
            outputs[0] if v is None else v, stride, first,
            ALL=slots, HEADS=heads, WIDTH=width, SLOTS=logits.shape[-1] - gated, GATED=int(gated),
            HAS_V=v is not None, BLOCK_H=block_h, BLOCK_K=block_k,
            num_warps=max(1, min(8, block_h * block_k // 256)), **OPTIONS,
        )  # fmt: skip


def _by_token(v: Tensor | None) -> tuple[Tensor | None, int]:
    """v [B, S, H, K] and how far apart its tokens are; copied only if a token's is not in a piece.

    v comes out of one product with q and k, so its tokens usually stand apart.
    """
    if v is None:
        return None, 0
    _, positions, heads, width = v.shape
    batch, token, head, one = v.stride()
    if (head, one) != (width, 1) or (len(v) > 1 and batch != positions * token):
        return v.contiguous(), heads * width
    return v, token
