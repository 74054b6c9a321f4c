"""The perceptual and the adversarial loss against plain float64, and what they may touch."""

from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from tests.test_tokenizer import make, make_images, one_line_error
from tokenizer import adversarial
from tokenizer.perceptual import WEIGHTS, load_perceptual_loss

LIBRARY = "torch_fidelity.sample_similarity_lpips"
CHANNELS = (64, 128, 256, 512, 512)
CPU = torch.device("cpu")


@pytest.fixture
def vgg(monkeypatch) -> nn.Sequential:
    """VGG-16's layers with random weights, in the place of the ones that are fetched."""
    torch.manual_seed(0)
    layers = make_layers(cfgs["D"])
    monkeypatch.setattr(
        f"{LIBRARY}.torchvision_load_pretrained_vgg16", lambda: SimpleNamespace(features=layers)
    )
    return layers


@pytest.fixture
def folder(tmp_path):
    """A torch.hub folder with random weights of the distance."""
    torch.manual_seed(1)
    weights = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(CHANNELS)}
    (tmp_path / "checkpoints").mkdir()
    torch.save(weights, tmp_path / "checkpoints" / WEIGHTS[1])
    return tmp_path


def plain_lpips(a: Tensor, b: Tensor, layers: nn.Sequential, weights: dict[str, Tensor]) -> float:
    """LPIPS of images in [-1, 1] as its paper says it, in float64."""
    shift = torch.tensor([-0.030, -0.088, -0.188]).double().view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).double().view(1, 3, 1, 1)
    x, y = ((image.double() - shift) / scale for image in (a, b))
    total, level = torch.zeros(len(a), dtype=torch.float64), 0
    last_of_a_block = (3, 8, 15, 22, 29)
    for index, layer in enumerate(layers[:30]):
        if isinstance(layer, nn.Conv2d):
            kernel, bias = layer.weight.double(), layer.bias.double()
            x, y = (F.conv2d(image, kernel, bias, padding=1) for image in (x, y))
        elif isinstance(layer, nn.MaxPool2d):
            x, y = F.max_pool2d(x, 2), F.max_pool2d(y, 2)
        else:
            x, y = x.clamp(min=0), y.clamp(min=0)
        if index in last_of_a_block:
            u, v = (
                image / (image.square().sum(1, keepdim=True).sqrt() + 1e-10) for image in (x, y)
            )
            w = weights[f"lin{level}.model.1.weight"].double()
            total += ((u - v) ** 2 * w).sum(1).mean((1, 2))
            level += 1
    return total.mean().item()


def test_lpips_matches_reference_and_reaches_the_images_alone(vgg, folder):
    before = torch.hub.get_dir()
    loss = load_perceptual_loss(folder, CPU)
    assert torch.hub.get_dir() == before
    images, other = make_images(2, 16, 16), make_images(2, 16, 16, seed=7).requires_grad_()
    value = loss(other, images)
    weights = torch.load(folder / "checkpoints" / WEIGHTS[1])
    with torch.no_grad():
        assert value.item() == pytest.approx(plain_lpips(other, images, vgg, weights), rel=1e-4)
    assert value > 0.01 and loss(images, images) == 0
    value.backward()
    assert (other.grad != 0).float().mean() > 0.5
    assert not any(parameter.requires_grad for parameter in vgg.parameters())
    again = loss(other, images)
    assert torch.equal(again, value), "no dropout"


def test_missing_lpips_weights_are_named(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr("torch.hub.urlopen", offline)
    parts = [*WEIGHTS, str(tmp_path / "checkpoints"), "cannot be fetched", "perceptual_weight: 0"]
    with one_line_error(ValueError, *parts):
        load_perceptual_loss(tmp_path, CPU)


def test_damaged_lpips_weights_are_named(folder, vgg):
    (folder / "checkpoints" / WEIGHTS[0]).touch()
    path = folder / "checkpoints" / WEIGHTS[1]
    path.write_bytes(path.read_bytes()[:100])
    with one_line_error(ValueError, str(folder), "damaged"):
        load_perceptual_loss(folder, CPU)


def test_hinge_losses():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.5, -0.5])
    expected = (np.mean([0, 0.5, 2.0]) + np.mean([0, 1.5, 0.5])) / 2
    assert adversarial.discriminator_loss(real, fake).item() == pytest.approx(expected)
    assert adversarial.generator_loss(fake).item() == pytest.approx(2 / 3)


def test_adaptive_weight_matches_reference():
    rng = np.random.default_rng(0)
    layer, x, y, a = (rng.standard_normal(n) for n in (4, 4, 4, 4))
    last = torch.tensor(layer, requires_grad=True)
    out = last * torch.tensor(x)
    reconstruction = ((out - torch.tensor(y)) ** 2).mean()
    judged = -(torch.tensor(a) * out.tanh()).sum()
    found = adversarial.adaptive_weight(reconstruction, judged, last)
    first = 2 * (layer * x - y) * x / 4
    second = -a * (1 - np.tanh(layer * x) ** 2) * x
    expected = np.linalg.norm(first) / (np.linalg.norm(second) + 1e-4)
    assert found.item() == pytest.approx(expected, rel=1e-12) and not found.requires_grad
    (reconstruction + found * judged).backward()  # the graphs are still there
    np.testing.assert_allclose(last.grad, first + expected * second, rtol=1e-10)


def test_adaptive_weight_is_bounded():
    last = torch.ones(2, requires_grad=True)
    assert adversarial.adaptive_weight(9e9 * last.sum(), 1e-9 * last.sum(), last) == 1e4


@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_discriminator_sees_patches_down_to_its_least_side(n_layers):
    torch.manual_seed(0)
    discriminator = adversarial.make_discriminator(3, 4, n_layers)
    least = adversarial.least_side(n_layers)
    assert discriminator(torch.zeros(2, 3, least, least)).shape == (2, 1, 1, 1)
    with pytest.raises(RuntimeError):
        discriminator(torch.zeros(2, 3, least // 2, least // 2))
    images = torch.randn(1, 3, 64, 64, requires_grad=True)
    discriminator.eval()(images)[0, 0, 0, 0].backward()
    seen = (images.grad[0, 0] != 0).nonzero().max() + 1
    assert seen < 64, "a logit is about a patch"


def test_the_pull_on_the_last_layer_is_as_strong_as_that_of_the_other_losses():
    tokenizer, images = make(), make_images(2, 16, 16)
    discriminator = adversarial.make_discriminator(3, 4, 1)
    out = tokenizer(images)
    judged = adversarial.generator_loss(discriminator(out.reconstruction))
    weight = adversarial.adaptive_weight(out.losses["l2"], judged, tokenizer.last_layer)
    norms = [
        torch.autograd.grad(loss, tokenizer.last_layer, retain_graph=True)[0].norm()
        for loss in (out.losses["l2"], weight * judged)
    ]
    assert norms[1].item() == pytest.approx(norms[0].item(), rel=0.05)
