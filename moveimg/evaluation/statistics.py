"""Mean and covariance of features, in float64 and in blocks.

N images   D features
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BLOCK = 2048  # rows turned to float64 at a time


@dataclass(frozen=True)
class Statistics:
    """mu float64 [D], sigma float64 [D, D], of `count` images (None: the source does not tell)."""

    mu: np.ndarray
    sigma: np.ndarray
    count: int | None = None


def statistics_of(features: np.ndarray) -> Statistics:
    """Mean and unbiased covariance of features [N, D], which may be a memory map.

    Two passes in float64. torch-fidelity and ADM take the mean of float32 features in float32,
    which loses digits where N is large. Raises ValueError for N < 2.
    """
    count = len(features)
    if count < 2:
        raise ValueError(f"too-few-samples: {count} images have no covariance: expected 2 or more")
    blocks = [slice(start, start + BLOCK) for start in range(0, count, BLOCK)]
    total = np.zeros(features.shape[1])
    for block in blocks:
        total += features[block].sum(axis=0, dtype=np.float64)
    mu = total / count
    scatter = np.zeros((len(mu), len(mu)))
    for block in blocks:
        centred = features[block].astype(np.float64) - mu
        scatter += centred.T @ centred
    return Statistics(mu, scatter / (count - 1), count)
