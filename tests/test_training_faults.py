"""Restarting, lengthening and stopping a run; hostile checkpoints; parts of the recipe."""

from __future__ import annotations

import io
import os
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from moveimg.data import sha256_file
from moveimg.data.codes import PackedCodes
from moveimg.dist import World
from moveimg.model import Transformer
from moveimg.training.checkpoints import Checkpoints, find_damage, read_index, sealed
from moveimg.training.generator import GeneratorTask, train_generator
from moveimg.training.loop import Run, catch_stop
from tests.conftest import lively, tiny_config
from tests.test_training import CPU, few_digits, same_end, train_config

CONSTANT = {"lr": 3e-3, "schedule": "constant"}


def test_more_steps_continue_to_the_bits_of_a_longer_run(digits, tmp_path):
    for out, lengths in (("whole", [12]), ("longer", [8, 12])):
        for steps in lengths:
            train_generator(
                train_config(digits, tmp_path / out, optimizer=CONSTANT, steps=steps), CPU
            )
    assert same_end(tmp_path / "whole", tmp_path / "longer")


def test_a_cosine_run_cannot_be_lengthened(digits, tmp_path):
    train_generator(train_config(digits, tmp_path, steps=2), CPU)
    with pytest.raises(ValueError, match=r"steps 2, now 4.*cosine.*init_from"):
        train_generator(train_config(digits, tmp_path, steps=4), CPU)


def test_restart_makes_the_codes_of_the_run_anew(digits, tmp_path):
    def config(size):
        data = {"images": {"source": "digits", "size": size}, "tokenizer": digits / "tokenizer"}
        return train_config(digits, tmp_path, data=data, steps=1)

    with few_digits():
        train_generator(config(32), CPU)
        with pytest.raises(ValueError, match=r"image_size is 32 there, 16 asked.*--restart"):
            train_generator(config(16), CPU)
        train_generator(config(16), CPU, restart=True)
    assert PackedCodes(tmp_path / "codes/train").image_size == 16


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_stop_with_a_checkpoint(digits, tmp_path, monkeypatch, number):
    config, advance = train_config(digits, tmp_path, checkpoint_every=50), Run.advance
    handler = signal.getsignal(number)

    def interrupted(run):
        if run.step == 4:
            os.kill(os.getpid(), number)
        return advance(run)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "advance", interrupted)
        with pytest.raises(SystemExit) as caught:
            train_generator(config, CPU)
    assert caught.value.code == 128 + number and signal.getsignal(number) == handler
    assert (tmp_path / "training/checkpoints/step-0000005").is_dir()
    train_generator(config, CPU)
    train_generator(train_config(digits, tmp_path / "whole"), CPU)
    assert same_end(tmp_path / "whole", tmp_path)


def test_a_second_ctrl_c_ends_the_run_at_once():
    with catch_stop() as received:
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_run_in_use_by_another_process_is_refused(digits, tmp_path):
    hold = (
        "import sys, time; from moveimg.files import lock\n"
        "with lock(sys.argv[1], 'a training'): print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", hold, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=str(process.pid)):
            train_generator(train_config(digits, tmp_path / "run", steps=1), CPU)
        process.kill()
    assert not (tmp_path / "run" / "config.json").exists()
    train_generator(train_config(digits, tmp_path / "run", steps=1), CPU)  # it died: free again


