"""The codebook: lookup, gradients, dead codes, statistics, and training losses."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokenizer as tok
from tests.test_tokenizer import make, make_images, one_line_error
from tokenizer import codebook, quantizers


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 40),
    size=st.integers(1, 30),
    dim=st.integers(1, 6),
    at_once=st.integers(1, 200),
    seed=st.integers(0, 2**20),
    whole=st.booleans(),
)
def test_nearest_codes_match_brute_force(n, size, dim, at_once, seed, whole):
    rng = torch.Generator().manual_seed(seed)
    vectors, codes = (
        torch.randn(rows, dim, generator=rng, dtype=torch.float64) * 2 for rows in (n, size)
    )
    if whole:  # whole numbers have exact ties: the lowest index wins
        vectors, codes = vectors.round(), codes.round()
    distances = (vectors[:, None] - codes[None]).square().sum(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codebook, "SCORES_AT_ONCE", at_once)
        assert torch.equal(codebook.nearest_codes(vectors, codes), distances.argmin(1))


def make_quantizer(size: int = 8, l2_normalize: bool = False, **settings):
    config = tok.VQQuantizerConfig(**{"init_from_data": False, **settings})
    return quantizers.VectorQuantizer(config, size, 2, l2_normalize)


def as_grid(vectors: Tensor) -> Tensor:
    """[n, D] -> [1, D, 1, n]."""
    return vectors.T[None, :, None]


@pytest.mark.parametrize("l2_normalize", [False, True])
def test_straight_through_gradient(l2_normalize):
    torch.manual_seed(0)
    quantizer = make_quantizer(l2_normalize=l2_normalize)
    z = torch.randn(2, 2, 3, 3, requires_grad=True)
    out = quantizer(z)
    chosen = quantizer.embed(out.codes).mT.reshape(z.shape)
    torch.testing.assert_close(out.quantized, chosen)
    weight = torch.randn_like(z)
    (out.quantized * weight).sum().backward()
    copy = z.detach().requires_grad_()
    compared = F.normalize(copy, dim=1) if l2_normalize else copy
    (compared * weight).sum().backward()
    torch.testing.assert_close(z.grad, copy.grad)
    assert quantizer.embedding.weight.grad is None, "pixels move the encoder, not the codes"


def test_codebook_losses_move_their_own_side():
    quantizer = make_quantizer()
    z = torch.randn(1, 2, 2, 2, requires_grad=True)
    out = quantizer(z)
    chosen = quantizer.embed(out.codes).mT.reshape(z.shape)
    expected = (chosen - z).square().mean()
    torch.testing.assert_close(out.losses["codebook"], expected)
    torch.testing.assert_close(out.losses["commitment"], expected)
    out.losses["codebook"].backward(retain_graph=True)
    assert z.grad is None and quantizer.embedding.weight.grad is not None
    quantizer.embedding.weight.grad = None
    out.losses["commitment"].backward()
    assert z.grad is not None and quantizer.embedding.weight.grad is None


def test_dead_codes_are_revived():
    torch.manual_seed(0)
    quantizer = make_quantizer(size=8, reseed_after=3)
    with torch.no_grad():
        quantizer.embedding.weight.fill_(100.0)
        quantizer.embedding.weight[5] = 0.0
    batch = torch.randn(20, 2)
    for _ in range(3):  # only code 5 is near
        out = quantizer(as_grid(batch))
        assert out.codes.unique().tolist() == [5] and out.stats["reseeded"] == 0
    out = quantizer(as_grid(batch))
    assert out.stats["reseeded"] == 7
    assert out.codes.unique().numel() >= 7, "revived codes stand on vectors and are chosen"
    assert (quantizer.embedding.weight < 50).all()
    assert torch.equal(quantizer.embedding.weight[5], torch.zeros(2)), "a living code stays"
    assert quantizer(as_grid(batch)).stats["reseeded"] == 0


def test_a_revived_code_has_its_time_again():
    quantizer = make_quantizer(size=4, reseed_after=2)
    with torch.no_grad():
        quantizer.embedding.weight.fill_(100.0)
    batch = as_grid(torch.ones(9, 2))  # codes on equal vectors: only the first is chosen
    moved = [int(quantizer(batch).stats["reseeded"]) for _ in range(5)]
    assert moved == [0, 0, 3, 0, 3]


def test_reseeding_takes_no_more_codes_than_vectors_and_can_be_off():
    torch.manual_seed(0)
    for reseed_after, expected in ((1, 2), (0, 0)):
        quantizer = make_quantizer(size=8, reseed_after=reseed_after)
        with torch.no_grad():
            quantizer.embedding.weight.fill_(100.0)
        moved = [int(quantizer(as_grid(torch.randn(2, 2))).stats["reseeded"]) for _ in range(3)]
        assert moved == [0, expected, expected]


def test_codebook_starts_at_the_first_batch_unless_it_was_loaded():
    torch.manual_seed(0)
    vectors = torch.randn(5, 2) + 50
    fresh = make_quantizer(init_from_data=True)
    stored = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    fresh(as_grid(vectors))
    assert (fresh.embedding.weight - 50).abs().max() < 10
    assert fresh.embedding.weight.unique(dim=0).shape[0] == 8, "no two codes are the same"
    before = fresh.embedding.weight.detach().clone()
    fresh(as_grid(vectors - 100))
    assert torch.equal(fresh.embedding.weight, before), "only the first batch"
    loaded = make_quantizer(init_from_data=True)
    loaded.load_state_dict(stored)
    loaded(as_grid(vectors))
    assert torch.equal(loaded.embedding.weight, stored["embedding.weight"])


def test_code_statistics():
    stats = tok.code_statistics(torch.tensor([2, 2, 0, 0]))
    assert stats["usage"] == 0.5 and stats["perplexity"] == pytest.approx(2)
    stats = tok.code_statistics(torch.ones(7, dtype=torch.int64))
    assert stats["usage"] == 1 and stats["perplexity"] == pytest.approx(7)


def test_training_learns():
    tokenizer = make()
    images = make_images(4, 8, 8)
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        out = tokenizer(images)
        loss = tok.total_loss(out.losses)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(out.losses["l2"].item())
    assert losses[-1] < 0.6 * losses[0]
    assert out.reconstruction.shape == images.shape and out.codes.shape == (4, 4)
    assert set(out.stats) == {"usage", "perplexity", "reseeded"}
    assert all(parameter.grad is not None for parameter in tokenizer.parameters())


def test_total_loss_refuses_unmatched_names():
    terms = {"l1": torch.tensor(1.0), "l2": torch.tensor(2.0)}
    assert tok.total_loss(terms, {"l1": 3.0, "l2": 0.5}) == 4
    with one_line_error(ValueError, "differ in ['codebook', 'commitment']"):
        tok.total_loss(terms)
