"""Metrics of features, by torch-fidelity's functions, and of image pairs.

N images   D features   K logits; `samples` are generated images, `reference` real ones
B image pairs   C channels   H height   W width, float in 0..1
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

NEIGHBOURS = 3  # k of the manifolds of precision and recall (Kynkäänniemi et al. 2019; ADM)
KID_SUBSET, KID_SUBSETS = 1000, 100  # torch-fidelity's defaults
IS_SPLITS, ADM_SPLIT = 10, 5000
PRC_BLOCK = 1000  # rows of a distance matrix in memory at once: 0.2 GB for 50,000 images
WINDOW, SIGMA = 11, 1.5  # of SSIM
C1, C2 = 0.01**2, 0.03**2


@dataclass(frozen=True)
class Statistics:
    """mu float64 [D] and sigma float64 [D, D] of `count` images (None: unknown)."""

    mu: np.ndarray
    sigma: np.ndarray
    count: int | None = None


def statistics_of(features: np.ndarray) -> Statistics:
    """Mean and unbiased covariance of features [N, D], in float64.

    torch-fidelity and ADM average float32 features in float32, which loses digits where N is large.
    """
    mu, count = features.mean(axis=0, dtype=np.float64), len(features)
    centred = features - mu
    return Statistics(mu, centred.T @ centred / (count - 1), count)


def frechet_distance(samples: Statistics, reference: Statistics) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017): FID and sFID.

    Raises ValueError for statistics of different numbers of features.
    """
    if samples.mu.shape != reference.mu.shape:
        raise ValueError(f"{len(samples.mu)} features, the reference has {len(reference.mu)}")
    pair = [{"mu": s.mu, "sigma": s.sigma} for s in (samples, reference)]
    return fid_statistics_to_metric(*pair, verbose=False)["frechet_inception_distance"]


def inception_scores(logits: np.ndarray) -> dict[str, float]:
    """exp E KL(p(y|x) | p(y)) of bias-free logits [N, K] (Salimans et al. 2016), computed two ways.

    inception_score_shuffled: torch-fidelity's, 10 splits of shuffled images, with the standard
    deviation over the splits. inception_score_adm: ADM's, the mean over contiguous runs of 5,000
    images in file order; it is wrong for a class-sorted set.
    """
    features = torch.from_numpy(logits)
    shuffled = isc_features_to_metric(features, splits=min(IS_SPLITS, len(features)), shuffle=True)
    runs = [
        isc_features_to_metric(run, splits=1, shuffle=False)["inception_score_mean"]
        for run in features.split(ADM_SPLIT)
    ]
    return {
        "inception_score_shuffled": shuffled["inception_score_mean"],
        "inception_score_shuffled_std": shuffled["inception_score_std"],
        "inception_score_adm": float(np.mean(runs)),
    }


def precision_recall(samples: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Share of samples [N, D] in the k-NN manifold of the reference [M, D], and the reverse; k = 3.

    Both need more than k images.
    """
    pair = torch.from_numpy(samples), torch.from_numpy(reference)
    options = {"prc_neighborhood": NEIGHBOURS, "prc_batch_size": PRC_BLOCK, "save_cpu_ram": True}
    metrics = prc_features_to_metric(*pair, verbose=False, **options)
    return {"precision": metrics["precision"], "recall": metrics["recall"]}


def kernel_distance(samples: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Unbiased MMD^2 with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018), over 100 subsets.

    A subset has 1,000 images, or as many as the smaller set.
    """
    pair = torch.from_numpy(samples), torch.from_numpy(reference)
    subset = min(KID_SUBSET, len(samples), len(reference))
    options = {"kid_subsets": KID_SUBSETS, "kid_subset_size": subset}
    metrics = kid_features_to_metric(*pair, verbose=False, **options)
    return {
        "kid": metrics["kernel_inception_distance_mean"],
        "kid_std": metrics["kernel_inception_distance_std"],
        "kid_subset_size": subset,
    }


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each pair [B, C, H, W], mean over channels and pixels: [B].

    Wang et al. 2004: Gaussian window of 11 x 11 with deviation 1.5, K1 = 0.01, K2 = 0.03, at the
    positions where the window lies inside the image, which must not be smaller.
    """
    channels = a.shape[1]
    offsets = torch.arange(WINDOW, dtype=a.dtype, device=a.device) - WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    window = (weights / weights.sum()).repeat(channels, 1, 1, 1)  # [C, 1, 1, 11]

    def blur(images: Tensor) -> Tensor:
        # rows, then columns: float64 convolutions on a CPU copy each window, 11 numbers and not 121
        rows = F.conv2d(images, window, groups=channels)
        return F.conv2d(rows, window.transpose(2, 3), groups=channels)

    mean_a, mean_b = blur(a), blur(b)
    variances = blur(a * a) - mean_a**2 + blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    structure = (2 * covariance + C2) / (variances + C2)
    return (luminance * structure).flatten(1).mean(1)
