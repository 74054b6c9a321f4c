"""Training: the recipe's pieces, resume to the bit, and refusals; on digits, at tiny size."""

from __future__ import annotations

import json
import math
import signal
from contextlib import contextmanager

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from moveimg.checkpoint import BUNDLED, load_model, load_tokenizer, read_about
from moveimg.config import OptimizerConfig, TokenizerTrainConfig, TrainConfig
from moveimg.data import sources as data
from moveimg.data.encode import encode_splits
from moveimg.errors import validate
from moveimg.model import ValueTable
from moveimg.training import generator
from moveimg.training.generator import GeneratorTask, train_generator
from moveimg.training.loop import Run
from moveimg.training.optimizer import clip_gradients, learning_rate, make_optimizers
from moveimg.training.tokenizer import train_tokenizer
from tests.conftest import FEEDFORWARDS, random_model, tiny_config

CPU = torch.device("cpu")
TOKENIZER = {
    "width": 8, "multipliers": [1, 1, 1, 1], "n_res_blocks": 1, "z_channels": 8, "norm_groups": 4,
    "codebook_size": 16, "codebook_dim": 4, "attention": False,
    "quantizer": {"kind": "vq", "reseed_after": 2},
}  # fmt: skip
FEW = {"train": 160, "val": 40}
EVERY = {"log_every": 2, "validate_every": 4, "preview_every": 8, "checkpoint_every": 2}


def tokenizer_config(out, **changes) -> TokenizerTrainConfig:
    settings = {
        "out": out, "images": {"source": "digits", "size": 32}, "tokenizer": TOKENIZER,
        "steps": 8, "batch_size": 4, "ema": 0.9, "optimizer": {"lr": 1e-3}, **EVERY,
    }  # fmt: skip
    return validate(TokenizerTrainConfig, settings | changes, "test")


@contextmanager
def few_digits():
    """Let the data set `digits` have few images of each class, which takes a tenth of the time."""
    everything = data.load_digit_arrays
    with pytest.MonkeyPatch.context() as patch:
        some = lambda split: tuple(part[: FEW[split]] for part in everything(split))  # noqa: E731
        patch.setattr(data, "load_digit_arrays", some)
        yield


def encode_tiny_digits(folder):
    """A tokenizer trained for a few steps, and some digits packed by it, in `folder`."""
    with few_digits():
        train_tokenizer(tokenizer_config(folder / "tokenizer"), CPU)
        config = tokenizer_config(folder).images
        encode_splits(config, load_tokenizer(folder / "tokenizer", CPU), folder / "codes")


def train_config(digits, out, **changes) -> TrainConfig:
    settings = {
        "out": out, "data": {"codes": digits / "codes", "tokenizer": digits / "tokenizer"},
        "model": {"n_layer": 2, "n_head": 2, "width": 16, "memory": {"kind": "move", "slots": 2}},
        "steps": 8, "batch_size": 16, "ema": 0.9, "sampling": {"cfg_scale": 1.5},
        "optimizer": {"lr": 3e-3, "schedule": "cosine", "warmup": 2}, **EVERY,
    }  # fmt: skip
    return validate(TrainConfig, settings | changes, "test")


