"""Likelihoods of codes under a generator, and classification by them.

B images   T codes in an image   V codebook size   C classes

p(codes | label) is a product over positions, so one teacher-forcing pass gives it. Bits per pixel
count the codes alone: the tokenizer's own error is not a likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moveimg.model import Transformer
from moveimg.progress import progress_bar
from moveimg.sampling import guide, guided_labels


@dataclass(frozen=True)
class Likelihood:
    """log p of each code of B images in nats, float64 [B, T], and the pixels of an image."""

    log_probs: Tensor
    pixels: int

    @property
    def total(self) -> Tensor:
        """log p(codes | label) in nats, float64 [B]."""
        return self.log_probs.sum(dim=1)

    @property
    def nats_per_code(self) -> Tensor:
        """-log p per code, float64 [B]; the larger, the stranger the image."""
        return -self.log_probs.mean(dim=1)

    @property
    def bits_per_code(self) -> Tensor:
        """-log2 p per code, float64 [B]."""
        return self.nats_per_code / math.log(2)

    @property
    def bits_per_pixel(self) -> Tensor:
        """-log2 p per pixel, float64 [B]."""
        return -self.total / math.log(2) / self.pixels


@torch.inference_mode()
def code_log_probs(
    generator: Transformer,
    codes: Tensor,
    labels: Tensor,
    scales: Tensor | None = None,
    temperature: float = 1.0,
    narrow: Callable[[Tensor], Tensor] = lambda logits: logits,
) -> Tensor:
    """log p(code | label, codes before it) in nats, float64 [B, T].

    Labels int64 [B] are in 0..C, where C is the null label. `scales` are those of guidance_scales
    for one scale, none means 1; `narrow` changes the guided logits [B, T, V].
    """
    scales = torch.ones(1, 1, 1) if scales is None else scales
    labels, guided = guided_labels(generator, labels, scales)
    with torch.autocast(labels.device.type, enabled=False):
        logits = generator(codes.repeat(1 + guided, 1), labels)  # [B or 2 B, T, V]
    if guided:
        conditional, unconditional = logits.chunk(2)
        logits = guide(conditional, unconditional, scales[..., 0].to(logits))
    log_probs = narrow(logits / temperature).log_softmax(dim=-1)
    return log_probs.gather(-1, codes[..., None])[..., 0].double()


def class_log_likelihoods(generator: Transformer, codes: Tensor, batch_size: int = 64) -> Tensor:
    """log p(codes | class) of every class in nats, float64 [B, C]."""
    n_classes = generator.config.n_classes
    pairs = torch.cartesian_prod(torch.arange(len(codes)), torch.arange(n_classes))  # [B C, 2]
    sums = []
    with progress_bar(len(pairs), "classify", "pair", delay=2) as bar:
        for rows, labels in (part.to(codes.device).unbind(1) for part in pairs.split(batch_size)):
            sums.append(code_log_probs(generator, codes[rows], labels).sum(1))
            bar.update(len(rows))
    return torch.cat(sums).view(len(codes), n_classes)
