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
            router = weights[pre + "latent_mixer.router.weight"]
            rows = memory(spec.kv_rank)[t]
            c = mixed_value(c, h, rows, router, n_head, config.memory.gate_standard)
        up = (weights[pre + "wkv_up.weight"] @ c).reshape(n_head, 2, config.head_dim)
        v = up[:, 1]
        if not in_latent and (rows := memory(config.width)) is not None:
            router = weights[pre + "value_mixer.router.weight"]
            gated = config.memory.gate_standard
            v = mixed_value(v.reshape(-1), h, rows[t], router, n_head, gated).reshape(v.shape)
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


MEMORIES = {"none": no_memory, "lave": lave, "move": move}
ATTENTIONS = {"mha": mha, "mla": mla}
FEEDFORWARDS = {"swiglu": swiglu, "moe": moe, "product_key": product_key, "peer": peer}
