"""Triton kernels of the value mix (see fused_mix.py, the only one to import this file).

    T tokens   H heads   K width of a head   G gates of a head   N codes   A slots of a code
    L layers   M slots a layer reads, from slot `first` on

Tables are [N, A, H, K], logits [T, H, G] with G = M, or M + 1 where gate 0 is that of v. All sums
are in float32 and in one order, whatever the block sizes: the same inputs give the same bits, and
a token's sums do not depend on the tokens beside it. Offsets into tables and tokens have 64 bits:
16384 codes of 96 slots 1600 wide are more than 2^31 numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr):
    """A program's token and heads; numbers of a head; which are there; their places in a token."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    k = tl.arange(0, BLOCK_K)
    live_head = head < HEADS
    live = live_head[:, None] & (k < WIDTH)[None, :]
    return token, head, k, live_head, live, head[:, None] * WIDTH + k[None, :]


@triton.jit(do_not_specialize=["first"])  # or LaVE's layers would each compile their own
def mix_forward(
    out, table, ids, logits, v, v_stride, first,
    ALL: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr,
    GATED: tl.constexpr, HAS_V: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = (g_0) v + sum_i g_i rows_i, or the sum alone; a program a token and BLOCK_H heads."""
    token, head, k, live_head, live, at = _place(HEADS, WIDTH, BLOCK_H, BLOCK_K)
    gate = logits + (token * HEADS + head) * (SLOTS + GATED)
    mixed = tl.zeros((BLOCK_H, BLOCK_K), tl.float32)
    if HAS_V:
        mixed += tl.load(v + token * v_stride + at, live, other=0.0).to(tl.float32)
        if GATED:
            g_0 = 2 * tl.sigmoid(tl.load(gate, live_head, other=0.0).to(tl.float32))
            mixed *= g_0[:, None]
    code = tl.load(ids + token).to(tl.int64)
    there = tl.where(code < 0, 0, WIDTH)  # -1: no row stands here
    looked_up = live_head[:, None] & (k < there)[None, :]
    row = table + (code * ALL + first) * (HEADS * WIDTH)
    for slot in tl.static_range(SLOTS):
        g = 2 * tl.sigmoid(tl.load(gate + GATED + slot, live_head, other=0.0).to(tl.float32))
        values = tl.load(row + slot * (HEADS * WIDTH) + at, looked_up, other=0.0).to(tl.float32)
        mixed += g[:, None] * values
    tl.store(out + token * (HEADS * WIDTH) + at, mixed.to(out.dtype.element_ty), live)


@triton.jit(do_not_specialize=["first"])
def mix_backward(
    d_logits, d_v, d_out, table, ids, logits, v, v_stride, first,
    ALL: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr,
    GATED: tl.constexpr, HAS_V: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What reaches the logits, and v where it is gated. Blocks as in `mix_forward`.

    g = 2 sigmoid(z), so dg/dz = g (1 - g / 2); dL/dg_i = d_out . rows_i.
    """
    token, head, k, live_head, live, at = _place(HEADS, WIDTH, BLOCK_H, BLOCK_K)
    gate_at = (token * HEADS + head) * (SLOTS + GATED)
    gate, d_gate = logits + gate_at, d_logits + gate_at
    d = tl.load(d_out + token * (HEADS * WIDTH) + at, live, other=0.0).to(tl.float32)
    if GATED:
        g_0 = 2 * tl.sigmoid(tl.load(gate, live_head, other=0.0).to(tl.float32))
        reached = tl.zeros((BLOCK_H,), tl.float32)
        if HAS_V:
            own = tl.load(v + token * v_stride + at, live, other=0.0).to(tl.float32)
            reached += tl.sum(d * own, axis=1) * g_0 * (1 - g_0 / 2)
            d_own = (g_0[:, None] * d).to(d_v.dtype.element_ty)
            tl.store(d_v + token * (HEADS * WIDTH) + at, d_own, live)
        tl.store(d_gate, reached.to(d_logits.dtype.element_ty), live_head)
    code = tl.load(ids + token).to(tl.int64)
    there = tl.where(code < 0, 0, WIDTH)
    looked_up = live_head[:, None] & (k < there)[None, :]
    row = table + (code * ALL + first) * (HEADS * WIDTH)
    for slot in tl.static_range(SLOTS):
        g = 2 * tl.sigmoid(tl.load(gate + GATED + slot, live_head, other=0.0).to(tl.float32))
        values = tl.load(row + slot * (HEADS * WIDTH) + at, looked_up, other=0.0).to(tl.float32)
        reached = tl.sum(d * values, axis=1) * g * (1 - g / 2)
        tl.store(d_gate + GATED + slot, reached.to(d_logits.dtype.element_ty), live_head)


@triton.jit
def bank_gradient(
    d_table, partial, partial_row, ids, order, begin, end, out, logits, outs, gates, firsts,
    n_layer, ALIGNED: tl.constexpr, ALL: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    SLOTS: tl.constexpr, GATED: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d_table[code, a, h] = sum over tokens of the code and layers of g_a * d_out, both in order.

    Tokens are sorted by code: ids and order [T], and for each the begin and end of its code's
    tokens. A program takes CHUNK of them, one head, all slots; the others of the grid have nothing
    to do. A code of more than CHUNK tokens leaves partial sums for `add_chunks`.

    The layers' gradients [T, H, K] and logits [T, H, G] lie anywhere in memory, so that nothing has
    to be copied together: out and logits are those of one layer, outs and gates say how many
    numbers away each layer's are, in multiples of ALIGNED for outs; firsts: of each layer.
    """
    place, head = tl.program_id(0), tl.program_id(1)
    code = tl.load(ids + place).to(tl.int64)
    start, stop = tl.load(begin + place), tl.load(end + place)
    if (code >= 0) & ((place - start) % CHUNK == 0):
        slot, k = tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_K)
        total = tl.zeros((BLOCK_A, BLOCK_K), tl.float32)
        for i in range(place, tl.minimum(place + CHUNK, stop)):
            token = tl.load(order + i).to(tl.int64)
            for begun in range(0, n_layer, BLOCK_L):
                layer = begun + tl.arange(0, BLOCK_L)
                there = layer < n_layer
                away = tl.multiple_of(tl.load(outs + layer, there, other=0), ALIGNED)
                z = logits + tl.load(gates + layer, there, other=0)
                first = tl.load(firsts + layer, there, other=0)
                mine = slot[:, None] - first[None, :]  # which of the layer's slots, [A, L]
                read = (mine >= 0) & (mine < SLOTS) & there[None, :]
                at = z[None, :] + (token * HEADS + head) * (SLOTS + GATED) + GATED + mine
                g = 2 * tl.sigmoid(tl.load(at, read, other=0.0).to(tl.float32))
                g = tl.where(read, g, 0.0)
                d = tl.load(
                    out + away[:, None] + (token * HEADS + head) * WIDTH + k[None, :],
                    there[:, None] & (k < WIDTH)[None, :],
                    other=0.0,
                )
                total = tl.dot(g, d.to(tl.float32), total, input_precision=PRECISION)
        at = (slot[:, None] * HEADS + head) * WIDTH + k[None, :]
        live = (slot < ALL)[:, None] & (k < WIDTH)[None, :]
        if stop - start > CHUNK:
            row = tl.load(partial_row + place).to(tl.int64)
            tl.store(partial + row * (ALL * HEADS * WIDTH) + at, total, live)
        else:
            tl.store(d_table + code * (ALL * HEADS * WIDTH) + at, total, live)


@triton.jit
def add_chunks(
    d_table, partial, place_of, ids, begin, end, tokens,
    ROW: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The partial sums of each code that has them, added up in order; a program BLOCK numbers.

    place_of: the place among the sorted tokens where each row of `partial` begins, `tokens` for
    rows that are not used. A code's rows follow each other; the program of the first does the work.
    """
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(place_of + row)
    used = place < tokens
    start = tl.load(begin + place, used, other=-1)
    if place == start:
        stop = tl.load(end + place)
        code = tl.load(ids + place).to(tl.int64)
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for i in range(0, tl.cdiv(stop - start, CHUNK)):
            total += tl.load(partial + (row + i) * ROW + at, at < ROW, other=0.0)
        tl.store(d_table + code * ROW + at, total, at < ROW)
