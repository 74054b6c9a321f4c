"""A shard's images -> codes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from moveimg.data.crops import normalize
from moveimg.data.loading import LoadedBatch
from moveimg.data.manifest import EncodeSettings, Skipped, write_shard
from moveimg.data.resume import FinishedShard

# uint8 views [b * n_crops, 3, H, W] -> codes uint16 [b, n_crops, T]
Encoder = Callable[[torch.Tensor], np.ndarray]


class Tokenizer(Protocol):
    """What encoding needs of a tokenizer."""

    @property
    def codebook_size(self) -> int: ...

    @property
    def downsample(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """float32 [B, 3, H, W] in [-1, 1] -> int64 [B, h*w]."""


def make_encoder(
    tokenizer: Tokenizer,
    settings: EncodeSettings,
    device: str | torch.device,
    dtype: torch.dtype | None,
) -> Encoder:
    """The function from views to codes; it raises ValueError for codes that cannot be.

    Raises ValueError for a dtype that autocast does not have.
    """
    if dtype == torch.float64:
        raise ValueError("dtype float64: expected float32 or bfloat16")
    n_codes = settings.grid[0] * settings.grid[1]
    low = dtype in (torch.bfloat16, torch.float16)

    @torch.inference_mode()
    def encode(views: torch.Tensor) -> np.ndarray:
        parts = []
        autocast = torch.autocast(torch.device(device).type, dtype) if low else nullcontext()
        for chunk in views.split(settings.batch_size):
            with autocast:
                codes = tokenizer.encode(normalize(chunk.to(device, non_blocking=True)))
            if codes.shape != (len(chunk), n_codes):
                raise ValueError(
                    f"the tokenizer gave codes {list(codes.shape)} for {len(chunk)} images: "
                    f"expected {[len(chunk), n_codes]}"
                )
            parts.append(codes.cpu().numpy())
        found = np.concatenate(parts)
        if found.min() < 0 or found.max() >= settings.codebook_size:
            raise ValueError(
                f"the tokenizer gave codes {found.min()}..{found.max()}: expected "
                f"0..{settings.codebook_size - 1}"
            )
        return found.astype(np.uint16).reshape(-1, settings.n_crops, n_codes)

    return encode


def encode_shard(
    out: Path,
    number: int,
    batches: Iterable[LoadedBatch],
    encode: Encoder,
    advance: Callable[[int], None],
) -> FinishedShard:
    """Encode a shard's batches and write it; `advance` is told of each batch's images."""
    codes: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    skipped: list[Skipped] = []
    for views, batch_labels, unreadable in batches:
        skipped += unreadable
        if len(batch_labels):
            codes.append(encode(views))
            labels.append(batch_labels)
        advance(len(batch_labels) + len(unreadable))
    shard = None
    if codes:
        shard = write_shard(out, number, np.concatenate(codes), np.concatenate(labels))
    return FinishedShard(number=number, shard=shard, skipped=tuple(skipped))
