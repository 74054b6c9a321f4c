"""Winograd's algorithm gives the vectors, codes and pixels of the plain way."""

from __future__ import annotations

import pytest
import torch

import tokenizer as vq
from tokenizer.winograd import WinogradConv2d, fast_tokenizer

pytestmark = pytest.mark.skipif(
    not torch.backends.nnpack.is_available(), reason="this torch has no NNPACK"
)


@pytest.fixture(scope="module")
def tokenizer() -> vq.VQTokenizer:
    torch.manual_seed(0)
    config = vq.VQConfig(
        width=128, multipliers=(1, 1), n_res_blocks=1, z_channels=8, codebook_size=32,
        codebook_dim=8, norm_groups=8, attention=False,
    )  # fmt: skip
    return vq.VQTokenizer(config).freeze()


def images(n: int, size: int) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def test_vectors_and_codes_are_those_of_the_plain_way(tokenizer, monkeypatch):
    fast, x, calls = fast_tokenizer(tokenizer), images(2, 64), []
    kernel = torch._nnpack_spatial_convolution
    monkeypatch.setattr(
        torch, "_nnpack_spatial_convolution", lambda *args: (calls.append(1), kernel(*args))[1]
    )
    fast.encode(x)
    assert len(calls) == 4  # two convolutions of 64 x 64, an image at a time
    exact = tokenizer.double().encoder(x.double())
    tokenizer.float()
    torch.testing.assert_close(fast.encoder(x).double(), exact, atol=2e-4, rtol=2e-4)
    assert torch.equal(fast.encode(x), tokenizer.encode(x))
    assert torch.equal(fast.encode(x)[1:], fast.encode(x[1:]))  # whatever lies beside it


@torch.no_grad()
def test_pixels_are_those_of_the_plain_way(tokenizer):
    fast, codes = fast_tokenizer(tokenizer), torch.arange(2 * 32 * 32).view(2, -1) % 32
    found = fast.decode(codes)
    exact = tokenizer.double().decode(codes)
    tokenizer.float()
    assert sum(isinstance(m, WinogradConv2d) for m in fast.decoder.modules()) > 4
    torch.testing.assert_close(found.double(), exact, atol=2e-4, rtol=0)
    assert found.std() > 0.01


def test_small_images_and_other_dtypes_take_the_plain_way(tokenizer):
    x = images(2, 32)
    assert torch.equal(fast_tokenizer(tokenizer).encoder(x), tokenizer.encoder(x))
    assert fast_tokenizer(tokenizer.double()) is tokenizer
    tokenizer.float()


def test_weights_names_and_fingerprint_stay(tokenizer):
    fast = fast_tokenizer(tokenizer)
    assert fast.fingerprint == tokenizer.fingerprint
    assert list(fast.state_dict()) == list(tokenizer.state_dict())
    pairs = zip(fast.parameters(), tokenizer.parameters(), strict=True)
    assert all(mine is theirs for mine, theirs in pairs)
    assert not any(isinstance(m, WinogradConv2d) for m in tokenizer.modules())
