"""Decoding and cropping images in worker processes, on the way to the tokenizer."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from moveimg.data.crops import crop_views, stack_views
from moveimg.data.images import ImageSource
from moveimg.data.manifest import EncodeSettings, Skipped
from moveimg.images import UnreadableImageError

_SMALL_SOURCE = 2048  # images; below it, starting worker processes costs more than it saves
_MAX_WORKERS = 8

# uint8 views [b * n_crops, 3, size, size], int32 labels [b], and the images left out
LoadedBatch = tuple[torch.Tensor, np.ndarray, list[Skipped]]


class _Views(Dataset):
    """Image index -> (uint8 views [n_crops, 3, size, size], label), or why it is left out."""

    def __init__(self, source: ImageSource, settings: EncodeSettings) -> None:
        self.source, self.settings = source, settings

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int] | Skipped:
        settings = self.settings
        try:
            image, label = self.source[index]
        except UnreadableImageError as error:
            # a name that is not UTF-8 must not spoil the manifest
            path = error.identifier.encode("utf-8", "backslashreplace").decode()
            return Skipped(path=path, reason=error.reason)
        views = crop_views(image, settings.image_size, settings.crops, settings.ranges)
        return stack_views(views), label


def _collate(items: list[tuple[torch.Tensor, int] | Skipped]) -> LoadedBatch:
    skipped = [item for item in items if isinstance(item, Skipped)]
    readable = [item for item in items if not isinstance(item, Skipped)]
    views = torch.cat([item[0] for item in readable]) if readable else torch.empty(0)
    return views, np.array([item[1] for item in readable], np.int32), skipped


def cut_batches(block: range, settings: EncodeSettings) -> list[range]:
    """Cut a shard's image indices into batches of about settings.batch_size views."""
    step = max(1, settings.batch_size // settings.n_crops)
    return [block[i : i + step] for i in range(0, len(block), step)]


def load_views(
    source: ImageSource,
    settings: EncodeSettings,
    blocks: Iterable[range],
    device: str | torch.device,
    workers: int | None = None,
) -> Iterator[LoadedBatch]:
    """Decode and crop the images of `blocks` of indices, batch after batch, in order.

    device: where the views go next; for a GPU they are put in pinned memory
    workers: processes; None means none for small sources, else up to 8
    """
    if workers is None:
        share = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        workers = 0 if len(source) < _SMALL_SOURCE else max(1, min(_MAX_WORKERS, share))
    return iter(
        DataLoader(
            _Views(source, settings),
            batch_sampler=(list(rows) for block in blocks for rows in cut_batches(block, settings)),
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=torch.device(device).type == "cuda",
            generator=torch.Generator(),  # else it draws a seed from the global stream
        )
    )
