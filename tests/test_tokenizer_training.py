"""Training tokenizers: data, discriminator, resume to the bit, codes of every quantizer."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tokenizer as tok
from moveimg.config import TokenizerTrainConfig
from moveimg.data import open_images
from moveimg.errors import validate
from moveimg.training import tokenizer as training
from moveimg.training.loop import Run
from moveimg.training.parallel import Parallelism
from moveimg.training.tokenizer import TokenizerTask, train_tokenizer
from tests.test_training import die_at_step_5

CPU = torch.device("cpu")
TINY = {
    "width": 8, "multipliers": [1, 1, 1], "n_res_blocks": 1, "z_channels": 8, "norm_groups": 4,
    "codebook_size": 16, "codebook_dim": 4, "attention": False,
}  # fmt: skip
JUDGE = {"start": 3, "n_layers": 1, "width": 4, "lr": 1e-3}


def smooth_images(root: Path) -> Path:
    """Two classes of smooth colour images, in a folder."""
    rng = np.random.default_rng(0)
    for index in range(12):
        path = root / ("warm" if index % 2 else "cold") / f"{index}.png"
        path.parent.mkdir(exist_ok=True, parents=True)
        coarse = Image.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8))
        coarse.resize((16, 16), Image.Resampling.BICUBIC).save(path)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return smooth_images(tmp_path_factory.mktemp("images"))


def make_config(folder, out, quantizer=None, **changes) -> TokenizerTrainConfig:
    settings = {
        "out": out, "images": {"source": str(folder), "size": 16}, "steps": 8, "batch_size": 4,
        "tokenizer": TINY | {"quantizer": quantizer or {"kind": "vq", "reseed_after": 2}},
        "ema": 0.9, "optimizer": {"lr": 1e-3}, "log_every": 2, "validate_every": 4,
        "preview_every": 8, "checkpoint_every": 2,
    }  # fmt: skip
    return validate(TokenizerTrainConfig, settings | changes, "test")


def make_task(config: TokenizerTrainConfig) -> TokenizerTask:
    torch.manual_seed(0)
    return TokenizerTask(config, training.make_tokenizer(config), Parallelism())


def train(config: TokenizerTrainConfig) -> str:
    """The fingerprint of the tokenizer that a run makes."""
    train_tokenizer(config, CPU)
    return tok.load(config.out).fingerprint


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


def test_an_interrupted_run_with_a_discriminator_ends_with_the_same_bits(
    folder, tmp_path, monkeypatch
):
    whole, parted = (
        make_config(folder, tmp_path / name, adversarial=JUDGE, l1_weight=0.5)
        for name in ("whole", "parted")
    )
    kept = {}
    extra_state = TokenizerTask.extra_state

    def keep(task):
        kept[task.config.out.name] = extra_state(task)
        return kept[task.config.out.name]

    monkeypatch.setattr(TokenizerTask, "extra_state", keep)
    train_tokenizer(whole, CPU)
    die_at_step_5(monkeypatch, lambda: train_tokenizer(parted, CPU))
    assert train(parted) == tok.load(whole.out).fingerprint
    for part in ("idle_steps", "discriminator", "discriminator_optimizer"):
        torch.testing.assert_close(kept["whole"][part], kept["parted"][part], rtol=0, atol=0)
    assert kept["whole"]["discriminator_optimizer"]["state"][0]["step"] == 5  # steps 3 to 7


@pytest.mark.parametrize("kind", ["vq", "simvq"])
def test_the_average_follows_codes_that_are_moved_and_keeps_frozen_ones(
    folder, tmp_path, monkeypatch, kind
):
    averages, moved, advance = [], [], Run.advance

    def watching(run):
        quantize = run.ema.module.quantize
        if not averages:
            averages.append(quantize.embedding.weight.double())
        scalars = advance(run)
        raw = run.task.model.quantize.embedding.weight.detach().double()
        decay = run.ema.get_decay(run.step)
        averages.append(decay * averages[-1] + (1 - decay) * raw)
        moved.append(int(scalars.get("reseeded", 0)))
        assert getattr(quantize, "idle_steps", None) is None
        return scalars

    monkeypatch.setattr(Run, "advance", watching)
    quantizer = {"kind": kind} | ({"reseed_after": 2} if kind == "vq" else {})
    settings = TINY | {"codebook_size": 200, "quantizer": quantizer}
    train_tokenizer(make_config(folder, tmp_path, tokenizer=settings), CPU)
    codes = tok.load(tmp_path).quantize.embedding.weight.double()
    torch.testing.assert_close(codes, averages[-1], rtol=1e-5, atol=1e-6)
    assert torch.equal(averages[0], codes) == (kind == "simvq")
    assert (sum(moved) > 0) == (kind == "vq")


def test_init_from_continues_with_the_weights_of_a_tokenizer(folder, tmp_path):
    first = train(make_config(folder, tmp_path / "first", steps=2))
    config = make_config(folder, tmp_path / "second", init_from=tmp_path / "first", tokenizer={})
    model = training.make_tokenizer(config)
    assert model.fingerprint == first and all(p.requires_grad for p in model.parameters())
    assert train(config) != first and tok.load(tmp_path / "first").fingerprint == first
    other = config.model_copy(update={"tokenizer": {"codebook_size": 32}})
    with pytest.raises(ValueError, match=r"first.*\[16, 4\].*\[32, 4\]"):
        training.make_tokenizer(other)


def test_refusals_come_before_anything_is_written(folder, tmp_path):
    with pytest.raises(ValueError, match=r"images.size 16.* 24"):
        judge = JUDGE | {"n_layers": 3}
        train_tokenizer(make_config(folder, tmp_path / "run", adversarial=judge), CPU)
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
