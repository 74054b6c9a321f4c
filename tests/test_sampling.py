"""Sampling: guidance, filters, draws that depend on an image's own seed alone, and the models that
are prepared for it, which compute what the plain one does: packed, quantized, static.
"""

from __future__ import annotations

import copy
import gc
import math
import shutil

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch._dynamo.utils import counters

from moveimg import sampling
from moveimg.config import SamplingSettings
from moveimg.model import prepare_for_sampling
from moveimg.model.inference import StaticTransformer, can_pack
from moveimg.sampling import draw, guidance_scales, image_rngs, keep_top, sample_codes
from tests import conftest
from tests.conftest import PAIRED, VARIED, random_inputs, random_model, tiny_config, tiny_model

SETTINGS = SamplingSettings(cfg_scale=2.0, temperature=0.9, top_k=8, top_p=0.95)
MOVE = "mha-move-3-class-rows-swiglu"
needs_onednn = pytest.mark.skipif(not can_pack(torch.zeros(2, 2)), reason="torch without oneDNN")
decoded = torch.inference_mode()(conftest.decode_all)


def sample(model, labels, chosen=SETTINGS, seed=0):
    labels = torch.tensor(labels)
    return sample_codes(model, labels, chosen, image_rngs(range(seed, seed + len(labels))))


@torch.no_grad()
def recompute(model, label, chosen, seed, known=None):
    """One image, the whole sequence again for every code, with a plain inverse-CDF draw.

    Codes in `known` of zero or more are kept.
    """
    config = model.config
    uniforms = torch.rand(config.seq_len, generator=torch.Generator().manual_seed(seed))
    scales = guidance_scales(chosen, config.seq_len).flatten()
    codes = torch.zeros(1, config.seq_len, dtype=torch.int64)
    for t in range(config.seq_len):
        conditional = model(codes, torch.tensor([label]))[0, t]
        unconditional = model(codes, torch.tensor([config.n_classes]))[0, t]
        logits = unconditional + (conditional - unconditional) * scales[t]
        logits = keep_top((logits / chosen.temperature)[None], chosen.top_k, chosen.top_p)[0]
        cumulative = np.cumsum(torch.softmax(logits, -1).numpy())
        target = uniforms[t].item() * cumulative[-1]
        kept = known is not None and known[t] >= 0
        codes[0, t] = known[t] if kept else int(np.argmax(cumulative > target))
    return codes[0]


@pytest.mark.parametrize("name", PAIRED)
def test_sampling_equals_recomputing_every_step_in_any_batch(name):
    model, labels = tiny_model(name), [0, 4, 2, 3]
    codes = sample(model, labels, seed=5)
    assert not torch.equal(sample(model, labels, seed=7), codes)
    for i, label in enumerate(labels):
        assert torch.equal(codes[i], recompute(model, label, SETTINGS, 5 + i))
    parts = [sample(model, labels[:3], seed=5), sample(model, labels[3:], seed=8)]
    assert torch.equal(torch.cat(parts), codes)


# label 5 is the null label
@pytest.mark.parametrize(("scale", "labels"), [(1.0, [2]), (0.0, [5]), (2.0, [2, 5])])
def test_guidance_makes_only_the_passes_it_needs(scale, labels, monkeypatch):
    model, asked = random_model(tiny_config()), []
    prefill, chosen = model.prefill, SETTINGS.model_copy(update={"cfg_scale": scale})
    spy = lambda given, *rest: asked.append(given.tolist()) or prefill(given, *rest)  # noqa: E731
    monkeypatch.setattr(model, "prefill", spy)
    assert torch.equal(sample(model, [2], chosen)[0], recompute(model, 2, chosen, 0))
    assert asked == [labels]


@pytest.mark.parametrize("options", [{}, {"cfg_schedule": "linear", "cfg_start": 0.25}])
@pytest.mark.parametrize("scales", [[0.0, 1.0, 1.5, 4.0], [2.0] * 4, [1.0] * 4, [0.0] * 4])
def test_a_guidance_scale_per_image_equals_each_image_with_that_scale(scales, options):
    model, labels, rngs = (
        random_model(tiny_config()),
        torch.tensor([0, 1, 2, 3]),
        image_rngs(range(4)),
    )
    chosen = SETTINGS.model_copy(update=options)
    together = sample_codes(model, labels, chosen, rngs, cfg_scale=torch.tensor(scales))
    for i, scale in enumerate(scales):
        alone = chosen.model_copy(update={"cfg_scale": scale})
        assert torch.equal(together[i], sample(model, [i], alone, seed=i)[0])


