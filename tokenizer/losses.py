"""Losses that train a tokenizer.

A loss is a set of named, unweighted scalars, and one function that weighs and adds them. A
perceptual loss (`perceptual.py`) is one more term; an adversarial one (`adversarial.py`) balances
itself against the gradient of the others at `tokenizer.last_layer`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

ImageLoss = Callable[[Tensor, Tensor], Tensor]
"""(reconstruction, images), both [B, 3, H, W] -> scalar."""

IMAGE_LOSSES: Mapping[str, ImageLoss] = MappingProxyType({"l1": F.l1_loss, "l2": F.mse_loss})

CODEBOOK_WEIGHTS: Mapping[str, float] = MappingProxyType(
    # codebook at 1 is LlamaGen's; commitment is the beta of VQ-VAE (arXiv 1711.00937)
    {"codebook": 1.0, "commitment": 0.25}
)
DEFAULT_WEIGHTS: Mapping[str, float] = MappingProxyType({"l1": 0.0, "l2": 1.0, **CODEBOOK_WEIGHTS})
"""LlamaGen's, for a quantizer of kind `vq` or `simvq`."""


def reconstruction_losses(reconstruction: Tensor, images: Tensor) -> dict[str, Tensor]:
    """Mean absolute (`l1`) and mean squared (`l2`) error, in float32 or better."""
    precision = torch.promote_types(images.dtype, torch.float32)
    pair = reconstruction.to(precision), images.to(precision)
    return {name: loss(*pair) for name, loss in IMAGE_LOSSES.items()}


def codebook_losses(vectors: Tensor, chosen: Tensor) -> dict[str, Tensor]:
    """The two halves of VQ-VAE's equation 3, unweighted.

    Args:
        vectors: [n, d], what the encoder gave.
        chosen: [n, d], the codebook vectors in their place.

    Returns:
        `codebook` moves codes to vectors, `commitment` moves vectors to codes.
    """
    return {
        "codebook": F.mse_loss(chosen, vectors.detach()),
        "commitment": F.mse_loss(vectors, chosen.detach()),
    }


def total_loss(
    terms: Mapping[str, Tensor], weights: Mapping[str, float] = DEFAULT_WEIGHTS
) -> Tensor:
    """Weighted sum of named terms.

    Raises:
        ValueError: a term without a weight, or a weight without a term: a misspelt name must not
            drop a loss in silence.
    """
    if terms.keys() != weights.keys():
        unmatched = sorted(terms.keys() ^ weights.keys())
        raise ValueError(
            f"loss terms {sorted(terms)} and weights {sorted(weights)} differ in {unmatched}"
        )
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum()
