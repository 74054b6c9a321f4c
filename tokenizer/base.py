"""What every tokenizer promises, and the half of it that all kinds share.

Letters: B batch, D codebook dimension, h and w the grid of codes, T = h*w, H and W the image.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from tokenizer.codebook import Quantizer
from tokenizer.config import TamingConfig, VQConfig
from tokenizer.losses import reconstruction_losses


@runtime_checkable
class Tokenizer(Protocol):
    """Images <-> codes. All that the rest of a program may rely on."""

    @property
    def codebook_size(self) -> int:
        """Codes are in 0..codebook_size-1."""

    @property
    def downsample(self) -> int:
        """Pixels per code along one side."""

    @property
    def fingerprint(self) -> str:
        """sha256, in hex, of config and weights."""

    def encode(self, images: Tensor) -> Tensor:
        """float32 [B, 3, H, W] in [-1, 1] -> int64 [B, h*w], raster order."""

    def decode(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """int64 [B, T] -> float32 [B, 3, H, W] in [-1, 1]; a square grid unless `grid` is given."""


class TrainingOutput(NamedTuple):
    """What a training step needs from a tokenizer."""

    reconstruction: Tensor
    """[B, 3, H, W], not clamped, so that a loss sees values outside [-1, 1]."""
    losses: dict[str, Tensor]
    """Unweighted scalars for `losses.total_loss`: `l1`, `l2`, and those of the quantizer."""
    codes: Tensor
    """int64 [B, h*w]."""
    stats: dict[str, Tensor]
    """Scalars to log: `usage` and `perplexity` of this batch's codes, and the quantizer's own."""


class AutoencoderTokenizer(nn.Module):
    """encoder -> quant_conv -> quantize -> post_quant_conv -> decoder.

    A new one is trainable: `forward` is for training. `freeze` makes it a fixed function for good;
    what `tokenizer.load` and the foreign readers return is frozen already.
    """

    def __init__(
        self,
        config: VQConfig | TamingConfig,
        encoder: nn.Module,
        decoder: nn.Module,
        quantize: Quantizer,
    ) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.decoder = decoder
        self.quantize = quantize
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
        """sha256, in hex, of the config and of the weights in float32.

        The same on every device. A frozen tokenizer keeps it, so that a later cast to bfloat16
        changes nothing; one in training computes it anew each time.
        """
        if self._fingerprint is not None:
            return self._fingerprint
        value = fingerprint(self.config, self.state_dict())
        if self._frozen:
            self._fingerprint = value
        return value

    def freeze(self) -> Self:
        """Eval mode and no gradients, from now on; returns itself."""
        self._frozen = True
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> Self:
        """As in nn.Module, but a frozen tokenizer stays in eval mode."""
        return super().train(mode and not self._frozen)

    # no_grad, not inference_mode: codes made under the latter cannot index an embedding in training
    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Codes of images, on the tokenizer's device.

        Args:
            images: floating point [B, C, H, W] in [-1, 1], of any dtype and device.

        Returns:
            int64 [B, h*w], raster order, h = H / downsample, w = W / downsample.

        Raises:
            ValueError: a wrong shape or an integer dtype.
        """
        with self._evaluating():
            return self.quantize.lookup(self._encode(images))

    @torch.no_grad()
    def decode(
        self, codes: Tensor, grid: tuple[int, int] | None = None, *, clip: bool = True
    ) -> Tensor:
        """Images of codes, on the tokenizer's device.

        Args:
            codes: integer [B, T] in 0..codebook_size-1, raster order.
            grid: (h, w) with h*w = T; a square when not given.
            clip: clamp the pixels to [-1, 1]; without, some lie a little outside.

        Returns:
            [B, C, h * downsample, w * downsample], in float32 (float64 when the
            tokenizer is in float64).

        Raises:
            ValueError: a wrong shape, a T that does not fit the grid, or codes out of range.
        """
        h, w = self._check_codes(codes, grid)
        like = self.quant_conv.weight
        with self._evaluating():
            z = self.quantize.embed(codes.to(like.device, torch.int64))  # [B, T, D]
            z = z.mT.contiguous().unflatten(2, (h, w)).to(like.dtype)  # [B, D, h, w]
            images: Tensor = self.decoder(self.post_quant_conv(z))
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        return images.clamp(-1, 1) if clip else images

    def forward(self, images: Tensor) -> TrainingOutput:
        """Encode, quantize and decode images [B, C, H, W] in [-1, 1], with gradients."""
        quantizer = self.quantize(self._encode(images))
        reconstruction = self.decoder(self.post_quant_conv(quantizer.quantized))
        target = images.to(reconstruction.device)
        losses = reconstruction_losses(reconstruction, target) | quantizer.losses
        return TrainingOutput(reconstruction, losses, quantizer.codes, quantizer.stats)

    def _encode(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> vectors [B, D, h, w] before quantization."""
        self._check_images(images)
        z: Tensor = self.quant_conv(self.encoder(images.to(self.quant_conv.weight)))
        return z

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Eval mode for a while: no dropout, and no change to the codebook."""
        was_training = self.training
        if was_training:
            self.eval()
        try:
            yield
        finally:
            if was_training:
                self.train()

    def _check_images(self, images: Tensor) -> None:
        c, f = self.config.in_channels, self.downsample
        expected = f"images must be [B, {c}, H, W] with H and W positive multiples of {f}"
        if images.ndim != 4 or images.shape[1] != c:
            raise ValueError(f"{expected}, got shape {list(images.shape)}")
        h, w = images.shape[2:]
        if h % f or w % f or h == 0 or w == 0:
            raise ValueError(f"{expected}, got H = {h} and W = {w}")
        if not images.is_floating_point():
            raise ValueError(f"images must be floating point in [-1, 1], got {images.dtype}")

    def _check_codes(self, codes: Tensor, grid: tuple[int, int] | None) -> tuple[int, int]:
        if codes.ndim != 2 or codes.shape[1] == 0:
            raise ValueError(f"codes must be [B, T], got shape {list(codes.shape)}")
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise ValueError(f"codes must be integers, got {codes.dtype}")
        length = codes.shape[1]
        if grid is None:
            side = math.isqrt(length)
            if side * side != length:
                raise ValueError(f"T = {length} codes are not a square; give `grid`")
            grid = (side, side)
        if grid[0] < 1 or grid[1] < 1 or grid[0] * grid[1] != length:
            raise ValueError(f"grid {grid[0]} x {grid[1]} does not hold T = {length} codes")
        if codes.numel():
            wide = codes.to(torch.int64)  # uint16 has no min and max everywhere
            low, high = int(wide.min()), int(wide.max())
            if low < 0 or high >= self.codebook_size:
                raise ValueError(f"codes must be in 0..{self.codebook_size - 1}, got {low}..{high}")
        return grid

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # every move and cast of a module comes through here: the last chance to see the weights
        # as they were stored
        if self._frozen:
            _ = self.fingerprint
        return super()._apply(fn, recurse)


def _forget_fingerprint(module: nn.Module, _: object) -> None:
    assert isinstance(module, AutoencoderTokenizer)
    module._fingerprint = None


def fingerprint(config: VQConfig | TamingConfig, weights: Mapping[str, Tensor]) -> str:
    """sha256, in hex, of a config and of weights as float32."""
    digest = hashlib.sha256()
    # without what is at its default, so that a field added later changes no fingerprint
    settings = config.model_dump(mode="json", exclude_defaults=True) | {"kind": config.kind}
    digest.update(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(weights):
        array = weights[name].detach().to("cpu", torch.float32).contiguous().numpy()
        digest.update(f"\n{name} float32 {list(array.shape)}\n".encode())
        digest.update(array.astype("<f4", copy=False))
    return digest.hexdigest()