def test_guidance_schedules():
    def scales(**kw):
        return guidance_scales(SamplingSettings(cfg_scale=3.0, **kw), 4).flatten().tolist()

    assert scales() == [3.0] * 4
    assert scales(cfg_schedule="linear") == [1.0, 1.5, 2.0, 2.5]
    cosine = [1 + 2 * (1 - math.cos(math.pi * (t / 4) ** 2)) / 2 for t in range(4)]
    assert scales(cfg_schedule="power-cosine", cfg_power=2.0) == pytest.approx(cosine)
    assert scales(cfg_start=0.5) == [1.0, 1.0, 3.0, 3.0]
    assert scales(cfg_start=0.5, cfg_schedule="linear") == [1.0, 1.0, 1.0, 2.0]


rows = st.lists(
    st.lists(st.floats(-20, 20, width=32), min_size=6, max_size=6), min_size=1, max_size=4
)


@settings(deadline=None, max_examples=50)
@given(rows, st.integers(0, 8), st.floats(0.01, 1))
def test_filters_equal_their_definition(logits, top_k, top_p):
    logits = torch.tensor(logits, dtype=torch.float64)
    kept = keep_top(logits.clone(), top_k, top_p).isfinite()
    for row, keep in zip(logits, kept, strict=True):
        allowed = row >= row.sort(descending=True).values[min(top_k or 6, 6) - 1]
        p = row.masked_fill(~allowed, -math.inf).softmax(-1)
        nucleus, total = torch.zeros(6, dtype=torch.bool), 0.0
        for i in row.masked_fill(~allowed, -math.inf).sort(descending=True, stable=True).indices:
            if total < top_p or top_p == 1:
                nucleus[i] = True
            total += p[i].item()
        # cumulative sums may round to either side of p exactly at its edge
        if abs(p[nucleus].sum().item() - top_p) > 1e-9:
            assert torch.equal(keep, allowed & nucleus)
        assert keep[row.argmax()]


