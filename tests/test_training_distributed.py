"""Two processes train to the weights of one process, and continue each other's runs."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from moveimg.config import RunConfig, TrainConfig
from moveimg.dist import World, processes
from moveimg.rng import set_generator
from moveimg.training.generator import train_generator
from moveimg.training.loop import Run
from moveimg.training.parallel import (
    Parallelism,
    choose_parallelism,
    micro_batch_seed,
    parallelize,
)
from moveimg.training.tokenizer import TokenizerTask, train_tokenizer
from tests.conftest import (
    MEMORIES,
    PRODUCT_KEYS,
    VARIANTS,
    random_inputs,
    random_model,
    tiny_config,
)
from tests.test_tokenizer_training import JUDGE, make_config, smooth_images
from tests.test_training import CPU, die_at_step_5, newest_state, same_end, train_config
from tools.kill import SERVER

SIZE = {"n_layer": 2, "n_head": 2, "width": 16}
EXPERTS = SIZE | {
    "memory": {"kind": "move", "slots": 2},
    "ffn": {"kind": "moe", "n_experts": 4, "hidden": 8, "shared_hidden": 8},
}
# what is hardest for FSDP2: tables in the blocks and outside, a latent, recomputing
RICH = SIZE | {
    "attention": {"kind": "mla", "kv_rank": 8, "rope_dim": 4},
    "memory": MEMORIES["move-3-class-rows"],
    "ffn": {"kind": "product_key", **PRODUCT_KEYS},
}
COMMON = {"micro_batch": 4, "validate_every": 1, "checkpoint_every": 4, "log_every": 4}
COMMON |= {"model": EXPERTS, "steps": 6, "distributed": "fsdp"}
# name -> what differs from COMMON
JOBS: dict[str, dict] = {
    "ddp": {"distributed": "ddp"},
    "fsdp, begun by one": {},
    "fsdp, ended by one": {},  # at step 4 the last of its two processes is asked to stop
    # with seed 0, something discrete (top-k?) enlarges rounding to 1e-5 at one step
    "rich": {"model": RICH, "activation_checkpointing": True, "steps": 4, "seed": 1},
    "memory": {"train": "memory", "dtype": "bfloat16", "steps": 2},
    "muon": {"distributed": "ddp", "optimizer": {"kind": "muon", "lr": 3e-3}, "steps": 2},
}
# the first two do not depend on how a batch is divided
TOKENIZERS: dict[str, dict] = {
    "vq": {"quantizer": {"kind": "vq", "init_from_data": False, "reseed_after": 0}, "steps": 3},
    "ibq": {"quantizer": {"kind": "ibq"}, "steps": 3},  # its hard choices amplify rounding
    "judged": {"adversarial": JUDGE | {"start": 2}, "steps": 6},
    "judged, parted": {"adversarial": JUDGE | {"start": 2}, "steps": 6},
}
NO_DROPOUT = {f"{place}_dropout": 0.0 for place in ("token", "resid", "ffn")}


# A run, and the step at which the last process, and it alone, gets SIGTERM.
Job = tuple[RunConfig, int | None]


def launch(n: int, jobs: list[Job], folder: Path) -> None:
    """Run jobs in `n` processes, as torchrun would start them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    logs = [folder / f"log-{rank}" for rank in range(n)]
    running = []
    for rank, log in enumerate(logs):
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(n)}
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        running.append(SERVER.Process(target=work, args=(jobs, shared | own, log)))
        running[-1].start()
    for process in running:
        process.join()
    assert not any(p.exitcode for p in running), "\n".join(log.read_text() for log in logs)


def work(jobs: list[Job], environment: dict[str, str], log: Path) -> None:
    """Run the jobs as one process of torchrun; checks that tokenizers have equal weights."""
    os.environ |= environment
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    advance = Run.advance
    with processes("cpu") as world:
        for config, stop_at in jobs:

            def dying(run: Run, stop_at: int | None = stop_at) -> dict:
                scalars = advance(run)
                if isinstance(task := run.task, TokenizerTask):
                    judge = task.adversary and task.adversary.discriminator
                    for model in filter(None, (task.model, judge)):
                        weights = parameters_to_vector(model.parameters()).detach().double()
                        assert torch.equal(world.mean(weights), weights)
                if run.step == stop_at and world.rank == world.size - 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                return scalars

            Run.advance = dying  # type: ignore[method-assign]
            train = train_generator if isinstance(config, TrainConfig) else train_tokenizer
            try:
                train(config, world)  # type: ignore[arg-type]
            except SystemExit as stop:
                assert stop.code == 143 and stop_at, stop.code


