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


def memory_rows(weights, config, codes, label, layer):
    """The value rows a layer reads at each position: list of [M, width] (or None)."""
    memory = config.memory
    if memory.kind == "none":
        return None
    slots = memory.slots if memory.kind == "move" else None
    if memory.kind == "lave":
        layers = {
            "all": list(range(config.n_layer)),
            # every second layer, counted from the last
            "alternate": list(range(config.n_layer - 1, -1, -2))[::-1],
        }.get(memory.layers, sorted(memory.layers))
        if layer not in layers:
            return None
        slots = len(layers)

    def row(table, index):
        rows = table[index].reshape(slots, config.width)
        return rows if memory.kind == "move" else rows[layers.index(layer)][None]

    bank = weights["memory.bank.weight"]
    count = slots if memory.kind == "move" else 1
    first = np.zeros((count, config.width))
    if memory.class_rows:
        first = row(weights["memory.class_bank.weight"], label)
    return [first] + [row(bank, code) for code in codes]


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


def reference_logits(model, codes, label):
    """logits [T, V] of one sequence, as lists of numbers would give them."""
    config = model.config
    weights = {k: v.detach().double().numpy() for k, v in model.state_dict().items()}
    codes = [int(c) for c in codes][:-1]
    n_head, head_dim = config.n_head, config.width // config.n_head
    xs = [weights["label_embedding.weight"][int(label)]]
    xs += [weights["code_embedding.weight"][c] for c in codes]
    for layer in range(config.n_layer):
        pre = f"layers.{layer}."
        rows = memory_rows(weights, config, codes, int(label), layer)
        qs, ks, vs, outs = [], [], [], []
        for t, x in enumerate(xs):
            h = rms_norm(x, weights[pre + "attention_norm.weight"], config.norm_eps)
            q, k, v = np.split(weights[pre + "attention.wqkv.weight"] @ h, 3)
            if rows is not None:
                router = weights[pre + "attention.mixer.router.weight"]
                v = mixed_value(v, h, rows[t], router, n_head, config.memory.gate_standard)
            for name, vector in (("q", q), ("k", k)):
                heads = vector.reshape(n_head, head_dim)
                turned = [rotated(p, t - 1, config.grid, config.rope_base) for p in heads]
                (qs if name == "q" else ks).append(np.stack(turned))
            vs.append(v.reshape(n_head, head_dim))
            attended = np.zeros((n_head, head_dim))
            for h_i in range(n_head):
                scores = np.array([qs[t][h_i] @ ks[s][h_i] for s in range(t + 1)])
                scores = np.exp(scores / math.sqrt(head_dim))
                for s in range(t + 1):
                    attended[h_i] += scores[s] / scores.sum() * vs[s][h_i]
            outs.append(x + weights[pre + "attention.wo.weight"] @ attended.reshape(-1))
        xs = []
        for x in outs:
            h = rms_norm(x, weights[pre + "ffn_norm.weight"], config.norm_eps)
            gate = silu(weights[pre + "ffn.w1.weight"] @ h) * (weights[pre + "ffn.w3.weight"] @ h)
            xs.append(x + weights[pre + "ffn.w2.weight"] @ gate)
    final = [rms_norm(x, weights["norm.weight"], config.norm_eps) for x in xs]
    return np.stack([weights["head.weight"] @ x for x in final])
