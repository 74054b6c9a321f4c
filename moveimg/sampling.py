"""Sampling codes from labels, and log-likelihoods of codes, with explicit random generators.

    B batch   T codes in an image   V codebook size   C classes

Each image has its own random generator and uses one uniform number per code. So an image's draws
depend on its own seed alone: not on the batch, its neighbours or the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moveimg.config import SamplingSettings
from moveimg.model import Transformer
from moveimg.progress import progress_bar

MAX_SEED = 2**32 - 1  # torch's CPU generator keeps 32 bits of a seed
UNKNOWN = -1  # marks a code to draw


def image_rngs(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU random generator per seed. Raises ValueError for a seed outside 0..2^32-1."""
    for seed in seeds:
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seed {seed}: expected a whole number in 0..{MAX_SEED}")
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def sample_codes(
    generator: Transformer,
    labels: Tensor,
    settings: SamplingSettings,
    rng: Sequence[torch.Generator],
    known: Tensor | None = None,
    cfg_scale: Tensor | None = None,
) -> Tensor:
    """Draw the codes of one image per label: int64 [B, T].

    Random generators in equal states give equal codes.

    Args:
        labels: int64 [B] in 0..C, where C is the null label.
        rng: one CPU random generator per image (see image_rngs).
        known: int64 [B, T], codes to keep, and UNKNOWN for codes to draw. If all kept codes come
            before the drawn codes, this samples exactly from p(drawn | kept).
        cfg_scale: [B], a guidance scale per image in place of that of `settings`.
    """
    codes = iter_codes(generator, labels, settings, rng, known, cfg_scale)
    return torch.stack(list(codes), dim=1)


@torch.inference_mode()
def iter_codes(
    generator: Transformer,
    labels: Tensor,
    settings: SamplingSettings,
    rng: Sequence[torch.Generator],
    known: Tensor | None = None,
    cfg_scale: Tensor | None = None,
) -> Iterator[Tensor]:
    """As sample_codes, but yields the codes [B] position by position, in raster order."""
    if len(rng) != len(labels):
        raise ValueError(f"{len(rng)} random generators for {len(labels)} labels: expected equal")
    length = generator.config.seq_len
    if known is None:
        known = torch.full((len(labels), length), UNKNOWN, device=labels.device)
    missing = set((known == UNKNOWN).any(dim=0).nonzero()[:, 0].tolist())  # positions to draw
    first, last = min(missing, default=length), max(missing, default=length)
    yield from known[:, :first].unbind(1)
    if not missing:
        return
    scales = guidance_scales(settings, length, cfg_scale)
    labels, guided = guided_labels(generator, labels, scales)
    # dtype and device are explicit: with torch's defaults changed, a seed must give the same draws
    drawn = [torch.rand(length, generator=g, dtype=torch.float32, device=g.device) for g in rng]
    draws = torch.stack(drawn).to(labels.device)
    cache = generator.make_cache(len(labels))
    prefix = [known[:, :first].repeat(1 + guided, 1)] if first else []
    with torch.autocast(labels.device.type, enabled=False):
        logits = generator.prefill(labels, cache, *prefix)
    scales = scales.to(logits)
    for position in range(first, length):
        codes = known[:, position]
        # checked at two positions alone: the check waits for the device, and NaN persists
        if position in (first, last) and not torch.isfinite(logits).all():
            raise ValueError("the model's logits are not finite: expected undamaged weights")
        if position in missing:
            if guided:
                conditional, unconditional = logits.chunk(2)
                logits = guide(conditional, unconditional, scales[position])
            new = draw(logits, draws[:, position], settings)
            codes = torch.where(codes == UNKNOWN, new, codes)
        yield codes
        if position < last:  # autocast around each step: the caller's code runs in between
            with torch.autocast(labels.device.type, enabled=False):
                logits = generator.step(codes.repeat(1 + guided), cache)


def guidance_scales(
    settings: SamplingSettings, length: int, cfg_scale: Tensor | None = None
) -> Tensor:
    """The guidance scale per position, float64 [T, 1, 1], or [T, B, 1] with cfg_scale [B].

    Before `cfg_start` it is 1. From there, with progress p in [0, 1): constant is cfg_scale,
    linear 1 + (cfg_scale - 1) p (MAR, arXiv 2406.11838), power-cosine
    1 + (cfg_scale - 1) (1 - cos(pi p^power)) / 2 (MDT, arXiv 2303.14389; RAR).
    """
    shape = {
        "constant": lambda p: 1.0,
        "linear": lambda p: p,
        "power-cosine": lambda p: (1 - math.cos(math.pi * p**settings.cfg_power)) / 2,
    }[settings.cfg_schedule]
    start = settings.cfg_start
    progress = [(position / length - start) / (1 - start) for position in range(length)]
    weights = torch.tensor([shape(p) if p >= 0 else 0.0 for p in progress], dtype=torch.float64)
    weights = weights[:, None, None]
    scale = settings.cfg_scale if cfg_scale is None else cfg_scale.cpu().double()[:, None]
    # in this form a constant schedule gives cfg_scale itself, unrounded
    return scale * weights + (1 - weights)


