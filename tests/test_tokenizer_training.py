"""Training tokenizers: losses, data, discriminator, resume to the bit."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch_fidelity.sample_similarity_lpips import SampleSimilarityLPIPS
from torchvision.models.vgg import vgg16

import tokenizer as tok
from moveimg.config import TokenizerTrainConfig
from moveimg.data import open_images
from moveimg.errors import validate
from moveimg.training import tokenizer as training
from moveimg.training.parallel import Parallelism
from moveimg.training.tokenizer import TokenizerTask, train_tokenizer
from tests.test_tokenizer import make_images
from tests.test_tokenizer_files import Hostile
from tests.test_training import die_at_step_5

CPU = torch.device("cpu")
TINY = {
    "width": 8, "multipliers": [1, 1, 1], "n_res_blocks": 1, "z_channels": 8, "norm_groups": 4,
    "codebook_size": 16, "codebook_dim": 4, "attention": False,
}  # fmt: skip
JUDGE = {"start": 3, "n_layers": 1, "width": 4, "lr": 1e-3}


def smooth_images(root):
    """Two classes of smooth colour images, in a folder."""
    rng = np.random.default_rng(0)
    for index in range(12):
        path = root / ("warm" if index % 2 else "cold") / f"{index}.png"
        path.parent.mkdir(exist_ok=True, parents=True)
        coarse = Image.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8))
        coarse.resize((16, 16), Image.Resampling.BICUBIC).save(path)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return smooth_images(tmp_path_factory.mktemp("images"))


def make_config(folder, out, quantizer=None, **changes):
    settings = {
        "out": out, "images": {"source": str(folder), "size": 16}, "steps": 8, "batch_size": 4,
        "tokenizer": TINY | {"quantizer": quantizer or {"kind": "vq", "reseed_after": 2}},
        "ema": 0.9, "optimizer": {"lr": 1e-3}, "log_every": 2, "validate_every": 4,
        "preview_every": 8, "checkpoint_every": 2,
    }  # fmt: skip
    return validate(TokenizerTrainConfig, settings | changes, "test")


def make_task(config):
    torch.manual_seed(0)
    return TokenizerTask(config, training.make_tokenizer(config), Parallelism())


# --- losses --------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A torch.hub folder with random weights of VGG-16 and of LPIPS's distance."""
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(nn.Linear, "reset_parameters", lambda self: None)  # of the classifier: slow
    with torch.device("meta"):
        shapes = vgg16().state_dict()
    torch.manual_seed(0)  # the classifier is expanded from one number: a small file
    vgg = {
        name: torch.zeros(1).expand(w.shape) if "classifier" in name else torch.randn(w.shape) / 20
        for name, w in shapes.items()
    }
    torch.save(vgg, tmp_path / "checkpoints" / training.VGG_FILE)
    channels = enumerate((64, 128, 256, 512, 512))
    lins = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in channels}
    torch.save(lins, tmp_path / "checkpoints" / training.LPIPS_FILE)
    return tmp_path


def test_lpips_is_torch_fidelitys_and_runs_no_code_of_its_files(hub, monkeypatch):
    loss = training.load_perceptual_loss(hub, CPU)
    images, other = make_images(2, 16, 16), make_images(2, 16, 16, seed=7).requires_grad_()
    value = loss(other, images)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(hub))
    pixels = [(x.detach() + 1) * 127.5 for x in (other, images)]  # in 0..255
    assert value.item() == pytest.approx(SampleSimilarityLPIPS("lpips")(*pixels).mean().item())
    assert value > 1e-3 and loss(images, images) == 0
    value.backward()
    assert (other.grad != 0).float().mean() > 0.5
    for name in (training.VGG_FILE, training.LPIPS_FILE):
        torch.save({"x": Hostile(hub / "was-run")}, hub / "checkpoints" / name)
        with pytest.raises(ValueError, match=str(hub)):
            training.load_perceptual_loss(hub, CPU)
    assert not (hub / "was-run").exists()


def test_adaptive_weight_matches_reference(folder, tmp_path):
    """The discriminator is replaced by x -> sum(a tanh(x)), whose gradients are written out."""
    run = make_config(folder, tmp_path, adversarial=JUDGE | {"weight": 0.5})
    adversary = training.Adversary(run.adversarial, run, CPU)
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


# --- runs ----------------------------------------------------------------------------------


