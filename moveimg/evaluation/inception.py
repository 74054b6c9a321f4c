"""torch-fidelity's Inception with one more layer: the spatial features of sFID.

sFID (Nash et al. 2021) is the Fréchet distance of the first 7 channels of `mixed_6/conv` in the
TensorFlow graph of 2015-12-05, 17 x 17 x 7 = 2023 numbers. torch-fidelity's conversion script maps
the weights of `mixed_6/conv` to `Mixed_6d.branch1x1`; its output after batch norm and ReLU is the
tensor. It is flattened channels last, as ADM does: the order must be that of mu_s and sigma_s.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    FeatureExtractorInceptionV3,
)
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from moveimg.evaluation.features import Extractor
from moveimg.files import fetch, require_file

POOL, SPATIAL, LOGITS = "2048", "mixed_6_spatial", "logits_unbiased"
NAME = "inception-v3-compat-spatial"
CHANNELS = 7


class SpatialInception(FeatureExtractorInceptionV3):
    """`inception-v3-compat` that also returns `mixed_6_spatial`, float32 [B, 2023]."""

    features_list: list[str]

    def __init__(self, name: str, features_list: list[str], **kwargs: Any) -> None:
        super().__init__(name, features_list, **kwargs)
        self._spatial: Tensor | None = None
        self.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return (*FeatureExtractorInceptionV3.get_provided_features_list(), SPATIAL)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """uint8 [B, 3, H, W] -> the requested features, in the order requested."""
        wanted = self.features_list
        self.features_list = [name for name in wanted if name != SPATIAL] or ["768"]
        try:  # the parent knows its own layers only
            outputs = dict(zip(self.features_list, super().forward(x), strict=True))
        finally:
            self.features_list = wanted
        assert self._spatial is not None
        outputs[SPATIAL], self._spatial = self._spatial, None
        return tuple(outputs[name] for name in wanted)

    def _keep(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        channels_last = output[:, :CHANNELS].permute(0, 2, 3, 1)  # [B, 17, 17, 7]
        self._spatial = channels_last.flatten(1).to(torch.float32)


def register() -> None:
    """Make SpatialInception known to torch-fidelity under NAME (once)."""
    if NAME not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(NAME, SpatialInception)


def load_inception(weights: Path | None, device: torch.device) -> Extractor:
    """The extractor of FID, sFID, IS, precision, recall and KID.

    Its weights are a file in torch-fidelity's layout, or that of torch-fidelity, downloaded once.
    Raises FileNotFoundError without weights, ValueError for weights of another network.
    """
    file = URL_INCEPTION_V3.rsplit("/", 1)[-1]  # its name ends in the start of its sha256
    kept = Path(torch.hub.get_dir()) / "checkpoints" / file
    path = weights or fetch(URL_INCEPTION_V3, kept, kept.stem.rsplit("-", 1)[-1])
    require_file(path)
    register()
    with TemporaryDirectory() as folder:
        # torch-fidelity reads with weights_only=False: it gets a copy of the tensors read safely
        verified = Path(folder) / "weights.pth"
        try:
            torch.save(torch.load(path, map_location="cpu", weights_only=True), verified)
            network = FEATURE_EXTRACTORS_REGISTRY[NAME](
                NAME, [POOL, LOGITS, SPATIAL], feature_extractor_weights_path=str(verified)
            ).to(device)
        except Exception as error:  # torch's own message would advise weights_only=False
            raise ValueError(
                f"{path}: not weights of Inception alone in torch-fidelity's layout, as in {file}"
            ) from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Extractor(
        name="inception-v3-compat",
        space="Inception-v3 (2015-12-05), comparable with published numbers",
        fingerprint=digest,
        network=lambda images: network.convert_features_tuple_to_dict(network(images)),
        layers={"fid": POOL, "sfid": SPATIAL, "logits": LOGITS},
        device=device,
    )
