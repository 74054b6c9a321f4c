"""PSNR and SSIM of image pairs.

B images   C channels   H height   W width, float in 0..1
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """10 log10(1 / mean squared error) of each pair [B, C, H, W], in dB; inf where equal."""
    mse = (a - b).square().flatten(1).mean(1)
    return -10 * mse.log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each pair [B, C, H, W], mean over channels and pixels: [B].

    Wang et al. 2004: Gaussian window of 11 x 11 with deviation 1.5, K1 = 0.01, K2 = 0.03, where
    the window fits wholly. Raises ValueError for images smaller than the window.
    """
    if min(a.shape[-2:]) < WINDOW:
        raise ValueError(f"images are {list(a.shape[-2:])}: SSIM needs {WINDOW} x {WINDOW} or more")
    channels = a.shape[1]
    window = _window(a).repeat(channels, 1, 1, 1)  # [C, 1, 1, 11]

    def blur(images: Tensor) -> Tensor:
        # by rows, then by columns: float64 on a CPU copies every window's numbers, 11 and not 121
        rows = F.conv2d(images, window, groups=channels)
        return F.conv2d(rows, window.transpose(2, 3), groups=channels)

    mean_a, mean_b = blur(a), blur(b)
    variance_a = blur(a * a) - mean_a**2
    variance_b = blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = K1**2, K2**2
    light = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (light * structure).flatten(1).mean(1)


def _window(like: Tensor) -> Tensor:
    """Gaussian weights [11] that sum to 1; the square window is their outer product."""
    offsets = torch.arange(WINDOW, dtype=like.dtype, device=like.device) - WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    return weights / weights.sum()
