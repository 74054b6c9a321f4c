"""One pass of an extractor over a set of images, cached by content hash.

N images   D features of a layer
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moveimg.evaluation.metrics import NEIGHBOURS
from moveimg.evaluation.sets import ImageSet
from moveimg.files import atomic_directory, lock
from moveimg.progress import progress_bar

BATCH = 64
DONE = "features.json"


@dataclass(frozen=True)
class Extractor:
    """A frozen network from pixels to features."""

    name: str
    space: str  # what its numbers may be compared with
    fingerprint: str  # sha256 of its weights
    network: Callable[[Tensor], dict[str, Tensor]]  # uint8 [B, 3, H, W] -> layer: float32 [B, D]
    layers: dict[str, str]  # of each role: `fid` always, `sfid` and `logits` where there is one
    device: torch.device
    class_names: tuple[str, ...] | None = None  # of a classifier of a data set's own classes
    held_out: float | None = None  # that classifier's accuracy on held-out real images

    def summary(self) -> dict[str, Any]:
        """For results."""
        about = {"name": self.name, "space": self.space, "sha256": self.fingerprint}
        return about | {"device": self.device.type, "held_out_accuracy": self.held_out}


def extract(
    images: ImageSet, digest: str, extractor: Extractor, cache: Path, batch_size: int = BATCH
) -> dict[str, np.ndarray]:
    """Features of every image by role (`fid`, `sfid`, `logits`): float32 [N, D] memory maps.

    One pass for all roles, written to `cache` under the content's and the extractor's hash; a set
    whose features are there is not read again. Raises ValueError for features that are not finite,
    or fewer images than precision and recall need.
    """
    if len(images) <= NEIGHBOURS:
        raise ValueError(
            f"too-few-samples: {len(images)} images: expected {NEIGHBOURS + 1} or more"
        )
    folder = cache / f"{digest[:24]}-{extractor.fingerprint[:12]}-{extractor.device.type}"
    with lock(folder, "features of the same images", wait=True):
        if not (folder / DONE).is_file():
            with atomic_directory(folder) as temporary:
                _extract_to(temporary, images, extractor, batch_size)
    # copy-on-write: torch warns of read-only arrays
    return {role: np.load(folder / f"{role}.npy", mmap_mode="c") for role in extractor.layers}


def _extract_to(folder: Path, images: ImageSet, extractor: Extractor, batch_size: int) -> None:
    outputs: dict[str, np.memmap] = {}
    start = 0
    with progress_bar(len(images), f"{extractor.name} on {images.name}", "image") as bar:
        for batch in images.read(batch_size):
            for role, values in run(extractor, batch).items():
                if not np.isfinite(values).all():
                    raise ValueError(
                        f"non-finite: the {role} features of {images.name} are not finite from "
                        f"image {start} on"
                    )
                if role not in outputs:
                    outputs[role] = np.lib.format.open_memmap(
                        folder / f"{role}.npy", "w+", np.float32, (len(images), values.shape[1])
                    )
                outputs[role][start : start + len(values)] = values
            start += len(batch)
            bar.update(len(batch))
    for output in outputs.values():
        output.flush()
    about = {"set": images.name, "extractor": extractor.name, "images": len(images)}
    (folder / DONE).write_text(json.dumps(about), encoding="utf-8")


@torch.inference_mode()
def run(extractor: Extractor, batch: np.ndarray) -> dict[str, np.ndarray]:
    """Features of uint8 [B, H, W, 3] by role, float32 [B, D]."""
    images = torch.tensor(batch, device=extractor.device).permute(0, 3, 1, 2)
    # TF32 convolutions, torch's default on CUDA, would shift the score
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        outputs = extractor.network(images)
    return {role: outputs[layer].float().cpu().numpy() for role, layer in extractor.layers.items()}
