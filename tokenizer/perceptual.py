"""The perceptual loss LPIPS (arXiv 1801.03924): distances of VGG-16 features, as torch-fidelity
computes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from tokenizer.losses import ImageLoss

WEIGHTS = ("vgg16-397923af.pth", "weights-vgg16-lpips.pth")
"""torchvision's VGG-16 (528 MiB) and the distance's own weights, as torch.hub names them."""


def load_perceptual_loss(folder: Path | None, device: torch.device) -> ImageLoss:
    """LPIPS as a loss: (reconstruction, images), float [B, 3, H, W] in [-1, 1] -> scalar.

    Its weights are frozen; gradients flow to both images. H and W of at least 16.

    Args:
        folder: a torch.hub folder, which holds WEIGHTS in its `checkpoints/`; None is torch's own
            (`~/.cache/torch/hub`). A file that is missing is fetched into it.
        device: where the features are computed.

    Raises:
        ValueError: a file is missing and cannot be fetched, or is damaged.
        ImportError: torch-fidelity is not installed.
    """
    from torch_fidelity.sample_similarity_lpips import SampleSimilarityLPIPS

    with _hub_folder(folder) as checkpoints:
        try:
            distance: nn.Module = SampleSimilarityLPIPS("lpips").to(device)
        except (OSError, RuntimeError, EOFError, UnpicklingError, KeyError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            missing = [name for name in WEIGHTS if not (checkpoints / name).is_file()]
            what = f"{' and '.join(missing)} cannot be fetched" if missing else "damaged weights"
            raise ValueError(
                f"the perceptual loss needs {' and '.join(WEIGHTS)} in {checkpoints}: {what} "
                f"({reason}); put them there, or do without (perceptual_weight: 0)"
            ) from None

    def loss(reconstruction: Tensor, images: Tensor) -> Tensor:
        # it takes 0..255
        distances: Tensor = distance(127.5 * (reconstruction + 1), 127.5 * (images + 1))
        return distances.mean()

    return loss


@contextmanager
def _hub_folder(folder: Path | None) -> Iterator[Path]:
    """Let torch.hub read and write in `folder` for a while; its `checkpoints/`."""
    before = torch.hub.get_dir()
    try:
        if folder is not None:
            torch.hub.set_dir(folder)
        yield Path(torch.hub.get_dir()) / "checkpoints"
    finally:
        if folder is not None:
            torch.hub.set_dir(before)
