"""Metrics of feature sets, computed by torch-fidelity, and SSIM of pairs of images.

N images   D features   K logits; `samples` are generated images, `reference` real ones
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

NEIGHBOURS = 3  # k of the manifolds of precision and recall (Kynkäänniemi et al. 2019; ADM)
ADM_SPLIT = 5000
WINDOW = 11  # of SSIM
Statistics = tuple[np.ndarray, np.ndarray]  # mu float64 [D] and sigma float64 [D, D]


def compute_statistics(features: np.ndarray) -> Statistics:
    """Return mean and unbiased covariance of features [N, D] (torch-fidelity's are float32)."""
    mu = features.mean(axis=0, dtype=np.float64)
    centred = features - mu
    return mu, centred.T @ centred / (len(features) - 1)


def frechet_distance(samples: Statistics, reference: Statistics) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017): FID and sFID."""
    if len(samples[0]) != len(reference[0]):
        raise ValueError(f"{len(samples[0])} features: expected {len(reference[0])}, as reference")
    pair = [{"mu": mu, "sigma": sigma} for mu, sigma in (samples, reference)]
    return fid_statistics_to_metric(*pair, verbose=False)["frechet_inception_distance"]


def inception_scores(logits: np.ndarray) -> dict[str, float]:
    """Return exp E KL(p(y|x) | p(y)) of bias-free logits [N, K] (Salimans et al. 2016), two ways.

    shuffled: as in torch-fidelity, 10 splits of shuffled images; std is over the splits.
    adm: as in ADM, the mean over chunks of 5,000 images in file order; wrong if sorted by class.
    """
    features, key = torch.from_numpy(logits), "inception_score_mean"
    shuffled = isc_features_to_metric(features, splits=min(10, len(features)), shuffle=True)
    parts = [isc_features_to_metric(x, splits=1, shuffle=False) for x in features.split(ADM_SPLIT)]
    return {
        "inception_score_shuffled": shuffled[key],
        "inception_score_shuffled_std": shuffled["inception_score_std"],
        "inception_score_adm": float(np.mean([part[key] for part in parts])),
    }


def precision_recall(samples: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Return the shares of samples [N, D] in the 3-NN manifold of reference [M, D] and reverse."""
    pair = torch.from_numpy(samples), torch.from_numpy(reference)
    # rows of a distance matrix in memory: 0.2 GB for 50,000 images
    options = {"prc_batch_size": 1000, "save_cpu_ram": True}
    metrics = prc_features_to_metric(*pair, verbose=False, prc_neighborhood=NEIGHBOURS, **options)
    return {"precision": metrics["precision"], "recall": metrics["recall"]}


def kernel_distance(samples: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Return KID: unbiased MMD^2, kernel (x.y / D + 1)^3 (Binkowski et al. 2018), 100 subsets."""
    pair = torch.from_numpy(samples), torch.from_numpy(reference)
    subset = min(1000, len(samples), len(reference))
    metrics = kid_features_to_metric(*pair, verbose=False, kid_subsets=100, kid_subset_size=subset)
    return {
        "kid": metrics["kernel_inception_distance_mean"],
        "kid_std": metrics["kernel_inception_distance_std"],
        "kid_subset_size": subset,
    }


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Return the structural similarity [B] of pairs of images [B, C, H, W] in 0..1.

    Wang et al. 2004: Gaussian window of 11 x 11 with deviation 1.5, K1 = 0.01, K2 = 0.03, at the
    positions where the window lies inside the image.
    """
    channels, offsets = a.shape[1], torch.arange(WINDOW, dtype=a.dtype) - WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * 1.5**2))
    rows = (weights / weights.sum()).repeat(channels, 1, 1, 1)  # [C, 1, 1, 11]
    images = torch.cat([a, b, a * a, b * b, a * b])
    # separable, as float64 convolutions on a CPU copy each window: 11 numbers instead of 121
    images = F.conv2d(F.conv2d(images, rows, groups=channels), rows.mT, groups=channels)
    mean_a, mean_b, square_a, square_b, product = images.chunk(5)
    c1, c2, means = 0.01**2, 0.03**2, mean_a * mean_b
    luminance = (2 * means + c1) / (mean_a**2 + mean_b**2 + c1)
    variances = square_a - mean_a**2 + square_b - mean_b**2
    return (luminance * (2 * (product - means) + c2) / (variances + c2)).flatten(1).mean(1)
