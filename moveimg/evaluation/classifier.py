"""A small classifier as feature extractor, for data sets unlike ImageNet.

Trained on the real training images of one data set by `moveimg evaluate --make-extractor`. Its
features give FID, precision and recall in a space of their own, its logits the share of samples
that show the requested class. Numbers of one extractor compare with those of no other.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from moveimg.errors import describe, validate
from moveimg.evaluation.features import Extractor
from moveimg.files import atomic, parse_json
from moveimg.progress import progress_bar

WIDTHS, FEATURES = (24, 48, 64), 64
BATCH_SIZE = 64
STEPS, RATE = 1200, 2e-3
MANY = 20_000  # images, from which on more steps at a higher rate serve
MANY_STEPS, MANY_RATE = 4000, 4e-3
FORMAT = "moveimg-extractor-1"


class About(BaseModel):
    """The metadata of an extractor's file; accuracy is that on held-out real images."""

    size: int = Field(ge=8, le=1024)
    class_names: list[str] = Field(min_length=1, max_length=100_000)
    trained_on: str
    accuracy: float


class Classifier(nn.Module):
    """Convolutions, a mean over positions (64 features), one linear layer.

    Args:
        n_classes: logits.
        size: side in pixels of the network's input; other images are resized to it.
    """

    def __init__(self, n_classes: int, size: int) -> None:
        super().__init__()
        self.size = size
        layers: list[nn.Module] = []
        width = 3
        for i, wider in enumerate((*WIDTHS, FEATURES)):
            stride = 2 if i < 2 else 1
            convolution = nn.Conv2d(width, wider, 3, stride=stride, padding=1, bias=False)
            layers += [convolution, nn.GroupNorm(8, wider), nn.ReLU()]
            width = wider
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(FEATURES, n_classes)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 or float [B, 3, H, W] in 0..255 -> features [B, 64], logits [B, C]."""
        x = images.float() / 127.5 - 1
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        features = self.body(x).mean((2, 3))
        return {"features": features, "logits": self.head(features)}


def train_classifier(
    images: np.ndarray, labels: np.ndarray, n_classes: int, device: torch.device, seed: int = 0
) -> Classifier:
    """Fit a classifier to real images uint8 [N, S, S, 3] with labels int64 [N].

    1,200 steps of AdamW (4,000 for 20,000 images and more) on randomly rotated, scaled and shifted
    images. The same seed and device give the same weights.
    """
    steps, peak = (STEPS, RATE) if len(images) < MANY else (MANY_STEPS, MANY_RATE)
    torch.manual_seed(seed)
    model = Classifier(n_classes, images.shape[1]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.05)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    targets = torch.from_numpy(labels).long()
    rng = torch.Generator().manual_seed(seed)
    with progress_bar(steps, "extractor", "step") as bar:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = peak * 0.5 * (1 + math.cos(math.pi * step / steps))
            rows = torch.randint(len(pixels), (BATCH_SIZE,), generator=rng)
            logits = model(_augment(pixels[rows].float().to(device), rng))["logits"]
            loss = F.cross_entropy(logits, targets[rows].to(device), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.update()
    return model.eval().requires_grad_(False)


def save_classifier(
    model: Classifier, path: Path, class_names: list[str], trained_on: str, accuracy: float
) -> None:
    """Write one safetensors file; size, classes, data and held-out accuracy are its metadata."""
    about = {
        "size": model.size,
        "class_names": class_names,
        "trained_on": trained_on,
        "accuracy": accuracy,
    }
    tensors = {key: value.cpu().contiguous() for key, value in model.state_dict().items()}
    with atomic(path) as temporary:
        save_file(tensors, temporary, {"format": FORMAT, "about": json.dumps(about)})


def load_classifier(path: Path, device: torch.device) -> Extractor:
    """The extractor in a file of save_classifier. FileNotFoundError, or ValueError if damaged."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such extractor")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or "about" not in metadata:
                raise ValueError(f"{path}: not an extractor of moveimg evaluate --make-extractor")
            about = validate(About, parse_json(metadata["about"], str(path)), str(path))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        model = Classifier(len(about.class_names), about.size)
        model.load_state_dict(tensors)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged extractor ({describe(error)})") from None
    model.eval().requires_grad_(False).to(device)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Extractor(
        name=f"classifier-{digest[:8]}",
        space=(
            f"{FEATURES} features of a small classifier of {about.trained_on} ({digest[:8]}): "
            "compares with nothing but itself"
        ),
        fingerprint=digest,
        network=model,
        layers={"fid": "features", "logits": "logits"},
        device=device,
        class_names=tuple(about.class_names),
        held_out=about.accuracy,
    )


def _augment(images: Tensor, rng: torch.Generator) -> Tensor:
    """Rotate by up to 8 degrees, scale by up to 10 %, shift by up to 8 %; nothing is mirrored."""
    count = len(images)
    draws = torch.rand(4, count, generator=rng) * 2 - 1
    angle, scale = draws[0] * math.radians(8), 1 + 0.1 * draws[1]
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = torch.stack([cos, -sin, 0.16 * draws[2], sin, cos, 0.16 * draws[3]], dim=1)
    affine = rows.view(count, 2, 3).to(images.device)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
