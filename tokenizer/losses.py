"""Losses that train a tokenizer: reconstruction, codebook, LPIPS, and VQGAN's adversarial loss."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moveimg.device import shapes_only
from moveimg.dist import reduce_mean
from moveimg.files import fetch
from tokenizer.weights import load_weights, read_weights

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
TAPS = (3, 8, 15, 22, 29)  # VGG-16's ReLUs before each pooling, and the last


class LPIPS(nn.Module):
    """LPIPS (arXiv 1801.03924) of pairs of images [B, 3, H, W] in [-1, 1]: scalar, the mean.

    Gradients flow to the images; the weights are frozen. H and W of at least 16.
    """

    def __init__(self) -> None:
        from torchvision.models import vgg16

        super().__init__()
        self.features = vgg16(weights=None).features[: TAPS[-1] + 1]
        self.lins = nn.ParameterList(
            nn.Parameter(torch.empty(1, channels, 1, 1)) for channels in (64, 128, 256, 512, 512)
        )
        self.requires_grad_(False)

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        distance = torch.zeros((), device=images.device)
        shift = images.new_tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
        scale = images.new_tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
        x, y = ((image.float() - shift) / scale for image in (reconstruction, images))
        for index, layer in enumerate(self.features):
            x, y = layer(x), layer(y)  # the ReLUs work in place
            if index in TAPS:
                u, v = (z / (z.square().sum(1, keepdim=True).sqrt() + 1e-10) for z in (x, y))
                squares = (u - v).square()  # [B, C, h, w]
                distance = distance + F.conv2d(squares, self.lins[TAPS.index(index)]).mean()
        return distance


def load_perceptual_loss(folder: Path | None, device: torch.device) -> ImageLoss:
    """LPIPS with its published weights, read as plain tensors.

    They are in `checkpoints/` of a torch.hub folder (None: torch's own), or downloaded into it.
    Raises FileNotFoundError without a file or network, ValueError for a damaged file.
    """
    checkpoints = Path(folder or torch.hub.get_dir()) / "checkpoints"
    for name, url in WEIGHTS.items():
        fetch(url, checkpoints / name, "397923af" if name == VGG_FILE else None)
    vgg, lins = (read_weights(checkpoints / name) for name in WEIGHTS)
    used = {name: w for name, w in vgg.items() if name.startswith("features.")}
    used |= {re.sub(r"lin(\d)\.model\.1\.weight", r"lins.\1", name): w for name, w in lins.items()}
    with shapes_only():
        model = LPIPS()
    load_weights(model, used, str(checkpoints))
    return model.eval().to(device)


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
