"""The quantizers against NumPy in float64, where their gradients go, and re-seeding."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokenizer as tok
from tests.test_tokenizer import make, make_images
from tokenizer import quantizers
from tokenizer.quantizers import QUANTIZERS

SIZE, DIM = 7, 3


def make_quantizer(kind: str = "vq", l2_normalize=False, size=SIZE, dim=DIM, **settings):
    if kind == "vq":
        settings = {"init_from_data": False} | settings
    values = {"kind": "vq", "quantizer": {"kind": kind, **settings}}
    torch.manual_seed(0)
    config = tok.parse_config(values, "test").quantizer
    return QUANTIZERS[kind](config, size, dim, l2_normalize).double()


def make_vectors(seed: int = 1) -> Tensor:
    """z [2, DIM, 2, 3]."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(2, DIM, 2, 3, generator=rng, dtype=torch.float64)


def as_grid(vectors: Tensor) -> Tensor:
    """[n, D] -> [1, D, 1, n]."""
    return vectors.double().T[None, :, None]


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def rows_of(z: Tensor) -> np.ndarray:
    """[B, D, h, w] -> [n, D], one vector after another."""
    b, d, h, w = z.shape
    array = z.detach().numpy()
    positions = [(i, y, x) for i in range(b) for y in range(h) for x in range(w)]
    return np.array([[array[i, c, y, x] for c in range(d)] for i, y, x in positions])


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 40),
    size=st.integers(1, 30),
    max_scores=st.integers(1, 200),
    seed=st.integers(0, 2**20),
    whole=st.booleans(),
)
def test_nearest_codes_match_brute_force(n, size, max_scores, seed, whole):
    rng = torch.Generator().manual_seed(seed)
    vectors, codes = (
        torch.randn(rows, DIM, generator=rng, dtype=torch.float64) * 2 for rows in (n, size)
    )
    if whole:  # whole numbers have exact ties: the lowest index wins
        vectors, codes = vectors.round(), codes.round()
    distances = (vectors[:, None] - codes[None]).square().sum(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantizers, "MAX_SCORES", max_scores)
        assert torch.equal(make_quantizer().assign(vectors, codes), distances.argmin(1))


@pytest.mark.parametrize("kind", ["vq", "simvq"])
@pytest.mark.parametrize("l2_normalize", [False, True])
def test_nearest_vector_quantizers_match_reference(kind, l2_normalize):
    quantizer, z = make_quantizer(kind, l2_normalize), make_vectors().requires_grad_()
    out = quantizer(z)
    codes, vectors = quantizer.embedding.weight.detach().numpy(), rows_of(z)
    if kind == "simvq":
        codes = np.array([quantizer.projection.weight.detach().numpy() @ row for row in codes])
    if l2_normalize:
        codes, vectors = unit(codes), unit(vectors)
    chosen = [min(range(SIZE), key=lambda j: ((v - codes[j]) ** 2).sum()) for v in vectors]
    assert out.codes.flatten().tolist() == chosen and len(set(chosen)) > 2
    np.testing.assert_allclose(rows_of(out.output), codes[chosen], atol=1e-12)
    expected = ((codes[chosen] - vectors) ** 2).mean()
    for name in ("codebook", "commitment"):
        assert out.losses[name].item() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(quantizer.lookup(z), out.codes)
    # straight through: the gradient of the quantized vectors is that of the vectors compared
    weight, copy = make_vectors(2), z.detach().requires_grad_()
    (out.output * weight).sum().backward(retain_graph=True)
    ((F.normalize(copy, dim=1) if l2_normalize else copy) * weight).sum().backward()
    torch.testing.assert_close(z.grad, copy.grad)
    learned = quantizer.projection.weight if kind == "simvq" else quantizer.embedding.weight
    assert learned.grad is None, "pixels move the encoder, not the codes"
    z.grad = None
    out.losses["codebook"].backward(retain_graph=True)
    assert z.grad is None and learned.grad is not None
    learned.grad = None
    out.losses["commitment"].backward()
    assert z.grad is not None and learned.grad is None
    assert (quantizer.embedding.weight.grad is None) or kind == "vq"


