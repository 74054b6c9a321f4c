"""Numbers against plain float64 NumPy, on three constructed sets of features."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moveimg.evaluation import metrics
from tests import reference_metrics as plain

D = 12
RNG = np.random.default_rng(0)
MIX = RNG.normal(size=(D, D))
REAL = (RNG.normal(size=(70, D)) @ MIX).astype(np.float32)
SETS = {
    "identical": REAL,
    "shifted": (RNG.normal(size=(60, D)) @ MIX + 0.7).astype(np.float32),
    "disjoint": (40 + 3 * RNG.normal(size=(50, D))).astype(np.float32),
}


@pytest.mark.parametrize("name", SETS)
def test_distances_between_sets_equal_the_reference(name):
    samples = SETS[name]
    fid = metrics.frechet_distance(metrics.statistics_of(samples), metrics.statistics_of(REAL))
    assert fid == pytest.approx(plain.frechet(samples, REAL), rel=1e-9, abs=1e-5)
    assert (abs(fid) < 1e-5) == (name == "identical")
    manifolds = metrics.precision_recall(samples, REAL)
    precision, recall = plain.covered(samples, REAL), plain.covered(REAL, samples)
    assert manifolds == pytest.approx({"precision": precision, "recall": recall}, abs=1e-7)
    assert precision == {"identical": 1, "disjoint": 0}.get(name, precision)
    kid, subset = metrics.kernel_distance(samples, REAL), min(len(samples), len(REAL))
    mean, deviation = plain.kid(samples, REAL, subset)
    assert kid["kid_subset_size"] == subset and kid["kid"] == pytest.approx(mean, rel=1e-4)
    assert kid["kid_std"] == pytest.approx(deviation, rel=1e-2, abs=1e-4 * abs(mean))


def test_both_inception_scores(monkeypatch):
    monkeypatch.setattr(metrics, "ADM_SPLIT", 40)
    logits = (3 * RNG.normal(size=(90, 7))).astype(np.float32)
    expected = plain.inception_scores(logits, 40)
    assert metrics.inception_scores(logits) == pytest.approx(expected, rel=1e-9)
    classed = (10 * np.eye(5)[np.arange(200) // 40]).astype(np.float32)  # sorted by class
    scores = metrics.inception_scores(classed)
    assert scores["inception_score_adm"] == pytest.approx(1, abs=0.01)
    assert scores["inception_score_shuffled"] > 4


def test_statistics_are_float64():
    features = (1e4 + RNG.normal(size=(150, D))).astype(np.float32)
    mu, sigma = metrics.statistics_of(features)
    exact = features.astype(np.float64)
    assert np.allclose(mu, exact.mean(0), rtol=1e-14)
    assert np.allclose(sigma, np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match=r"12.* 5"):
        metrics.frechet_distance((mu, sigma), metrics.statistics_of(features[:, :5]))


def test_ssim_is_its_definition():
    a = RNG.random((2, 2, 12, 14))
    b = np.clip(a + 0.2 * RNG.normal(size=a.shape), 0, 1)
    values = metrics.ssim(torch.from_numpy(a), torch.from_numpy(b))
    expected = [
        np.mean([plain.ssim(*pair) for pair in zip(*one, strict=True)])
        for one in zip(a, b, strict=True)
    ]
    assert values.tolist() == pytest.approx(expected, rel=1e-9)
