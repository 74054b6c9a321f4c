"""Checkpoints: kept, checked, replaced; runs that are killed, stopped, or out of disk."""

from __future__ import annotations

import errno
import os
import shutil

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint import filesystem

from moveimg.checkpoint import load_generator, read_about
from moveimg.training.checkpoints import read_index
from moveimg.training.generator import train_generator
from moveimg.training.logging import gate_statistics
from moveimg.training.loop import Run
from tests.conftest import VARIANTS, lively, random_inputs, tiny_config
from tests.test_training import CPU, die_at_step_5, newest_state, same_end, train_config
from tools.kill import kill_command, leftovers, list_commands


def kept(out) -> list[int]:
    names = (path.name for path in (out / "training/checkpoints").glob("step-*"))
    return sorted(int(name.split("-")[1]) for name in names if name[-1].isdigit())


@pytest.mark.parametrize("name", ["train", "encode", "evaluate", "convert"])
def test_killed_commands_end_with_the_same_bytes(digits, tmp_path, name):
    command = list_commands(digits, tmp_path, steps=16)[name]
    assert kill_command(command, tmp_path, kills=2 if name == "train" else 1, seed=3)


def test_the_newest_checkpoints_and_the_best_model_stay(digits, tmp_path, monkeypatch):
    scores = iter([3.0, 1.0, 2.0, 2.5])
    monkeypatch.setattr(Run, "_validate", score_by(scores))
    config = train_config(digits, tmp_path, validate_every=2, keep_checkpoints=1)
    train_generator(config, CPU)
    assert kept(tmp_path) == [8]
    assert read_index(tmp_path / "training/checkpoints/step-0000008")["best"] == 1.0
    assert read_about(tmp_path / "training/best")["step"] == 4
    state = newest_state(tmp_path)
    exported = load_generator(tmp_path).state_dict()
    assert all(torch.equal(value, state[f"ema.{key}"]) for key, value in exported.items())


def score_by(scores):
    def validate(run, model, logger):
        run.held_out, run.validated = {"loss": next(scores)}, run.step

    return validate


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """A run of 6 steps that nothing happened to."""
    config = train_config(digits, tmp_path_factory.mktemp("runs") / "whole", steps=6)
    train_generator(config, CPU)
    return config


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "extra.pt", "checkpoint.json"])
def test_a_damaged_newest_checkpoint_falls_back(digits, whole, tmp_path, capsys, file):
    parted = train_config(digits, tmp_path / "parted", steps=6)
    shutil.copytree(whole.out, parted.out)
    (parted.out / "model.safetensors").unlink()
    flip_a_bit(tmp_path / "parted/training/checkpoints/step-0000006" / file)
    train_generator(parted, CPU)
    said = capsys.readouterr().err
    assert f"{file} " in said and "set aside, going back to step-0000004" in said
    assert same_end(whole.out, parted.out) and (parted.out / "model.safetensors").is_file()
    assert (parted.out / "training/checkpoints/step-0000006.damaged").is_dir()


@pytest.mark.parametrize("full_at", [4, 8])
def test_a_full_disk_leaves_the_one_before(digits, tmp_path, monkeypatch, capsys, full_at):
    write, step = filesystem._write_item, 0
    save = Run.save

    def saving(run, model):
        nonlocal step
        run.checkpoints.wait()
        step = run.step
        save(run, model)

    def writing(*args):
        if step == full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*args)

    monkeypatch.setattr(Run, "save", saving)
    monkeypatch.setattr(filesystem, "_write_item", writing)
    config = train_config(digits, tmp_path)
    message = f"checkpoint of step {full_at} not written (No space left on device)"
    if full_at == 8:  # the last one: the run has not kept what it was for
        with pytest.raises(OSError, match="step 8 not written"):
            train_generator(config, CPU)
        assert kept(tmp_path) == [4, 6]
    else:
        train_generator(config, CPU)
        assert kept(tmp_path) == [6, 8]
    assert message in capsys.readouterr().err
    assert not leftovers(tmp_path)


