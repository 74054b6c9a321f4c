"""The autoencoders: LlamaGen's (arXiv 2406.06525), and taming-transformers' by its own modules.

Names of modules and parameters are those of LlamaGen's checkpoints, so its weights load unchanged.
Letters: B batch size, C channels, h and w the current resolution.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from contextlib import redirect_stdout
from itertools import pairwise

import torch
from torch import Tensor, nn

from moveimg.rng import Dropout
from tokenizer.base import AutoencoderTokenizer
from tokenizer.config import TamingConfig, VQConfig, VQQuantizerConfig
from tokenizer.quantizers import QUANTIZERS, Quantizer


class VQTokenizer(AutoencoderTokenizer):
    """The tokenizer of kind `vq`."""

    config: VQConfig

    def __init__(self, config: VQConfig) -> None:
        sizes = config.codebook_size, config.codebook_dim, config.l2_normalize
        quantize = QUANTIZERS[config.quantizer.kind](config.quantizer, *sizes)
        super().__init__(config, Encoder(config), Decoder(config), quantize)


class TamingTokenizer(AutoencoderTokenizer):
    """The tokenizer of kind `taming`: a VQGAN of taming-transformers, imported when it is built."""

    config: TamingConfig

    def __init__(self, config: TamingConfig) -> None:
        from taming.modules.diffusionmodules import model as layers

        settings = config.model_dump(exclude={"kind", "n_embed", "embed_dim"})
        encoder = layers.Encoder(**settings)
        with redirect_stdout(io.StringIO()):  # its constructor prints
            decoder = layers.Decoder(**settings)
        sizes = config.n_embed, config.embed_dim, False
        quantize = Quantizer(VQQuantizerConfig(), *sizes)
        super().__init__(config, encoder, decoder, quantize)


class Encoder(nn.Module):
    """Images [B, C, H, W] -> [B, z_channels, H / downsample, W / downsample]."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        channels = config.channels
        self.conv_in = _conv3(config.in_channels, config.width)
        self.conv_blocks = nn.Sequential()
        for level, (before, after) in enumerate(pairwise((config.width, *channels))):
            blocks = [before] + [after] * config.n_res_blocks
            last = level == len(channels) - 1
            self.conv_blocks.append(Level(config, blocks, last, last, "downsample"))
        self.mid = _middle(config)
        self.norm_out = _norm(config, channels[-1])
        self.conv_out = _conv3(channels[-1], config.z_channels)

    def forward(self, images: Tensor) -> Tensor:
        x = self.mid(self.conv_blocks(self.conv_in(images)))  # [B, channels[-1], h, w]
        return self.conv_out(_swish(self.norm_out(x)))  # [B, z_channels, h, w]


class Decoder(nn.Module):
    """[B, z_channels, h, w] -> images [B, C, h * downsample, w * downsample]."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        channels = config.channels[::-1]  # lowest resolution first
        self.conv_in = _conv3(config.z_channels, channels[0])
        self.mid = _middle(config)
        self.conv_blocks = nn.Sequential()
        for level, (before, after) in enumerate(pairwise((channels[0], *channels))):
            blocks = [before] + [after] * (config.n_res_blocks + 1)
            last = level == len(channels) - 1
            self.conv_blocks.append(Level(config, blocks, level == 0, last, "upsample"))
        self.norm_out = _norm(config, channels[-1])
        self.conv_out = _conv3(channels[-1], config.in_channels)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_blocks(self.mid(self.conv_in(z)))  # [B, channels[-1], H, W]
        return self.conv_out(_swish(self.norm_out(x)))  # [B, C, H, W]


class Level(nn.Module):
    """Residual blocks of one resolution, attention after each if it is the lowest, a resampling."""

    def __init__(
        self, config: VQConfig, channels: list[int], lowest: bool, last: bool, resampling: str
    ) -> None:
        super().__init__()
        self.res = nn.ModuleList(ResidualBlock(config, a, b) for a, b in pairwise(channels))
        attention = channels[1:] if lowest and config.attention else []
        self.attn = nn.ModuleList(AttentionBlock(config, c) for c in attention)
        c = channels[-1]
        steps: dict[str, nn.Module]
        if resampling == "downsample":  # VQGAN's weights expect padding right and bottom only
            steps = {"pad": nn.ZeroPad2d((0, 1, 0, 1)), "conv": nn.Conv2d(c, c, 3, stride=2)}
        else:
            steps = {"nearest": nn.Upsample(scale_factor=2), "conv": _conv3(c, c)}
        if last:  # made all the same, so that a seed keeps giving the same weights
            steps = {}
        self.resampling = resampling
        self.add_module(resampling, nn.Sequential(OrderedDict(steps)))

    def forward(self, x: Tensor) -> Tensor:
        for index, res in enumerate(self.res):
            x = res(x)
            if self.attn:
                x = self.attn[index](x)
        return self.get_submodule(self.resampling)(x)


class ResidualBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), a 1x1 convolution on x where widths differ."""

    def __init__(self, config: VQConfig, before: int, after: int) -> None:
        super().__init__()
        self.norm1 = _norm(config, before)
        self.conv1 = _conv3(before, after)
        self.norm2 = _norm(config, after)
        self.dropout = Dropout(config.dropout)
        self.conv2 = _conv3(after, after)
        self.nin_shortcut = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(_swish(self.norm1(x)))
        y = self.conv2(self.dropout(_swish(self.norm2(y))))
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
        # Written out, in LlamaGen's order of products, so that float32 rounds as it does there.
        weights = torch.softmax(torch.bmm(q.mT, k) * q.shape[1] ** -0.5, dim=2)  # [B, h*w, h*w]
        return x + self.proj_out(torch.bmm(v, weights.mT).view(x.shape))


def _swish(x: Tensor) -> Tensor:
    """x * sigmoid(x) in two roundings, as LlamaGen computes it; F.silu rounds once."""
    gate = torch.sigmoid(x)
    return x * gate if torch.is_grad_enabled() else gate.mul_(x)  # in place: a third less memory


def _middle(config: VQConfig) -> nn.Sequential:
    c = config.channels[-1]
    # without attention an Identity keeps the names of the modules
    attention = AttentionBlock(config, c) if config.attention else nn.Identity()
    return nn.Sequential(ResidualBlock(config, c, c), attention, ResidualBlock(config, c, c))


def _norm(config: VQConfig, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_groups, channels, eps=1e-6)


def _conv3(before: int, after: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1)
