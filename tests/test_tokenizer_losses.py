"""The perceptual and the adversarial loss against plain float64, and what they may change."""

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers, vgg16

from moveimg.config import AdversarialConfig, TokenizerTrainConfig
from moveimg.errors import validate
from moveimg.training import tokenizer as losses
from tests.test_tokenizer import make_images
from tests.test_tokenizer_files import Hostile

CHANNELS = (64, 128, 256, 512, 512)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A torch.hub folder with random weights of VGG-16's convolutions and of the distance."""
    checkpoints = tmp_path_factory.mktemp("hub") / "checkpoints"
    checkpoints.mkdir()
    torch.manual_seed(0)
    vgg = {f"features.{name}": w for name, w in make_layers(cfgs["D"]).state_dict().items()}
    with torch.device("meta"):
        unused = vgg16().classifier.state_dict()  # one number behind each tensor: a small file
    vgg |= {f"classifier.{name}": torch.zeros(1).expand(w.shape) for name, w in unused.items()}
    torch.save(vgg, checkpoints / losses.VGG_FILE)
    lins = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(CHANNELS)}
    torch.save(lins, checkpoints / losses.LPIPS_FILE)
    return checkpoints.parent


def plain_lpips(a: Tensor, b: Tensor, folder) -> float:
    """LPIPS of images in [-1, 1] by its paper's equation, in float64."""
    files = (folder / "checkpoints" / name for name in (losses.VGG_FILE, losses.LPIPS_FILE))
    vgg, lins = (torch.load(file) for file in files)
    shift = torch.tensor([-0.030, -0.088, -0.188]).double().view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).double().view(1, 3, 1, 1)
    x, y = ((image.double() - shift) / scale for image in (a, b))
    total, level = torch.zeros(len(a), dtype=torch.float64), 0
    last_of_block = (3, 8, 15, 22, 29)
    for index, layer in enumerate(make_layers(cfgs["D"])[:30]):
        if isinstance(layer, nn.Conv2d):
            weight, bias = (vgg[f"features.{index}.{name}"].double() for name in ("weight", "bias"))
            x, y = (F.conv2d(image, weight, bias, padding=1) for image in (x, y))
        elif isinstance(layer, nn.MaxPool2d):
            x, y = F.max_pool2d(x, 2), F.max_pool2d(y, 2)
        else:
            x, y = x.clamp(min=0), y.clamp(min=0)
        if index in last_of_block:
            u, v = (z / (z.square().sum(1, keepdim=True).sqrt() + 1e-10) for z in (x, y))
            w = lins[f"lin{level}.model.1.weight"].double()
            total += ((u - v) ** 2 * w).sum(1).mean((1, 2))
            level += 1
    return total.mean().item()


def test_lpips_matches_reference_and_reaches_the_images_alone(folder):
    loss = losses.load_perceptual_loss(folder, CPU)
    images, other = make_images(2, 16, 16), make_images(2, 16, 16, seed=7).requires_grad_()
    value = loss(other, images)
    with torch.no_grad():
        assert value.item() == pytest.approx(plain_lpips(other, images, folder), rel=1e-4)
    assert value > 0.01 and loss(images, images) == 0
    value.backward()
    assert (other.grad != 0).float().mean() > 0.5


@pytest.mark.parametrize("hostile", [losses.VGG_FILE, losses.LPIPS_FILE])
def test_lpips_weights_are_not_unpickled_freely(folder, tmp_path, hostile):
    (tmp_path / "checkpoints").mkdir()
    for name in losses.WEIGHTS:
        os.link(folder / "checkpoints" / name, tmp_path / "checkpoints" / name)
    (tmp_path / "checkpoints" / hostile).unlink()
    torch.save({"x": Hostile(tmp_path / "was-run")}, tmp_path / "checkpoints" / hostile)
    with pytest.raises(ValueError, match="LPIPS"):
        losses.load_perceptual_loss(tmp_path, CPU)
    assert not (tmp_path / "was-run").exists()


def test_adaptive_weight_matches_reference():
    """The discriminator is replaced by x -> sum(a tanh(x)), whose gradients are written out."""
    settings = {"out": "x", "steps": 1, "images": {"source": "x", "size": 8}, "tokenizer": {}}
    run = validate(TokenizerTrainConfig, settings, "test")
    adversary = losses.Adversary(AdversarialConfig(weight=0.5, n_layers=1, width=4), run, CPU)
    rng = np.random.default_rng(0)
    layer, x, y, a = (rng.standard_normal(n) for n in (4, 4, 4, 4))
    adversary.discriminator = nn.Tanh()
    adversary.discriminator.register_forward_hook(lambda *args: (torch.tensor(a) * args[2]).sum())
    last = torch.tensor(layer, requires_grad=True)
    out = last * torch.tensor(x)
    reconstruction = ((out - torch.tensor(y)) ** 2).mean()
    loss, scalars = adversary.generator_loss(out, reconstruction, last)
    weight = scalars["adversarial_weight"]
    first = 2 * (layer * x - y) * x / 4
    second = -a * (1 - np.tanh(layer * x) ** 2) * x
    expected = 0.5 * np.linalg.norm(first) / (np.linalg.norm(second) + 1e-4)
    assert weight.item() == pytest.approx(expected, rel=1e-12) and not weight.requires_grad
    (reconstruction + loss).backward()  # the graphs are still there
    np.testing.assert_allclose(last.grad, first + expected * second, rtol=1e-10)
    _, scalars = adversary.generator_loss(1e-9 * last, 9e9 * last.sum(), last)
    assert scalars["adversarial_weight"] == 0.5e4
