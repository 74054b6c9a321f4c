"""Sampling: the cache, guidance, filters, and draws that depend on an image's own seed alone."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from moveimg.config import SamplingSettings
from moveimg.sampling import draw, guidance_scales, guide, image_rngs, keep_top, sample_codes
from tests.conftest import PAIRED, VARIANTS, lively, tiny_config

SETTINGS = SamplingSettings(cfg_scale=2.0, temperature=0.9, top_k=8, top_p=0.95)


def sample(model, labels, chosen=SETTINGS, seed=0):
    labels = torch.tensor(labels)
    return sample_codes(model, labels, chosen, image_rngs(range(seed, seed + len(labels))))


def recompute(model, label, chosen, seed):
    """One image, the whole sequence again for every code, with a plain inverse-CDF draw."""
    config = model.config
    uniforms = torch.rand(config.seq_len, generator=torch.Generator().manual_seed(seed))
    codes = torch.zeros(1, config.seq_len, dtype=torch.int64)
    for t in range(config.seq_len):
        with torch.no_grad():
            conditional = model(codes, torch.tensor([label]))[0, t]
            unconditional = model(codes, torch.tensor([config.n_classes]))[0, t]
        logits = unconditional + (conditional - unconditional) * chosen.cfg_scale
        logits = keep_top((logits / chosen.temperature)[None], chosen.top_k, chosen.top_p)[0]
        cumulative = np.cumsum(torch.softmax(logits, -1).numpy())
        target = uniforms[t].item() * cumulative[-1]
        codes[0, t] = int(np.argmax(cumulative > target))
    return codes[0]


@pytest.mark.parametrize("name", PAIRED)
def test_sampling_equals_recomputing_every_step_in_any_batch(name):
    model, labels = lively(tiny_config(**VARIANTS[name])), [0, 4, 2, 3]
    codes = sample(model, labels, seed=5)
    assert not torch.equal(sample(model, labels, seed=7), codes)
    for i, label in enumerate(labels):
        assert torch.equal(codes[i], recompute(model, label, SETTINGS, 5 + i))
    parts = [sample(model, labels[:3], seed=5), sample(model, labels[3:], seed=8)]
    assert torch.equal(torch.cat(parts), codes)


class FixedLogits(torch.nn.Module):
    """A hand-written model with fixed logits that keeps the labels of each pass."""

    def __init__(self, conditional, unconditional):
        super().__init__()
        self.config = tiny_config(codebook_size=len(conditional))
        self.null_label = self.config.n_classes
        self.tables = torch.tensor([conditional, unconditional])
        self.asked = []

    def make_cache(self, batch):
        return None

    def start(self, labels, cache):
        self.labels = labels
        return self.decode(labels, cache)

    def decode(self, codes, cache):
        assert len(codes) == len(self.labels)
        self.asked.append(self.labels.tolist())
        return self.tables[(self.labels == self.null_label).long()]


@pytest.mark.parametrize(
    ("scale", "batches", "greedy"), [(1.0, [2], 0), (0.0, [5], 2), (2.0, [2, 5], 1)]
)
def test_guidance_makes_only_the_passes_it_needs(scale, batches, greedy):
    # cond likes code 0, uncond code 2, and doubling the difference makes code 1 win
    model = FixedLogits([2.0, 1.9, 0.0], [1.0, 0.5, 3.0])
    codes = sample(model, [2], SamplingSettings(cfg_scale=scale, temperature=0))
    assert all(asked == batches for asked in model.asked)
    assert codes.unique().tolist() == [greedy]


@pytest.mark.parametrize("options", [{}, {"cfg_schedule": "linear", "cfg_start": 0.25}])
@pytest.mark.parametrize("scales", [[0.0, 1.0, 1.5, 4.0], [2.0] * 4, [1.0] * 4, [0.0] * 4])
def test_a_guidance_scale_per_image_equals_each_image_with_that_scale(scales, options):
    model, labels, rngs = lively(tiny_config()), torch.tensor([0, 1, 2, 3]), image_rngs(range(4))
    chosen = SETTINGS.model_copy(update=options)
    together = sample_codes(model, labels, chosen, rngs, cfg_scale=torch.tensor(scales))
    for i, scale in enumerate(scales):
        alone = sample(model, [i], chosen.model_copy(update={"cfg_scale": scale}), seed=i)
        assert torch.equal(together[i], alone[0])


def test_guidance_formula_and_schedules():
    c, u = torch.tensor([[1.0, 4.0]] * 3), torch.tensor([[3.0, 2.0]] * 3)
    guided = guide(c, u, torch.tensor([[1.5], [1.0], [0.0]]))
    assert guided.tolist() == [[0.0, 5.0], [1.0, 4.0], [3.0, 2.0]]

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


@settings(deadline=None)
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


@settings(deadline=None)
@given(rows, st.floats(0, 1, exclude_max=True, width=32), st.sampled_from([0, 1, 3]))
def test_draws_invert_the_distribution_and_never_return_an_excluded_code(logits, u, top_k):
    logits = torch.tensor(logits)
    codes = draw(logits, torch.full((len(logits),), u), SamplingSettings(top_k=top_k))
    p = keep_top(logits, top_k, 1.0).softmax(-1)
    cumulative = p.double().cumsum(-1)
    for row, code in enumerate(codes.tolist()):
        assert p[row, code] > 0
        below = cumulative[row, code - 1].item() if code else 0.0
        assert below - 1e-5 <= u <= cumulative[row, code].item() + 1e-5


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"2 .*1 labels"):
        sample_codes(lively(tiny_config()), torch.tensor([0]), SETTINGS, image_rngs([0, 1]))
    with pytest.raises(ValueError, match="-1"):
        image_rngs([-1])
    for bad in ({"temperature": -1}, {"top_p": 0}, {"top_k": -2}, {"cfg_scale": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            SamplingSettings(**bad)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("damaged", ["head", "memory.bank"])  # the first logits do not show it
def test_weights_that_are_not_finite_are_refused(damaged, temperature):
    model = lively(tiny_config(memory={"kind": "move", "slots": 2}), dtype=torch.float32)
    with torch.no_grad():
        model.get_submodule(damaged).weight.fill_(math.nan)
    with pytest.raises(ValueError, match="not finite"):
        sample(model, [1, 2], SamplingSettings(temperature=temperature, top_p=0.5))
