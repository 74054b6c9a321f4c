"""The generator once more, slow and obvious, in float64 NumPy, straight from the formulas.

One sequence at a time, one head at a time, every position a loop step; no cache, no batching,
nothing shared with the program but the names of its weights. `w` are all weights, `pre` the name
of a module with its dot; a list has an entry per position.
"""

from __future__ import annotations

import math

import numpy as np


def rms_norm(x, weight, eps):
    return x / math.sqrt(float(np.mean(x * x)) + eps) * weight


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def rotated(vector, position, config):
    """Neighbouring pairs turned: the first half by row, the second by column of the position.

    The class token (position -1) becomes zero.
    """
    if position < 0:
        return np.zeros_like(vector)
    row, column = divmod(position, config.grid[1])
    half = len(vector) // 2
    frequencies = [config.rope_base ** (-i / half) for i in range(0, half, 2)]
    out = np.empty_like(vector)
    for pair, angle in enumerate(
        [row * f for f in frequencies] + [column * f for f in frequencies]
    ):
        a, b = vector[2 * pair], vector[2 * pair + 1]
        out[2 * pair] = a * math.cos(angle) - b * math.sin(angle)
        out[2 * pair + 1] = b * math.cos(angle) + a * math.sin(angle)
    return out


def no_memory(w, config, codes, label, layer, width):
    return None


def move(w, config, codes, label, layer, width):
    """The value rows that a layer reads at each position: list of [M, width]."""
    bank, spec = w["memory.bank.weight"], config.memory
    rows = [w["memory.class_bank.weight"][label] if spec.class_rows else np.zeros(bank.shape[1])]
    for i, code in enumerate(codes):
        shared = getattr(spec, "rows", None) is not None
        row = bank[int(w["memory.row_of_code"][code]) if shared else code]
        if getattr(spec, "context", None) is not None:
            line, column = divmod(i, config.grid[1])
            neighbour = config.codebook_size
            if spec.context == "left" and column > 0:
                neighbour = codes[i - 1]
            if spec.context == "above" and line > 0:
                neighbour = codes[i - config.grid[1]]
            table = w["memory.context_bank.weight"]
            row = row + table[hashed(code * (config.codebook_size + 1) + neighbour) % len(table)]
        rows.append(row)
    return [row.reshape(-1, width) for row in rows]


def hashed(number):
    """The finalizer of 32-bit murmur3, with 15 for its shifts of 16 and 13."""
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        number = (number ^ (number >> 15)) * factor % 2**32
    return number ^ (number >> 16)


def lave(w, config, codes, label, layer, width):
    """The same, of the one slot that is the layer's own; None where it has none."""
    chosen = config.memory.layers
    layers = {
        "all": list(range(config.n_layer)),
        # every second layer, counted from the last
        "alternate": list(range(config.n_layer - 1, -1, -2))[::-1],
    }.get(chosen, sorted(chosen))
    if layer not in layers:
        return None
    rows = move(w, config, codes, label, layer, width)
    assert all(len(row) == len(layers) for row in rows)
    return [row[layers.index(layer)][None] for row in rows]


def mixed_value(v, x, rows, w, name, config):
    """V = g_0 V + sum_i g_i M_i per head, g = 2 sigmoid(x W_G + b)."""
    logits = w[name + ".router.weight"] @ x + w.get(name + ".router.bias", 0.0)
    gates = 2 / (1 + np.exp(-logits)).reshape(config.n_head, -1)
    head_dim = len(v) // config.n_head
    out = np.empty_like(v)
    for h in range(config.n_head):
        part = slice(h * head_dim, (h + 1) * head_dim)
        g = list(gates[h])
        total = (g.pop(0) if config.memory.gate_standard else 1.0) * v[part]
        for g_i, m_i in zip(g, rows, strict=True):
            total = total + g_i * m_i[part]
        out[part] = total
    return out


def attended_values(qs, ks, vs, scale):
    """Causal softmax attention, head by head: lists of [H, .] -> list of [H * K]."""
    outs = []
    for t, q in enumerate(qs):
        out = np.zeros_like(vs[t])
        for h in range(len(q)):
            weights = softmax(np.array([q[h] @ ks[s][h] for s in range(t + 1)]) * scale)
            for s in range(t + 1):
                out[h] += weights[s] * vs[s][h]
        outs.append(out.reshape(-1))
    return outs


