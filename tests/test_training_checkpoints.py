"""Runs that are killed, stopped, lengthened, restarted or out of disk; hostile checkpoints."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import signal
from unittest.mock import Mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from moveimg.checkpoint import load_generator, read_about
from moveimg.data.codes import PackedCodes
from moveimg.training.checkpoints import Checkpoints
from moveimg.training.generator import GeneratorTask, train_generator
from moveimg.training.logging import read_measurements
from moveimg.training.loop import Run, catch_stop
from tests.test_training import CPU, few_digits, newest_state, same_end, train_config
from tools.kill import kill_command, list_commands

LAST = "training/checkpoints/step-0000006"


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """An uninterrupted run of 6 steps."""
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


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("marker",)  # a folder, if it is unpickled


CUT, BOMB = b"", pickle.dumps(Bomb(), protocol=2)


def put_in_values(path, data: bytes) -> None:
    """Make `data` the stored value of everything in a checkpoint that is not a tensor."""
    metadata = dcp.FileSystemReader(path).read_metadata()
    file = path / "__0_0.distcp"
    start = file.stat().st_size
    file.write_bytes(file.read_bytes() + data)
    for name, about in metadata.state_dict_metadata.items():
        if isinstance(about, BytesStorageMetadata):
            place = metadata.storage_data[MetadataIndex(name)]
            place.offset, place.length = start, len(data)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("training/data.json", b'{"tokenizer": "another"}', "data.json"),
        ("training/config.yaml", b"steps: [", "config.yaml"),
        ("training/metrics.jsonl", b'{"step": "x"}\n', "metrics.jsonl"),
        ("training/metrics.jsonl", b'{"step": 1\n', "metrics.jsonl"),
        (f"{LAST}/checkpoint.json", b'{"checkpoint": {"step": "two"}}', "step"),
        (f"{LAST}/checkpoint.json", b"[]", "checkpoint.json"),
        (f"{LAST}/checkpoint.json", CUT, "checkpoint.json"),
        (f"{LAST}/__0_0.distcp", CUT, LAST),
        (f"{LAST}/.metadata", CUT, LAST),
        (f"{LAST}/extra.pt", CUT, LAST),
        (f"{LAST}/__0_0.distcp", BOMB, LAST),
        (f"{LAST}/.metadata", BOMB, LAST),
        (f"{LAST}/extra.pt", BOMB, LAST),
    ],
)
def test_bad_files_of_a_run_are_named_and_run_nothing(
    whole, tmp_path, monkeypatch, file, content, named
):
    monkeypatch.chdir(tmp_path)
    config = whole.model_copy(update={"out": tmp_path / "run"})
    shutil.copytree(whole.out, config.out)
    path = config.out / file
    if content == BOMB and path.suffix == ".distcp":
        put_in_values(path.parent, BOMB)
    else:
        path.write_bytes(content or path.read_bytes()[:40])
    with pytest.raises(ValueError, match=named):
        read_measurements(config.out / "training/metrics.jsonl")
        train_generator(config, CPU)
    assert not (tmp_path / "marker").exists()


def test_a_full_disk_ends_the_run_and_the_checkpoint_before_stays(whole, tmp_path, monkeypatch):
    save = Checkpoints.save

    def fill_disk_at_4(checkpoints, step, *args):
        checkpoints.wait()
        if step == 4:
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            monkeypatch.setattr(filesystem, "_write_item", Mock(side_effect=full))
        save(checkpoints, step, *args)

    monkeypatch.setattr(Checkpoints, "save", fill_disk_at_4)
    config = whole.model_copy(update={"out": tmp_path})
    with pytest.raises(OSError, match=r"step-0000004.*No space left"):
        train_generator(config, CPU)
    monkeypatch.undo()
    assert (tmp_path / "training/checkpoints/step-0000002").is_dir()
    partial = tmp_path / "training/checkpoints/.step-0000009.partial"
    partial.mkdir()  # of a killed run
    (tmp_path / "training/.metrics.jsonl.tmp-ab12cd34.jsonl").write_text("x")
    train_generator(config, CPU)
    assert same_end(whole.out, tmp_path) and not partial.exists()
    assert not list((tmp_path / "training").glob(".metrics*"))


def test_more_steps_continue_to_the_bits_of_a_longer_run(digits, whole, tmp_path):
    constant = {"optimizer": {"lr": 3e-3, "schedule": "constant"}}
    for out, steps in (("whole", 6), ("longer", 4), ("longer", 6)):
        train_generator(train_config(digits, tmp_path / out, **constant, steps=steps), CPU)
    assert same_end(tmp_path / "whole", tmp_path / "longer")
    with pytest.raises(ValueError, match=r"steps 6, now 8"):  # its rate is a cosine
        train_generator(whole.model_copy(update={"steps": 8}), CPU)


def test_restart_repeats_a_run_and_its_encoding(digits, tmp_path):
    def config(size, lr):
        data = {"images": {"source": "digits", "size": size}, "tokenizer": digits / "tokenizer"}
        return train_config(digits, tmp_path, data=data, steps=1, optimizer={"lr": lr})

    with few_digits():
        train_generator(config(32, 3e-3), CPU)
        assert load_generator(tmp_path).config.n_classes == 10
        with pytest.raises(ValueError, match=r"image_size was 32, now 16"):
            train_generator(config(16, 3e-3), CPU)
        with pytest.raises(ValueError, match=r"optimizer\.lr 0\.003, now 1e-05"):
            train_generator(config(32, 1e-5), CPU)
        train_generator(config(16, 1e-5), CPU, restart=True)
    assert PackedCodes(tmp_path / "codes/train").image_size == 16


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_stop_with_a_checkpoint(whole, tmp_path, monkeypatch, number):
    config = whole.model_copy(update={"out": tmp_path, "checkpoint_every": 50})
    handler, advance = signal.getsignal(number), Run.advance

    def interrupted(run):
        if run.step == 4:
            signal.raise_signal(number)
        return advance(run)

    monkeypatch.setattr(Run, "advance", interrupted)
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


def test_logged_learning_rates_are_those_of_the_schedule(whole):
    events = EventAccumulator(str(whole.out / "training")).Reload()
    rates = {"images_per_second", "grad_norm", "lr", "accuracy", "loss"}
    assert {f"train/{key}" for key in rates} | {"val/loss"} <= set(events.Tags()["scalars"])
    first, *later = (event.value for event in events.Scalars("train/lr"))
    assert first == pytest.approx(3e-3) and later == sorted(later, reverse=True)
    assert events.Tags()["images"] == ["preview"]
