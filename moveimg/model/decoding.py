"""A model made ready to be sampled on a CPU: the same function from faster matrix products.

A step of decoding multiplies a few rows (two an image, with guidance) by every weight matrix, so
reading the weights takes most of the time. Here they are laid out once for such products, by
oneDNN, and optionally kept in 8 bits. A module names matrices that it does not apply to rows, but
uses in another way, in `absorbed`: they stay. Other devices take the model as it is.
"""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, nn

from moveimg.model.transformer import Transformer

ROWS = 16  # how many rows the layout is made for; it serves other numbers, too
INT8_LIMIT = 63  # of a weight: the 16-bit sums of AVX2 hold two products of 7 by 8 bits, not more
QUANTIZED = ("int8",)


class PackedLinear(nn.Module):
    """x [..., in] -> x W^T + b [..., out], with W in oneDNN's own layout."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class Int8Linear(nn.Module):
    """x [..., in] -> x W^T + b [..., out], with W and, at each call, x rounded to 8 bits or less.

    W has a scale for each output, x one for the whole call: what a row gives depends, by rounding,
    on the rows beside it.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        tiny = torch.finfo(torch.float32).tiny  # a row of zeros still needs a scale
        scales = (weight.abs().amax(dim=1) / INT8_LIMIT).clamp_min(tiny).double()
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        with warnings.catch_warnings():  # torch says that torchao will replace its quantization
            warnings.simplefilter("ignore")
            rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
            self.packed = torch.ops.quantized.linear_prepack(rounded, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic(x.contiguous(), self.packed)


def decoding_model(model: Transformer, quantize: str | None = None) -> Transformer:
    """A model that decodes as `model` does, faster where the device allows it.

    On a CPU it is a copy that shares embeddings and memory with `model` and has matrices of its
    own; bfloat16 is computed in float32 (with the weights as they are) where the processor has no
    instructions for it. Elsewhere, and in float64, it is `model` itself.

    Args:
        model: in eval mode. The copy is for decoding: teacher forcing works, training does not.
        quantize: None, or "int8", which changes the logits (docs/performance.md has by how much).

    Raises ValueError where `quantize` is unknown or the device is not a CPU.
    """
    weight = model.head.weight
    if quantize is not None and quantize not in QUANTIZED:
        raise ValueError(f"quantize {quantize!r}: expected {' or '.join(QUANTIZED)}")
    if quantize is not None and weight.device.type != "cpu":
        raise ValueError(f"quantize {quantize} on {weight.device.type}: expected a CPU")
    if quantize is None and not packable(weight):
        return model
    if weight.dtype == torch.bfloat16 and not (quantize is None and has_bfloat16()):
        fast = copy.deepcopy(model).float()
    else:
        tensors = (*model.parameters(), *model.buffers())
        fast = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})  # not copied
    make = Int8Linear if quantize is not None else PackedLinear
    for module in list(fast.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and name not in getattr(module, "absorbed", ()):
                setattr(module, name, make(child))
    return fast


def packable(weight: Tensor) -> bool:
    """Whether oneDNN has a layout for matrices like this one."""
    known = weight.dtype in (torch.float32, torch.bfloat16)
    return weight.device.type == "cpu" and known and torch.backends.mkldnn.is_available()


def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices by itself."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()
