"""SimVQ and IBQ against slow references in NumPy and float64, and where their gradients go."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import tokenizer as tok
from tests.test_tokenizer import make, make_images, one_line_error
from tokenizer import codebook, processes
from tokenizer.quantizers import QUANTIZERS

SIZE, DIM = 7, 3


def make_quantizer(kind: str, l2_normalize: bool = False, **settings):
    values = {"kind": "vq", "quantizer": {"kind": kind, **settings}}
    config = tok.parse_config(values, "test").quantizer
    torch.manual_seed(0)
    return QUANTIZERS[kind](config, SIZE, DIM, l2_normalize).double()


def make_vectors(seed: int = 1) -> Tensor:
    """z [2, DIM, 2, 3]."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(2, DIM, 2, 3, generator=rng, dtype=torch.float64)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def rows_of(z: Tensor) -> np.ndarray:
    """[B, D, h, w] -> [n, D], one vector after another."""
    b, d, h, w = z.shape
    array = z.detach().numpy()
    places = [(i, y, x) for i in range(b) for y in range(h) for x in range(w)]
    return np.array([[array[i, c, y, x] for c in range(d)] for i, y, x in places])


def mean_square(difference: np.ndarray) -> float:
    return float((difference**2).mean())


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


@pytest.mark.parametrize("l2_normalize", [False, True])
def test_simvq_matches_reference(l2_normalize):
    quantizer = make_quantizer("simvq", l2_normalize)
    z = make_vectors()
    out = quantizer(z)
    c, w = quantizer.embedding.weight.numpy(), quantizer.projection.weight.detach().numpy()
    codes = np.array([w @ row for row in c])
    vectors = rows_of(z)
    if l2_normalize:
        codes, vectors = unit(codes), unit(vectors)
    chosen = [min(range(SIZE), key=lambda j: ((v - codes[j]) ** 2).sum()) for v in vectors]
    assert out.codes.flatten().tolist() == chosen and len(set(chosen)) > 2
    np.testing.assert_allclose(rows_of(out.quantized), codes[chosen], atol=1e-12)
    expected = mean_square(codes[chosen] - vectors)
    assert out.losses["codebook"].item() == pytest.approx(expected, rel=1e-12)
    assert out.losses["commitment"].item() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(quantizer.lookup(z), out.codes)


def test_simvq_learns_its_map_and_nothing_else_of_the_codebook():
    quantizer = make_quantizer("simvq")
    before = quantizer.embedding.weight.clone()
    assert before.std() == pytest.approx(DIM**-0.5, rel=0.4)
    optimizer = torch.optim.AdamW([p for p in quantizer.parameters() if p.requires_grad], lr=0.1)
    untouched = set(range(SIZE)) - set(quantizer.lookup(make_vectors()).flatten().tolist())
    moved = quantizer.codebook().detach()
    tok.total_loss(quantizer(make_vectors()).losses, quantizer.loss_weights).backward()
    assert quantizer.projection.weight.grad.abs().min() > 0
    assert quantizer.embedding.weight.grad is None
    optimizer.step()
    assert torch.equal(quantizer.embedding.weight, before)
    assert ((quantizer.codebook() - moved).norm(dim=1) > 0).all() and len(untouched) < SIZE


@pytest.mark.parametrize("at_once", [10**6, 2 * SIZE])
@pytest.mark.parametrize("temperature", [0.01, 0.5])
def test_ibq_matches_reference(monkeypatch, at_once, temperature):
    monkeypatch.setattr(codebook, "SCORES_AT_ONCE", at_once)
    quantizer = make_quantizer("ibq", entropy_temperature=temperature)
    z = make_vectors()
    out = quantizer(z)
    codes, vectors = quantizer.embedding.weight.detach().numpy(), rows_of(z)
    scores = np.array([[float((v * e).sum()) for e in codes] for v in vectors])
    chosen = scores.argmax(1)
    assert out.codes.flatten().tolist() == chosen.tolist() and len(set(chosen)) > 2
    np.testing.assert_array_equal(rows_of(out.quantized), codes[chosen])
    expected = mean_square(codes[chosen] - vectors)
    for name in ("codebook", "commitment", "double"):
        assert out.losses[name].item() == pytest.approx(expected, rel=1e-12)
    sharp = np.array([softmax(row / temperature) for row in scores])
    decided = np.mean([-sum(q * math.log(q) for q in row if q > 0) for row in sharp])
    usage = sharp.mean(0)
    spread = -sum(q * math.log(q + 1e-5) for q in usage)
    assert out.losses["entropy"].item() == pytest.approx(decided - spread, rel=1e-9)
    assert torch.equal(quantizer.lookup(z), out.codes)
    assert quantizer.loss_weights.keys() == out.losses.keys()


