"""Models prepared for sampling: prepacked or int8 weights on a CPU, a compiled step on CUDA.

On a CPU, reading the weights takes most of a decoding step, so weights are prepacked for products
with a few rows: float32 by oneDNN; bfloat16 as float16 by FBGEMM, if oneDNN has no bfloat16
products for this CPU; int8 by FBGEMM on request. Linear layers whose `weight` a module reads
directly are listed in its attribute `unpacked` and stay unchanged.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from moveimg.device import has_bfloat16
from moveimg.model.transformer import Cache, Transformer
from moveimg.rng import Dropout

ROWS = 16  # oneDNN packs for inputs of this many rows; other numbers work, too
INT8_LIMIT = 63  # largest int8 weight: AVX2 adds two 7-bit by 8-bit products in 16 bits


def prepare_for_sampling(
    model: Transformer, quantize: str | None = None, compile: bool = False
) -> Transformer:
    """Prepare `model` (in eval mode) for fast sampling; not for training.

    On a CPU, returns a copy, which shares weights with `model` unless they are cast: a bfloat16
    model computes in float32 if oneDNN has no bfloat16 products for this CPU, and int8 starts from
    float32. Without an option, other devices and dtypes get `model` itself. quantize: None, or
    "int8", which changes the logits (docs/performance.md). compile: one compiled decoding step over
    a static cache, for CUDA.
    Raises ValueError for an unknown `quantize`, or `quantize` on another device or with `compile`.
    """
    weight = model.head.weight
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize {quantize!r}: expected int8")
    if quantize and (compile or weight.device.type != "cpu"):
        where = "compile" if compile else weight.device.type
        raise ValueError(f"quantize {quantize} with {where}: expected a CPU and no compile")
    if compile:
        return StaticTransformer(model, mode="reduce-overhead", fullgraph=True)
    return _pack(model, quantize) if quantize or can_pack(weight) else model


def _pack(model: Transformer, quantize: str | None) -> Transformer:
    """A copy of `model` with prepacked linear layers, and no dropout."""
    dtype = model.head.weight.dtype
    emulated = dtype == torch.bfloat16 and not has_bfloat16()
    fbgemm = "fbgemm" in torch.backends.quantized.supported_engines
    kind = Int8Linear if quantize else HalfLinear if emulated and fbgemm else PackedLinear
    if emulated or (quantize and dtype != torch.float32):
        fast = copy.deepcopy(model).float()
    else:
        tensors = (*model.parameters(), *model.buffers())
        fast = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for module in list(fast.modules()):
        for name, child in module.named_children():
            if type(child) is Dropout:
                setattr(module, name, nn.Identity())
            elif type(child) is nn.RMSNorm and fast.norm.weight.dtype == torch.float32:
                setattr(module, name, FastRMSNorm(child))
            elif type(child) is nn.Linear and name not in getattr(module, "unpacked", ()):
                setattr(module, name, kind(child))
    return fast


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN can prepack matrices of this dtype and device."""
    known = weight.dtype in (torch.float32, torch.bfloat16)
    return weight.device.type == "cpu" and known and torch.backends.mkldnn.is_available()


class PackedLinear(nn.Module):
    """x [..., in] -> x W^T + b [..., out], with W in oneDNN's own layout."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class FastRMSNorm(nn.Module):
    """RMSNorm in float32, x / sqrt(mean(x^2) + eps) * weight [..., D], by the vector norm of x."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__()
        self.weight, size = norm.weight, norm.weight.numel()
        self.scaled = norm.weight.detach() * size**0.5
        self.epsilon = self.scaled.new_tensor((size * (norm.eps or 0.0)) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x / torch.hypot(length, self.epsilon) * self.scaled


class HalfLinear(nn.Module):
    """x [..., in] -> x W^T + b [..., out], both float32, with a bfloat16 W stored as float16."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


class Int8Linear(nn.Module):
    """x [..., in] -> x W^T + b [..., out] in int8, with a scale per row of W and one for x."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        tiny = torch.finfo(torch.float32).tiny  # a row of zeros still needs a scale
        scales = (weight.abs().amax(dim=1) / INT8_LIMIT).clamp_min(tiny).double()
        zeros = torch.zeros_like(scales, dtype=torch.int64)
        with warnings.catch_warnings():  # torch announces that torchao will replace quantization
            warnings.simplefilter("ignore")
            rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
            self.packed = torch.ops.quantized.linear_prepack(rounded, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic(x.contiguous(), self.packed)


class StaticTransformer(Transformer):
    """`model` in eval mode with a decoding step of the same shapes at every position.

    As in gpt-fast, the step is compiled once and replayed as a CUDA graph. Batches are padded to a
    power of two, so that few graphs are needed. `compiler`: arguments of torch.compile; without
    arguments, the step runs eagerly.
    """

    def __init__(self, model: Transformer, **compiler: Any) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(model.__dict__)
        step = model._step
        self._step_function = torch.compile(step, dynamic=False, **compiler) if compiler else step
        self._compiled = bool(compiler)
        self._idle: dict[int, list[Cache]] = defaultdict(list)  # by batch size

    @torch.inference_mode()
    def make_cache(self, batch: int) -> Cache:
        """A static cache, in reused tensors: CUDA graphs keep the addresses of their inputs."""
        size = 1 << (batch - 1).bit_length()
        idle = self._idle[size]
        buffers = idle.pop() if idle else Cache(self, size, static=True)
        tensors = [tensor for layer in buffers.layers for tensor in layer.tensors]
        if self._compiled:
            inputs = (*tensors, buffers.rope, buffers.index, buffers.codes)
            for tensor in filter(torch.is_tensor, inputs):
                torch._dynamo.mark_static_address(tensor)
        cache = copy.copy(buffers)  # the same tensors, at position 0
        cache.index.zero_()  # type: ignore[union-attr]
        weakref.finalize(cache, idle.append, buffers).atexit = False
        return cache

    @torch.inference_mode()
    def prefill(self, labels: Tensor, cache: Cache, codes: Tensor | None = None) -> Tensor:
        padded = None if codes is None else _pad(codes, cache.batch)
        return super().prefill(_pad(labels, cache.batch), cache, padded)[: len(labels)]

    @torch.inference_mode()
    def step(self, codes: Tensor, cache: Cache) -> Tensor:
        return super().step(_pad(codes, cache.batch), cache)[: len(codes)]

    def _step(self, codes: Tensor, cache: Cache) -> Tensor:
        if not self._compiled:
            return self._step_function(codes, cache)
        torch.compiler.cudagraph_mark_step_begin()
        return self._step_function(codes, cache).clone()  # the next replay overwrites its output


def _pad(inputs: Tensor, size: int) -> Tensor:
    return torch.cat([inputs, inputs.new_zeros(max(0, size - len(inputs)), *inputs.shape[1:])])
