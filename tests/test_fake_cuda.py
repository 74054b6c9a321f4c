"""What takes another way on CUDA, followed with tensors that have a device and no numbers."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import tokenizer as vq
from moveimg.config import SamplingSettings
from moveimg.model import Transformer
from moveimg.model.attention import without_cudnn_sdpa
from moveimg.sampling import draw, running_sums
from tests.conftest import VARIANTS, tiny_config

needs_cuda_build = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="this torch knows no CUDA"
)


@needs_cuda_build
@pytest.mark.parametrize("name", ["mha-none-swiglu", "mha-none-moe", "mla-none-swiglu"])
def test_decoding_keeps_off_cudnn_and_teacher_forcing_does_not(name, monkeypatch):
    allowed: list[bool] = []
    attend = F.scaled_dot_product_attention

    def noting(*args, **kwargs):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noting)
    with FakeTensorMode(), torch.device("cuda"), torch.inference_mode():
        model = Transformer(tiny_config(**VARIANTS[name])).eval()
        codes = torch.zeros(3, 12, dtype=torch.int64)
        cache = model.make_cache(3)
        logits = model.start(codes[:, 0], cache)
        logits = model.decode(logits.argmax(dim=1), cache)
        assert logits.device.type == "cuda" and not any(allowed)
        steps = len(allowed)
        model(codes, codes[:, 0])
        assert len(allowed) > steps and all(allowed[steps:])


def test_cudnn_stays_off_where_it_was_off_and_comes_back_after_an_error():
    cuda = torch.device("cuda")
    with pytest.raises(RuntimeError), without_cudnn_sdpa(cuda):
        raise RuntimeError
    assert torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with without_cudnn_sdpa(cuda):
            pass
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


@needs_cuda_build
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (3, 0.9)])
def test_probabilities_are_added_up_in_float64_and_nothing_is_waited_for(top_k, top_p):
    settings = SamplingSettings(top_k=top_k, top_p=top_p)
    with FakeTensorMode():  # which refuses what would have to wait for a number
        logits = torch.zeros(1, 50, device="cuda")
        assert running_sums(logits).dtype == torch.float64
        codes = draw(logits, torch.zeros(1, device="cuda"), settings)
    assert codes.device.type == "cuda" and codes.dtype == torch.int64
    assert running_sums(torch.zeros(1, 50)).dtype == torch.float32


def test_how_long_codes_were_idle_is_taken_back_to_where_the_codebook_is():
    config = vq.parse_config({"kind": "vq", "width": 32}, "tokenizer")
    with torch.device("meta"):
        quantizer = vq.build(config).quantize
    quantizer.load_training_state({"idle_steps": torch.arange(config.codebook_size)})
    assert quantizer.idle_steps.device.type == "meta"
    quantizer.load_training_state({"idle_steps": None})
    assert quantizer.idle_steps is None
