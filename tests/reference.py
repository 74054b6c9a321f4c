"""The generator once more, slow and obvious, in float64 NumPy, straight from the formulas.

One sequence at a time, one head at a time, every position a loop step; no cache, no batching,
nothing shared with the program but the names of its weights.
"""

from __future__ import annotations

import math

import numpy as np


def rms_norm(x, weight, eps):
    return x / math.sqrt(float(np.mean(x * x)) + eps) * weight


def silu(x):
    return x / (1 + np.exp(-x))


def rotation_angles(position, grid, head_dim, base):
    """Angles of a head's pairs at a code's position: first half by row, second by column."""
    row, column = divmod(position, grid[1])
    half = head_dim // 2
    frequencies = [base ** (-i / half) for i in range(0, half, 2)]
    return [row * f for f in frequencies] + [column * f for f in frequencies]


def rotated(vector, position, grid, base):
    """Rotate neighbouring pairs; the class token (position -1) becomes zero."""
    if position < 0:
        return np.zeros_like(vector)
    out = np.empty_like(vector)
    for pair, angle in enumerate(rotation_angles(position, grid, len(vector), base)):
        a, b = vector[2 * pair], vector[2 * pair + 1]
        out[2 * pair] = a * math.cos(angle) - b * math.sin(angle)
        out[2 * pair + 1] = b * math.cos(angle) + a * math.sin(angle)
    return out


def no_memory(weights, config, codes, label, layer, width):
    return None


def move(weights, config, codes, label, layer, width):
    """The value rows that a layer reads at each position: list of [M, width]."""
    bank, spec = weights["memory.bank.weight"], config.memory
    first = np.zeros(bank.shape[1])
    if spec.class_rows:
        first = weights["memory.class_bank.weight"][label]
    rows = [first]
    for i, code in enumerate(codes):
        shared = getattr(spec, "rows", None) is not None
        row = bank[int(weights["memory.row_of_code"][code]) if shared else code]
        if getattr(spec, "context", None) is not None:
            line, column = divmod(i, config.grid[1])
            neighbour = config.codebook_size
            if spec.context == "left" and column > 0:
                neighbour = codes[i - 1]
            if spec.context == "above" and line > 0:
                neighbour = codes[i - config.grid[1]]
            table = weights["memory.context_bank.weight"]
            row = row + table[hashed(code * (config.codebook_size + 1) + neighbour) % len(table)]
        rows.append(row)
    return [row.reshape(-1, width) for row in rows]


def hashed(number):
    """The finalizer of 32-bit murmur3, with 15 for its shifts of 16 and 13."""
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        number = (number ^ (number >> 15)) * factor % 2**32
    return number ^ (number >> 16)


def lave(weights, config, codes, label, layer, width):
    """The same, of the one slot that is the layer's own; None where it has none."""
    chosen = config.memory.layers
    layers = {
        "all": list(range(config.n_layer)),
        # every second layer, counted from the last
        "alternate": list(range(config.n_layer - 1, -1, -2))[::-1],
    }.get(chosen, sorted(chosen))
    if layer not in layers:
        return None
    slot = layers.index(layer)
    rows = move(weights, config, codes, label, layer, width)
    assert all(len(row) == len(layers) for row in rows)
    return [row[slot][None] for row in rows]


def mixed_value(v, x, rows, weights, name, n_head, gate_standard):
    """V = g_0 V + sum_i g_i M_i per head, g = 2 sigmoid(x W_G + b)."""
    logits = weights[name + ".router.weight"] @ x + weights.get(name + ".router.bias", 0.0)
    gates = 2 / (1 + np.exp(-logits)).reshape(n_head, -1)
    head_dim = len(v) // n_head
    out = np.empty_like(v)
    for h in range(n_head):
        part = slice(h * head_dim, (h + 1) * head_dim)
        g = list(gates[h])
        total = (g.pop(0) if gate_standard else 1.0) * v[part]
        for g_i, m_i in zip(g, rows, strict=True):
            total = total + g_i * m_i[part]
        out[part] = total
    return out


