"""A tokenizer that is faster on a CPU: wide 3 x 3 convolutions by Winograd's algorithm.

At 256 pixels three quarters of the time go into convolutions, which already run near the
processor's peak. Winograd's algorithm (arXiv 1509.09308) needs fewer multiplications for the same
sums, added up in another order. torch's NNPACK has it, for float32 on a CPU.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from tokenizer.base import AutoencoderTokenizer

AnyTokenizer = TypeVar("AnyTokenizer", bound=AutoencoderTokenizer)

# Below either, the transforms cost about what they save (measured with AVX2, two cores).
LEAST_CHANNELS, LEAST_PIXELS = 128, 64 * 64


class WinogradConv2d(nn.Conv2d):
    """A 3 x 3 convolution of stride 1 and padding 1, the same to rounding; without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        """x float32 [B, C, H, W] -> [B, C', H, W]."""
        wide = x.shape[1] >= LEAST_CHANNELS and x.shape[2] * x.shape[3] >= LEAST_PIXELS
        if not wide or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        # One image at a time: for several NNPACK takes another, slower way.
        parts = [
            torch._nnpack_spatial_convolution(part, self.weight, self.bias, [1, 1], [1, 1])
            for part in x.contiguous().split(1)
        ]
        return torch.cat(parts)


def fast_tokenizer(tokenizer: AnyTokenizer) -> AnyTokenizer:
    """A tokenizer that encodes and decodes as `tokenizer` does, faster where the device allows.

    Vectors before quantization and pixels differ by rounding, and so, at ties, may codes. It
    shares all weights, has the same fingerprint, and is meant for a frozen tokenizer. Anywhere but
    in float32 on a CPU with NNPACK it is `tokenizer` itself.
    """
    weight = next(tokenizer.parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return tokenizer
    if not torch.backends.nnpack.is_available():  # asking also makes it ready
        return tokenizer
    tensors = (*tokenizer.parameters(), *tokenizer.buffers())
    fast = copy.deepcopy(tokenizer, {id(tensor): tensor for tensor in tensors})  # not copied
    for module in fast.modules():
        if type(module) is nn.Conv2d and _suits(module):
            module.__class__ = WinogradConv2d  # it adds no state
    return fast


def _suits(convolution: nn.Conv2d) -> bool:
    plain = convolution.groups == 1 and convolution.dilation == (1, 1)
    plain = plain and convolution.padding_mode == "zeros" and convolution.bias is not None
    shape = (convolution.kernel_size, convolution.stride, convolution.padding)
    return plain and shape == ((3, 3), (1, 1), (1, 1))
