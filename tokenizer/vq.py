"""LlamaGen's VQ tokenizer (arXiv 2406.06525), and taming-transformers' VQGAN, from its modules.

Modules and parameters have the names of LlamaGen's checkpoints, which load without renaming.
B batch size   C channels   D codebook dimension   h, w grid of codes   T = h*w codes   H, W image
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections import OrderedDict
from contextlib import redirect_stdout
from functools import partial
from itertools import pairwise, zip_longest
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moveimg.rng import Dropout
from tokenizer.config import QuantizerConfig, TamingConfig, TokenizerConfig, VQConfig
from tokenizer.quantizers import QUANTIZERS, Quantizer, TrainingOutput


class AutoencoderTokenizer(nn.Module):
    """A VQ autoencoder: encoder -> quant_conv -> quantize -> post_quant_conv -> decoder.

    A new tokenizer is trainable (`forward`), a loaded one frozen. Codes are in
    0..codebook_size-1; `downsample` is the number of pixels per code along one side.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        make_layers: Any = {"vq": make_llamagen_layers, "taming": make_taming_layers}[config.kind]
        self.encoder, self.decoder, self.quantize, levels = make_layers(config)
        self.downsample = 2 ** (levels - 1)
        self.codebook_size, dim = self.quantize.embedding.weight.shape
        self.quant_conv = nn.Conv2d(config.z_channels, dim, 1)
        self.post_quant_conv = nn.Conv2d(dim, config.z_channels, 1)
        self._fingerprint: str | None = None

    @property
    def fingerprint(self) -> str:
        """Hexadecimal sha256 of the config and the float32 weights; constant once frozen."""
        if self._fingerprint is not None:
            return self._fingerprint
        # defaults are left out, so that a setting added later changes no fingerprint
        config = self.config.model_dump(mode="json", exclude_defaults=True)
        config["kind"] = self.config.kind
        text = json.dumps(config, sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(text.encode())
        for name, tensor in sorted(self.state_dict().items()):
            array = tensor.to("cpu", torch.float32).contiguous().numpy()
            digest.update(f"\n{name} float32 {list(array.shape)}\n".encode())
            digest.update(array.astype("<f4", copy=False))
        return digest.hexdigest()

    def freeze(self) -> Self:
        """Set eval mode without gradients, and fix the fingerprint, which casts would change."""
        self._fingerprint = self.fingerprint
        return self.eval().requires_grad_(False)

    # no_grad: codes made under inference_mode could not index an embedding in training
    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images [B, C, H, W] in [-1, 1] to codes int64 [B, T] in raster order.

        The caller's autocast applies. Raises ValueError for a wrong shape or an integer dtype.
        """
        return self.quantize.lookup(self._encode(images))

    @torch.no_grad()
    def decode(
        self, codes: Tensor, grid: tuple[int, int] | None = None, *, clip: bool = True
    ) -> Tensor:
        """Decode integer codes [B, T] in raster order to images [B, C, H, W], at least float32.

        `grid` is (h, w), by default a square; `clip` clamps the pixels to [-1, 1]. The caller's
        autocast is ignored. Raises ValueError for a wrong shape, or codes out of range.
        """
        h, w = grid or (math.isqrt(codes.shape[-1]),) * 2
        if codes.ndim != 2 or h * w != codes.shape[1]:
            raise ValueError(f"codes {list(codes.shape)}: expected [B, {h} x {w}] or other `grid`")
        like = self.quant_conv.weight
        codes = codes.to(like.device, torch.int64)
        if ((codes < 0) | (codes >= self.codebook_size)).any():
            low, high = (int(x) for x in codes.aminmax())
            raise ValueError(f"codes {low}..{high}: expected 0..{self.codebook_size - 1}")
        with torch.autocast(like.device.type, enabled=False):
            z = self.quantize.embed(codes).mT.unflatten(2, (h, w))  # [B, D, h, w]
            images: Tensor = self.decoder(self.post_quant_conv(z.contiguous().to(like.dtype)))
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        return images.clamp(-1, 1) if clip else images

    def forward(self, images: Tensor) -> TrainingOutput:
        """Encode, quantize and decode images [B, C, H, W] in [-1, 1], with gradients."""
        quantized = self.quantize(self._encode(images))
        output = self.decoder(self.post_quant_conv(quantized.output))
        dtype = torch.promote_types(images.dtype, torch.float32)
        x, y = output.to(dtype), images.to(output.device, dtype)
        losses = {"l1": F.l1_loss(x, y), "l2": F.mse_loss(x, y)} | quantized.losses
        return quantized._replace(output=output, losses=losses)

    def _encode(self, images: Tensor) -> Tensor:
        """Vectors [B, D, h, w] before quantization."""
        shape, channels, f = list(images.shape), self.config.in_channels, self.downsample
        if len(shape) != 4 or shape[1] != channels or shape[2] % f or shape[3] % f:
            raise ValueError(f"images {shape}: expected [B, {channels}, H, W], sides % {f} == 0")
        if not images.is_floating_point():
            raise ValueError(f"images of {images.dtype}: expected floating point in [-1, 1]")
        return self.quant_conv(self.encoder(images.to(self.quant_conv.weight)))


_conv3 = partial(nn.Conv2d, kernel_size=3, padding=1)
Layers = tuple[nn.Module, nn.Module, Quantizer, int]  # encoder, decoder, quantizer, resolutions


def make_taming_layers(config: TamingConfig) -> Layers:
    """Build the layers of a VQGAN from taming-transformers' modules."""
    from taming.modules.diffusionmodules import model as layers

    settings = config.model_dump(exclude={"kind", "n_embed", "embed_dim"})
    encoder = layers.Encoder(**settings)
    with redirect_stdout(io.StringIO()):  # its constructor prints
        decoder = layers.Decoder(**settings)
    quantize = Quantizer(QuantizerConfig(), config.n_embed, config.embed_dim, False)
    return encoder, decoder, quantize, len(config.ch_mult)


def make_llamagen_layers(config: VQConfig) -> Layers:
    """Build the layers of a tokenizer of kind `vq`."""
    channels = [config.width * multiplier for multiplier in config.multipliers]
    n_blocks, lowest = config.n_res_blocks, channels[-1]

    def make_levels(widths: list[int], n_blocks: int, up: bool) -> nn.Sequential:
        last = len(widths) - 2
        return nn.Sequential(
            *(
                Level(config, [a] + [b] * n_blocks, i == (0 if up else last), i == last, up)
                for i, (a, b) in enumerate(pairwise(widths))
            )
        )

    def make_middle() -> nn.Sequential:
        # Identity keeps parameter names; made first, since the order decides the random weights
        attention = AttentionBlock(config, lowest) if config.attention else nn.Identity()
        return nn.Sequential(
            ResidualBlock(config, lowest, lowest), attention, ResidualBlock(config, lowest, lowest)
        )

    sizes = config.codebook_size, config.codebook_dim, config.l2_normalize
    quantize = QUANTIZERS[config.quantizer.kind](config.quantizer, *sizes)
    encoder = OrderedDict[str, nn.Module](
        conv_in=_conv3(config.in_channels, config.width),
        conv_blocks=make_levels([config.width, *channels], n_blocks, up=False),
        mid=make_middle(),
        norm_out=_norm(config, lowest),
        swish=Swish(),
        conv_out=_conv3(lowest, config.z_channels),
    )
    decoder = OrderedDict[str, nn.Module](
        conv_in=_conv3(config.z_channels, lowest),
        mid=make_middle(),
        conv_blocks=make_levels([lowest, *channels[::-1]], n_blocks + 1, up=True),
        norm_out=_norm(config, channels[0]),
        swish=Swish(),
        conv_out=_conv3(channels[0], config.in_channels),
    )
    return nn.Sequential(encoder), nn.Sequential(decoder), quantize, len(channels)


class Level(nn.ModuleDict):
    """Residual blocks of one resolution, with attention at the lowest, and a resampling."""

    def __init__(self, config: VQConfig, widths: list[int], lowest: bool, last: bool, up: bool):
        attended = widths[1:] if lowest and config.attention else []
        super().__init__()
        self["res"] = nn.ModuleList(ResidualBlock(config, a, b) for a, b in pairwise(widths))
        self["attn"] = nn.ModuleList(AttentionBlock(config, width) for width in attended)
        c = widths[-1]
        if up:
            steps = {"nearest": nn.Upsample(scale_factor=2), "conv": _conv3(c, c)}
        else:  # VQGAN's weights expect padding right and bottom only
            steps = {"pad": nn.ZeroPad2d((0, 1, 0, 1)), "conv": nn.Conv2d(c, c, 3, stride=2)}
        if last:  # dropped after its random draws, which the weights of a seed depend on
            steps.clear()
        self["upsample" if up else "downsample"] = nn.Sequential(OrderedDict(steps))

    def forward(self, x: Tensor) -> Tensor:
        layers: Any = self.values()
        res, attn, resampling = layers
        for block, attend in zip_longest(res, attn, fillvalue=nn.Identity()):
            x = attend(block(x))
        return resampling(x)


class ResidualBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), with a 1x1 convolution if widths differ."""

    def __init__(self, config: VQConfig, before: int, after: int) -> None:
        super().__init__()
        self.swish = Swish()
        self.norm1 = _norm(config, before)
        self.conv1 = _conv3(before, after)
        self.norm2 = _norm(config, after)
        self.dropout = Dropout(config.dropout)
        self.conv2 = _conv3(after, after)
        self.nin_shortcut = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.swish(self.norm1(x)))
        y = self.conv2(self.dropout(self.swish(self.norm2(y))))
        return self.nin_shortcut(x) + y


class AttentionBlock(nn.Module):
    """x + single-head self-attention over all h*w positions."""

    def __init__(self, config: VQConfig, channels: int) -> None:
        super().__init__()
        self.norm = _norm(config, channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (f(y).flatten(2) for f in (self.q, self.k, self.v))  # [B, C, h*w]
        # Not SDPA: LlamaGen's order of products makes float32 round as LlamaGen does.
        weights = torch.softmax(torch.bmm(q.mT, k) * q.shape[1] ** -0.5, dim=2)  # [B, h*w, h*w]
        return x + self.proj_out(torch.bmm(v, weights.mT).view(x.shape))


class Swish(nn.Module):
    """x * sigmoid(x) in two roundings, as LlamaGen computes it; F.silu rounds once."""

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(x)
        return x * gate if torch.is_grad_enabled() else gate.mul_(x)  # in place: less memory


def _norm(config: VQConfig, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_groups, channels, eps=1e-6)


class WinogradConv2d(nn.Conv2d):
    """A 3 x 3 convolution of stride 1, on a CPU by NNPACK (Winograd, arXiv 1509.09308)."""

    def forward(self, x: Tensor) -> Tensor:
        # on smaller inputs, Winograd's transforms cost about as much as they save
        small = x.shape[1] < 128 or x.shape[2] * x.shape[3] < 64 * 64
        plain = x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_grad_enabled()
        if small or not plain or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        # one image per call: NNPACK is slower on larger batches
        convolve, more = torch._nnpack_spatial_convolution, (self.weight, self.bias, [1, 1], [1, 1])
        return torch.cat([convolve(image, *more) for image in x.contiguous().split(1)])