def attended_values(qs, ks, vs, scale):
    """Causal softmax attention, head by head: lists of [H, .] over positions -> list of [H * K]."""
    outs = []
    for t, q in enumerate(qs):
        out = np.zeros_like(vs[t])
        for h in range(len(q)):
            scores = np.exp(np.array([q[h] @ ks[s][h] for s in range(t + 1)]) * scale)
            for s in range(t + 1):
                out[h] += scores[s] / scores.sum() * vs[s][h]
        outs.append(out.reshape(-1))
    return outs


def mha(weights, pre, config, hs, memory):
    """Multi-head attention over normed inputs; memory(width) gives the rows of all positions."""
    n_head = config.n_head
    qs, ks, vs = [], [], []
    for t, h in enumerate(hs):
        q, k, v = np.split(weights[pre + "wqkv.weight"] @ h, 3)
        rows = memory(config.width)
        if rows is not None:
            gated = config.memory.gate_standard
            v = mixed_value(v, h, rows[t], weights, pre + "mixer", n_head, gated)
        for vector, into in ((q, qs), (k, ks)):
            heads = vector.reshape(n_head, -1)
            into.append(np.stack([rotated(p, t - 1, config.grid, config.rope_base) for p in heads]))
        vs.append(v.reshape(n_head, -1))
    outs = attended_values(qs, ks, vs, 1 / math.sqrt(config.head_dim))
    return [weights[pre + "wo.weight"] @ out for out in outs]


def swiglu(weights, pre, config, spec, x):
    gate = silu(weights[pre + "w1.weight"] @ x) * (weights[pre + "w3.weight"] @ x)
    return weights[pre + "w2.weight"] @ gate


def reference_logits(model, codes, label):
    """logits [T, V] of one sequence, as lists of numbers would give them."""
    from tests.reference_variants import ATTENTIONS, FEEDFORWARDS, MEMORIES, remember

    config = model.config
    weights = {k: v.detach().double().numpy() for k, v in model.state_dict().items()}
    codes = [int(c) for c in codes][:-1]
    xs = [weights["label_embedding.weight"][int(label)]]
    xs += [weights["code_embedding.weight"][c] for c in codes]
    remembered = {}
    for layer in range(config.n_layer):
        pre = f"layers.{layer}."

        def normed(x, name, pre=pre):
            return rms_norm(x, weights[pre + name], config.norm_eps)

        def memory(width, layer=layer):
            find = MEMORIES[config.memory.kind]
            return find(weights, config, codes, int(label), layer, width)

        hs = [normed(x, "attention_norm.weight") for x in xs]
        attended = ATTENTIONS[config.attention.kind](
            weights, pre + "attention.", config, hs, memory
        )
        xs = [x + a for x, a in zip(xs, attended, strict=True)]
        spec = layer_ffn(config, layer)
        feed = FEEDFORWARDS[spec.kind]
        xs = [
            x + feed(weights, pre + "ffn.", config, spec, normed(x, "ffn_norm.weight")) for x in xs
        ]
        if spec.kind == "ultramem":
            later = [remember(weights, pre + "ffn.", config, spec, x) for x in xs]
            remembered.setdefault(layer + spec.delay, []).append(later)
        for later in remembered.get(layer, []):
            xs = [x + y for x, y in zip(xs, later, strict=True)]
    final = [rms_norm(x, weights["norm.weight"], config.norm_eps) for x in xs]
    return np.stack([weights["head.weight"] @ x for x in final])


def layer_ffn(config, layer):
    """The feed-forward that stands in a layer."""
    if getattr(config.ffn, "layers", "all") == "all":
        return config.ffn
    return config.ffn if layer in config.ffn.layers else config.ffn.elsewhere