def test_it_trains_on_train_images_and_validates_on_evenly_spaced_val_images(tmp_path, monkeypatch):
    """Each val image has a grey value of its own, and lies in the list in that order."""
    for index in range(12):
        for split, value in (("train", 200 + index), ("val", index)):
            path = tmp_path / "images" / split / f"class{index // 4}" / f"{index:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (value,) * 3).save(path)
    monkeypatch.setattr(training, "MAX_VALIDATION", 4)
    monkeypatch.setattr(training.os, "cpu_count", lambda: 1)
    task = make_task(make_config(tmp_path / "images", tmp_path / "run"))
    assert ((task.val[:, 0, 0, 0] + 1) * 127.5).round().tolist() == [0, 4, 7, 11]
    seen = []
    forward = task.forward
    task.forward = lambda images: (seen.append(images), forward(images))[1]
    for step in range(3):
        task.loss(step, 0)
    values = ((torch.cat(seen)[:, 0, 0, 0] + 1) * 127.5).round()
    assert sorted(values.tolist()) == list(range(200, 212)), "one epoch: every training image once"


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A run with a discriminator, and its last checkpoint's other state."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, train_and_keep(make_config(folder, out, adversarial=JUDGE, l1_weight=0.5))


def train_and_keep(config):
    """The `extra_state` that the last checkpoint of a run holds."""
    kept, extra_state = [], TokenizerTask.extra_state
    with pytest.MonkeyPatch.context() as patch:
        keep = lambda task: kept.append(extra_state(task)) or kept[-1]  # noqa: E731
        patch.setattr(TokenizerTask, "extra_state", keep)
        train_tokenizer(config, CPU)
    return kept[-1]


def test_an_interrupted_run_with_a_discriminator_ends_with_the_same_bits(
    folder, whole, tmp_path, monkeypatch
):
    parted = make_config(folder, tmp_path / "parted", adversarial=JUDGE, l1_weight=0.5)
    die_at_step_5(monkeypatch, lambda: train_tokenizer(parted, CPU))
    state = train_and_keep(parted)
    assert tok.load(parted.out).fingerprint == tok.load(whole[0]).fingerprint
    assert state.keys() == {"idle_steps", "discriminator", "discriminator_optimizer"}
    torch.testing.assert_close(state, whole[1], rtol=0, atol=0)
    assert state["discriminator_optimizer"]["state"][0]["step"] == 5  # steps 3 to 7


def test_init_from_continues_with_the_weights_of_a_tokenizer(folder, whole, tmp_path):
    config = make_config(folder, tmp_path, init_from=whole[0], tokenizer={})
    model = training.make_tokenizer(config)
    assert model.fingerprint == tok.load(whole[0]).fingerprint
    assert all(p.requires_grad for p in model.parameters())
    other = config.model_copy(update={"tokenizer": {"codebook_size": 32}})
    with pytest.raises(ValueError, match=r"whole.*\[16, 4\].*\[32, 4\]"):
        training.make_tokenizer(other)


def test_refusals_come_before_anything_is_written(folder, tmp_path):
    with pytest.raises(ValueError, match=r"images.size 16.* 24"):
        config = make_config(folder, tmp_path / "run", adversarial=JUDGE | {"n_layers": 3})
        train_tokenizer(config, CPU)
    assert not (tmp_path / "run").exists()


def test_an_unreadable_image_ends_no_run(tmp_path, capsys):
    folder = smooth_images(tmp_path / "images")
    broken = folder / "warm" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    task = make_task(make_config(folder, tmp_path / "run"))
    for step in range(4):
        assert task.loss(step, 0)[0].isfinite()
    (line,) = capsys.readouterr().err.splitlines()
    assert "warm/1.png" in line and "UserWarning" not in line
    for path in folder.rglob("*.png"):
        path.write_text("no image")
    with pytest.raises(ValueError, match="none of its 2 images"):
        make_task(make_config(folder, tmp_path / "other"))


def test_a_share_of_the_training_images_is_held_out(tmp_path):
    """images.val_fraction reaches both splits: held-out images must not be trained on."""
    images = {"source": "digits", "size": 16, "val_fraction": 0.25}
    task = make_task(make_config("digits", tmp_path, images=images))
    expected = {split: open_images("digits", split, 0.25) for split in ("train", "val")}
    assert task.train.source.identifiers == expected["train"].identifiers
    assert len(task.val) == len(expected["val"]) != 360
