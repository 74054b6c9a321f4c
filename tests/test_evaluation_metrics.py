"""Numbers against plain float64 NumPy, on three constructed sets of features."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moveimg.evaluation import metrics
from moveimg.evaluation.metrics import (
    frechet_distance,
    inception_scores,
    kernel_distance,
    precision_recall,
    ssim,
    statistics_of,
)
from tests import reference_metrics as plain

D = 12
RNG = np.random.default_rng(0)
MIX = RNG.normal(size=(D, D))
REAL = (RNG.normal(size=(150, D)) @ MIX).astype(np.float32)
SETS = {
    "identical": REAL,
    "shifted": (RNG.normal(size=(120, D)) @ MIX + 0.7).astype(np.float32),
    "disjoint": (40 + 3 * RNG.normal(size=(90, D))).astype(np.float32),
}


@pytest.fixture(params=SETS)
def pair(request) -> tuple[str, np.ndarray]:
    return request.param, SETS[request.param]


def test_frechet_distance(pair):
    name, samples = pair
    found = frechet_distance(statistics_of(samples), statistics_of(REAL))
    assert found == pytest.approx(plain.frechet(samples, REAL), rel=1e-9, abs=1e-5)
    assert (abs(found) < 1e-5) == (name == "identical")


def test_precision_and_recall(pair):
    name, samples = pair
    found = precision_recall(samples, REAL)
    wanted = plain.precision_recall(samples, REAL)
    assert (found["precision"], found["recall"]) == pytest.approx(wanted, abs=1e-7)
    assert found["precision"] == {"identical": 1, "disjoint": 0}.get(name, found["precision"])


def test_precision_is_of_the_samples_and_recall_of_the_reference():
    """A part of the real images covers itself wholly, and the rest not at all."""
    clusters = np.concatenate([REAL, REAL + 1000])
    found = precision_recall(REAL, clusters)
    assert found["precision"] == 1 and found["recall"] == pytest.approx(0.5)


def test_kernel_distance(pair):
    _, samples = pair
    found = kernel_distance(samples, REAL)
    subset = min(len(samples), len(REAL))
    assert found["kid_subset_size"] == subset
    mean, deviation = plain.kid(samples, REAL, subset)
    assert found["kid"] == pytest.approx(mean, rel=1e-4)
    assert found["kid_std"] == pytest.approx(deviation, rel=1e-2, abs=1e-4 * abs(mean))


def test_both_inception_scores(monkeypatch):
    monkeypatch.setattr(metrics, "ADM_SPLIT", 40)
    logits = (3 * RNG.normal(size=(90, 7))).astype(np.float32)
    found = inception_scores(logits)
    shuffled, deviation = plain.scores_shuffled(logits)
    assert found["inception_score_shuffled"] == pytest.approx(shuffled, rel=1e-9)
    assert found["inception_score_shuffled_std"] == pytest.approx(deviation, rel=1e-9)
    assert found["inception_score_adm"] == pytest.approx(plain.score_adm(logits, 40), rel=1e-9)


def test_adms_score_suffers_from_class_sorted_images_and_the_shuffled_one_does_not(monkeypatch):
    monkeypatch.setattr(metrics, "ADM_SPLIT", 40)
    logits = (10 * np.eye(5)[np.arange(200) % 5]).astype(np.float32)
    mixed = inception_scores(logits)
    classed = inception_scores(logits[np.argsort(np.arange(200) % 5, kind="stable")])
    assert mixed["inception_score_adm"] == pytest.approx(5, abs=0.01)
    assert classed["inception_score_adm"] == pytest.approx(1, abs=0.01)
    assert classed["inception_score_shuffled"] > 4


def test_statistics_are_float64():
    features = (1e4 + RNG.normal(size=(150, D))).astype(np.float32)
    found = statistics_of(features)
    exact = features.astype(np.float64)
    assert np.allclose(found.mu, exact.mean(0), rtol=1e-14)
    assert np.allclose(found.sigma, np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-12)
    assert found.count == 150
    with pytest.raises(ValueError, match=r"12 features.* 5"):
        frechet_distance(found, statistics_of(features[:, :5]))


def slow_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """One channel [H, W], window by window (Wang et al. 2004)."""
    steps = np.arange(-5, 6)
    window = np.exp(-(steps[:, None] ** 2 + steps[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    found = []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            p, q = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
            c = (window * (p - mp) * (q - mq)).sum()
            light = (2 * mp * mq + 1e-4) / (mp**2 + mq**2 + 1e-4)
            found.append(light * (2 * c + 9e-4) / (vp + vq + 9e-4))
    return float(np.mean(found))


def test_ssim_is_its_definition():
    a = RNG.random((2, 3, 14, 17))
    b = np.clip(a + 0.2 * RNG.normal(size=a.shape), 0, 1)
    found = ssim(torch.from_numpy(a), torch.from_numpy(b))
    for i in range(2):
        wanted = np.mean([slow_ssim(a[i, c], b[i, c]) for c in range(3)])
        assert found[i].item() == pytest.approx(wanted, rel=1e-9)
    assert ssim(torch.from_numpy(a), torch.from_numpy(a)).tolist() == pytest.approx([1, 1])