def mha(w, pre, config, hs, memory):
    """Multi-head attention over normed inputs; memory(width) gives the rows of all positions."""
    qs, ks, vs = [], [], []
    rows = memory(config.width)
    for t, h in enumerate(hs):
        q, k, v = np.split(w[pre + "wqkv.weight"] @ h, 3)
        if rows is not None:
            v = mixed_value(v, h, rows[t], w, pre + "mixer", config)
        for vector, into in ((q, qs), (k, ks)):
            heads = vector.reshape(config.n_head, -1)
            into.append(np.stack([rotated(head, t - 1, config) for head in heads]))
        vs.append(v.reshape(config.n_head, -1))
    outs = attended_values(qs, ks, vs, 1 / math.sqrt(config.head_dim))
    return [w[pre + "wo.weight"] @ out for out in outs]


def mla(w, pre, config, hs, memory):
    """Latent attention with every head's keys and values unfolded; MoVE is in the latent."""
    n_head, spec, width = config.n_head, config.attention, config.head_dim
    in_latent = config.memory.kind == "move"
    rows = memory(spec.kv_rank if in_latent else config.width)
    qs, ks, vs = [], [], []
    for t, h in enumerate(hs):
        if spec.q_rank is None:
            q = w[pre + "wq.weight"] @ h
        else:
            low = w[pre + "wq.down.weight"] @ h
            q = w[pre + "wq.up.weight"] @ rms_norm(low, w[pre + "wq.norm.weight"], config.norm_eps)
        q = q.reshape(n_head, width + spec.rope_dim)
        down = w[pre + "wkv_down.weight"] @ h
        c, key = down[: spec.kv_rank], down[spec.kv_rank :]
        c = rms_norm(c, w[pre + "kv_norm.weight"], config.norm_eps)
        if in_latent:
            c = mixed_value(c, h, rows[t], w, pre + "latent_mixer", config)
        up = (w[pre + "wkv_up.weight"] @ c).reshape(n_head, 2, width)
        v = up[:, 1]
        if not in_latent and rows is not None:
            v = mixed_value(v.reshape(-1), h, rows[t], w, pre + "value_mixer", config)
            v = v.reshape(n_head, -1)
        key = rotated(key, t - 1, config)
        ks.append(np.stack([np.concatenate([up[i, 0], key]) for i in range(n_head)]))
        turned = [np.concatenate([p[:width], rotated(p[width:], t - 1, config)]) for p in q]
        qs.append(np.stack(turned))
        vs.append(v)
    outs = attended_values(qs, ks, vs, 1 / math.sqrt(width + spec.rope_dim))
    return [w[pre + "wo.weight"] @ out for out in outs]


def swiglu(w, pre, spec, x):
    gate = silu(w[pre + "w1.weight"] @ x) * (w[pre + "w3.weight"] @ x)
    return w[pre + "w2.weight"] @ gate


def moe(w, pre, spec, x):
    p = softmax(w[pre + "expert_router.weight"] @ x)
    chosen = np.argsort(-p)[: spec.top_k]
    out = swiglu(w, pre + "shared_expert.", spec, x)
    for e in chosen:
        gate, up = np.split(x @ w[pre + "w_in"][e], 2)
        out = out + p[e] / p[chosen].sum() * ((silu(gate) * up) @ w[pre + "w_out"][e])
    return out


def look_up(w, pre, spec, x):
    """(row, weight) pairs of every look-up, from all n^2 scores, sorted."""
    rows = []
    query = w[pre + "query.weight"] @ x + w[pre + "query.bias"]
    for head, q in enumerate(query.reshape(spec.key_heads, 2, -1)):
        first, second = (w[pre + "keys"][head, half] @ q[half] for half in (0, 1))
        scores = (first[:, None] + second[None, :]).reshape(-1)
        best = np.argsort(-scores)[: spec.top_k]
        rows += list(zip(best, softmax(scores[best]), strict=True))
    return rows


def product_key(w, pre, spec, x):
    values = w["shared_ffn.weight"]
    memory = sum(share * values[row] for row, share in look_up(w, pre + "lookup.", spec, x))
    gate = w[pre + "gate.weight"] @ x + w[pre + "gate.bias"]
    return w[pre + "out.weight"] @ (memory * silu(gate)) + w[pre + "out.bias"]