def test_muon_resumes_to_the_same_bits_and_learns(digits, tmp_path):
    muon = {"optimizer": {"kind": "muon", "lr": 3e-3, "warmup": 2}}
    whole, parted = (train_config(digits, tmp_path / name, **muon) for name in ("whole", "parted"))
    train_generator(whole, CPU)
    with pytest.MonkeyPatch.context() as patch:
        die_at_step_5(patch, lambda: train_generator(parted, CPU))
    train_generator(parted, CPU)
    assert same_end(whole.out, parted.out)
    state = newest_state(whole.out)
    momentum = {key for key in state if key.endswith(".momentum_buffer")}
    adam = {key for key in state if key.endswith(".exp_avg")}
    assert momentum and all("layers." in k and "router" not in k for k in momentum)
    assert any("memory.bank" in key for key in adam) and any("router" in key for key in adam)
    weights = {key for key in state if key.startswith("model.")}
    assert len(momentum) + len(adam) == len(weights)


def test_what_a_killed_run_left_half_written_is_swept(digits, tmp_path):
    config = train_config(digits, tmp_path, steps=2)
    train_generator(config, CPU)
    partial = tmp_path / "training/checkpoints/.step-0000004.partial"
    partial.mkdir()
    left = [tmp_path / ".model.safetensors.ab12_xyz.safetensors"]
    left.append(tmp_path / "training/.metrics.jsonl.ab12_xyz.jsonl")
    mine = tmp_path / ".notes.original"
    for path in (*left, mine):
        path.write_text("x")
    train_generator(config, CPU)
    assert not partial.exists() and not any(path.exists() for path in left) and mine.exists()


def test_a_run_on_other_data_or_without_settings_is_refused(digits, tmp_path):
    config = train_config(digits, tmp_path, steps=2)
    train_generator(config, CPU)
    data = tmp_path / "training/data.json"
    before = data.read_text()
    data.write_text(before.replace('"train codes": "', '"train codes": "0'))
    with pytest.raises(ValueError, match=r"holds a run on other data \(the train codes"):
        train_generator(config, CPU)
    data.write_text(before)
    (tmp_path / "training/config.yaml").write_text("steps: [")
    with pytest.raises(ValueError, match=r"config.yaml: not valid YAML"):
        train_generator(config, CPU)


def test_rates_and_gates_are_logged(digits, tmp_path):
    train_generator(train_config(digits, tmp_path, steps=4), CPU)
    events = EventAccumulator(str(tmp_path / "training")).Reload()
    found = set(events.Tags()["scalars"])
    rates = {"images_per_second", "tokens_per_second", "grad_norm", "lr", "accuracy", "loss"}
    assert {f"train/{key}" for key in rates} | {"val/loss", "gates/g_0", "gates/g_i"} <= found
    last = {key: events.Scalars(f"train/{key}")[-1].value for key in rates}
    assert last["tokens_per_second"] == pytest.approx(16 * last["images_per_second"])
    assert set(events.Tags()["images"]) == {"preview", "preview-raw"}


def test_gate_statistics_are_those_of_the_gates():
    model = lively(tiny_config(**VARIANTS["mha-move-3-class-rows-swiglu"]))
    codes, labels = random_inputs(model.config)
    seen = []
    for block in model.layers:
        mixer = next(m for m in block.modules() if type(m).__name__ == "GatedMixer")
        mixer.register_forward_pre_hook(lambda mixer, args: seen.append(mixer.router(args[0])))
    found = gate_statistics(model, lambda: model(codes, labels))
    gates = torch.stack(seen)[:, :, 1:].sigmoid() * 2  # [layers, B, S, H * G]
    gates = gates.unflatten(-1, (2, 4))
    assert found["g_0"] == pytest.approx(gates[..., 0].mean().item(), abs=1e-6)
    assert found["g_i_near_2"] == pytest.approx((gates[..., 1:] > 1.9).double().mean().item())
    assert found["g_i_near_0"] == pytest.approx((gates[..., 1:] < 0.1).double().mean().item())