@pytest.mark.parametrize("at_once", [10**6, 2 * SIZE])
def test_ibq_gradients_are_those_of_the_paper_s_expression(monkeypatch, at_once):
    monkeypatch.setattr(codebook, "SCORES_AT_ONCE", at_once)
    quantizer = make_quantizer("ibq")
    z = make_vectors().requires_grad_()
    pull = make_vectors(seed=2)
    out = quantizer(z)
    ((out.quantized * pull).sum() + out.losses["double"]).backward()
    found = z.grad, quantizer.embedding.weight.grad

    z = make_vectors().requires_grad_()
    codes = quantizer.embedding.weight.detach().requires_grad_()
    vectors = z.permute(0, 2, 3, 1).reshape(-1, DIM)
    p = (vectors @ codes.T).softmax(1)
    hard = torch.nn.functional.one_hot(p.argmax(1), SIZE).double()
    quantized = (hard - p.detach() + p) @ codes
    rows = pull.permute(0, 2, 3, 1).reshape(-1, DIM)
    ((quantized * rows).sum() + ((quantized - vectors) ** 2).mean()).backward()
    torch.testing.assert_close(found[0], z.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[1], codes.grad, rtol=1e-10, atol=1e-12)


def test_ibq_gives_every_code_a_gradient_and_vq_only_the_chosen():
    for kind, everyone in (("ibq", True), ("vq", False)):
        settings = {"entropy_weight": 0.0} if kind == "ibq" else {"init_from_data": False}
        quantizer = make_quantizer(kind, **settings)
        out = quantizer(make_vectors())
        chosen = out.codes.unique().tolist()
        assert len(chosen) < SIZE
        tok.total_loss(out.losses, quantizer.loss_weights).backward()
        moved = (quantizer.embedding.weight.grad.norm(dim=1) > 0).nonzero().flatten().tolist()
        assert moved == (list(range(SIZE)) if everyone else chosen)


def test_an_unused_code_has_a_finite_entropy_gradient():
    quantizer = make_quantizer("ibq").float()
    with torch.no_grad():
        quantizer.embedding.weight[0] = -1000.0 * torch.ones(DIM)
    z = make_vectors().float().abs().requires_grad_()
    quantizer(z).losses["entropy"].backward()
    assert z.grad.isfinite().all() and quantizer.embedding.weight.grad.isfinite().all()


def test_ibq_s_entropy_is_of_the_vectors_of_all_processes(monkeypatch):
    """Two processes, one after the other: the second's sum is what the first is told, and so on."""
    settings = {"entropy_temperature": 0.3}
    z, found, usages = make_vectors(), [], []

    def collect(tensor):
        if tensor.is_floating_point():  # and not counts of codes
            usages.append(tensor.clone())

    def tell(tensor):
        if tensor.is_floating_point():
            tensor.copy_(total)

    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(processes.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(processes.dist, "all_reduce", collect)
    for part in z:
        make_quantizer("ibq", **settings)(part[None])
    total = sum(usages)
    monkeypatch.setattr(processes.dist, "all_reduce", tell)
    for part in z:
        quantizer = make_quantizer("ibq", **settings)
        loss = quantizer(part[None]).losses["entropy"]
        loss.backward()
        found.append((loss.detach(), quantizer.embedding.weight.grad))
    monkeypatch.undo()
    whole = make_quantizer("ibq", **settings)
    expected = whole(z).losses["entropy"]
    expected.backward()
    torch.testing.assert_close((found[0][0] + found[1][0]) / 2, expected.detach())
    torch.testing.assert_close((found[0][1] + found[1][1]) / 2, whole.embedding.weight.grad)


@pytest.mark.parametrize("kind", ["simvq", "ibq"])
def test_a_tokenizer_learns_with_it(kind):
    values = {"kind": "vq", "quantizer": {"kind": kind}}
    tokenizer = make(
        quantizer=tok.parse_config(values, "test").quantizer, l2_normalize=kind != "ibq"
    )
    images = make_images(4, 8, 8)
    optimizer = torch.optim.Adam([p for p in tokenizer.parameters() if p.requires_grad], lr=3e-3)
    weights = {"l1": 0.0, "l2": 1.0, **tokenizer.quantize.loss_weights}
    errors = []
    for _ in range(30):
        out = tokenizer(images)
        optimizer.zero_grad()
        tok.total_loss(out.losses, weights).backward()
        assert all(p.grad is not None for p in tokenizer.parameters() if p.requires_grad)
        optimizer.step()
        errors.append(out.losses["l2"].item())
    assert errors[-1] < 0.7 * errors[0]


def test_under_autocast_codes_are_those_of_float32():
    for kind in QUANTIZERS:
        quantizer = make_quantizer(kind).float().eval()
        z = make_vectors().float()
        with torch.autocast("cpu", torch.bfloat16):
            out = quantizer(z)
        assert torch.equal(out.codes, quantizer(z).codes)
        assert all(loss.dtype == torch.float32 for loss in out.losses.values())


def test_settings_of_another_kind_are_refused():
    values = {"kind": "vq", "quantizer": {"kind": "simvq", "reseed_after": 3}}
    with one_line_error(ValueError, "quantizer.reseed_after: unknown key"):
        tok.parse_config(values, "test")
