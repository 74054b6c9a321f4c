"""The quantizers against NumPy in float64, where their gradients go, and re-seeding."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax
from torch import Tensor

import tokenizer as tok
from tests.test_tokenizer import make, make_images
from tokenizer import quantizers
from tokenizer.quantizers import QUANTIZERS

SIZE, DIM = 7, 3


def make_quantizer(kind: str = "vq", l2_normalize=False, size=SIZE, dim=DIM, **changes):
    changes = {"init_from_data": False, **changes} if kind == "vq" else changes
    torch.manual_seed(0)
    config = tok.QuantizerConfig(kind=kind, **changes)
    return QUANTIZERS[kind](config, size, dim, l2_normalize).double()


def make_vectors(seed: int = 1) -> Tensor:
    """z [2, DIM, 2, 3]."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(2, DIM, 2, 3, generator=rng, dtype=torch.float64)


def as_grid(vectors: Tensor) -> Tensor:
    """[n, D] -> [1, D, 1, n]."""
    return vectors.double().T[None, :, None]


def rows_of(z: Tensor) -> np.ndarray:
    """[B, D, h, w] -> [n, D], one vector after another."""
    return np.array([image[:, y, x] for image in z.detach().numpy() for y, x in np.ndindex(2, 3)])


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
        codes = codes @ quantizer.projection.weight.detach().numpy().T
    if l2_normalize:
        codes, vectors = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (codes, vectors))
    chosen = ((vectors[:, None] - codes) ** 2).sum(2).argmin(1)
    assert out.codes.flatten().tolist() == chosen.tolist() and len(set(chosen)) > 2
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


def test_ibq_matches_reference():
    quantizer, z = make_quantizer("ibq", entropy_temperature=0.5), make_vectors()
    out = quantizer(z)
    codes, vectors = quantizer.embedding.weight.detach().numpy(), rows_of(z)
    scores = vectors @ codes.T
    chosen = scores.argmax(1)
    assert out.codes.flatten().tolist() == chosen.tolist() and len(set(chosen)) > 2
    np.testing.assert_array_equal(rows_of(out.output), codes[chosen])
    expected = ((codes[chosen] - vectors) ** 2).mean()
    for name in ("codebook", "commitment", "double"):
        assert out.losses[name].item() == pytest.approx(expected, rel=1e-12)
    p, mean = softmax(scores / 0.5, axis=1), softmax(scores / 0.5, axis=1).mean(0)
    single = -(p * log_softmax(scores / 0.5, axis=1)).sum(1).mean()
    together = -(mean * np.log(mean + 1e-5)).sum()
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
def test_every_parameter_of_a_tokenizer_gets_a_gradient(kind):
    tokenizer = make(quantizer=tok.QuantizerConfig(kind=kind))
    out = tokenizer(make_images(4, 8, 8))
    sum(out.losses.values()).backward()
    without = {name for name, p in tokenizer.named_parameters() if p.grad is None}
    assert without == ({"quantize.embedding.weight"} if kind == "simvq" else set())
    assert out.codes.shape == (4, 4) and {"usage", "perplexity"} <= set(out.stats)
