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
    bank = weights["memory.bank.weight"]
    first = np.zeros(bank.shape[1])
    if config.memory.class_rows:
        first = weights["memory.class_bank.weight"][label]
    return [row.reshape(-1, width) for row in (first, *(bank[code] for code in codes))]


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


def mixed_value(v, x, rows, router, n_head, gate_standard):
    """V = g_0 V + sum_i g_i M_i per head, g = 2 sigmoid(x W_G)."""
    gates = 2 / (1 + np.exp(-(router @ x))).reshape(n_head, -1)
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
            router = weights[pre + "mixer.router.weight"]
            v = mixed_value(v, h, rows[t], router, n_head, config.memory.gate_standard)
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
    from tests.reference_variants import ATTENTIONS, FEEDFORWARDS, MEMORIES

    config = model.config
    weights = {k: v.detach().double().numpy() for k, v in model.state_dict().items()}
    codes = [int(c) for c in codes][:-1]
    xs = [weights["label_embedding.weight"][int(label)]]
    xs += [weights["code_embedding.weight"][c] for c in codes]
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
    final = [rms_norm(x, weights["norm.weight"], config.norm_eps) for x in xs]
    return np.stack([weights["head.weight"] @ x for x in final])


def layer_ffn(config, layer):
    """The feed-forward that stands in a layer."""
    if getattr(config.ffn, "layers", "all") == "all":
        return config.ffn
    return config.ffn if layer in config.ffn.layers else config.ffn.elsewhere
