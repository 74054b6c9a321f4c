"""`moveimg info --train`: the estimate, against what autograd keeps and against the configs."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from moveimg.config import TrainConfig, load_config
from moveimg.model import Transformer, cross_entropy
from moveimg.model.cross_entropy import linear_cross_entropy
from moveimg.training import budget as budget_module
from moveimg.training.budget import block_activations, comment, train_budget
from tests.conftest import tiny_config

CONFIGS = Path(__file__).parents[1] / "configs"
FFN = {"kind": "swiglu", "hidden": 96}
IMAGENET = sorted(CONFIGS.glob("imagenet-*-*-*.yaml"))


def kept_bytes(n_layer: int, memory: dict) -> int:
    """Bytes a token that the blocks keep in bfloat16 autocast, counted tensor by tensor."""
    config = tiny_config(n_layer=n_layer, n_head=4, width=64, grid=[7, 11], memory=memory, ffn=FFN)
    model, images = Transformer(config).train(), 3
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(p.shape) for p in model.parameters()}
    shapes |= {shape[::-1] for shape in shapes}  # and their bfloat16 copies, which `copies` counts
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tuple(tensor.shape) not in shapes:
            kept[storage.data_ptr()] = storage
        return tensor

    codes = torch.randint(config.codebook_size, (images, config.seq_len))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        model.hidden(codes, torch.zeros(images, dtype=torch.long))
    total = sum(storage.nbytes() for storage in kept.values())
    return round(total / (images * config.seq_len) * 100)


def counted_and_expected(memory: dict) -> tuple[float, int]:
    """Bytes a token and block, by the difference of two depths: what stands outside cancels."""
    config = tiny_config(n_head=4, width=64, memory=memory, ffn=FFN)
    counted = (kept_bytes(4, memory) - kept_bytes(2, memory)) / 200
    return counted, block_activations(config, Transformer(config).layers[1])


@pytest.mark.parametrize("memory", [{"kind": "none"}, {"kind": "move", "slots": 3}])
def test_activations_are_what_autograd_keeps(memory) -> None:
    counted, expected = counted_and_expected(memory)
    assert counted == pytest.approx(expected, rel=1e-3)


class Held(TorchDispatchMode):
    """Counts the bytes of all tensors that operations made and that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage() for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if torch.is_tensor(tensor) else None
            if storage is None or storage in given or storage in self.known:
                continue
            self.known[storage] = True
            self.now += storage.nbytes()
            weakref.finalize(storage, self.freed, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def freed(self, size: int) -> None:
        self.now -= size


def test_the_loss_holds_what_the_budget_says(monkeypatch) -> None:
    for module in (cross_entropy, budget_module):
        monkeypatch.setattr(module, "CHUNK", 2**16)
    config = tiny_config(codebook_size=1024, width=32, grid=[16, 16])
    x = torch.randn(256, 32, requires_grad=True)
    weight = torch.randn(1024, 32, requires_grad=True)
    targets = torch.randint(1024, (256,))
    with Held() as held, torch.autocast("cpu", torch.bfloat16):
        linear_cross_entropy(x, weight, targets)[0].backward()
    expected = budget_module._head(config, 256)
    assert 8 * 2**16 < expected < 0.25 * 14 * 256 * 1024  # of what all logits would take
    assert held.most == pytest.approx(expected, rel=0.02)


def test_bytes_of_a_run_by_hand() -> None:
    given = ["micro_batch=32", "distributed=ddp", "activation_checkpointing=false"]
    config = load_config(CONFIGS / "imagenet-b-256-move-x1.yaml", TrainConfig, given)
    budget = train_budget(config, gpus=8, gpu="A100")
    d, layers, vocabulary, tokens = 768, 12, 16384, 32 * 256
    block = 4 * d * d + 3 * d * 2048 + 2 * d + d * 12 * 7
    total = layers * block + 2 * vocabulary * d + 1001 * d + d + vocabulary * 6 * d
    assert budget.parameters == total
    assert budget.state == 20 * total
    assert budget.head == 8 * 2**24 + 6 * vocabulary * d + 4 * tokens * d
    linear = layers * (block - 2 * d) + vocabulary * d
    attention, mixing = 4 * layers * d * 257 / 2, 2 * layers * 6 * d
    assert budget.flops_per_step == 3 * (2 * linear + attention + mixing) * 256 * 256
    assert budget.codes == 1_281_167 * (20 * 256 * 2 + 4)
    assert budget.network_per_step == 2 * 7 / 8 * 4 * total
    best = budget.flops_per_step / (8 * 0.5 * 312e12) + 52 * total / (0.9 * 2e12)
    worst = budget.flops_per_step / (8 * 0.25 * 312e12) + 52 * total / (0.6 * 2e12)
    worst += budget.network_per_step / 100e9
    hours = [budget.steps * seconds / 3600 for seconds in (best, worst)]
    assert list(budget.hours) == pytest.approx(hours)
    assert budget.epoch()["steps"] == 5004


def test_sharding_and_checkpointing_save_memory() -> None:
    path = CONFIGS / "imagenet-b-256-move-x1.yaml"

    def budget(**settings: object):
        given = [f"{key}={value}" for key, value in settings.items()]
        return train_budget(load_config(path, TrainConfig, given))

    plain, cut = budget(), budget(distributed="fsdp")
    again = budget(activation_checkpointing="true")
    assert cut.state == plain.state // 8 and cut.activations == plain.activations
    assert again.activations < plain.activations / 4 and again.state == plain.state
    assert again.flops_per_step == pytest.approx(plain.flops_per_step * 4 / 3)


def test_a_batch_that_the_gpus_cannot_share_is_refused() -> None:
    config = load_config(CONFIGS / "imagenet-b-256-move-x1.yaml", TrainConfig)
    with pytest.raises(ValueError, match="3 processes cannot share"):
        train_budget(config, gpus=3)
    with pytest.raises(ValueError, match="'Z80': expected one of B200"):
        train_budget(config, gpu="Z80")


@pytest.mark.parametrize("path", IMAGENET, ids=lambda path: path.stem)
def test_a_config_says_what_it_takes(path: Path) -> None:
    """The comment is the command's own last lines: moveimg info CONFIG --train."""
    expected = comment(train_budget(load_config(path, TrainConfig)))
    assert expected in path.read_text(encoding="utf-8")
