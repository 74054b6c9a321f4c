"""The value mix without gathered rows, against float64 and against the plain formulation.

By itself this tests bags on a CPU. test_fused_mix.py runs it once more with TRITON_INTERPRET=1, in
a process of its own, since that must be set before triton is imported: there the kernels of CUDA
are tested, on a CPU.
"""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from moveimg.inspect import bank_maps, without_bank
from moveimg.inspect_bank import _gradient_norms
from moveimg.model import fused_bank, fused_mix, memory
from moveimg.model.fused_bank import INTERPRETED
from moveimg.model.fused_mix import look_up, mix
from tests.conftest import VARIANTS, lively, random_inputs, tiny_config
from tests.test_budget import counted_and_expected

kernels_only = pytest.mark.skipif(not INTERPRETED, reason="true of the kernels alone")
NO_DROPOUT = {"token_dropout": 0.0, "resid_dropout": 0.0, "ffn_dropout": 0.0}


# --- the kernels, against the formula in float64 -------------------------------------------


class Case:
    """Random inputs of layers that mix the same tables; every number fits the dtype.

    shape: B, S, H, K, A; firsts: the slots of each layer begin there, `slots` of them.
    """

    def __init__(self, shape, firsts, slots, gated=True, v=True, dtype=torch.float32) -> None:
        g = torch.Generator().manual_seed(0)

        def random(*size):
            return torch.randn(*size, generator=g).to(dtype)

        batch, length, heads, width, every = shape
        self.shape, self.firsts, self.slots, self.gated = shape, firsts, slots, gated
        self.tables = [random(n, every * heads * width) for n in (6, 3)]
        self.ids = torch.randint(-1, 9, (batch, length), generator=g)
        self.ids[0, 1:] = 2  # a code many times
        self.ids[0, 0], self.ids[-1, -1] = -1, 7  # and no row, and one of the second table
        layers, places = range(len(firsts)), (batch, length, heads)
        self.logits = [random(*places, slots + gated) for _ in layers]
        # v comes out of a product with q and k: its tokens stand apart
        self.v = [random(*places, 3, width)[..., 1, :] if v else None for _ in layers]
        if v and width > 5:
            self.v = [random(batch, length, 3, heads, width)[:, :, 1] for _ in layers]
        self.factors = [random(*places, width) for _ in layers]

    def look_up(self, tables, ids):
        """What each layer is handed, and after them one that reads nothing."""
        heads, _, every = self.shape[2:]
        firsts, gates = [*self.firsts, None], self.slots + self.gated
        return look_up(tables, ids, firsts, heads, every, gates, self.gated)

    def inputs(self, dtype=None):
        """tables, logits and v as leaves of a graph."""
        parts = (self.tables, self.logits, [v for v in self.v if v is not None])
        return [[t.detach().to(dtype or t.dtype).requires_grad_() for t in part] for part in parts]

    def fused(self):
        tables, logits, vs = self.inputs()
        rows = self.look_up(tables, self.ids)
        vs_or_none = vs or [None] * len(logits)
        outs = [
            mix(r, z, None if v is None else strided(v), first, self.gated)
            for r, z, v, first in zip(rows, logits, vs_or_none, self.firsts, strict=False)
        ]
        return outs, self.gradients(outs, [*tables, *logits, *vs])

    def reference(self):
        tables, logits, vs = self.inputs(torch.float64)
        heads, width, every = self.shape[2:]
        rows = torch.cat(tables).unflatten(1, (every, heads, width))[self.ids.clamp(min=0)]
        rows = rows * (self.ids >= 0)[..., None, None, None]  # [B, S, A, H, K]
        outs = []
        for layer, first in enumerate(self.firsts):
            gates = 2 / (1 + torch.exp(-logits[layer]))
            g_i = gates[..., 1:] if self.gated else gates
            out = torch.einsum("bshm,bsmhk->bshk", g_i, rows[:, :, first : first + self.slots])
            if vs:
                out = out + (gates[..., :1] if self.gated else 1) * vs[layer]
            outs.append(out)
        return outs, self.gradients(outs, [*tables, *logits, *vs])

    def gradients(self, outs, leaves):
        pairs = zip(outs, self.factors, strict=True)
        loss = sum((out.to(f.dtype).double() * f.double()).sum() for out, f in pairs)
        return torch.autograd.grad(loss, leaves)


