"""Runs that are killed, stopped, lengthened, restarted or out of disk; hostile checkpoints."""

from __future__ import annotations

import errno
import io
import os
import pickle
import shutil
import signal

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from moveimg.checkpoint import load_generator, read_about
from moveimg.data.codes import PackedCodes
from moveimg.training.generator import GeneratorTask, train_generator
from moveimg.training.logging import read_measurements
from moveimg.training.loop import Run, catch_stop
from tests.test_training import CPU, few_digits, newest_state, same_end, train_config
from tools.kill import kill_command, list_commands

LAST = "training/checkpoints/step-0000006"


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """A run of 6 steps that nothing happened to."""
    config = train_config(digits, tmp_path_factory.mktemp("runs") / "whole", steps=6)
    train_generator(config, CPU)
    return config


@pytest.mark.parametrize("name", ["train", "encode", "evaluate"])
def test_killed_commands_end_with_the_same_bytes(digits, tmp_path, name):
    command = list_commands(digits, tmp_path)[name]
    assert kill_command(name, command, tmp_path, kills=1, seed=3)


def test_the_newest_checkpoints_and_the_best_model_stay(digits, tmp_path, monkeypatch):
    scores = iter([3.0, 1.0, 2.0, 2.5])
    monkeypatch.setattr(GeneratorTask, "validate", lambda *_: {"loss": next(scores)})
    train_generator(train_config(digits, tmp_path, validate_every=2, keep_checkpoints=1), CPU)
    (path,) = (tmp_path / "training/checkpoints").iterdir()
    assert path.name == "step-0000008" and '"best": 1.0' in (path / "checkpoint.json").read_text()
    assert read_about(tmp_path / "training/best")["step"] == 4
    state, exported = newest_state(tmp_path), load_generator(tmp_path).state_dict()
    assert all(torch.equal(value, state[f"ema.{key}"]) for key, value in exported.items())


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "extra.pt", "checkpoint.json"])
def test_a_damaged_checkpoint_is_named(digits, whole, tmp_path, file):
    parted = train_config(digits, tmp_path / "parted", steps=6)
    shutil.copytree(whole.out, parted.out)
    newest = parted.out / LAST
    (newest / file).write_bytes((newest / file).read_bytes()[:40])
    with pytest.raises(ValueError, match=newest.name):
        train_generator(parted, CPU)
    if file == "extra.pt":
        shutil.rmtree(newest)
        train_generator(parted, CPU)  # from the one before
        assert same_end(whole.out, parted.out)


def test_a_full_disk_ends_the_run_and_the_checkpoint_before_stays(
    digits, whole, tmp_path, monkeypatch
):
    write, advance, step = filesystem._write_item, Run.advance, 0

    def advancing(run):
        nonlocal step
        run.checkpoints.wait()
        step = run.step + 1
        return advance(run)

    def writing(*args):
        if step == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*args)

    config = train_config(digits, tmp_path, steps=6)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "advance", advancing)
        patch.setattr(filesystem, "_write_item", writing)
        with pytest.raises(OSError, match=r"step-0000004.*No space left"):
            train_generator(config, CPU)
    assert (tmp_path / "training/checkpoints/step-0000002").is_dir()
    partial = tmp_path / "training/checkpoints/.step-0000009.partial"
    partial.mkdir()  # of a killed run
    (tmp_path / "training/.metrics.jsonl.tmp-ab12cd34.jsonl").write_text("x")
    train_generator(config, CPU)
    assert same_end(whole.out, tmp_path) and not partial.exists()
    assert not list((tmp_path / "training").glob(".metrics*"))


@pytest.mark.parametrize(
    ("file", "text", "named"),
    [
        ("training/data.json", '{"tokenizer": "another"}', "data.json"),
        ("training/config.yaml", "steps: [", "config.yaml"),
        ("training/metrics.jsonl", '{"step": "x"}', "metrics.jsonl"),
        ("training/metrics.jsonl", '{"step": 1', "metrics.jsonl"),
        (f"{LAST}/checkpoint.json", '{"checkpoint": {"step": "two"}}', "step"),
        (f"{LAST}/checkpoint.json", "[]", "checkpoint.json"),
    ],
)
def test_a_run_of_other_data_or_with_bad_files_is_refused(
    digits, whole, tmp_path, file, text, named
):
    out = tmp_path / "run"
    shutil.copytree(whole.out, out)
    (out / file).write_text(text)
    with pytest.raises(ValueError, match=named):
        read_measurements(out / "training/metrics.jsonl")
        train_generator(train_config(digits, out, steps=6), CPU)


