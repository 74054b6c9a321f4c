"""The adversarial loss of VQGAN (arXiv 2012.09841): a PatchGAN that tells images from
reconstructions, and the weight that keeps its pull as strong as that of the other losses.
"""

from __future__ import annotations

from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.processes import mean

MOST_WEIGHT = 1e4


def make_discriminator(channels: int, width: int, n_layers: int) -> nn.Module:
    """taming's PatchGAN (pix2pix, arXiv 1611.07004), initialised as there.

    Images [B, channels, H, W] -> logits [B, 1, h, w] of patches, positive for what looks real.
    `n_layers` halve the resolution after the first one; H and W of at least `least_side(n_layers)`.

    Raises:
        ImportError: taming-transformers is not installed.
    """
    try:
        module = import_module("taming.modules.discriminator.model")
    except ImportError as error:
        raise ImportError(
            f"the discriminator needs the package taming-transformers-rom1504: {error}"
        ) from None
    made: nn.Module = module.NLayerDiscriminator(channels, ndf=width, n_layers=n_layers)
    return made.apply(module.weights_init)


def least_side(n_layers: int) -> int:
    """Pixels of a side that leave the discriminator one patch: two 4 x 4 convolutions at the end
    take away one each."""
    return 3 * 2**n_layers


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss on logits of images and of reconstructions (VQGAN's, arXiv 1705.02894)."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def generator_loss(fake: Tensor) -> Tensor:
    """What the tokenizer is to make small: minus the mean logit of its reconstructions."""
    return -fake.mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """|d reconstruction / d L| / (|d adversarial / d L| + 1e-4), at most 1e4 (VQGAN, eq. 7).

    Args:
        reconstruction, adversarial: scalar losses; their graphs are kept.
        last_layer: L, the decoder's last weight.

    Returns:
        a scalar without a gradient, of the images of all processes.
    """
    gradients = [
        mean(torch.autograd.grad(loss, last_layer, retain_graph=True)[0])
        for loss in (reconstruction, adversarial)
    ]
    ratio = gradients[0].norm() / (gradients[1].norm() + 1e-4)
    return ratio.clamp(max=MOST_WEIGHT).detach()
