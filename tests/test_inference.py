"""Models prepared for sampling compute what the plain model does: packed, quantized, static."""

from __future__ import annotations

import copy
import gc
import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from moveimg.config import SamplingSettings
from moveimg.model import Transformer, decoding_model
from moveimg.model.inference import StaticDecoder, packable
from moveimg.sampling import image_rngs, iter_codes, sample_codes
from tests.conftest import MORE, PAIRED, VARIANTS, decode_all, lively, random_inputs, tiny_config

NAMES = [*PAIRED, "mla-lave-x2-gated-swiglu", "mha-move-2-ungated-swiglu", *MORE]
MOVE = "mha-move-3-class-rows-swiglu"
GUIDED = SamplingSettings(cfg_scale=2.0, temperature=0.9, top_k=8, top_p=0.95)
needs_onednn = pytest.mark.skipif(not packable(torch.zeros(2, 2)), reason="torch without oneDNN")
decoded = torch.inference_mode()(decode_all)


def tiny_model(name: str, dtype: torch.dtype = torch.float64) -> Transformer:
    return lively(tiny_config(**VARIANTS[name]), dtype=dtype)


def sample(model, seed=0):
    rngs = image_rngs(range(seed, seed + 3))
    return sample_codes(model, torch.tensor([0, 4, 2]), GUIDED, rngs)


@needs_onednn
@pytest.mark.parametrize("name", NAMES)
def test_packed_matrices_give_the_same_logits(name):
    model = tiny_model(name, torch.float32)
    codes, labels = random_inputs(model.config)
    fast = decoding_model(model)
    logits, expected = decoded(fast, codes, labels), decoded(model, codes, labels)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(decoded(fast, codes, labels), logits)
    with torch.inference_mode():
        torch.testing.assert_close(fast(codes, labels), model(codes, labels), atol=2e-5, rtol=1e-4)


@needs_onednn
@pytest.mark.parametrize("native", [False, True])
def test_bfloat16_stays_within_its_rounding(native, monkeypatch):
    if not native:  # as on a processor without bfloat16 instructions
        monkeypatch.setattr("moveimg.model.inference.has_bfloat16", lambda: False)
    rounded = tiny_model(MOVE, torch.float32).bfloat16()
    codes, labels = random_inputs(rounded.config)
    exact = decoded(copy.deepcopy(rounded).double(), codes, labels)  # the same weights
    plain = (decoded(rounded, codes, labels) - exact).abs().max()
    fast = (decoded(decoding_model(rounded), codes, labels) - exact).abs().max()
    assert fast <= 1.5 * plain
    assert rounded.head.weight.dtype == torch.bfloat16  # the model itself is unchanged


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_int8_is_near(dtype):
    model = tiny_model(MOVE, dtype)
    with torch.no_grad():
        model.head.weight[3] = 0  # a row without a scale of its own
    codes, labels = random_inputs(model.config)
    logits = decoded(decoding_model(model, "int8"), codes, labels)
    exact = decoded(copy.deepcopy(model).double(), codes, labels)
    assert 1e-4 < (logits - exact).norm() / exact.norm() < 0.1  # rounded, but not wrong
    assert not logits[..., 3].any()


def test_unpackable_models_and_unknown_settings():
    model = tiny_model("mha-none-swiglu")
    assert decoding_model(model) is model
    with pytest.raises(ValueError, match="int4"):
        decoding_model(model, "int4")
    with pytest.raises(ValueError, match="int8 with meta"):
        decoding_model(copy.deepcopy(model).to("meta"), "int8")
    with pytest.raises(ValueError, match="int8 with compile"):
        decoding_model(model, "int8", compile=True)


@pytest.mark.parametrize("name", NAMES)
def test_the_static_step_gives_the_logits_of_the_growing_cache(name):
    model = tiny_model(name)
    static = StaticDecoder(model)
    for seed in range(2):  # the second decoding uses the tensors of the first
        codes, labels = random_inputs(model.config, seed=seed)
        expected = decoded(model, codes, labels)
        torch.testing.assert_close(decoded(static, codes, labels), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", [MOVE, "mla-lave-x2-gated-swiglu", "mla-q-move-moe-listed"])
def test_the_static_step_compiles_to_one_graph_for_all_positions(name):
    torch._dynamo.reset()
    counters.clear()
    model = tiny_model(name)
    static = StaticDecoder(model, backend="aot_eager", fullgraph=True)
    for seed, batch in enumerate((3, 4)):  # both padded to four rows
        codes, labels = random_inputs(model.config, batch=batch, seed=seed)
        torch.testing.assert_close(decoded(static, codes, labels), decoded(model, codes, labels))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler needs g++")
def test_compile_gives_the_codes_of_the_plain_path():
    torch._dynamo.reset()
    model = lively(tiny_config(n_layer=1, grid=[2, 2], memory={"kind": "move", "slots": 2}))
    assert torch.equal(sample(decoding_model(model, compile=True)), sample(model))


def test_concurrent_and_abandoned_decodings_do_not_disturb_each_other():
    model = tiny_model(MOVE)
    static = StaticDecoder(model)
    runs = [
        iter_codes(static, torch.tensor([0, 4, 2]), GUIDED, image_rngs(range(seed, seed + 3)))
        for seed in (0, 50, 9)
    ]
    drawn = [[next(run) for run in runs] for _ in range(4)]  # a code of each in turn
    runs.pop().close()
    drawn += [[next(run) for run in runs] for _ in range(model.config.seq_len - 4)]
    for i, seed in enumerate((0, 50)):
        codes = torch.stack([step[i] for step in drawn], dim=1)
        assert torch.equal(codes, sample(model, seed))
    del runs, drawn
    gc.collect()
    assert torch.equal(sample(static), sample(model))
    assert [len(idle) for idle in static._idle.values()] == [3]
