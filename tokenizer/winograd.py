"""Faster 3 x 3 convolutions on a CPU by Winograd's algorithm (arXiv 1509.09308), torch's NNPACK."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from tokenizer.base import AutoencoderTokenizer

T = TypeVar("T", bound=AutoencoderTokenizer)


class WinogradConv2d(nn.Conv2d):
    """A 3 x 3 convolution of stride 1, the same up to rounding; without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        # on smaller inputs the transforms cost about what they save
        worthwhile = x.shape[1] >= 128 and x.shape[2] * x.shape[3] >= 64 * 64
        if not worthwhile or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        convolve = torch._nnpack_spatial_convolution
        # one image per call: NNPACK is slower on larger batches
        images = x.contiguous().split(1)
        return torch.cat([convolve(i, self.weight, self.bias, [1, 1], [1, 1]) for i in images])


def fast_tokenizer(tokenizer: T) -> T:
    """A tokenizer with the same weights and fingerprint that is faster in float32 on a CPU.

    For frozen tokenizers. Values differ by rounding, and so may codes at near-ties. On other
    devices and dtypes it is `tokenizer` itself.
    """
    weight = next(tokenizer.parameters())
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    if not on_cpu or not torch.backends.nnpack.is_available():
        return tokenizer
    tensors = (*tokenizer.parameters(), *tokenizer.buffers())
    fast = copy.deepcopy(tokenizer, {id(tensor): tensor for tensor in tensors})  # shared
    for module in fast.modules():
        if type(module) is nn.Conv2d and module.padding == module.stride == (1, 1):
            module.__class__ = WinogradConv2d  # it adds no state
    return fast