def test_more_steps_continue_to_the_bits_of_a_longer_run(digits, whole, tmp_path):
    constant = {"optimizer": {"lr": 3e-3, "schedule": "constant"}}
    for out, lengths in (("whole", [6]), ("longer", [4, 6])):
        for steps in lengths:
            train_generator(train_config(digits, tmp_path / out, **constant, steps=steps), CPU)
    assert same_end(tmp_path / "whole", tmp_path / "longer")
    with pytest.raises(ValueError, match=r"steps 6, now 8"):  # its rate is a cosine
        train_generator(train_config(digits, whole.out, steps=8), CPU)


def test_restart_makes_a_run_and_its_codes_anew(digits, tmp_path):
    def config(size, lr):
        data = {"images": {"source": "digits", "size": size}, "tokenizer": digits / "tokenizer"}
        return train_config(digits, tmp_path, data=data, steps=1, optimizer={"lr": lr})

    with few_digits():
        train_generator(config(32, 3e-3), CPU)
        assert load_generator(tmp_path).config.n_classes == 10
        with pytest.raises(ValueError, match=r"image_size is 32 there, 16 asked"):
            train_generator(config(16, 3e-3), CPU)
        with pytest.raises(ValueError, match=r"optimizer\.lr 0\.003, now 1e-05"):
            train_generator(config(32, 1e-5), CPU)
        train_generator(config(16, 1e-5), CPU, restart=True)
    assert PackedCodes(tmp_path / "codes/train").image_size == 16


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_stop_with_a_checkpoint(digits, whole, tmp_path, monkeypatch, number):
    config, advance = train_config(digits, tmp_path, steps=6, checkpoint_every=50), Run.advance
    handler = signal.getsignal(number)

    def interrupted(run):
        if run.step == 4:
            signal.raise_signal(number)
        return advance(run)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "advance", interrupted)
        with pytest.raises(SystemExit) as caught:
            train_generator(config, CPU)
    assert caught.value.code == 128 + number and signal.getsignal(number) == handler
    assert (tmp_path / "training/checkpoints/step-0000005").is_dir()
    train_generator(config, CPU)
    assert same_end(whole.out, tmp_path)


def test_a_second_ctrl_c_ends_the_run_at_once():
    with catch_stop() as received:
        signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_rates_are_logged_and_those_of_the_schedule(whole):
    events = EventAccumulator(str(whole.out / "training")).Reload()
    rates = {"images_per_second", "grad_norm", "lr", "accuracy", "loss"}
    assert {f"train/{key}" for key in rates} | {"val/loss"} <= set(events.Tags()["scalars"])
    first, *later = (event.value for event in events.Scalars("train/lr"))
    assert first == pytest.approx(3e-3) and later == sorted(later, reverse=True)
    assert events.Tags()["images"] == ["preview"]


class Bomb:
    """Unpickling it freely writes a marker file."""

    def __init__(self, marker) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def put_in_values(path, data: bytes) -> None:
    """Let .metadata say that every value of a checkpoint that is no tensor is `data`."""
    metadata = dcp.FileSystemReader(path).read_metadata()
    file = path / "__0_0.distcp"
    start = file.stat().st_size
    with file.open("ab") as out:
        out.write(data)
    count = 0
    for index, about in metadata.state_dict_metadata.items():
        if isinstance(about, BytesStorageMetadata):
            place = metadata.storage_data[MetadataIndex(index)]
            place.offset, place.length, count = start, len(data), count + 1
    assert count
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("name", [".metadata", "extra.pt", "__0_0.distcp"])
def test_hostile_checkpoints_run_nothing(digits, whole, tmp_path, name):
    shutil.copytree(whole.out, tmp_path / "run")
    path = tmp_path / "run" / LAST
    marker = tmp_path / "marker"
    if name == "__0_0.distcp":
        payload = io.BytesIO()
        torch.save(Bomb(marker), payload)
        put_in_values(path, payload.getvalue())
    else:
        (path / name).write_bytes(pickle.dumps(Bomb(marker), protocol=2))
    with pytest.raises(ValueError, match=path.name):
        train_generator(train_config(digits, tmp_path / "run", steps=6), CPU)
    assert not marker.exists()
