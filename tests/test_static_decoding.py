"""Recorded steps of decoding, without the recording: what CUDA graphs hold, run on the CPU."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch

from moveimg.config import SamplingSettings
from moveimg.model import Transformer, static_decoding
from moveimg.model.decoding import decoding_model
from moveimg.model.static_decoding import Handle, StaticTransformer
from moveimg.sampling import guide, image_rngs, iter_codes, sample_codes
from tests.conftest import MORE, PAIRED, VARIANTS, lively, random_inputs, tiny_config

GUIDED = SamplingSettings(cfg_scale=2.0, temperature=0.9, top_k=8, top_p=0.95)
NAMES = [*PAIRED, "mla-lave-x2-gated-swiglu", *MORE]


def sample(model, labels=(0, 4, 2), settings=GUIDED, seed=0):
    rngs = image_rngs(range(seed, seed + len(labels)))
    return sample_codes(model, torch.tensor(labels), settings, rngs)


def warmed(model: Transformer, rows: int) -> StaticTransformer:
    """It takes recorded steps for this many rows from the first time on."""
    static = StaticTransformer(model)
    static.make_cache(rows)
    return static


@torch.inference_mode()
def decoded(model, codes, labels):
    """Logits [B, T, V], step by step."""
    cache = model.make_cache(len(labels))
    steps = [model.start(labels, cache)]
    steps += [model.decode(codes[:, t], cache) for t in range(codes.shape[1] - 1)]
    return torch.stack(steps, dim=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_recorded_steps_give_the_same_logits_bit_by_bit(name, dtype):
    model = lively(tiny_config(**VARIANTS[name]), dtype=dtype)
    static = warmed(model, 3)
    for seed in range(3):  # taken from the record from the second time on
        codes, labels = random_inputs(model.config, seed=seed)
        expected = decoded(model, codes, labels)
        assert torch.equal(decoded(static, codes, labels), expected)
    assert len(static._idle[0].recorded) == model.config.seq_len


@pytest.mark.parametrize(
    "settings",
    [
        SamplingSettings(cfg_scale=1.0),
        GUIDED,
        SamplingSettings(cfg_scale=3.0, cfg_start=0.5, cfg_schedule="linear"),
        SamplingSettings(temperature=0),
    ],
)
def test_sampling_gives_the_same_codes(settings):
    model = lively(tiny_config(memory={"kind": "move", "slots": 2}), dtype=torch.float32)
    static = StaticTransformer(model)
    for seed in range(4):
        expected = sample(model, settings=settings, seed=seed)
        assert torch.equal(sample(static, settings=settings, seed=seed), expected)


def test_recording_begins_when_a_batch_size_comes_back(monkeypatch):
    static = StaticTransformer(lively(tiny_config()))
    made = []
    init = static_decoding.Steps.__init__

    def counting(self, model, batch):
        made.append(batch)
        init(self, model, batch)

    monkeypatch.setattr(static_decoding.Steps, "__init__", counting)
    one = SamplingSettings(cfg_scale=1.0)
    for rows in (3, 2, 3, 3, 4, 3, 2, 3):
        sample(static, labels=[0] * rows, settings=one)
    # 3, 2 and 4 plainly; 3 recorded, and used again; those of the last batch size alone are kept
    assert made == [3, 2, 3]


def test_the_draw_is_recorded_once_for_its_filters():
    model = lively(tiny_config(), dtype=torch.float32)
    static = warmed(model, 6)
    kept = []
    for settings in (GUIDED, GUIDED.model_copy(update={"cfg_scale": 4.0, "cfg_start": 0.3})):
        assert torch.equal(sample(static, settings=settings), sample(model, settings=settings))
        kept.append(static._idle[0].call[1])
    length = model.config.seq_len
    assert kept[0] is kept[1] and kept[0].calls == 2 * length  # the scale is an argument
    other = GUIDED.model_copy(update={"top_k": 3})
    assert torch.equal(sample(static, settings=other), sample(model, settings=other))
    assert static._idle[0].call[1].calls == length


@pytest.mark.parametrize("scale", [1.0, 0.0, 2.5])
def test_guidance_by_a_tensor_is_guidance_by_the_number(scale):
    conditional, unconditional = torch.randn(2, 3, 50)
    conditional[0, 0] = -torch.inf
    by_number = guide(conditional, unconditional, scale)
    assert torch.equal(
        guide(conditional, unconditional, torch.tensor(scale)).nan_to_num(), by_number.nan_to_num()
    )


def test_a_decoding_that_was_given_up_leaves_no_trace():
    model = lively(tiny_config())
    static = warmed(model, 6)
    labels = torch.tensor([0, 4, 2])
    begun = iter_codes(static, labels, GUIDED, image_rngs([7, 8, 9]))
    for _ in range(4):
        next(begun)
    begun.close()
    gc.collect()
    assert len(static._idle[0].recorded) == 4  # the next one records the rest
    assert torch.equal(sample(static), sample(model))
    assert len(static._idle[0].recorded) == model.config.seq_len


def test_decodings_side_by_side_have_steps_of_their_own():
    model = lively(tiny_config())
    static = warmed(model, 6)
    labels = torch.tensor([0, 4, 2])
    pair = [iter_codes(static, labels, GUIDED, image_rngs(range(s, s + 3))) for s in (0, 50)]
    drawn = list(zip(*pair, strict=True))  # a code of one, a code of the other, ...
    first, second = (torch.stack([codes[i] for codes in drawn], dim=1) for i in range(2))
    assert torch.equal(first, sample(model)) and torch.equal(second, sample(model, seed=50))


def test_two_models_share_nothing():
    models = [lively(tiny_config(), seed=seed) for seed in (0, 1)]
    static = [warmed(model, 6) for model in models]
    for _ in range(2):
        found = [sample(each) for each in static]
        assert all(torch.equal(a, sample(b)) for a, b in zip(found, models, strict=True))
    assert not torch.equal(*found)


def test_what_was_handed_out_stays_as_it_is():
    model = lively(tiny_config())
    static = warmed(model, 3)
    codes, labels = random_inputs(model.config)
    with torch.inference_mode():
        cache = static.make_cache(3)
        assert isinstance(cache, Handle)
        first = static.start(labels, cache)
        kept = first.clone()
        static.decode(codes[:, 0], cache)
    assert torch.equal(first, kept)
    with pytest.raises(ValueError, match="step 2 of 5 rows: expected 3 rows"):
        static.decode(torch.zeros(5, dtype=torch.int64), cache)


def test_weights_are_the_models_own_and_the_cpu_takes_another_way():
    model = lively(tiny_config())
    static = StaticTransformer(model)
    assert static.head.weight is model.head.weight
    codes, labels = random_inputs(model.config)
    assert torch.equal(static(codes, labels), model(codes, labels))
    assert not isinstance(decoding_model(model), StaticTransformer)


class FakeGraph:
    """Stands for torch.cuda.CUDAGraph, as far as a machine without CUDA can tell."""

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.calls = fails, []

    def capture_begin(self, pool, capture_error_mode):
        self.calls.append("begin")

    def capture_end(self):
        self.calls.append("end")
        if self.fails:
            raise RuntimeError("operation failed due to a previous error during capture\nmore")

    def replay(self):
        self.calls.append("replay")


@pytest.mark.parametrize("fails", [False, True])
def test_what_cannot_be_recorded_is_taken_plainly(monkeypatch, fails):
    graph = FakeGraph(fails)
    fakes = {
        "CUDAGraph": lambda: graph,
        "Stream": lambda device: None,
        "graph_pool_handle": lambda: (0, 1),
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda device: graph.calls.append("wait"),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def step():
        graph.calls.append("step")

    recorder = static_decoding.Recorder(torch.device("cuda"))
    if fails:
        with pytest.warns(UserWarning, match="not a CUDA graph: operation failed .* capture$"):
            recorded = recorder.record(step)
    else:
        recorded = recorder.record(step)
    assert graph.calls == ["wait", "begin", "step", "end"]
    recorded()
    assert graph.calls[4:] == ["step" if fails else "replay"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need CUDA")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graphs_give_the_codes_of_the_plain_path(name, dtype, recwarn):
    model = lively(tiny_config(**VARIANTS[name]), dtype=dtype).cuda()
    static = StaticTransformer(model)
    assert isinstance(decoding_model(model), StaticTransformer)  # whose products round otherwise
    labels = torch.tensor([0, 4, 2], device="cuda")
    for seed in range(4):
        rngs = [image_rngs(range(seed, seed + 3)) for _ in range(2)]
        expected = sample_codes(model, labels, GUIDED, rngs[0])
        assert torch.equal(sample_codes(static, labels, GUIDED, rngs[1]), expected)
    assert not [w for w in recwarn if "CUDA graph" in str(w.message)]
