"""Several processes train what one does, and read each other's checkpoints."""

from __future__ import annotations

import json

import pytest
import torch

from moveimg.dist import World
from moveimg.rng import set_generator
from moveimg.training.generator import train_generator
from moveimg.training.parallel import (
    Parallelism,
    choose_parallelism,
    micro_batch_seed,
    parallelize,
)
from moveimg.training.tokenizer import train_tokenizer
from tests.conftest import MEMORIES, PRODUCT_KEYS, VARIANTS, lively, random_inputs, tiny_config
from tests.test_tokenizer_training import JUDGE, make_config, smooth_images
from tests.test_training import CPU, die_at_step_5, newest_state, train_config
from tests.tools.processes import job, launch

EVERY = {"micro_batch": 4, "validate_every": 1, "checkpoint_every": 4, "log_every": 4}
# what FSDP2 has most to do with: tables in the blocks and outside, experts, a latent, recomputing
RICH = {
    "distributed": "fsdp",
    "activation_checkpointing": True,
    "steps": 4,
    "seed": 1,  # with seed 0, something discrete (top-k?) enlarges rounding to 1e-5 at one step
    "model": {
        "n_layer": 2, "n_head": 2, "width": 16, "attention": {"kind": "mla", "kv_rank": 8,
        "rope_dim": 4}, "memory": MEMORIES["move-3-class-rows"],
        "ffn": {"kind": "product_key", **PRODUCT_KEYS},
    },
}  # fmt: skip
EXPERTS = {"ffn": {"kind": "moe", "n_experts": 4, "hidden": 8, "shared_hidden": 8}}
EXPERTS |= {"n_layer": 1, "n_head": 2, "width": 16}
# name -> what differs from the plain run, and the step where the last process is asked to stop
JOBS: dict[str, tuple[dict, int | None]] = {
    "ddp": ({"distributed": "ddp"}, None),
    "fsdp, begun by one": ({"distributed": "fsdp"}, None),
    "fsdp, ended by one": ({"distributed": "fsdp"}, 4),
    "rich": (RICH, None),
    "experts": ({"model": EXPERTS, "steps": 3, "distributed": "fsdp"}, None),
    "memory": ({"train": "memory", "dtype": "bfloat16", "distributed": "fsdp", "steps": 2}, None),
    "muon": ({"optimizer": {"kind": "muon", "lr": 3e-3}, "steps": 3}, None),
}
MANY = ("one", "two")
STILL = {f"{place}_dropout": 0.0 for place in ("token", "resid", "ffn")}
# the first two do nothing that depends on how a batch is cut
TOKENIZERS: dict[str, dict] = {
    "vq": {"quantizer": {"kind": "vq", "init_from_data": False, "reseed_after": 0}, "steps": 4},
    "ibq": {"quantizer": {"kind": "ibq"}, "steps": 4},  # its sharp choices enlarge what is rounded
    "judged": {"adversarial": JUDGE | {"start": 2}},
    "judged, parted": {"adversarial": JUDGE | {"start": 2}},
}


@pytest.fixture(scope="module")
def folder(digits, tmp_path_factory):
    """Every job's run by one process, in one/NAME, and by two, in two/NAME."""
    folder = tmp_path_factory.mktemp("processes")

    def config(many, name):
        start = {"init_from": folder / "one/ddp"} if name == "memory" else {}
        return train_config(digits, folder / many / name, **EVERY | JOBS[name][0] | start)

    plain = None
    for name in JOBS:
        if not name.startswith("fsdp"):
            train_generator(config("one", name), CPU)
            plain = plain or folder / "one" / name
        else:
            (folder / "one" / name).symlink_to(plain)
    with pytest.MonkeyPatch.context() as patch:
        begun = config("two", "fsdp, begun by one")
        die_at_step_5(patch, lambda: train_generator(begun, CPU))
    jobs = [job(config("two", name), stop) for name, (_, stop) in JOBS.items()]
    images = smooth_images(folder / "images")
    for name, changes in TOKENIZERS.items():
        changes = {"checkpoint_every": 4, **changes}
        one, two = (make_config(images, folder / many / name, **changes) for many in MANY)
        if not name.startswith("judged"):
            train_tokenizer(one, CPU)
        jobs += [job(two, stop) for stop in ([4, None] if name.endswith("parted") else [None])]
    launch(2, jobs, folder)
    ended = config("two", "fsdp, ended by one")
    assert [line["step"] for line in curve(ended.out)] == [1, 2, 3, 4]  # both stopped there
    train_generator(ended, CPU)
    return folder


