"""Training tokenizers: the delayed discriminator, resume to the bit, codes of every quantizer."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tokenizer as tok
from moveimg.config import TokenizerTrainConfig, load_config
from moveimg.data.codes import PackedCodes
from moveimg.errors import validate
from moveimg.training import tokenizer as training
from moveimg.training.loop import Run
from moveimg.training.parallel import Plan
from moveimg.training.tokenizer import TokenizerTask, train_tokenizer
from tests.test_cli import run
from tests.test_training import die_at_step_5

CPU = torch.device("cpu")
TINY = {
    "width": 8, "multipliers": [1, 1, 1], "n_res_blocks": 1, "z_channels": 8, "norm_groups": 4,
    "codebook_size": 16, "codebook_dim": 4, "attention": False,
}  # fmt: skip
JUDGE = {"start": 3, "n_layers": 1, "width": 4, "lr": 1e-3}


def smooth_pictures(root: Path) -> Path:
    """Two classes of smooth colour pictures, in a folder."""
    rng = np.random.default_rng(0)
    for index in range(12):
        path = root / ("warm" if index % 2 else "cold") / f"{index}.png"
        path.parent.mkdir(exist_ok=True, parents=True)
        coarse = Image.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8))
        coarse.resize((16, 16), Image.Resampling.BICUBIC).save(path)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return smooth_pictures(tmp_path_factory.mktemp("images"))


def make_config(folder, out, quantizer=None, **changes) -> TokenizerTrainConfig:
    settings = {
        "out": out, "images": {"source": str(folder), "size": 16}, "steps": 8, "batch_size": 4,
        "tokenizer": TINY | {"quantizer": quantizer or {"kind": "vq", "reseed_after": 2}},
        "ema": 0.9, "optimizer": {"lr": 1e-3}, "log_every": 2, "validate_every": 4,
        "preview_every": 8, "checkpoint_every": 2,
    }  # fmt: skip
    return validate(TokenizerTrainConfig, settings | changes, "test")


def fingerprint_of(config: TokenizerTrainConfig) -> str:
    return tok.load(config.out).fingerprint


def test_the_discriminator_changes_nothing_before_its_start(folder, tmp_path):
    def trained(name, steps, **changes):
        config = make_config(folder, tmp_path / name, steps=steps, **changes)
        train_tokenizer(config, CPU)
        return fingerprint_of(config)

    assert trained("a", 3) == trained("b", 3, adversarial=JUDGE)
    assert trained("c", 4) != trained("d", 4, adversarial=JUDGE)


@pytest.mark.parametrize("kind", ["vq", "simvq"])
def test_an_interrupted_run_with_a_discriminator_ends_with_the_same_bits(
    folder, tmp_path, monkeypatch, kind
):
    whole, parted = (
        make_config(folder, tmp_path / name, {"kind": kind}, adversarial=JUDGE, l1_weight=0.5)
        for name in ("whole", "parted")
    )
    kept = {}
    extra = TokenizerTask.extra_state

    def keep(task):
        kept[task.config.out.name] = extra(task)
        return kept[task.config.out.name]

    monkeypatch.setattr(TokenizerTask, "extra_state", keep)
    train_tokenizer(whole, CPU)
    die_at_step_5(monkeypatch, lambda: train_tokenizer(parted, CPU))
    train_tokenizer(parted, CPU)
    assert fingerprint_of(whole) == fingerprint_of(parted)
    for part in ("discriminator", "discriminator_optimizer"):
        torch.testing.assert_close(kept["whole"][part], kept["parted"][part], rtol=0, atol=0)
    assert kept["whole"]["discriminator_optimizer"]["state"][0]["step"] == 5  # steps 3 to 7


@pytest.mark.parametrize("kind", ["vq", "simvq"])
def test_the_average_follows_codes_that_are_moved_and_keeps_frozen_ones(
    folder, tmp_path, monkeypatch, kind
):
    seen, advance = [], Run.advance

    def watching(run):
        if not seen:
            seen.append(run.ema.module.quantize.embedding.weight.double())
        scalars = advance(run)
        raw = run.task.model.quantize.embedding.weight.detach().double()
        decay = run.ema.get_decay(run.step)
        seen.append(decay * seen[-1] + (1 - decay) * raw)
        moved.append(int(scalars.get("reseeded", 0)))
        assert getattr(run.ema.module.quantize, "idle_steps", None) is None
        found = run.ema.module.quantize.embedding.weight.double()
        torch.testing.assert_close(found, seen[-1], rtol=1e-5, atol=1e-6)
        return scalars

    moved: list[int] = []
    monkeypatch.setattr(Run, "advance", watching)
    config = make_config(
        folder, tmp_path, {"kind": kind}, tokenizer=TINY | {
            "codebook_size": 200,
            "quantizer": {"kind": kind} | ({"reseed_after": 2} if kind == "vq" else {}),
        },
    )  # fmt: skip
    train_tokenizer(config, CPU)
    if kind == "simvq":
        assert torch.equal(seen[0], tok.load(tmp_path).quantize.embedding.weight.double())
    else:
        assert sum(moved) > 0 and not torch.equal(seen[0], seen[-1])
    codes = tok.load(tmp_path).quantize.embedding.weight.double()
    torch.testing.assert_close(codes, seen[-1], rtol=1e-5, atol=1e-6)


def test_the_discriminator_learns_and_its_scalars_are_logged(folder, tmp_path):
    config = make_config(folder, tmp_path, adversarial=JUDGE | {"start": 0})
    torch.manual_seed(0)
    model = tok.build(tok.parse_config({"kind": "vq"} | config.tokenizer, "test"))
    task = TokenizerTask(config, model, Plan())
    assert task.adversary is not None
    images = task.val.repeat(3, 1, 1, 1)
    noisy = images + 0.5 * torch.randn_like(images)
    found = [task.adversary.learn(0, images, noisy) for _ in range(40)]
    assert found[-1]["discriminator"] < 0.5 * found[0]["discriminator"]
    assert found[-1]["logits_real"] > 0 > found[-1]["logits_fake"]
    loss, scalars = task.loss(0)
    names = {"discriminator", "logits_real", "logits_fake", "adversarial", "adversarial_weight"}
    assert names < scalars.keys() and scalars["adversarial_weight"] > 0
    before = [p.grad for p in task.adversary.discriminator.parameters()]
    before = [None if grad is None else grad.clone() for grad in before]
    loss.backward()
    for parameter, grad in zip(task.adversary.discriminator.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, grad), "the tokenizer's loss does not teach it"


def test_the_perceptual_loss_is_weighed_into_the_reconstruction(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        training, "load_perceptual_loss", lambda *_: lambda a, b: (a - b).abs().amax()
    )
    config = make_config(folder, tmp_path, perceptual_weight=2.0, l1_weight=0.5)
    torch.manual_seed(0)
    model = tok.build(tok.parse_config({"kind": "vq"} | config.tokenizer, "test"))
    loss, terms = TokenizerTask(config, model, Plan()).loss(0)
    weights = {"l1": 0.5, "l2": 1, "perceptual": 2, "codebook": 1, "commitment": 0.25}
    expected = sum(weight * terms[name].item() for name, weight in weights.items())
    assert loss.item() == pytest.approx(expected, rel=1e-6) and terms["perceptual"] > 0


def test_bfloat16_trains(folder, tmp_path):
    config = make_config(
        folder, tmp_path, {"kind": "ibq"}, dtype="bfloat16", adversarial=JUDGE, steps=5
    )
    assert np.isfinite(train_tokenizer(config, CPU)["mse"])


def test_refusals_come_before_anything_is_written(folder, tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.urlopen", offline)
    bad = {"perceptual_weight": 1.0, "perceptual_folder": tmp_path / "hub"}
    with pytest.raises(ValueError, match=r"vgg16-397923af\.pth .*no network"):
        train_tokenizer(make_config(folder, tmp_path / "run", **bad), CPU)
    with pytest.raises(ValueError, match=r"at least 24 pixels a side, and images.size is 16"):
        judge = JUDGE | {"n_layers": 3}
        train_tokenizer(make_config(folder, tmp_path / "run", adversarial=judge), CPU)
    assert not (tmp_path / "run").exists()


def test_an_image_that_cannot_be_read_ends_no_run(tmp_path, capsys):
    folder = smooth_pictures(tmp_path / "images")
    broken = folder / "warm" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    config = make_config(folder, tmp_path / "run")
    assert np.isfinite(train_tokenizer(config, CPU)["mse"])
    said = [line for line in capsys.readouterr().err.splitlines() if "warm/1.png" in line]
    assert len(said) == 1 and said[0].endswith("; the next one takes its place")
    for path in folder.rglob("*.png"):
        path.write_text("no picture")
    with pytest.raises(ValueError, match="none of its 2 images can be read"):
        train_tokenizer(make_config(folder, tmp_path / "other"), CPU)


@pytest.mark.parametrize("kind", ["simvq", "ibq"])
def test_codes_of_every_quantizer_are_packed_and_decoded(folder, tmp_path, kind):
    config = make_config(folder, tmp_path / "tokenizer", {"kind": kind}, steps=2)
    train_tokenizer(config, CPU)
    run("encode", folder, "--tokenizer", config.out, "--out", tmp_path / "codes", "--size", 16)
    packed = PackedCodes(tmp_path / "codes" / "train")
    codes, _ = packed.get(np.arange(len(packed)), np.zeros(len(packed), np.int64))
    tokenizer = tok.load(config.out)
    packed.require_tokenizer(tokenizer.fingerprint)
    assert codes.shape == (len(packed), 16) and codes.min() >= 0 and codes.max() < 16
    images = tokenizer.decode(codes)
    assert images.shape == (len(packed), 3, 16, 16)
    task = TokenizerTask(config, tokenizer, Plan())
    again = torch.stack([task_image(task, index) for index in range(len(packed))])
    assert torch.equal(tokenizer.encode(again), codes)


def task_image(task: TokenizerTask, index: int) -> torch.Tensor:
    """A training image of 16 x 16 pixels as the tokenizer sees it."""
    pixels = np.asarray(task.train.image(index), np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)


def test_the_shipped_kinds_differ_in_nothing_but_their_quantizer():
    configs = Path(__file__).parents[1] / "configs"
    base = load_config(configs / "digits-tokenizer.yaml", TokenizerTrainConfig)
    for kind in ("simvq", "ibq"):
        config = load_config(configs / f"digits-tokenizer-{kind}.yaml", TokenizerTrainConfig)
        own = {"quantizer"}
        assert config.tokenizer["quantizer"]["kind"] == kind
        assert {k: v for k, v in config.tokenizer.items() if k not in own} == {
            k: v for k, v in base.tokenizer.items() if k not in own
        }
        left = {"out": base.out, "tokenizer": base.tokenizer}
        assert config.model_copy(update=left) == base