def newest_state(out) -> dict[str, torch.Tensor]:
    """Every tensor of a run's newest checkpoint, by name."""
    path = max((out / "training/checkpoints").glob("step-" + 7 * "[0-9]"))
    reader = dcp.FileSystemReader(path)
    described = reader.read_metadata().state_dict_metadata
    state = {
        key: torch.empty(about.size, dtype=about.properties.dtype)
        for key, about in described.items()
        if isinstance(about, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def same_end(one, other) -> bool:
    """Whether two runs end with the same bits of weights, average and moments."""
    states = [newest_state(one), newest_state(other)]
    return states[0].keys() == states[1].keys() and all(
        torch.equal(value, states[1][key]) for key, value in states[0].items()
    )


def die_at_step_5(monkeypatch, run_it):
    """Interrupt a run between two checkpoints: step 4 is saved, step 5 is lost."""
    advance = Run.advance

    def dying(run):
        if run.step == 5:
            run.checkpoints.wait()
            raise KeyboardInterrupt
        return advance(run)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "advance", dying)
        with pytest.raises(KeyboardInterrupt):
            run_it()


def test_a_run_makes_a_model_that_has_learned(digits, tmp_path, monkeypatch):
    every = {"validate_every": 20, "preview_every": 20, "checkpoint_every": 40}
    config, state = train_config(digits, tmp_path, steps=40, **every), torch.get_rng_state()
    result = train_generator(config, CPU)
    assert torch.equal(state, torch.get_rng_state())  # training has its own generators
    assert result["loss"] < math.log(16)  # better than a uniform distribution
    lines = [json.loads(s) for s in (tmp_path / "training/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 40] and lines[1]["loss"] < lines[0]["loss"]
    assert (tmp_path / "training/preview-000020.png").is_file()
    parts, about = load_model(tmp_path), read_about(tmp_path)
    assert parts.generator.config.grid == (4, 4) and parts.class_names[7] == "seven"
    assert about["step"] == 40 and about["run"]["optimizer"]["lr"] == 3e-3
    monkeypatch.setattr(Run, "advance", lambda run: pytest.fail("trained again"))
    assert train_generator(config, CPU) == result


@pytest.mark.parametrize("kind", ["adamw", "muon", "tokenizer"])
def test_an_interrupted_run_ends_with_the_same_bits(digits, tmp_path, monkeypatch, kind):
    outs = tmp_path / "whole", tmp_path / "parted"
    if kind == "tokenizer":  # more codes than vectors: idle ones are re-seeded after the break
        train, many = train_tokenizer, TOKENIZER | {"codebook_size": 128, "dropout": 0.1}
        whole, parted = (tokenizer_config(out, tokenizer=many, steps=9) for out in outs)
    else:
        options = {"kind": kind, "lr": 3e-3, "schedule": "cosine", "warmup": 2}
        train = train_generator
        whole, parted = (train_config(digits, o, optimizer=options, steps=6) for o in outs)
    with few_digits():
        train(whole, CPU)
        die_at_step_5(monkeypatch, lambda: train(parted, CPU))
        train(parted, CPU)
    assert same_end(*outs)
    if kind != "tokenizer":
        state = newest_state(whole.out)
        momentum = {key for key in state if key.endswith(".momentum_buffer")}
        adam = {key for key in state if key.endswith(".exp_avg")}
        assert (kind == "muon") == bool(momentum)
        assert all("layers." in key and "router" not in key for key in momentum)
        assert any("memory.bank" in key for key in adam) and any("router" in key for key in adam)
        assert len(momentum) + len(adam) == sum(key.startswith("model.") for key in state)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("model", "codebook_size", 32),
        ("model", "n_classes", 9),
        ("data", "tokenizer", BUNDLED / "digits"),
    ],
)
def test_a_model_or_tokenizer_of_other_codes_is_refused(digits, tmp_path, section, key, value):
    config = train_config(digits, tmp_path, model={"n_layer": 1, "n_head": 2, "width": 16})
    changed = getattr(config, section).model_copy(update={key: value})
    named = (
        load_tokenizer(value, CPU).fingerprint[:12] if section == "data" else f"{key} is {value}"
    )
    with pytest.raises(ValueError, match=named):
        train_generator(config.model_copy(update={section: changed}), CPU)


@pytest.mark.parametrize("stop", [False, True], ids=["checkpoint due", "SIGTERM"])
def test_no_checkpoint_follows_a_gradient_that_is_not_finite(digits, tmp_path, monkeypatch, stop):
    """The loss of that step is still finite, but its weights are not."""
    loss = GeneratorTask.loss

    def spoilt(task, step, part):
        value, scalars = loss(task, step, part)
        if step == 1:
            value.register_hook(lambda gradient: gradient * torch.nan)
            if stop:
                signal.raise_signal(signal.SIGTERM)
        return value, scalars

    monkeypatch.setattr(GeneratorTask, "loss", spoilt)
    every = {"log_every": 50, "checkpoint_every": 50 if stop else 2}
    with pytest.raises(ValueError, match=r"at step 1 "):
        train_generator(train_config(digits, tmp_path, **every), CPU)
    assert not list((tmp_path / "training").glob("checkpoints/step-*"))


def test_a_table_gradient_that_is_not_finite_shows_at_its_own_step():
    """Value tables are clipped separately: the norm that is checked must include them."""
    model = random_model(tiny_config(ffn=FEEDFORWARDS["product_key"]), dtype=torch.float32)
    optimizers = make_optimizers(model, OptimizerConfig())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    (table,) = (m.weight for m in model.modules() if isinstance(m, ValueTable))
    rest = sum(p.numel() for p in model.parameters()) - table.numel()
    assert clip_gradients(optimizers, OptimizerConfig()) == pytest.approx(math.sqrt(rest))
    table.grad[0, 0] = torch.inf
    assert not clip_gradients(optimizers, OptimizerConfig()).isfinite()


def test_learning_rates():
    config = OptimizerConfig(lr=1.0, warmup=4, schedule="cosine", final_lr=0.1)
    rates = [learning_rate(config, step, 104) for step in range(105)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[54] == pytest.approx(0.55) and rates[104] == pytest.approx(0.1)
    constant = OptimizerConfig(lr=2.0, warmup=2)
    assert [learning_rate(constant, step, 9) for step in (0, 1, 5, 8)] == [1.0, 2.0, 2.0, 2.0]


def test_weight_decay_falls_on_matrices_and_tables_alone():
    model = random_model(tiny_config(memory={"kind": "move", "slots": 2}), dtype=torch.float32)
    (optimizer,) = make_optimizers(model, OptimizerConfig(weight_decay=0.05))
    decayed = {id(p) for p in optimizer.param_groups[0]["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == ("norm" not in name), name
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]


def test_dropped_labels_are_null_and_validation_reads_held_out_codes(digits, tmp_path, monkeypatch):
    made, seen = [], []
    monkeypatch.setattr(generator, "fit", lambda task, *args: made.append(task) or {})
    train_generator(train_config(digits, tmp_path, class_dropout=1.0), CPU)
    (task,) = made
    task.forward.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    task.loss(0, 0)
    assert (seen[0] == task.model.null_label).all()
    assert task.val.directory.name == "val" and task.codes.directory.name == "train"
    monkeypatch.setattr(task.codes, "get", lambda *_: pytest.fail("read the training codes"))
    task.validate(task.model.eval())
