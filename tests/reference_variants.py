"""Plain references of the other attentions and feed-forwards, and the tables of all kinds."""

from __future__ import annotations

import math

import numpy as np

from tests.reference import (
    attended_values,
    lave,
    mha,
    mixed_value,
    move,
    no_memory,
    rms_norm,
    rotated,
    silu,
    swiglu,
)

IN_THE_LATENT = ("move",)  # the memories that MLA mixes into its latent, and not into its values


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def mla(weights, pre, config, hs, memory):
    """Latent attention with every head's keys and values unfolded."""
    n_head, spec = config.n_head, config.attention
    in_latent = config.memory.kind in IN_THE_LATENT
    qs, ks, vs = [], [], []
    for t, h in enumerate(hs):
        if spec.q_rank is None:
            q = weights[pre + "wq.weight"] @ h
        else:
            low = weights[pre + "wq.down.weight"] @ h
            low = rms_norm(low, weights[pre + "wq.norm.weight"], config.norm_eps)
            q = weights[pre + "wq.up.weight"] @ low
        q = q.reshape(n_head, config.head_dim + spec.rope_dim)
        down = weights[pre + "wkv_down.weight"] @ h
        c, key = down[: spec.kv_rank], down[spec.kv_rank :]
        c = rms_norm(c, weights[pre + "kv_norm.weight"], config.norm_eps)
        if in_latent:
            rows, gated = memory(spec.kv_rank)[t], config.memory.gate_standard
            c = mixed_value(c, h, rows, weights, pre + "latent_mixer", n_head, gated)
        up = (weights[pre + "wkv_up.weight"] @ c).reshape(n_head, 2, config.head_dim)
        v = up[:, 1]
        if not in_latent and (rows := memory(config.width)) is not None:
            gated, name = config.memory.gate_standard, pre + "value_mixer"
            v = mixed_value(v.reshape(-1), h, rows[t], weights, name, n_head, gated)
            v = v.reshape(n_head, -1)
        key = rotated(key, t - 1, config.grid, config.rope_base)
        ks.append(np.stack([np.concatenate([up[i, 0], key]) for i in range(n_head)]))
        turned = [rotated(p[config.head_dim :], t - 1, config.grid, config.rope_base) for p in q]
        qs.append(
            np.stack([np.concatenate([q[i, : config.head_dim], turned[i]]) for i in range(n_head)])
        )
        vs.append(v)
    outs = attended_values(qs, ks, vs, 1 / math.sqrt(config.head_dim + spec.rope_dim))
    return [weights[pre + "wo.weight"] @ out for out in outs]


def moe(weights, pre, config, spec, x):
    p = softmax(weights[pre + "expert_router.weight"] @ x)
    chosen = np.argsort(-p)[: spec.top_k]
    out = swiglu(weights, pre + "shared_expert.", config, spec, x)
    for e in chosen:
        gate, up = np.split(x @ weights[pre + "w_in"][e], 2)
        out = out + p[e] / p[chosen].sum() * ((silu(gate) * up) @ weights[pre + "w_out"][e])
    return out


def look_up(weights, pre, spec, x):
    """(row, weight) pairs of every look-up, from all n^2 scores, sorted."""
    rows = []
    query = weights[pre + "query.weight"] @ x + weights[pre + "query.bias"]
    for head, q in enumerate(query.reshape(spec.key_heads, 2, -1)):
        first, second = (weights[pre + "keys"][head, half] @ q[half] for half in (0, 1))
        scores = (first[:, None] + second[None, :]).reshape(-1)
        best = np.argsort(-scores)[: spec.top_k]
        rows += list(zip(best, softmax(scores[best]), strict=True))
    return rows


def product_key(weights, pre, config, spec, x):
    values = weights["shared_ffn.weight"]
    memory = sum(w * values[row] for row, w in look_up(weights, pre + "lookup.", spec, x))
    gate = weights[pre + "gate.weight"] @ x + weights[pre + "gate.bias"]
    return weights[pre + "out.weight"] @ (memory * silu(gate)) + weights[pre + "out.bias"]


def peer(weights, pre, config, spec, x):
    out = np.zeros_like(x)
    for row, w in look_up(weights, pre + "lookup.", spec, x):
        u = weights[pre + "u.weight"][row] @ x
        gelu = u * (1 + math.erf(u / math.sqrt(2))) / 2
        out = out + w * gelu * weights[pre + "v.weight"][row]
    return out


def ultramem(weights, pre, config, spec, x):
    return swiglu(weights, pre + "dense.", config, spec.elsewhere, x)


def layer_norm(x, weight):
    return (x - x.mean()) / math.sqrt(x.var() + 1e-5) * weight


def remember(weights, pre, config, spec, x):
    """UltraMem's memory of a stream: every cell scored, one at a time."""
    x = rms_norm(x, weights[pre + "memory_norm.weight"], config.norm_eps)
    n, cells = spec.n_keys, spec.n_keys**2
    step = int(cells * 0.618)
    while math.gcd(step, cells) > 1:
        step += 1
    values, look = weights[pre + "values.weight"], pre + "lookup."
    pooled = np.zeros((spec.expansion, values.shape[1]))
    query = (weights[look + "query.weight"] @ x).reshape(spec.key_heads, 2, -1)
    for h in range(spec.key_heads):
        q = [layer_norm(part, weights[look + "query_norm.weight"]) for part in query[h]]
        keys = weights[look + "keys"][h]  # [2, r, n, half]
        s = np.zeros((2, spec.rank, n))
        for p, r, i in np.ndindex(*s.shape):
            s[p, r, i] = layer_norm(keys[p, r, i], weights[look + "key_norm.weight"]) @ q[p]
        cores = weights[look + "core"][:, h]
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
    return weights[pre + "out.weight"] @ pooled.reshape(-1)


MEMORIES = {"none": no_memory, "lave": lave, "move": move}
ATTENTIONS = {"mha": mha, "mla": mla}
FEEDFORWARDS = {
    "swiglu": swiglu,
    "moe": moe,
    "product_key": product_key,
    "peer": peer,
    "ultramem": ultramem,
}