def strided(v):
    """The same numbers, a token's in one piece and the tokens apart."""
    return torch.stack([v, v, v], dim=2)[:, :, 1]


CASES = {
    "one slot": Case((2, 3, 2, 8, 1), [0, 0], 1),
    "24 slots, width not a power of two": Case((1, 4, 2, 5, 24), [0], 24),
    "a slot a layer (LaVE), v not gated": Case((1, 6, 3, 6, 2), [0, 1], 1, gated=False),
    "the sum alone (decoding with MLA)": Case((2, 3, 1, 16, 3), [0, 0], 3, v=False),
    "more layers than a block": Case((1, 3, 1, 4, 2), [0] * 17, 2),
    "bf16": Case((2, 3, 2, 8, 6), [0, 0, 0], 6, dtype=torch.bfloat16),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=kernels_only) if n == "bf16" else n for n in CASES]
)
def test_values_and_gradients_equal_the_formula_in_float64(name, monkeypatch):
    monkeypatch.setattr(fused_bank, "CHUNK", 2)  # so that a repeated code is cut into chunks
    case = CASES[name]
    (outs, gradients), (expected, by_formula) = case.fused(), case.reference()
    # The result alone is rounded, to the 8 bits of bfloat16; the interpreter cuts the others off.
    precision = 2**-7 if outs[0].dtype == torch.bfloat16 else 1e-6
    for found, right in zip([*outs, *gradients], [*expected, *by_formula], strict=True):
        assert found.dtype == case.tables[0].dtype
        assert (found.double() - right).abs().max() <= precision * right.abs().max()
        assert right.abs().max() > 0