def guided_labels(generator: Transformer, labels: Tensor, scales: Tensor) -> tuple[Tensor, bool]:
    """(labels, guided): with guidance, labels are [2 B], of which the last B are the null label."""
    values = set(scales.flatten().tolist())
    without_class = torch.full_like(labels, generator.null_label)
    if len(values) > 1 or not values <= {0.0, 1.0}:
        return torch.cat([labels, without_class]), True
    return (without_class if values == {0.0} else labels), False


def guide(conditional: Tensor, unconditional: Tensor, scale: Tensor) -> Tensor:
    """uncond + (cond - uncond) * scale on logits [..., V] (LlamaGen); at 1 exactly cond."""
    guided = unconditional + (conditional - unconditional) * scale
    return torch.where(scale == 1, conditional, guided)


def draw(logits: Tensor, uniforms: Tensor, settings: SamplingSettings) -> Tensor:
    """Draw one code per row of guided logits [B, V] by inverting its cumulative distribution.

    `uniforms` are random numbers in [0, 1), [B]; temperature 0 takes the likeliest code.
    """
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    logits = keep_top(logits / settings.temperature, settings.top_k, settings.top_p)
    cumulative = cumulative_sums(logits.softmax(dim=-1))  # [B, V]
    # The target stays below the total even after rounding: else a code of probability zero after
    # the last possible code could be drawn.
    total = cumulative[:, -1:] * (1 - torch.finfo(cumulative.dtype).eps)
    target = uniforms[:, None].to(cumulative.dtype) * total
    codes = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return codes.clamp(max=logits.shape[-1] - 1)  # NaN gives V, outside the codebook


def keep_top(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set to -inf every logit [B, V] outside the top k, then outside the nucleus of mass p.

    Ties with the k-th are kept. The nucleus (arXiv 1904.09751) is the smallest set of likeliest
    codes whose probability reaches p.
    """
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(dim=-1)
        outside = cumulative_sums(probabilities) - probabilities >= top_p
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    return logits


def cumulative_sums(probabilities: Tensor) -> Tensor:
    """Cumulative sums of probabilities [B, V] over the codes, on CUDA in float64."""
    # CUDA adds in parallel, and in another order for one row than for several: in float32 a draw
    # near a border could fall on either side of it. A CPU adds in float64 and in order.
    wide = torch.float64 if probabilities.is_cuda else probabilities.dtype
    return probabilities.cumsum(dim=-1, dtype=wide)


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
        """-log p per code, float64 [B]; larger for less likely images."""
        return -self.log_probs.mean(dim=1)

    @property
    def bits_per_code(self) -> Tensor:
        """-log2 p per code, float64 [B]."""
        return self.nats_per_code / math.log(2)

    @property
    def bits_per_pixel(self) -> Tensor:
        """-log2 p of the codes per pixel, float64 [B]; the tokenizer's own error is not counted."""
        return -self.total / math.log(2) / self.pixels


@torch.inference_mode()
def code_log_probs(
    generator: Transformer,
    codes: Tensor,
    labels: Tensor,
    scales: Tensor | None = None,
    temperature: float = 1.0,
    filter_logits: Callable[[Tensor], Tensor] = lambda logits: logits,
) -> Tensor:
    """log p(code | label, codes before it) in nats, float64 [B, T].

    Labels int64 [B] are in 0..C, where C is the null label. `scales` [T, 1, 1] are guidance scales
    (see guidance_scales; None: 1). `filter_logits` gets the guided logits [B, T, V], after the
    temperature.
    """
    scales = torch.ones(1, 1, 1) if scales is None else scales
    labels, guided = guided_labels(generator, labels, scales)
    with torch.autocast(labels.device.type, enabled=False):
        logits = generator(codes.repeat(1 + guided, 1), labels)  # [B or 2 B, T, V]
    if guided:
        conditional, unconditional = logits.chunk(2)
        logits = guide(conditional, unconditional, scales[..., 0].to(logits))
    log_probs = filter_logits(logits / temperature).log_softmax(dim=-1)
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