def curve(out) -> list[dict]:
    return [json.loads(x) for x in (out / "training/metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_compute_what_one_does(folder, name):
    one, two = folder / "one" / name, folder / "two" / name
    losses = [[line["loss"] for line in curve(out)] for out in (one, two)]
    # bfloat16: DDP rounds inside layers, FSDP2 the residual stream, too. Muon computes in bfloat16.
    assert losses[1] == pytest.approx(losses[0], abs=2e-2 if name == "memory" else 1e-6)
    expected, found = newest_state(one), newest_state(two)
    assert expected.keys() == found.keys()
    tolerance = {"memory": 1e-2, "muon": 1e-3}.get(name, 2e-5)
    for key, value in expected.items():
        assert torch.allclose(value, found[key], atol=tolerance), key


def test_only_the_memory_learns_in_two_processes(folder):
    start, end = newest_state(folder / "one/ddp"), newest_state(folder / "two/memory")
    learned = {key for key in end if key.startswith("model.") and "router" in key}
    learned.add("model.memory.bank.weight")
    for key in (key for key in end if key.startswith("model.")):
        # the exported average of the first run is what the second began with
        before = start[key.replace("model.", "ema.", 1)]
        assert torch.equal(before, end[key]) == (key not in learned), key


@pytest.mark.parametrize("name", ["vq", "ibq"])
def test_two_processes_train_the_tokenizer_that_one_does(folder, name):
    one, two = (newest_state(folder / many / name) for many in MANY)
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.allclose(value, two[key], atol=2e-5), key
    lines = [curve(folder / many / name) for many in MANY]
    for key in ("mse", "usage", "perplexity"):
        expected, found = ([line[key] for line in part] for part in lines)
        assert found == pytest.approx(expected, rel=1e-4), key


def test_two_processes_go_on_with_a_tokenizer_to_the_same_bits(folder):
    whole, parted = (newest_state(folder / "two" / n) for n in ("judged", "judged, parted"))
    assert whole.keys() == parted.keys()
    assert all(torch.equal(value, parted[key]) for key, value in whole.items())


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        ({"micro_batch": 5}, 1, "micro_batch 5"),
        ({}, 2, "micro_batch 16 .* 2 micro-batches"),
        ({"micro_batch": 4}, 3, "micro_batch 4 .* 3 micro-batches"),
        ({"distributed": "fsdp", "optimizer": {"kind": "muon"}}, 1, "muon"),
    ],
)
def test_a_batch_that_cannot_be_shared_is_refused(tmp_path, settings, size, message):
    config = train_config(tmp_path, tmp_path, **settings)
    with pytest.raises(ValueError, match=message):
        choose_parallelism(config, World(0, size, CPU))


def test_every_micro_batch_has_its_own_random_numbers():
    seeds = {
        micro_batch_seed(0, step, part) & 0xFFFFFFFF for step in range(50) for part in range(8)
    }
    assert len(seeds) == 400  # the CPU's generator looks at 32 bits
    assert micro_batch_seed(3, 7, 0) == 3 * 1_000_003 + 7  # as ever, where the batch is whole


def test_gradients_of_micro_batches_add_up(digits, tmp_path):
    model = {"n_layer": 1, "n_head": 2, "width": 16, **STILL}
    options = {"model": model, "class_dropout": 0.0, "steps": 3, "validate_every": 1}
    for name, micro in (("whole", 16), ("cut", 2)):
        train_generator(train_config(digits, tmp_path / name, micro_batch=micro, **options), CPU)
    whole, cut = (newest_state(tmp_path / name) for name in ("whole", "cut"))
    for key, value in whole.items():
        assert torch.allclose(value, cut[key], atol=2e-5), key


def gradients(config, parallel):
    model = lively(config).train()
    parallelize(model, None, parallel)
    set_generator(model, torch.Generator().manual_seed(1))
    loss, _ = model(*random_inputs(config), loss=True)
    (loss + model.auxiliary_loss()).backward()
    assert model.auxiliary_loss() == 0  # nor that of a recomputed pass
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("name", ["mla-move-3-class-rows-moe", "mha-lave-x1-product_key"])
def test_recomputed_activations_give_the_same_gradients(name):
    config = tiny_config(**VARIANTS[name], ffn_dropout=0.3)
    found = [gradients(config, Parallelism(checkpointing=on)) for on in (False, True)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "name", ["mha-none-swiglu", "mha-move-3-class-rows-moe", "mla-lave-x1-product_key"]
)
def test_compiled_training_has_no_graph_breaks(monkeypatch, name):
    """In train mode, on the way back and in recomputed blocks: a break would raise."""
    torch._dynamo.reset()
    compile, graphs = torch.compile, {"backend": "aot_eager", "fullgraph": True}
    monkeypatch.setattr(torch, "compile", lambda function: compile(function, **graphs))
    config = tiny_config(**VARIANTS[name], **STILL)
    modes = (Parallelism(), Parallelism(compiled=True, checkpointing=True))
    torch.testing.assert_close(*(gradients(config, m) for m in modes), rtol=1e-9, atol=1e-12)
    torch._dynamo.reset()