@pytest.fixture(scope="module")
def folder(digits, tmp_path_factory):
    """Every job's run by one process, in one/NAME, and by two, in two/NAME."""
    folder = tmp_path_factory.mktemp("processes")
    images, jobs = smooth_images(folder / "images"), []

    def config(many, name):
        start = {"init_from": folder / "one/ddp"} if name == "memory" else {}
        return train_config(digits, folder / many / name, **COMMON | JOBS[name] | start)

    for name, changes in JOBS.items():
        if changes:
            train_generator(config("one", name), CPU)
        else:
            (folder / "one" / name).symlink_to(folder / "one/ddp")
        jobs.append((config("two", name), 4 if "ended" in name else None))
    with pytest.MonkeyPatch.context() as patch:
        begun = config("two", "fsdp, begun by one")
        die_at_step_5(patch, lambda: train_generator(begun, CPU))
    for name, changes in TOKENIZERS.items():
        changes = {"checkpoint_every": 4, **changes}
        one, two = (make_config(images, folder / n / name, **changes) for n in ("one", "two"))
        if "judged" not in name:
            train_tokenizer(one, CPU)
        jobs += [(two, stop) for stop in ([4, None] if "parted" in name else [None])]
    launch(2, jobs, folder)
    ended = config("two", "fsdp, ended by one")
    assert [line["step"] for line in curve(ended.out)] == [1, 2, 3, 4]  # both stopped there
    train_generator(ended, CPU)
    return folder


def curve(out) -> list[dict]:
    return [json.loads(x) for x in (out / "training/metrics.jsonl").read_text().splitlines()]


def assert_close(one, two, tolerance=2e-5):
    """The newest checkpoints of two runs have the same tensors."""
    expected, found = newest_state(one), newest_state(two)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.allclose(value, found[key], atol=tolerance), key


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_compute_what_one_does(folder, name):
    one, two = folder / "one" / name, folder / "two" / name
    losses = [[line["loss"] for line in curve(out)] for out in (one, two)]
    # bfloat16: DDP rounds inside layers, FSDP2 the residual stream, too. Muon computes in bfloat16.
    assert losses[1] == pytest.approx(losses[0], abs=2e-2 if name == "memory" else 1e-6)
    assert_close(one, two, {"memory": 1e-2, "muon": 1e-3}.get(name, 2e-5))


def test_only_the_memory_learns_in_two_processes(folder):
    start, end = newest_state(folder / "one/ddp"), newest_state(folder / "two/memory")
    for key in (key for key in end if key.startswith("model.")):
        # the exported average of the first run is what the second began with
        same = torch.equal(start[key.replace("model.", "ema.", 1)], end[key])
        assert same != (".router." in key or key == "model.memory.bank.weight"), key


@pytest.mark.parametrize("name", ["vq", "ibq"])
def test_two_processes_train_the_tokenizer_that_one_does(folder, name):
    one, two = folder / "one" / name, folder / "two" / name
    assert_close(one, two)
    for expected, found in zip(curve(one), curve(two), strict=True):
        for key in ("mse", "usage", "perplexity"):
            assert found[key] == pytest.approx(expected[key], rel=1e-4), key


def test_two_processes_go_on_with_a_tokenizer_to_the_same_bits(folder):
    assert same_end(folder / "two/judged", folder / "two/judged, parted")


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        ({"micro_batch": 5}, 1, r"micro_batch \(5\)"),
        ({}, 2, r"micro_batch \(16\) .* \(2\)"),
        ({"micro_batch": 4}, 3, r"micro_batch \(4\) .* \(3\)"),
        ({"distributed": "fsdp", "optimizer": {"kind": "muon"}}, 1, "muon"),
    ],
)
def test_a_batch_that_cannot_be_shared_is_refused(tmp_path, settings, size, message):
    config = train_config(tmp_path, tmp_path, **settings)
    with pytest.raises(ValueError, match=message):
        choose_parallelism(config, World(0, size, CPU))


def test_gradients_of_micro_batches_add_up(digits, tmp_path):
    options = {"model": SIZE | NO_DROPOUT, "class_dropout": 0.0, "steps": 2}
    for name, micro in (("whole", 16), ("cut", 2)):
        train_generator(train_config(digits, tmp_path / name, micro_batch=micro, **options), CPU)
    assert_close(tmp_path / "whole", tmp_path / "cut")
    # each part has its own seed, of which the CPU's generator uses 32 bits
    seeds = [micro_batch_seed(0, step, part) for step in range(50) for part in range(8)]
    assert len({seed & 0xFFFFFFFF for seed in seeds}) == 400


def gradients(config, parallel):
    model = random_model(config).train()
    parallelize(model, None, parallel)
    set_generator(model, torch.Generator().manual_seed(1))
    loss, _ = model(*random_inputs(config), loss=True)
    (loss + model.auxiliary_loss()).backward()
    assert model.auxiliary_loss() == 0  # nor that of a recomputed pass
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("name", ["mha-move-3-class-rows-moe", "mla-lave-x1-product_key"])
def test_recomputed_and_compiled_blocks_give_the_same_gradients(monkeypatch, name):
    """Compiled without graph breaks, also on the way back: a break would raise."""
    config = tiny_config(**VARIANTS[name], ffn_dropout=0.3)
    found = [gradients(config, Parallelism(checkpointing=on)) for on in (False, True)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    torch._dynamo.reset()
    compile, graphs = torch.compile, {"backend": "aot_eager", "fullgraph": True}
    monkeypatch.setattr(torch, "compile", lambda function: compile(function, **graphs))
    config = tiny_config(**VARIANTS[name], **NO_DROPOUT)
    modes = (Parallelism(), Parallelism(compiled=True, checkpointing=True))
    torch.testing.assert_close(*(gradients(config, m) for m in modes), rtol=1e-9, atol=1e-12)
    torch._dynamo.reset()