def peer(w, pre, spec, x):
    out = np.zeros_like(x)
    for row, share in look_up(w, pre + "lookup.", spec, x):
        u = w[pre + "u.weight"][row] @ x
        gelu = u * (1 + math.erf(u / math.sqrt(2))) / 2
        out = out + share * gelu * w[pre + "v.weight"][row]
    return out


def ultramem(w, pre, spec, x):
    return swiglu(w, pre + "dense.", spec.elsewhere, x)


def layer_norm(x, weight):
    return (x - x.mean()) / math.sqrt(x.var() + 1e-5) * weight


def remember(w, pre, config, spec, x):
    """UltraMem's memory of a stream: every cell scored, one at a time."""
    x = rms_norm(x, w[pre + "memory_norm.weight"], config.norm_eps)
    n, cells = spec.n_keys, spec.n_keys**2
    step = int(cells * 0.618)
    while math.gcd(step, cells) > 1:
        step += 1
    values, look = w[pre + "values.weight"], pre + "lookup."
    pooled = np.zeros((spec.expansion, values.shape[1]))
    query = (w[look + "query.weight"] @ x).reshape(spec.key_heads, 2, -1)
    for h in range(spec.key_heads):
        q = [layer_norm(part, w[look + "query_norm.weight"]) for part in query[h]]
        keys = w[look + "keys"][h]  # [2, r, n, half]
        s = np.zeros((2, spec.rank, n))
        for p, r, i in np.ndindex(*s.shape):
            s[p, r, i] = layer_norm(keys[p, r, i], w[look + "key_norm.weight"]) @ q[p]
        cores = w[look + "core"][:, h]
        u, _, vt = np.linalg.svd(cores.sum(0))
        sign = np.sign(u[np.argmax(abs(u[:, 0])), 0])
        best_rows = np.argsort(-(sign * u[:, 0] @ s[0]))[: spec.top_k]
        best_columns = np.argsort(-(sign * vt[0] @ s[1]))[: spec.top_k]
        found = []
        for i in best_rows:
            for j in best_columns:
                by_core = [s[0][:, i] @ core @ s[1][:, j] for core in cores]
                found.append((sum(by_core), i * n + j, by_core))
        for _, cell, by_core in sorted(found, key=lambda item: -item[0])[: spec.top_k]:
            table, row = divmod(int(cell) * step % cells, len(values))
            pooled[table] += np.repeat(by_core, len(values[row]) // spec.cores) * values[row]
    return w[pre + "out.weight"] @ pooled.reshape(-1)


MEMORIES = {"none": no_memory, "lave": lave, "move": move}
ATTENTIONS = {"mha": mha, "mla": mla}
FEEDFORWARDS = {"swiglu": swiglu, "moe": moe, "product_key": product_key, "peer": peer}
FEEDFORWARDS["ultramem"] = ultramem


def reference_logits(model, codes, label):
    """logits [T, V] of one sequence, as lists of numbers would give them."""
    config = model.config
    w = {k: v.detach().double().numpy() for k, v in model.state_dict().items()}
    codes, label = [int(c) for c in codes][:-1], int(label)
    xs = [w["label_embedding.weight"][label]]
    xs += [w["code_embedding.weight"][c] for c in codes]
    remembered = {}
    for layer in range(config.n_layer):
        pre, spec = f"layers.{layer}.", config.ffn
        chosen = getattr(spec, "layers", "all")
        spec = spec if chosen == "all" or layer in chosen else spec.elsewhere

        def normed(x, name, pre=pre):
            return rms_norm(x, w[pre + name], config.norm_eps)

        def memory(width, layer=layer):
            return MEMORIES[config.memory.kind](w, config, codes, label, layer, width)

        hs = [normed(x, "attention_norm.weight") for x in xs]
        attended = ATTENTIONS[config.attention.kind](w, pre + "attention.", config, hs, memory)
        xs = [x + a for x, a in zip(xs, attended, strict=True)]
        feed = FEEDFORWARDS[spec.kind]
        xs = [x + feed(w, pre + "ffn.", spec, normed(x, "ffn_norm.weight")) for x in xs]
        if spec.kind == "ultramem":
            later = [remember(w, pre + "ffn.", config, spec, x) for x in xs]
            remembered.setdefault(layer + spec.delay, []).append(later)
        for later in remembered.get(layer, []):
            xs = [x + y for x, y in zip(xs, later, strict=True)]
    final = [rms_norm(x, w["norm.weight"], config.norm_eps) for x in xs]
    return np.stack([w["head.weight"] @ x for x in final])
