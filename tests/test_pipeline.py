"""Model directories and the pipeline: round trips, class names, streaming, damaged files."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import moveimg
import tokenizer as vq
from moveimg.checkpoint import ModelParts, load_model, save_model
from moveimg.class_names import find_label, search_names
from moveimg.config import SamplingSettings
from moveimg.pipeline import Pipeline
from moveimg.sampling import image_rngs, sample_codes
from tests.conftest import MORE, NAMES, random_model, tiny_model, tiny_parts, tiny_tokenizer


@pytest.fixture
def pipeline(directory):
    return Pipeline.from_pretrained(directory, device="cpu")


def pixels(images):
    return [image.tobytes() for image in images]


def test_classes_by_index_name_synonym_and_part():
    wanted = [1, np.int64(1), "1", "goldfish", "Tinca TINCA", "swan", " gold "]
    assert [find_label(NAMES, item) for item in wanted] == [1, 1, 1, 1, 0, 4, 1]
    assert search_names(NAMES, "CRANE") == [2, 3]
    decomposed = [unicodedata.normalize("NFD", name) for name in ("Kälte", "Wärme")]
    assert find_label(decomposed, "Wärme") == 1 and search_names(decomposed, "wÄr") == [1]
    mixed = ["10", "1", "a", "b", "c"]
    assert [find_label(mixed, item) for item in ("10", "1", 1, "2")] == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("names", "item", "value"),
    [
        (NAMES, "zebra", "'zebra'"),
        (NAMES, "goldfsh", "1 (goldfish)"),
        (NAMES, 10**30, "0..4"),
        (NAMES, "-1", "class -1: expected 0..4"),
        (NAMES, "crane", "2 (crane), 3 (crane)"),
        (["01", "02", "03"], "1", "'1' is ambiguous"),
        (NAMES, "z" * 10**6, "zzz"),
    ],
)
def test_unknown_and_ambiguous_classes_are_named(names, item, value):
    with pytest.raises(ValueError) as error:
        find_label(names, item)
    assert value in str(error.value) and len(str(error.value)) < 300


def test_samples_repeat_and_have_their_own_seeds(pipeline):
    first = pipeline.sample(["goldfish", 4, 4], seed=3)
    assert [image.size for image in first] == [(16, 12)] * 3 and first[0].mode == "RGB"
    assert pixels(pipeline.sample(["goldfish", 4, 4], seed=3, batch_size=2)) == pixels(first)
    assert pixels(pipeline.sample("swan", num=2, seed=4)) == pixels(first)[1:]  # seed + i
    assert pixels(first)[1] != pixels(first)[2]
    assert len(pipeline.sample(np.array([1, 0]))) == 2
    assert pipeline.settings(top_k=None) == SamplingSettings(cfg_scale=1.5, top_k=9)  # its own
    assert pipeline.settings(top_k=2, cfg_scale=0.0) == SamplingSettings(cfg_scale=0, top_k=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert pixels(pipeline.sample(["goldfish", 4, 4], seed=3)) == pixels(first)


@pytest.mark.parametrize(
    ("classes", "options", "value"),
    [
        ([0], {"cfg_skale": 1}, "cfg_skale"),
        ([], {}, "0 classes"),
        ([0], {"num": 10**30}, "num 1000"),
        ([0], {"batch_size": 0}, "batch_size 0"),
        ([0], {"seed": 10**30}, "seed 1000"),
    ],
)
def test_bad_arguments_are_named(pipeline, classes, options, value):
    with pytest.raises(ValueError, match=value):
        pipeline.sample(classes, **options)


def test_partial_images_end_with_the_sampled_ones(pipeline):
    steps = [
        (done, pipeline.decode_partial(codes, done))
        for done, codes in pipeline.iter_codes([0, 1], pipeline.settings(), seed=2)
    ]
    assert [done for done, _ in steps] == list(range(1, 13))
    assert pixels(steps[-1][1]) == pixels(pipeline.sample([0, 1], seed=2))
    first = np.asarray(steps[3][1][0])
    assert (first[4:] == 128).all() and not (first[:4] == 128).all()  # rows to come are grey


def test_the_prepared_generator_follows_the_generator(pipeline):
    settings = SamplingSettings(temperature=0.0)
    assert pipeline.prepared_generator is pipeline.prepared_generator
    before = pipeline.sample_codes([0, 1], settings)
    with torch.no_grad():  # weights changed in place
        pipeline.generator.head.weight.neg_()
    assert not torch.equal(before, pipeline.sample_codes([0, 1], settings))
    pipeline.generator = random_model(pipeline.generator.config, seed=5)
    expected = sample_codes(pipeline.generator, torch.tensor([0, 1]), settings, image_rngs([0, 1]))
    assert torch.equal(pipeline.sample_codes([0, 1], settings), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_number_types_load_and_sample(directory, dtype):
    name = str(dtype).removeprefix("torch.")
    pipeline = Pipeline.from_pretrained(directory, device="cpu", dtype=name)
    assert pipeline.generator.head.weight.dtype == dtype
    precise = torch.promote_types(dtype, torch.float32)  # bfloat16 shows in pixels
    assert pipeline.tokenizer.quant_conv.weight.dtype == precise
    assert len(pipeline.sample([0, 1])) == 2
    for key in ("dtype", "device", "quantize"):
        with pytest.raises(ValueError, match="'abacus'"):
            Pipeline.from_pretrained(directory, **({"device": "cpu"} | {key: "abacus"}))


def test_the_package_shows_its_pipeline(pipeline, directory):
    assert "Pipeline" in dir(moveimg) and moveimg.Pipeline is Pipeline
    for part in (str(directory), "5 classes", "move", "3 x 4", "11", "float32 on cpu"):
        assert part in repr(pipeline)


@pytest.mark.parametrize("name", MORE)
def test_a_model_directory_round_trips(name, tmp_path):
    parts = tiny_parts(tiny_model(name, torch.float32), top_p=0.5)
    save_model(tmp_path, replace(parts, about={"note": 1}))
    loaded = load_model(tmp_path)
    assert loaded.generator.config == parts.generator.config and not loaded.generator.training
    assert (loaded.class_names, loaded.sampling) == (NAMES, parts.sampling)
    assert loaded.about == {"note": 1}
    assert loaded.tokenizer.fingerprint == parts.tokenizer.fingerprint
    weights = parts.generator.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in loaded.generator.state_dict().items())


def model(**changes):
    return lambda data: data | {"model": data["model"] | changes}


def spoil(tensor):
    return torch.full_like(tensor, float("nan"))


@pytest.mark.parametrize(
    ("file", "change", "value"),
    [
        ("model.safetensors", "truncate", "model.safetensors"),
        ("model.safetensors", "remove", "model.safetensors"),
        ("config.json", "remove", "config.json"),
        ("classes.json", "remove", "classes.json"),
        ("tokenizer/config.json", "remove", "tokenizer/config.json"),
        ("config.json", model(n_layer=3), "layers.2."),
        ("config.json", model(n_classes=6), "5 class names, expected 6"),
        ("config.json", model(codebook_size=12), "[11, 16], expected [12, 16]"),
        ("config.json", model(n_layers=2), "model.n_layers: unknown key"),
        ("config.json", model(grid=[500, 500]), "500"),
        ("config.json", model(memory={"kind": "move", "slots": 256}), "router"),
        ("config.json", lambda data: data["model"].pop("grid") and data, "model.grid: missing"),
        ("config.json", lambda data: [data], "config.json"),
        ("config.json", lambda data: data | {"format": 2}, "format"),
        ("config.json", lambda data: data | {"about": 3}, "about"),
        ("classes.json", lambda names: [None, *names[1:]], "classes.json: 0"),
        ("classes.json", lambda names: ["x" * 5000, *names[1:]], "classes.json: 0"),
        ("sampling.json", lambda data: data | {"top_k": "all"}, "sampling.json: top_k"),
        ("model.safetensors", Tensor.long, "int64"),
        ("model.safetensors", spoil, "model.safetensors"),
        ("tokenizer/model.safetensors", spoil, "tokenizer"),
    ],
)
def test_damaged_models_get_one_line(directory, file, change, value):
    path = directory / file
    if change == "remove":
        path.unlink()
    elif change == "truncate":
        path.write_bytes(path.read_bytes()[:-100])
    elif path.suffix == ".json":
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    else:
        save_file({key: change(tensor) for key, tensor in load_file(path).items()}, path)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        Pipeline.from_pretrained(directory, device="cpu")
    assert value in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_another_tokenizer_is_refused_and_replaced_by_saving(directory):
    parts = load_model(directory)
    torch.manual_seed(1)
    other = vq.AutoencoderTokenizer(parts.tokenizer.config).freeze()
    save_model(directory, ModelParts(parts.generator, other, NAMES, parts.sampling))
    assert load_model(directory).tokenizer.fingerprint == other.fingerprint
    vq.save(tiny_tokenizer(), directory / "tokenizer")
    with pytest.raises(ValueError, match=other.fingerprint[:12]):
        load_model(directory)
    vq.save(tiny_tokenizer(codebook_size=12), directory / "tokenizer")
    with pytest.raises(ValueError, match="11 codes, its tokenizer 12"):
        load_model(directory)
