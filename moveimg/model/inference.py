"""A model prepared for sampling: the same function from faster matrix products, or compiled.

A decoding step multiplies a few rows (two per image, with guidance) by every weight matrix, so
reading the weights takes most of the time. On a CPU they are laid out once for such products:
float32 by oneDNN; bfloat16 as half precision by FBGEMM, where the processor has no instructions for
it; and optionally 8 bits by FBGEMM. Matrices applied to the same rows are concatenated, on CUDA
too. A module lists in `absorbed` the matrices that it uses otherwise: they stay unchanged.

With `compile`, a step reads a static cache whose position is a tensor, so that all steps have the
same shapes and torch.compile can record one CUDA graph (as in gpt-fast).
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moveimg.device import has_bfloat16
from moveimg.model.attention import MultiHeadAttention
from moveimg.model.memory import GatedMixer, Rows
from moveimg.model.mla import MultiHeadLatentAttention
from moveimg.model.swiglu import SwiGLU
from moveimg.model.transformer import Cache, Transformer

ROWS = 16  # how many rows the layout is made for; it serves other numbers, too
ALIGNED = 16  # outputs of a concatenated product, so that its rows are aligned for GPUs
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


class HalfLinear(nn.Module):
    """x [..., in] float32 -> x W^T + b [..., out] float32, with W kept in half precision.

    For W that was bfloat16: half precision has its numbers from 2^-14 to 65,504, and below
    rounds to multiples of 2^-24. Sums are of float32.
    """

    takes = torch.float32

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


class Int8Linear(nn.Module):
    """x [..., in] -> x W^T + b [..., out], with W and, at each call, x rounded to 8 bits or less.

    W has a scale per output, x one for the whole call: the result of a row depends, by rounding, on
    the other rows of the batch.
    """

    takes = torch.float32

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        tiny = torch.finfo(torch.float32).tiny  # a row of zeros still needs a scale
        scales = (weight.abs().amax(dim=1) / INT8_LIMIT).clamp_min(tiny).double()
        zeros = torch.zeros_like(scales, dtype=torch.int64)
        with warnings.catch_warnings():  # torch says that torchao will replace its quantization
            warnings.simplefilter("ignore")
            rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
            self.packed = torch.ops.quantized.linear_prepack(rounded, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        try:
            return torch.ops.quantized.linear_dynamic(x.contiguous(), self.packed)
        except RuntimeError:  # it finds no scale for NaN
            if torch.isfinite(x).all():
                raise
            raise ValueError(
                "the model's numbers are not finite: its weights are damaged"
            ) from None


class FusedAttention(MultiHeadAttention):
    """Queries, keys, values and the mixer's gates of one matrix product."""

    def __init__(self, attention: MultiHeadAttention) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(attention.__dict__)  # a copy that may be changed: see decoding_model
        self.ends = [3 * self.config.width] * 2
        if isinstance(self.mixer, GatedMixer):
            self.ends[1] += self.mixer.router.out_features
            self.wqkv = concat_linears(attention.wqkv, self.mixer.router)
            self.mixer.router = nn.Identity()  # type: ignore[assignment]

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, S, D] -> queries, keys and values [B, S, 3 D], and the logits of the gates."""
        (middle, end), both = self.ends, self.wqkv(x)
        return both[..., :middle], both[..., middle:end]


class FusedLatentAttention(MultiHeadLatentAttention):
    """Queries (or their latent), the latent and the mixer's gates from one matrix product."""

    def __init__(self, attention: MultiHeadLatentAttention) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(attention.__dict__)  # a copy that may be changed: see decoding_model
        parts: list[Any] = [self.wq, self.wkv_down]
        if isinstance(self.wq, nn.Sequential):  # of low rank: only its first step sees x
            parts[0], self.wq = self.wq[0], self.wq[1:]
        else:
            self.wq = nn.Identity()
        for mixer in (self.latent_mixer, self.value_mixer):
            if isinstance(mixer, GatedMixer):
                parts.append(mixer.router)
                mixer.router = nn.Identity()  # type: ignore[assignment]
        self.widths = [part.out_features for part in parts] + [0] * (len(parts) < 3)
        self.wkv_down = concat_linears(*parts)
        self.widths.append(self.wkv_down.out_features - sum(self.widths))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As in MultiHeadLatentAttention, with the logits of the gates last."""
        q, joint, logits, _ = self.wkv_down(x).split(self.widths, dim=-1)
        return self.wq(q), joint, logits


class FusedSwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), with w1 and w3 of one matrix product."""

    auxiliary = load = None

    def __init__(self, ffn: SwiGLU) -> None:
        super().__init__()
        self.w13, self.w2 = concat_linears(ffn.w1, ffn.w3), ffn.w2
        self.hidden = ffn.w1.out_features

    def forward(self, x: Tensor, shared: nn.Module | None = None) -> Tensor:
        gate, up, *_ = self.w13(x).split(self.hidden, dim=-1)
        return self.w2(F.silu(gate) * up)


class FusedRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight [..., D], by way of the length of x; for float32."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__()
        size = norm.weight.numel()
        self.weight = norm.weight
        self.scaled = norm.weight.detach() * size**0.5
        self.least = self.scaled.new_tensor((size * (norm.eps or 0.0)) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x / torch.hypot(length, self.least) * self.scaled


def decoding_model(
    model: Transformer, quantize: str | None = None, compile: bool = False
) -> Transformer:
    """A model that decodes as `model` does, faster where the device allows it.

    On a CPU it is a copy that shares embeddings and memory with `model` and has its own matrices;
    bfloat16 is computed in float32 (from the bfloat16 weights) where the processor has no
    instructions for it. On CUDA, matrices applied to the same rows are concatenated. Elsewhere, and
    in float64 on a CPU, it is `model` itself.

    Args:
        model: in eval mode. The copy is for decoding: teacher forcing works, training does not.
        quantize: None, or "int8", which changes the logits (docs/performance.md has by how much).
        compile: decode by one compiled step over a static cache.

    Raises ValueError where `quantize` is unknown, the device is not a CPU, or both are asked for.
    """
    weight = model.head.weight
    if quantize is not None and quantize not in QUANTIZED:
        raise ValueError(f"quantize {quantize!r}: expected {' or '.join(QUANTIZED)}")
    if quantize is not None and weight.device.type != "cpu":
        raise ValueError(f"quantize {quantize} on {weight.device.type}: expected a CPU")
    if quantize is not None and compile:
        raise ValueError(f"quantize {quantize} and compile: expected one of the two")
    if compile:
        return StaticTransformer(model, compile=True)
    if weight.device.type == "cuda":
        return swap(clone_sharing_weights(model), FUSED)
    if quantize is None and not packable(weight):
        return model
    low = weight.dtype == torch.bfloat16 and not has_bfloat16()
    if low or (quantize is not None and weight.dtype != torch.float32):
        fast = copy.deepcopy(model).float()
    else:
        fast = clone_sharing_weights(model)
    swap(fast, FUSED)
    if fast.norm.weight.dtype == torch.float32:
        swap(fast, {nn.RMSNorm: FusedRMSNorm})
    swap(fast, {nn.Linear: linear_kind(weight, quantize)})
    return fast


class StaticTransformer(Transformer):
    """`model`, decoded by one step over a static cache; it shares every weight with `model`.

    A cache that is no longer used is kept for the next decoding of the same batch size: a compiled
    step is recorded anew for other memory.
    """

    def __init__(self, model: Transformer, compile: bool) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(model.__dict__)
        step = self.static_step
        if compile:
            step = torch.compile(step, mode="reduce-overhead", fullgraph=True, dynamic=False)
        self.run_step: Callable[..., Tensor] = step
        self.idle: dict[int, list[Cache]] = {}

    @torch.inference_mode()
    def make_cache(self, batch: int) -> Any:
        idle = self.idle.setdefault(batch, [])
        cache = idle.pop() if idle else Cache(self, batch, static=True)
        cache.reset()
        lease = CacheLease(cache)
        weakref.finalize(lease, idle.append, cache).atexit = False
        return lease

    @torch.inference_mode()
    def _step(self, x: Tensor, rows: Rows, cache: Any) -> Tensor:
        logits = self.run_step(x, rows, cache.cache)
        cache.position += 1
        return logits.clone()  # a recorded graph overwrites its outputs

    def static_step(self, x: Tensor, rows: Rows, cache: Cache) -> Tensor:
        """Inputs x [B, 1, D] and rows of the cache's position -> logits [B, V]."""
        assert cache.index is not None
        rope = cache.rope.index_select(0, cache.index)
        logits = self.logits(self.blocks(x, rows, rope, cache))[:, 0]
        cache.index.add_(1)
        return logits


class CacheLease:
    """A static cache in use by one decoding."""

    def __init__(self, cache: Cache) -> None:
        self.cache, self.batch, self.position = cache, cache.batch, 0


FUSED: dict[type, Any] = {
    MultiHeadAttention: FusedAttention,
    MultiHeadLatentAttention: FusedLatentAttention,
    SwiGLU: FusedSwiGLU,
    nn.Dropout: lambda dropout: nn.Identity(),
}


def clone_sharing_weights(model: Transformer) -> Transformer:
    """A copy of the modules with the same tensors."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})  # not copied


def swap(model: Transformer, kinds: dict[type, Any]) -> Transformer:
    """`model`, with kinds[its type](module) in place of every module that has a kind."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) in kinds and name not in getattr(module, "absorbed", ()):
                setattr(module, name, kinds[type(child)](child))
    return model


def concat_linears(*linears: nn.Linear) -> nn.Linear:
    """One linear layer of the outputs of all, then zeros; for layers without bias."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    weight = F.pad(weight, (0, 0, 0, -len(weight) % ALIGNED))
    both = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    both.weight = nn.Parameter(weight, requires_grad=False)
    return both


def linear_kind(weight: Tensor, quantize: str | None) -> Any:
    """The class that replaces linear layers in a model whose matrices are like `weight`."""
    if quantize is not None:
        return Int8Linear
    if not packable(weight):
        return lambda linear: linear
    fbgemm = "fbgemm" in torch.backends.quantized.supported_engines
    if weight.dtype == torch.bfloat16 and not has_bfloat16() and fbgemm:
        return lambda linear: (HalfLinear if fits_half(linear.weight) else PackedLinear)(linear)
    return PackedLinear


def fits_half(weight: Tensor) -> bool:
    """Whether half precision can hold every number; not infinity and NaN."""
    return bool(weight.abs().max() <= torch.finfo(torch.float16).max)


def packable(weight: Tensor) -> bool:
    """Whether oneDNN has a layout for matrices like this one."""
    known = weight.dtype in (torch.float32, torch.bfloat16)
    return weight.device.type == "cpu" and known and torch.backends.mkldnn.is_available()
