"""Losses that train a tokenizer: reconstruction, codebook, LPIPS, and VQGAN's adversarial loss."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moveimg.dist import reduce_mean
from moveimg.files import fetch

ImageLoss = Callable[[Tensor, Tensor], Tensor]
"""(reconstruction, images), both [B, 3, H, W] in [-1, 1] -> scalar."""


def reconstruction_losses(reconstruction: Tensor, images: Tensor) -> dict[str, Tensor]:
    """Mean absolute (`l1`) and mean squared (`l2`) error, in float32 or better."""
    dtype = torch.promote_types(images.dtype, torch.float32)
    x, y = reconstruction.to(dtype), images.to(dtype)
    return {"l1": F.l1_loss(x, y), "l2": F.mse_loss(x, y)}


def codebook_losses(vectors: Tensor, chosen: Tensor) -> dict[str, Tensor]:
    """VQ-VAE's equation 3 for vectors and their codes' vectors, both [n, D], unweighted.

    `codebook` moves codes to vectors, `commitment` moves vectors to codes.
    """
    return {
        "codebook": F.mse_loss(chosen, vectors.detach()),
        "commitment": F.mse_loss(vectors, chosen.detach()),
    }


def total_loss(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The sum of named terms, each times its weight."""
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum()


# --- LPIPS -----------------------------------------------------------------------------------

VGG_FILE, LPIPS_FILE = "vgg16-397923af.pth", "weights-vgg16-lpips.pth"
WEIGHTS = {
    VGG_FILE: f"https://download.pytorch.org/models/{VGG_FILE}",
    LPIPS_FILE: f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{LPIPS_FILE}",
}


def load_perceptual_loss(folder: Path | None, device: torch.device) -> ImageLoss:
    """LPIPS (arXiv 1801.03924) by torch-fidelity; H and W of images of at least 16.

    Its weights are in `checkpoints/` of a torch.hub folder (None: torch's own), or downloaded into
    it. Raises FileNotFoundError without a file or network, ValueError for a damaged file.
    """
    from torch_fidelity.sample_similarity_lpips import SampleSimilarityLPIPS

    before = torch.hub.get_dir()
    for name, url in WEIGHTS.items():
        path = Path(folder or before) / "checkpoints" / name
        fetch(url, path, "397923af" if name == VGG_FILE else None)
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # so that no code in a file is run
    torch.hub.set_dir(str(folder or before))
    try:
        model: nn.Module = SampleSimilarityLPIPS("lpips").to(device)
    except Exception as error:  # a damaged pickle can end in any
        raise ValueError(f"{folder or before}: damaged weights of LPIPS ({error!r:.200})") from None
    finally:
        torch.hub.set_dir(before)
        del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
    return lambda x, y: model((x + 1) * 127.5, (y + 1) * 127.5).mean()


# --- the adversarial loss of VQGAN (arXiv 2012.09841) -----------------------------------------


def make_discriminator(channels: int, width: int, n_layers: int) -> nn.Module:
    """taming's PatchGAN (pix2pix, arXiv 1611.07004), initialised as there.

    Images [B, channels, H, W] -> logits [B, 1, h, w] of patches, positive for real images.
    `n_layers` halve the resolution after the first; H and W of at least `min_side(n_layers)`.
    """
    from taming.modules.discriminator.model import NLayerDiscriminator, weights_init

    made: nn.Module = NLayerDiscriminator(channels, ndf=width, n_layers=n_layers)
    return made.apply(weights_init)


def min_side(n_layers: int) -> int:
    """Pixels of a side that leave the discriminator one patch."""
    return 3 * 2**n_layers  # the two 4 x 4 convolutions at the end remove one position each


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss on the logits of images and of reconstructions (arXiv 1705.02894)."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """|d reconstruction / d L| / (|d adversarial / d L| + 1e-4), at most 1e4 (VQGAN, eq. 7).

    The losses are scalars, whose graphs are kept; L is the decoder's last weight. Returns a scalar
    without gradient, of the images of all processes.
    """
    gradients = [
        reduce_mean(torch.autograd.grad(loss, last_layer, retain_graph=True)[0])
        for loss in (reconstruction, adversarial)
    ]
    ratio = gradients[0].norm() / (gradients[1].norm() + 1e-4)
    return ratio.clamp(max=1e4).detach()
