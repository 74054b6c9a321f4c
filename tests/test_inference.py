"""The model prepared for sampling computes what the plain one does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from moveimg.device import has_bfloat16
from moveimg.model.inference import StaticTransformer, decoding_model, packable
from moveimg.model.transformer import Transformer
from tests.conftest import PAIRED, VARIANTS, lively, random_inputs, tiny_config

pytestmark = pytest.mark.skipif(
    not packable(torch.zeros(2, 2)), reason="this torch has no oneDNN, models are used unchanged"
)


@torch.inference_mode()
def decoded(model: Transformer, codes: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] by cached decoding."""
    cache = model.make_cache(len(labels))
    steps = [model.start(labels, cache)]
    steps += [model.decode(codes[:, t], cache) for t in range(codes.shape[1] - 1)]
    return torch.stack(steps, dim=1)


def tiny_model(name: str, dtype: torch.dtype = torch.float32) -> Transformer:
    return lively(tiny_config(**VARIANTS[name]), dtype=dtype)


def test_packed_matrices_give_the_same_logits(variant):
    model = lively(variant, dtype=torch.float32)
    codes, labels = random_inputs(model.config)
    fast = decoding_model(model)
    torch.testing.assert_close(
        decoded(fast, codes, labels), decoded(model, codes, labels), atol=2e-5, rtol=1e-4
    )
    with torch.inference_mode():
        torch.testing.assert_close(fast(codes, labels), model(codes, labels), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", ["mha-move-3-class-rows-swiglu", "mla-move-3-class-rows-moe"])
def test_the_same_call_gives_the_same_bits(variant):
    fast = decoding_model(tiny_model(variant))
    codes, labels = random_inputs(fast.config)
    assert torch.equal(decoded(fast, codes, labels), decoded(fast, codes, labels))


def test_bfloat16_stays_within_its_rounding():
    model = tiny_model("mha-move-3-class-rows-swiglu")
    codes, labels = random_inputs(model.config)
    rounded = copy.deepcopy(model).bfloat16()
    exact = decoded(copy.deepcopy(rounded).double(), codes, labels)  # the same weights
    plain = (decoded(rounded, codes, labels) - exact).abs().max()
    fast = (decoded(decoding_model(rounded), codes, labels) - exact).abs().max()
    assert fast <= 1.5 * plain
    assert rounded.head.weight.dtype == torch.bfloat16  # the model itself is left alone


def test_int8_is_near():
    model = tiny_model("mha-move-3-class-rows-swiglu")
    codes, labels = random_inputs(model.config)
    exact, near = (
        decoded(model, codes, labels),
        decoded(decoding_model(model, "int8"), codes, labels),
    )
    error = (near - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.1  # rounded, but not wrong
    assert torch.equal(decoded(model, codes, labels), exact)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_int8_of_other_dtypes(dtype):
    model = tiny_model("mha-none-swiglu", dtype)
    codes, labels = random_inputs(model.config)
    near = decoded(decoding_model(model, "int8"), codes, labels)
    exact = decoded(copy.deepcopy(model).double(), codes, labels)
    assert (near - exact).norm() / exact.norm() < 0.1


def test_int8_survives_a_row_of_zeros():
    model = tiny_model("mha-none-swiglu")
    with torch.no_grad():
        model.head.weight[3] = 0
    codes, labels = random_inputs(model.config)
    logits = decoded(decoding_model(model, "int8"), codes, labels)
    assert torch.isfinite(logits).all()
    assert (logits[..., 3] == 0).all()


@pytest.mark.parametrize("name", ["code_embedding", "norm"])
def test_int8_of_damaged_weights_is_told(name):
    model = tiny_model("mha-none-swiglu")
    with torch.no_grad():
        getattr(model, name).weight.fill_(torch.nan)
    codes, labels = random_inputs(model.config)
    with pytest.raises(ValueError, match="weights are damaged"):
        decoded(decoding_model(model, "int8"), codes, labels)


@pytest.mark.skipif(has_bfloat16(), reason="this processor computes bfloat16 itself")
@pytest.mark.parametrize("damage", [torch.inf, torch.nan, 1e6])
def test_weights_beyond_half_precision_are_kept(damage):
    model = tiny_model("mha-none-swiglu").bfloat16()
    with torch.no_grad():
        model.head.weight[3, 2] = damage
    codes, labels = random_inputs(model.config)
    exact = decoded(copy.deepcopy(model).double(), codes, labels)
    near = decoded(decoding_model(model), codes, labels)
    torch.testing.assert_close(near.double(), exact, atol=0.1, rtol=0.05, equal_nan=True)


def test_tables_are_shared_and_matrices_are_not():
    model = tiny_model("mha-move-3-class-rows-swiglu")
    fast = decoding_model(model)
    assert fast.memory.bank.weight is model.memory.bank.weight
    assert fast.code_embedding.weight is model.code_embedding.weight
    assert not any(name.endswith("wqkv.weight") for name, _ in fast.named_parameters())
    assert any(name.endswith("wqkv.weight") for name, _ in model.named_parameters())


def test_float64_is_used_unchanged():
    model = tiny_model("mha-none-swiglu", torch.float64)
    assert decoding_model(model) is model


def test_what_cannot_be_quantized_is_refused():
    model = tiny_model("mha-none-swiglu")
    with pytest.raises(ValueError, match=r"int4.*expected int8"):
        decoding_model(model, "int4")
    with pytest.raises(ValueError, match="int8 on meta: expected a CPU"):
        decoding_model(copy.deepcopy(model).to("meta"), "int8")


# --- one step over a static cache ----------------------------------------------------------


def test_the_static_step_equals_the_growing_cache(variant):
    model = lively(variant)
    static = StaticTransformer(model, compile=False)
    for seed in range(2):  # the second decoding reuses the cache of the first
        codes, labels = random_inputs(model.config, seed=seed)
        torch.testing.assert_close(
            decoded(static, codes, labels), decoded(model, codes, labels), rtol=1e-10, atol=1e-10
        )
    assert len(static.idle[3]) == 1


@pytest.mark.parametrize("name", [*PAIRED, "mla-lave-x2-gated-swiglu"])
def test_the_static_step_compiles_to_one_graph(name):
    """No graph break, and not a graph per position: what a recorded CUDA graph needs."""
    model = tiny_model(name)
    static = StaticTransformer(model, compile=False)
    counter = CompileCounter()
    torch._dynamo.reset()
    static.run_step = torch.compile(
        static.static_step, backend=counter, fullgraph=True, dynamic=False
    )
    codes, labels = random_inputs(model.config)
    torch.testing.assert_close(
        decoded(static, codes, labels), decoded(model, codes, labels), rtol=1e-4, atol=1e-4
    )
    assert counter.frame_count <= 2  # the first step may have rows of other strides


def test_two_decodings_at_once_do_not_share_a_cache():
    model = tiny_model("mha-move-3-class-rows-swiglu")
    static = StaticTransformer(model, compile=False)
    labels = random_inputs(model.config)[1]
    one, two = static.make_cache(3), static.make_cache(3)
    first = static.start(labels, one)
    static.start(labels.flip(0), two)
    assert torch.equal(static.start(labels, static.make_cache(3)), first)
    with pytest.raises(ValueError, match="3 labels"):
        static.start(labels, two)


def test_compile_and_quantize_exclude_each_other():
    with pytest.raises(ValueError, match="int8"):
        decoding_model(tiny_model("mha-none-swiglu"), "int8", compile=True)