def test_ibq_matches_reference():
    quantizer, temperature = make_quantizer("ibq", entropy_temperature=0.5), 0.5
    z = make_vectors()
    out = quantizer(z)
    codes, vectors = quantizer.embedding.weight.detach().numpy(), rows_of(z)
    scores = np.array([[float((v * e).sum()) for e in codes] for v in vectors])
    chosen = scores.argmax(1)
    assert out.codes.flatten().tolist() == chosen.tolist() and len(set(chosen)) > 2
    np.testing.assert_array_equal(rows_of(out.output), codes[chosen])
    expected = ((codes[chosen] - vectors) ** 2).mean()
    for name in ("codebook", "commitment", "double"):
        assert out.losses[name].item() == pytest.approx(expected, rel=1e-12)
    sharp = np.array([softmax(row / temperature) for row in scores])
    single = np.mean([-sum(q * math.log(q) for q in row if q > 0) for row in sharp])
    together = -sum(q * math.log(q + 1e-5) for q in sharp.mean(0))
    assert out.losses["entropy"].item() == pytest.approx(single - together, rel=1e-9)
    assert torch.equal(quantizer.lookup(z), out.codes)
    assert quantizer.loss_weights.keys() == out.losses.keys()


def test_ibq_gradients_are_those_of_the_paper_s_expression():
    quantizer, z, weight = make_quantizer("ibq"), make_vectors().requires_grad_(), make_vectors(2)
    out = quantizer(z)
    ((out.output * weight).sum() + out.losses["double"]).backward()
    gradients = z.grad, quantizer.embedding.weight.grad
    assert (gradients[1].norm(dim=1) > 0).all() and len(out.codes.unique()) < SIZE
    z = make_vectors().requires_grad_()
    codes = quantizer.embedding.weight.detach().requires_grad_()
    vectors = z.permute(0, 2, 3, 1).reshape(-1, DIM)
    p = (vectors @ codes.T).softmax(1)
    quantized = (F.one_hot(p.argmax(1), SIZE).double() - p.detach() + p) @ codes
    rows = weight.permute(0, 2, 3, 1).reshape(-1, DIM)
    ((quantized * rows).sum() + ((quantized - vectors) ** 2).mean()).backward()
    torch.testing.assert_close(gradients[0], z.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients[1], codes.grad, rtol=1e-10, atol=1e-12)


# --- re-seeding and the start of the codebook ---------------------------------------------------


def test_dead_codes_are_revived():
    quantizer = make_quantizer(size=8, dim=2, reseed_after=3)
    with torch.no_grad():
        quantizer.embedding.weight.fill_(100.0)
        quantizer.embedding.weight[5] = 0.0
    batch = as_grid(torch.randn(20, 2))
    for _ in range(3):  # only code 5 is near
        out = quantizer(batch)
        assert out.codes.unique().tolist() == [5] and out.stats["reseeded"] == 0
    out = quantizer(batch)
    assert out.stats["reseeded"] == 7
    assert out.codes.unique().numel() >= 7 and (quantizer.embedding.weight < 50).all()
    assert torch.equal(quantizer.embedding.weight[5], torch.zeros(2).double()), "a used code stays"


def test_codebook_starts_at_the_first_batch_unless_it_was_loaded():
    vectors = torch.randn(5, 2) + 50
    fresh, loaded = (make_quantizer(size=8, dim=2, init_from_data=True) for _ in range(2))
    stored = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    fresh(as_grid(vectors))
    assert (fresh.embedding.weight - 50).abs().max() < 10
    assert len(fresh.embedding.weight.unique(dim=0)) == 8, "no two codes are the same"
    before = fresh.embedding.weight.detach().clone()
    fresh(as_grid(vectors - 100))
    assert torch.equal(fresh.embedding.weight, before), "only the first batch"
    loaded.load_state_dict(stored)
    loaded(as_grid(vectors))
    assert torch.equal(loaded.embedding.weight, stored["embedding.weight"])


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_a_tokenizer_learns_with_it(kind):
    quantizer = tok.parse_config({"kind": "vq", "quantizer": {"kind": kind}}, "test").quantizer
    tokenizer = make(quantizer=quantizer, l2_normalize=kind != "ibq")
    frozen = tokenizer.quantize.embedding.weight.clone()
    images = make_images(4, 8, 8)
    learned = [p for p in tokenizer.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learned, lr=3e-3)
    weights = {"l1": 0.0, "l2": 1.0, **tokenizer.quantize.loss_weights}
    errors = []
    for _ in range(25):
        out = tokenizer(images)
        optimizer.zero_grad()
        sum(weights[name] * loss for name, loss in out.losses.items()).backward()
        assert all(p.grad is not None for p in learned)
        optimizer.step()
        errors.append(out.losses["l2"].item())
    assert errors[-1] < 0.7 * errors[0]
    assert torch.equal(frozen, tokenizer.quantize.embedding.weight) == (kind == "simvq")
    assert out.codes.shape == (4, 4) and {"usage", "perplexity"} <= set(out.stats)
