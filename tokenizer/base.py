"""What all kinds of tokenizer share: encode, decode, the training pass, and the fingerprint.

Letters: B batch size, D codebook dimension, h and w the grid of codes, T = h*w, H and W the image.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from tokenizer.config import TokenizerConfig
from tokenizer.losses import reconstruction_losses
from tokenizer.quantizers import Quantizer


class TrainingOutput(NamedTuple):
    """The result of a training pass."""

    reconstruction: Tensor  # [B, C, H, W], not clamped
    losses: dict[str, Tensor]  # unweighted: l1, l2, and those of the quantizer
    codes: Tensor  # int64 [B, T]
    stats: dict[str, Tensor]  # scalars to log: usage, perplexity, and the quantizer's own


class AutoencoderTokenizer(nn.Module):
    """encoder -> quant_conv -> quantize -> post_quant_conv -> decoder.

    A new one is trainable (`forward`). `freeze` makes it a fixed function for good; those read from
    files are frozen.
    """

    def __init__(
        self, config: TokenizerConfig, encoder: nn.Module, decoder: nn.Module, quantize: Quantizer
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder, self.quantize = encoder, decoder, quantize
        codebook_dim = quantize.embedding.embedding_dim
        self.quant_conv = nn.Conv2d(config.z_channels, codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(codebook_dim, config.z_channels, 1)
        self._frozen = False
        self._fingerprint: str | None = None
        self.register_load_state_dict_post_hook(_forget_fingerprint)

    @property
    def codebook_size(self) -> int:
        """Codes are in 0..codebook_size-1."""
        return self.quantize.embedding.num_embeddings

    @property
    def downsample(self) -> int:
        """Pixels per code along one side."""
        return self.config.downsample

    @property
    def last_layer(self) -> nn.Parameter:
        """The decoder's last weight, where an adversarial loss is balanced (VQGAN, eq. 7)."""
        weight: nn.Parameter = self.decoder.get_parameter("conv_out.weight")
        return weight

    @property
    def fingerprint(self) -> str:
        """sha256, in hex, of the config and the float32 weights.

        A frozen tokenizer keeps the value, so that a later cast to bfloat16 does not change it.
        """
        value = self._fingerprint or fingerprint(self.config, self.state_dict())
        if self._frozen:
            self._fingerprint = value
        return value

    def freeze(self) -> Self:
        """Put the tokenizer into eval mode without gradients, for good; returns itself."""
        self._frozen = True
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> Self:
        """Set the mode as nn.Module does, but a frozen tokenizer stays in eval mode."""
        return super().train(mode and not self._frozen)

    # no_grad, not inference_mode: codes made under the latter cannot index an embedding in training
    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Codes int64 [B, T] in raster order of images [B, C, H, W] in [-1, 1], any float dtype.

        A caller's autocast applies. Raises ValueError for another shape or dtype.
        """
        with self._eval_mode():
            return self.quantize.lookup(self._encode(images))

    @torch.no_grad()
    def decode(
        self, codes: Tensor, grid: tuple[int, int] | None = None, *, clip: bool = True
    ) -> Tensor:
        """Images [B, C, H, W] in float32 or better of integer codes [B, T] in raster order.

        The grid (h, w) is a square if left out; `clip` clamps the pixels to [-1, 1]. A caller's
        autocast is ignored. Raises ValueError for another shape, or codes out of range.
        """
        h, w = self._check_codes(codes, grid)
        like = self.quant_conv.weight
        with self._eval_mode(), torch.autocast(like.device.type, enabled=False):
            z = self.quantize.embed(codes.to(like.device, torch.int64))  # [B, T, D]
            z = z.mT.contiguous().unflatten(2, (h, w)).to(like.dtype)  # [B, D, h, w]
            images: Tensor = self.decoder(self.post_quant_conv(z))
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        return images.clamp(-1, 1) if clip else images

    def forward(self, images: Tensor) -> TrainingOutput:
        """Encode, quantize and decode images [B, C, H, W] in [-1, 1], with gradients."""
        quantized = self.quantize(self._encode(images))
        reconstruction = self.decoder(self.post_quant_conv(quantized.vectors))
        losses = reconstruction_losses(reconstruction, images.to(reconstruction.device))
        losses |= quantized.losses
        return TrainingOutput(reconstruction, losses, quantized.codes, quantized.stats)

    def _encode(self, images: Tensor) -> Tensor:
        """Vectors [B, D, h, w] before quantization."""
        shape, f = list(images.shape), self.downsample
        if len(shape) != 4 or shape[1] != self.config.in_channels or 0 in shape[2:]:
            raise ValueError(f"images {shape}: expected [B, {self.config.in_channels}, H, W]")
        if shape[2] % f or shape[3] % f:
            raise ValueError(f"images {shape}: expected H and W to be multiples of {f}")
        if not images.is_floating_point():
            raise ValueError(f"images of {images.dtype}: expected floating point in [-1, 1]")
        return self.quant_conv(self.encoder(images.to(self.quant_conv.weight)))

    def _check_codes(self, codes: Tensor, grid: tuple[int, int] | None) -> tuple[int, int]:
        """The grid (h, w) of codes; ValueError for another shape, dtype or range."""
        if codes.ndim != 2 or codes.shape[1] == 0:
            raise ValueError(f"codes {list(codes.shape)}: expected [B, T]")
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise ValueError(f"codes of {codes.dtype}: expected integers")
        h, w = grid or (math.isqrt(codes.shape[1]),) * 2
        if h < 1 or w < 1 or h * w != codes.shape[1]:
            raise ValueError(f"{codes.shape[1]} codes do not fill a grid of {h} x {w}: pass `grid`")
        if codes.numel():
            low, high = (int(x) for x in codes.long().aminmax())
            if low < 0 or high >= self.codebook_size:
                raise ValueError(f"codes {low}..{high}: expected 0..{self.codebook_size - 1}")
        return h, w

    @contextmanager
    def _eval_mode(self) -> Iterator[Self | None]:
        """Turn off dropout and changes to the codebook for a while."""
        training = self.training
        try:
            yield self.eval() if training else None
        finally:
            if training:
                self.train()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # every move and cast comes through here: hash the weights as they were stored
        if self._frozen:
            _ = self.fingerprint
        return super()._apply(fn, recurse)


def _forget_fingerprint(module: Any, _: object) -> None:
    module._fingerprint = None


def fingerprint(config: TokenizerConfig, weights: Mapping[str, Tensor]) -> str:
    """sha256, in hex, of a config and of weights as float32."""
    # defaults are left out, so that a setting added later changes no fingerprint
    settings = config.model_dump(mode="json", exclude_defaults=True) | {"kind": config.kind}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(weights):
        array = weights[name].detach().to("cpu", torch.float32).contiguous().numpy()
        digest.update(f"\n{name} float32 {list(array.shape)}\n".encode())
        digest.update(array.astype("<f4", copy=False))
    return digest.hexdigest()