@settings(deadline=None, max_examples=50)
@given(rows, st.floats(0, 1, exclude_max=True, width=32), st.sampled_from([0, 1, 3]))
def test_draws_invert_the_distribution_and_never_return_an_excluded_code(logits, u, top_k):
    logits = torch.tensor(logits)
    uniforms = torch.full((len(logits),), u)
    codes = draw(logits, uniforms, SamplingSettings(top_k=top_k))
    p = keep_top(logits, top_k, 1.0).softmax(-1)
    cumulative = p.double().cumsum(-1)
    for row, code in enumerate(codes.tolist()):
        assert p[row, code] > 0
        below = cumulative[row, code - 1].item() if code else 0.0
        assert below - 1e-5 <= u <= cumulative[row, code].item() + 1e-5
    greedy = draw(logits, uniforms, SamplingSettings(temperature=0))
    assert torch.equal(greedy, logits.argmax(-1))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"2 .*1 labels"):
        sample_codes(random_model(tiny_config()), torch.tensor([0]), SETTINGS, image_rngs([0, 1]))
    for bad in ({"temperature": -1}, {"top_p": 0}, {"top_k": -2}, {"cfg_scale": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            SamplingSettings(**bad)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("damaged", ["head", "memory.bank"])  # the first logits do not show it
def test_weights_that_are_not_finite_are_refused(damaged, temperature):
    model = random_model(tiny_config(memory={"kind": "move", "slots": 2}), dtype=torch.float32)
    with torch.no_grad():
        model.get_submodule(damaged).weight.fill_(math.nan)
    with pytest.raises(ValueError, match="not finite"):
        sample(model, [1, 2], SamplingSettings(temperature=temperature, top_p=0.5))


@pytest.mark.parametrize("name", [*VARIED, "mla-lave-x2-gated-swiglu", "mha-move-2-ungated-swiglu"])
@pytest.mark.parametrize(
    ("prepare", "dtype", "tolerance"),
    [
        pytest.param(prepare_for_sampling, torch.float32, 2e-5, marks=needs_onednn, id="packed"),
        pytest.param(StaticTransformer, torch.float64, 1e-11, id="static"),
    ],
)
def test_prepared_models_give_the_same_logits(prepare, dtype, tolerance, name):
    model = tiny_model(name, dtype)
    fast = prepare(model)
    assert fast is not model
    for seed in range(2):  # the second decoding uses the tensors of the first
        codes, labels = random_inputs(model.config, seed=seed)
        logits, expected = decoded(fast, codes, labels), decoded(model, codes, labels)
        torch.testing.assert_close(logits, expected, atol=tolerance, rtol=10 * tolerance)
    if prepare is prepare_for_sampling:  # all positions at once
        with torch.inference_mode():
            torch.testing.assert_close(fast(codes, labels), expected, atol=2e-5, rtol=1e-4)


@needs_onednn
@pytest.mark.parametrize("native", [False, True])
def test_bfloat16_stays_within_its_rounding(native, monkeypatch):
    if not native:  # as on a processor without bfloat16 instructions
        monkeypatch.setattr("moveimg.model.inference.has_bfloat16", lambda: False)
    rounded = tiny_model(MOVE, torch.float32).bfloat16()
    codes, labels = random_inputs(rounded.config)
    exact = decoded(copy.deepcopy(rounded).double(), codes, labels)  # the same weights
    plain = (decoded(rounded, codes, labels) - exact).abs().max()
    fast = (decoded(prepare_for_sampling(rounded), codes, labels) - exact).abs().max()
    assert fast <= 1.5 * plain
    assert rounded.head.weight.dtype == torch.bfloat16  # the model itself is unchanged


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_int8_is_near(dtype):
    model = tiny_model(MOVE, dtype)
    with torch.no_grad():
        model.head.weight[3] = 0  # a row without a scale of its own
    codes, labels = random_inputs(model.config)
    logits = decoded(prepare_for_sampling(model, "int8"), codes, labels)
    exact = decoded(copy.deepcopy(model).double(), codes, labels)
    assert 1e-4 < (logits - exact).norm() / exact.norm() < 0.1  # rounded, but not wrong
    assert not logits[..., 3].any()
    with pytest.raises(ValueError, match="int4"):
        prepare_for_sampling(model, "int4")
    with pytest.raises(ValueError, match="int8 with meta"):
        prepare_for_sampling(model.to("meta"), "int8")
    with pytest.raises(ValueError, match="int8 with compile"):
        prepare_for_sampling(model, "int8", compile=True)


def test_the_static_step_compiles_to_one_graph_for_all_positions():
    torch._dynamo.reset()
    counters.clear()
    model = tiny_model("mla-q-move-moe-listed")
    static = StaticTransformer(model, backend="aot_eager", fullgraph=True)
    for seed, batch in enumerate((3, 4)):  # both padded to four rows
        codes, labels = random_inputs(model.config, batch=batch, seed=seed)
        torch.testing.assert_close(decoded(static, codes, labels), decoded(model, codes, labels))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler needs g++")
def test_compile_gives_the_codes_of_the_plain_path():
    torch._dynamo.reset()
    model = random_model(tiny_config(n_layer=1, grid=[2, 2], memory={"kind": "move", "slots": 2}))
    compiled = prepare_for_sampling(model, compile=True)
    assert torch.equal(sample(compiled, [0, 4]), sample(model, [0, 4]))


def test_concurrent_and_abandoned_decodings_do_not_disturb_each_other():
    model, labels = tiny_model(MOVE), torch.tensor([0, 4, 2])
    static = StaticTransformer(model)
    runs = [
        sampling.iter_codes(static, labels, SETTINGS, image_rngs(range(seed, seed + 3)))
        for seed in (0, 50, 9)
    ]
    drawn = [[next(run) for run in runs] for _ in range(4)]  # a code of each in turn
    runs.pop().close()
    drawn += [[next(run) for run in runs] for _ in range(model.config.seq_len - 4)]
    for i, seed in enumerate((0, 50)):
        codes = torch.stack([step[i] for step in drawn], dim=1)
        assert torch.equal(codes, sample(model, [0, 4, 2], seed=seed))
    del runs, drawn
    gc.collect()
    assert torch.equal(sample(static, [0, 4, 2]), sample(model, [0, 4, 2]))
    assert [len(idle) for idle in static._idle.values()] == [3]