@pytest.mark.parametrize("damage", [torch.inf, torch.nan])
def test_a_row_that_is_not_finite_stays_with_the_codes_that_have_it(damage):
    case = Case((2, 3, 2, 8, 1), [0, 0], 1)
    case.ids = torch.tensor([[-1, 2, 3], [-1, 4, 2]])
    outs, gradients = case.fused()
    case.tables[0][0] = damage
    rows = case.look_up(case.tables, case.ids)[0]
    assert rows.gathered().isfinite().all()
    for found, expected in zip(case.fused(), (outs, gradients), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_banks_gradient_is_added_up_in_float32():
    # 130 times the same code, more than a program takes: bfloat16 counts to 256 only
    out, logits = torch.full((1, 130, 1, 16), 3.0), torch.zeros(1, 130, 1, 1)
    ids = torch.zeros(1, 130, dtype=torch.int64)
    total = fused_bank.bank_gradient([out.bfloat16()], [logits.bfloat16()], ids, [0], False, [2, 1])
    assert total.dtype == torch.float32 and total.shape == (2, 1, 1, 16)
    assert torch.equal(total[0], torch.full((1, 1, 16), 390.0)) and not total[1].any()


def test_the_same_bits_twice_whether_asked_for_or_not(monkeypatch):
    monkeypatch.setattr(fused_bank, "CHUNK", 2)
    case = CASES["a slot a layer (LaVE), v not gated"]
    found = [case.fused()]
    torch.use_deterministic_algorithms(True)
    try:
        found.append(case.fused())
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(*([*outs, *gradients] for outs, gradients in found), strict=True):
        assert torch.equal(a, b)


@kernels_only
def test_a_token_is_mixed_alike_in_any_batch():
    case = CASES["one slot"]
    with torch.no_grad():
        whole = mix(case.look_up(case.tables, case.ids)[0], case.logits[0], case.v[0], 0, True)
        for i in range(len(case.ids)):
            part = slice(i, i + 1)
            rows = case.look_up(case.tables, case.ids[part])[0]
            alone = mix(rows, case.logits[0][part], case.v[0][part], 0, True)
            assert torch.equal(alone[0], whole[i])


# --- models, against the plain formulation -------------------------------------------------


def plain():
    return patch.object(memory, "usable", lambda *given: False)


def model_and_inputs(name, **changes):
    config = tiny_config(**VARIANTS[name], **NO_DROPOUT, grid=[2, 3], **changes)
    return lively(config, dtype=torch.float32).train(), *random_inputs(config, batch=1)


def loss_and_gradients(model, codes, labels):
    model.zero_grad()
    loss = model(codes, labels).float().square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize(
    "name",
    ["mha-move-3-class-rows-swiglu", "mla-move-2-ungated-swiglu", "mla-lave-x2-gated-swiglu"],
)
def test_a_model_has_the_loss_and_gradients_of_the_plain_path(name):
    model, codes, labels = model_and_inputs(name)
    found = loss_and_gradients(model, codes, labels)
    model.checkpointing = True
    recomputed = loss_and_gradients(model, codes, labels)
    model.checkpointing = False
    with plain():
        expected = loss_and_gradients(model, codes, labels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(found, recomputed, strict=True))


@pytest.mark.parametrize("name", ["mha-move-3-class-rows-swiglu", "mla-lave-x2-gated-swiglu"])
def test_decoding_equals_the_whole_sequence(name):
    model, codes, labels = model_and_inputs(name)
    with torch.no_grad():
        cache = model.make_cache(1)
        steps = [model.start(labels, cache)]
        steps += [model.decode(codes[:, t], cache) for t in range(3)]
        with plain():
            expected = model(codes, labels)[:, :4]
    torch.testing.assert_close(torch.stack(steps, 1), expected, rtol=1e-4, atol=1e-4)


@kernels_only
def test_autocast_rounds_the_table_once_and_keeps_float32_gradients():
    model, codes, labels = model_and_inputs("mha-move-1-swiglu", codebook_size=5)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.memory.rows(labels, codes)[0].table.dtype == torch.bfloat16
        assert model.memory.rows(labels, None)[0].table.dtype == torch.float32  # one token
        found = loss_and_gradients(model, codes, labels)
        with plain():
            expected = loss_and_gradients(model, codes, labels)
    for a, b in zip(found, expected, strict=True):  # of 8 bits, through two layers and back
        assert a.dtype == torch.float32 and (a - b).norm() < 0.12 * b.norm()


def test_blocks_compile_to_one_graph_each():
    model, codes, labels = model_and_inputs("mha-move-1-swiglu")
    expected = loss_and_gradients(model, codes, labels)
    for block in model.layers:
        block.compile(backend="aot_eager", fullgraph=True)
    found = loss_and_gradients(model, codes, labels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_frozen_bank_costs_nothing_backward():
    model, codes, labels = model_and_inputs("mha-move-1-swiglu")
    model.memory.requires_grad_(False)
    assert model.memory.rows(labels, codes)[0].carriers is None
    model.eval()(codes, labels).sum().backward()
    assert model.memory.bank.weight.grad is None
    assert all(p.grad is not None for p in model.layers.parameters())


def test_a_look_inside_sees_the_rows():
    model, codes, labels = model_and_inputs("mha-move-3-class-rows-swiglu")
    found = bank_maps(model, codes, labels)[1], _gradient_norms(model, codes, labels)
    with torch.no_grad():
        bare = without_bank(model)(codes, labels)
        with plain():
            assert torch.equal(bare, without_bank(model)(codes, labels))
    with plain():
        expected = bank_maps(model, codes, labels)[1], _gradient_norms(model, codes, labels)
    torch.testing.assert_close(found[0].share, expected[0].share, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)


@kernels_only
@pytest.mark.parametrize(
    "memory",
    [
        {"kind": "move", "slots": 6},
        {"kind": "move", "slots": 1, "gate_standard": False},
        {"kind": "lave", "layers": "all"},
    ],
)
def test_a_block_keeps_what_the_budget_says(memory, monkeypatch):
    # what is kept has its size whatever is in it, and the interpreter takes its time
    monkeypatch.setattr(fused_mix, "_launch", lambda kernel, *given: None)
    counted, expected = counted_and_expected(memory)
    assert counted == pytest.approx(expected, rel=3e-3)  # LaVE's table grows with the layers