class Bomb:
    """Unpickling it freely writes a marker file."""

    def __init__(self, marker) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def seal(path, change=lambda index: None) -> None:
    """Write a checkpoint's index again, with the digests of its files: as an attacker would."""
    index = read_index(path)
    for name in index["files"]:
        index["files"][name] = [(path / name).stat().st_size, sha256_file(path / name)]
    change(index)
    (path / "checkpoint.json").write_text(sealed(index))


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
def test_hostile_checkpoints_run_nothing(digits, tmp_path, name):
    config = train_config(digits, tmp_path / "run", optimizer=CONSTANT, steps=2)
    train_generator(config, CPU)
    path = next((tmp_path / "run/training/checkpoints").glob("step-*"))
    marker = tmp_path / "marker"
    if name == "__0_0.distcp":
        payload = io.BytesIO()
        torch.save(Bomb(marker), payload)
        put_in_values(path, payload.getvalue())
    else:
        (path / name).write_bytes(pickle.dumps(Bomb(marker), protocol=2))
    seal(path)
    assert find_damage(path) is None
    longer = train_config(digits, tmp_path / "run", optimizer=CONSTANT, steps=4)
    with pytest.raises(ValueError, match=path.name):
        train_generator(longer, CPU)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("step", "two"), ("step", 10**30), ("files", []), ("files", {".metadata": 3}), ("best", [1])],
)
def test_indices_of_wrong_types_are_damaged_checkpoints(tmp_path, key, value):
    folder = tmp_path / "step-0000002"
    folder.mkdir()
    (folder / "checkpoint.json").write_text(
        sealed({"step": 2, "files": {".metadata": [0, ""]}} | {key: value})
    )
    checkpoints = Checkpoints(tmp_path, 2, World())
    with pytest.raises(ValueError, match=r"damaged checkpoint \(checkpoint.json"):
        checkpoints.newest()


# --- parts of the recipe that nothing else would miss --------------------------------------


def make_task(digits, tmp_path, **changes) -> GeneratorTask:
    """The task of a run of no steps, with its model in train mode."""
    made = {}
    config = train_config(digits, tmp_path, steps=1, **changes)

    def keep(task, *args, **options):
        made["task"] = task
        return {}

    from moveimg.training import generator

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator, "fit", keep)
        train_generator(config, CPU)
    made["task"].model.train()
    return made["task"]


def test_class_dropout_gives_the_null_label(digits, tmp_path, monkeypatch):
    task = make_task(digits, tmp_path, class_dropout=1.0)
    seen = []
    forward = Transformer.forward
    monkeypatch.setattr(
        Transformer,
        "forward",
        lambda model, codes, labels, **options: (
            seen.append(labels.clone()) or forward(model, codes, labels, **options)
        ),
    )
    task.loss(0, 0)
    assert (seen[0] == task.model.null_label).all()


def test_validation_reads_the_held_out_codes(digits, tmp_path, monkeypatch):
    task = make_task(digits, tmp_path)
    assert task.val.directory.name == "val" and task.codes.directory.name == "train"
    monkeypatch.setattr(task.codes, "get", lambda *_: pytest.fail("read the training codes"))
    task.validate(task.model.eval())


def test_the_rate_of_each_step_reaches_the_optimizer(digits, tmp_path, monkeypatch):
    rates, advance = [], Run.advance

    def noted(run):
        result = advance(run)
        rates.append(run.optimizers[0].param_groups[0]["lr"])
        return result

    monkeypatch.setattr(Run, "advance", noted)
    train_generator(train_config(digits, tmp_path), CPU)
    assert rates[0] == pytest.approx(1.5e-3) and rates[1] == pytest.approx(3e-3)
    assert np.all(np.diff(rates[2:]) < 0)


def test_dropout_falls_on_tokens_and_branches_alone():
    """Of each kind alone: the model differs from itself without; the stream is never dropped."""
    kinds = ("token_dropout", "resid_dropout", "ffn_dropout")
    codes, labels = torch.zeros(1, 12, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    for kind in kinds:
        config = tiny_config(**{name: 0.5 * (name == kind) for name in kinds})
        model = lively(config).train()
        torch.manual_seed(0)
        assert not torch.equal(model(codes, labels), model(codes, labels)), kind
    config = tiny_config(token_dropout=0.0, resid_dropout=0.99, ffn_dropout=0.99)
    model = lively(config).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0.5:
            module.p = 1.0
    torch.manual_seed(0)
    embedded = model.label_embedding.weight[0]
    logits = model(codes, labels)[0, 0]
    expected = model.head(model.norm(embedded))
    torch.testing.assert_close(logits, expected.to(logits.dtype))
