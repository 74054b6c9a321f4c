"""Every metric written plainly in float64 NumPy, from its paper; slow, and for the tests alone.

N, M images   D features   K logits
"""

from __future__ import annotations

from itertools import pairwise
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3 as fidelity
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

BLOCKS = """Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 MaxPool_1 Conv2d_3b_1x1 Conv2d_4a_3x3
MaxPool_2 Mixed_5b Mixed_5c Mixed_5d Mixed_6a Mixed_6b Mixed_6c"""


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """FID of features [N, D] and [M, D]: the square root through symmetric matrices."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    mean = x.mean(0) - y.mean(0)
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root_a = symmetric_root(a)
    cross = symmetric_root(root_a @ b @ root_a)
    return float(mean @ mean + np.trace(a) + np.trace(b) - 2 * np.trace(cross))


def symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def inception_score(logits: np.ndarray) -> float:
    """exp of the mean KL(p(y|x) | p(y)) over one split, logits [N, K]."""
    logits = logits.astype(np.float64)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return float(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))


def inception_scores(logits: np.ndarray, run: int) -> dict[str, float]:
    """torch-fidelity's convention, 10 splits shuffled by a fixed seed; ADM's, runs as they come."""
    mixed = logits[np.random.RandomState(2020).permutation(len(logits))]
    edges = [i * len(mixed) // 10 for i in range(11)]
    shuffled = [inception_score(mixed[i:j]) for i, j in pairwise(edges)]
    adm = [inception_score(logits[i : i + run]) for i in range(0, len(logits), run)]
    return {
        "inception_score_shuffled": float(np.mean(shuffled)),
        "inception_score_shuffled_std": float(np.std(shuffled)),
        "inception_score_adm": float(np.mean(adm)),
    }


def covered(points: np.ndarray, manifold: np.ndarray, k: int = 3) -> float:
    """The share of points [N, D] within the k-NN radius of any point of the manifold [M, D]."""
    points, manifold = points.astype(np.float64), manifold.astype(np.float64)
    within, between = (np.linalg.norm(x[:, None] - manifold, axis=2) for x in (manifold, points))
    radii = np.sort(within, axis=1)[:, k]  # the nearest is the centre itself
    return float((between <= radii).any(1).mean())


def kid(x: np.ndarray, y: np.ndarray, subset: int) -> tuple[float, float]:
    """Unbiased MMD^2 of the kernel (x.y / D + 1)^3 over torch-fidelity's 100 random subsets."""
    x, y, distances = x.astype(np.float64), y.astype(np.float64), []
    rng = np.random.RandomState(2020)
    for _ in range(100):
        a = x[rng.choice(len(x), subset, replace=False)]
        b = y[rng.choice(len(y), subset, replace=False)]
        xx, yy, xy = (((p @ q.T) / p.shape[1] + 1) ** 3 for p, q in ((a, a), (b, b), (a, b)))
        within = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)
        distances.append(within / (subset * (subset - 1)) - 2 * xy.mean())
    return float(np.mean(distances)), float(np.std(distances))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """One channel [H, W], window by window (Wang et al. 2004)."""
    steps = np.arange(-5, 6)
    window = np.exp(-(steps[:, None] ** 2 + steps**2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for p, q in zip(windows(a), windows(b), strict=True):
        mp, mq = (window * p).sum(), (window * q).sum()
        vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
        c = (window * (p - mp) * (q - mq)).sum()
        light = (2 * mp * mq + 1e-4) / (mp**2 + mq**2 + 1e-4)
        values.append(light * (2 * c + 9e-4) / (vp + vq + 9e-4))
    return float(np.mean(values))


def windows(x: np.ndarray) -> np.ndarray:
    return np.lib.stride_tricks.sliding_window_view(x, (11, 11)).reshape(-1, 11, 11)


def spatial_features(network, images: np.ndarray) -> np.ndarray:
    """sFID's features by hand: the network's blocks in order up to mixed_6's first branch."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    x = interpolate_bilinear_2d_like_tensorflow1x(x, (299, 299), align_corners=False)
    x = (x - 128) / 128
    for name in BLOCKS.split():
        x = getattr(network, name)(x)
    branch = network.Mixed_6d.branch1x1
    x = branch.bn(branch.conv(x)).clamp(min=0).numpy()  # [B, 192, 17, 17]
    return np.stack([x[:, c] for c in range(7)], axis=-1).reshape(len(x), -1)


def random_inception(path) -> None:
    """Random weights in torch-fidelity's file layout, scaled so that every layer is alive."""
    torch.manual_seed(0)
    network_class = fidelity.FeatureExtractorInceptionV3
    with (
        patch.object(fidelity, "load_state_dict_from_url", return_value={}),
        patch.object(network_class, "load_state_dict"),
    ):
        network = network_class("inception-v3-compat", ["2048"])
    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight)
        elif isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.bias, std=0.1)
    nn.init.normal_(network.fc.weight, std=0.05)
    torch.save(network.state_dict(), path)
