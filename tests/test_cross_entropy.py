"""The head's loss in chunks: what the plain computation gives, and never all logits at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moveimg.model import cross_entropy
from moveimg.model.cross_entropy import linear_cross_entropy
from tests.conftest import lively, random_inputs, tiny_config

ROWS, WIDTH, VOCABULARY = 13, 6, 10


@pytest.fixture(params=[1, 4 * VOCABULARY, 2**24], ids=["a row", "4 rows", "all rows"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK", request.param)


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return out


def inputs(dtype=torch.float64, rows=ROWS, vocabulary=VOCABULARY):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, WIDTH, generator=g, dtype=torch.float64)
    weight = torch.randn(vocabulary, WIDTH, generator=g, dtype=torch.float64)
    targets = torch.randint(vocabulary, (rows,), generator=g)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def plain(x, weight, targets):
    logits = x @ weight.T
    return F.cross_entropy(logits, targets), (logits.argmax(1) == targets).to(x.dtype).mean()


def test_loss_accuracy_and_gradients_are_the_plain_ones(chunk):
    results = []
    for function in (plain, linear_cross_entropy):
        x, weight, targets = inputs()
        loss, accuracy = function(x, weight, targets)
        assert not accuracy.requires_grad
        (3 * loss).backward()  # the way back takes what comes from behind into account
        results.append((loss, accuracy, x.grad, weight.grad))
    assert 0 < results[0][1] < 1
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_gradients_are_those_of_small_differences(chunk):
    x, weight, targets = inputs()
    assert torch.autograd.gradcheck(lambda *a: linear_cross_entropy(*a, targets)[0], (x, weight))


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_does_not_learn_gets_no_gradient(frozen):
    leaves = inputs()
    leaves[frozen].requires_grad_(False)
    linear_cross_entropy(*leaves)[0].backward()
    expected = inputs()
    plain(*expected)[0].backward()
    assert leaves[frozen].grad is None
    torch.testing.assert_close(leaves[1 - frozen].grad, expected[1 - frozen].grad)


@pytest.mark.parametrize("train", [True, False])
def test_no_tensor_holds_all_logits(monkeypatch, train):
    rows, vocabulary = 64, 512
    monkeypatch.setattr(cross_entropy, "CHUNK", 8 * vocabulary)
    leaves = inputs(rows=rows, vocabulary=vocabulary)
    with Largest() as seen, torch.set_grad_enabled(train):
        loss, _ = linear_cross_entropy(*leaves)
        if train:
            loss.backward()
    assert seen.numel == 8 * vocabulary  # 64 rows have eight times as many
    with Largest() as seen, torch.no_grad():
        plain(*leaves)
    assert seen.numel == rows * vocabulary


def test_in_bfloat16_it_is_as_near_as_the_plain_computation():
    """Products in bfloat16, the rest in float32; the error is that of rounding the products."""
    exact = inputs(rows=256)
    plain(*exact)[0].backward()
    errors = []
    for function in (plain, linear_cross_entropy):
        leaves = inputs(torch.float32, rows=256)
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = function(*leaves)
        assert loss.dtype == torch.float32
        loss.backward()
        assert leaves[1].grad.dtype == torch.float32
        errors.append([(a.grad - b.grad).norm() for a, b in zip(leaves[:2], exact, strict=False)])
    assert 0 < errors[1][0] < 1.5 * errors[0][0] and 0 < errors[1][1] < 1.5 * errors[0][1]


def test_the_model_hands_out_its_loss(chunk):
    model = lively(tiny_config(memory={"kind": "move", "slots": 2})).train()
    codes, labels = random_inputs(model.config)
    gradients = []
    for chunked in (False, True):
        torch.manual_seed(0)
        model.zero_grad()
        if chunked:
            loss, accuracy = model(codes, labels, loss=True)
        else:
            logits = model(codes, labels)
            loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
            hits = (logits.argmax(-1) == codes).double().mean()
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert accuracy == hits
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)
