"""Model directories and the pipeline: round trips, class names, streaming, damaged files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import tokenizer as vq
from moveimg.checkpoint import BUNDLED, ModelParts, load_model, load_tokenizer, save_model
from moveimg.config import SamplingSettings
from moveimg.images import labelled_grid, to_pil
from moveimg.pipeline import Pipeline
from moveimg.sampling import image_rngs, sample_codes
from tests.conftest import lively, tiny_config

NAMES = ["tench, Tinca tinca", "goldfish", "crane", "crane", "black swan"]


def tiny_tokenizer(codebook_size: int = 11) -> vq.VQTokenizer:
    torch.manual_seed(0)
    config = vq.VQConfig(
        width=8, multipliers=(1, 1, 1), n_res_blocks=1, z_channels=8, norm_groups=4,
        codebook_size=codebook_size, codebook_dim=4, attention=False,
    )  # fmt: skip
    return vq.VQTokenizer(config).freeze()


@pytest.fixture
def directory(tmp_path):
    config = tiny_config(memory={"kind": "move", "slots": 2})
    generator = lively(config, dtype=torch.float32)
    settings = SamplingSettings(cfg_scale=1.5, top_k=9)
    parts = ModelParts(generator, tiny_tokenizer(), NAMES, settings)
    save_model(tmp_path / "model", parts, {"note": "made by a test"})
    return tmp_path / "model"


@pytest.fixture
def pipeline(directory):
    return Pipeline.from_pretrained(directory, device="cpu")


def test_a_model_directory_round_trips(variant, tmp_path):
    generator = lively(variant, dtype=torch.float32)
    parts = ModelParts(generator, tiny_tokenizer(), NAMES, SamplingSettings(top_p=0.5))
    save_model(tmp_path, parts, {})
    loaded = load_model(tmp_path)
    assert loaded.generator.config == variant
    assert loaded.class_names == NAMES and loaded.sampling == parts.sampling
    assert loaded.tokenizer.fingerprint == parts.tokenizer.fingerprint
    weights = generator.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in loaded.generator.state_dict().items())
    assert not loaded.generator.training


def test_classes_by_index_name_synonym_and_part(pipeline):
    assert [pipeline.label(c) for c in (1, "1", "goldfish", "Tinca TINCA", "swan", " gold ")] == [
        1, 1, 1, 0, 4, 1,
    ]  # fmt: skip
    assert pipeline.search_classes("CRANE") == [2, 3]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zebra", "unknown class 'zebra': expected an index (0..4) or a name; such as tench,"),
        ("goldfsh", "; did you mean 1 (goldfish)?"),
        (5, "class 5: expected 0..4"),
        ("-1", "class -1: expected 0..4"),
        ("crane", "fits 2 classes: 2 (crane), 3 (crane)"),
    ],
)
def test_unknown_classes_are_named(pipeline, name, message):
    with pytest.raises(ValueError) as error:
        pipeline.sample([name])
    assert message in str(error.value)


def test_samples_are_pictures_and_repeat(pipeline):
    first = pipeline.sample(["goldfish", 4, 4], seed=3)
    assert [image.size for image in first] == [(16, 12)] * 3 and first[0].mode == "RGB"
    assert [i.tobytes() for i in pipeline.sample(["goldfish", 4, 4], seed=3)] == [
        i.tobytes() for i in first
    ]
    assert pipeline.sample([4], seed=5)[0].tobytes() == first[2].tobytes()  # seed + i
    assert first[1].tobytes() != first[2].tobytes()


def test_settings_left_out_are_the_models_own(pipeline):
    assert pipeline.settings(top_k=None) == SamplingSettings(cfg_scale=1.5, top_k=9)
    assert pipeline.settings(top_k=2, cfg_scale=0.0) == SamplingSettings(cfg_scale=0, top_k=2)
    with pytest.raises(ValueError, match=r"sampling settings: temperature: .*got -1"):
        pipeline.sample([0], temperature=-1)
    with pytest.raises(ValueError, match="no classes given"):
        pipeline.sample([])
    assert len(pipeline.sample(np.array([1, 0]))) == 2


def test_streaming_ends_with_the_sampled_pictures(pipeline):
    settings = pipeline.settings()
    steps = list(pipeline.stream([0, 1], settings, seed=2))
    assert [done for done, _ in steps] == [4, 8, 12]
    final = pipeline.sample([0, 1], seed=2)
    assert [i.tobytes() for i in steps[-1][1]] == [i.tobytes() for i in final]
    half = np.asarray(steps[0][1][0])
    assert (half[4:] == 128).all() and not (half[:4] == 128).all()  # rows to come are grey


def test_the_decoder_follows_the_generator(pipeline):
    settings = SamplingSettings(cfg_scale=1.0, temperature=0.0)
    before = pipeline.sample_codes([0, 1], settings)
    assert pipeline.decoder is pipeline.decoder
    with torch.no_grad():  # weights changed in place
        pipeline.generator.head.weight.neg_()
    after = pipeline.sample_codes([0, 1], settings)
    assert not torch.equal(before, after)
    pipeline.generator = lively(pipeline.generator.config, seed=5, dtype=torch.float64)
    swapped = pipeline.sample_codes([0, 1], settings)
    assert not torch.equal(swapped, after)
    assert torch.equal(
        swapped,
        sample_codes(pipeline.generator, torch.tensor([0, 1]), settings, image_rngs([0, 1])),
    )


def test_a_quantized_pipeline_samples(directory):
    pipeline = Pipeline.from_pretrained(directory, device="cpu", quantize="int8")
    codes = pipeline.sample_codes([0, 1], pipeline.settings())
    assert codes.shape == (2, 12)
    with pytest.raises(ValueError, match="quantize 'int3': expected int8"):
        Pipeline.from_pretrained(directory, device="cpu", quantize="int3")


def test_two_pipelines_share_nothing(directory):
    a, b = (Pipeline.from_pretrained(directory, device="cpu") for _ in range(2))
    before = b.sample([0])[0].tobytes()
    with torch.no_grad():
        for parameter in a.generator.parameters():
            parameter.zero_()
    assert b.sample([0])[0].tobytes() == before


def damage(directory, name):
    path = directory / name
    if name.endswith(".safetensors"):
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.unlink()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "truncated or damaged weights"),
        ("tokenizer/model.safetensors", "damaged"),
        ("config.json", "no model here"),
        ("classes.json", "classes.json: no such file"),
        ("tokenizer/config.json", "no such file"),
    ],
)
def test_damaged_models_are_named(directory, name, message):
    damage(directory, name)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        Pipeline.from_pretrained(directory)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert name.split("/")[0] in str(error.value) or name == "config.json"


def edit_config(directory, **changes):
    path = directory / "config.json"
    data = json.loads(path.read_text())
    data["model"] |= changes
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 3}, "lacks 'layers.2"),
        ({"n_layer": 1}, "not in the model"),
        ({"n_classes": 6}, "'label_embedding.weight' is [6, 16], expected [7, 16]"),
        ({"n_layers": 2}, "n_layers: unknown key"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_named(directory, changes, message):
    edit_config(directory, **changes)
    with pytest.raises(ValueError) as error:
        load_model(directory)
    assert message in str(error.value)


def test_a_tokenizer_of_another_codebook_is_refused(directory):
    vq.save(tiny_tokenizer(codebook_size=12), directory / "tokenizer")
    with pytest.raises(ValueError, match="has 11 codes, its tokenizer 12"):
        load_model(directory)


def test_a_tokenizer_with_other_weights_is_refused(directory):
    torch.manual_seed(1)
    config = vq.VQConfig.model_validate(tiny_tokenizer().config.model_dump())
    vq.save(vq.VQTokenizer(config).freeze(), directory / "tokenizer")
    with pytest.raises(ValueError, match="speaks the codes of tokenizer"):
        load_model(directory)


def test_saving_again_replaces_another_tokenizer(directory):
    parts = load_model(directory)
    torch.manual_seed(1)
    other = vq.VQTokenizer(parts.tokenizer.config).freeze()
    save_model(directory, ModelParts(parts.generator, other, NAMES, parts.sampling), {})
    assert load_model(directory).tokenizer.fingerprint == other.fingerprint


def test_a_class_called_by_a_number_is_found_by_its_name(pipeline):
    pipeline.class_names = ["10", "1", "a", "b", "c"]
    assert [pipeline.label(c) for c in ("10", "1", 1, "2")] == [0, 1, 1, 2]


def test_logits_that_are_not_finite_are_named(pipeline):
    with torch.no_grad():
        pipeline.generator.head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="logits are not finite"):
        pipeline.sample([0])


def test_unknown_models_and_devices_are_named(directory):
    with pytest.raises(FileNotFoundError, match="no model 'nothing': expected a model directory"):
        Pipeline.from_pretrained("nothing")
    with pytest.raises(ValueError, match="device 'abacus'"):
        Pipeline.from_pretrained(directory, device="abacus")
    with pytest.raises(ValueError, match="dtype 'int3'"):
        Pipeline.from_pretrained(directory, device="cpu", dtype="int3")


def test_a_bundled_tokenizer_is_known_by_name(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    bundled = load_tokenizer(BUNDLED / "digits" / "tokenizer", cpu)
    assert load_tokenizer(Path("digits"), cpu).fingerprint == bundled.fingerprint
    monkeypatch.chdir(tmp_path)
    Path("digits").mkdir()  # a directory of one's own comes first
    with pytest.raises(FileNotFoundError, match=r"digits: no such tokenizer|digits.*config.json"):
        load_tokenizer(Path("digits"), cpu)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_number_types_load_and_sample(directory, dtype):
    pipeline = Pipeline.from_pretrained(directory, device="cpu", dtype=dtype)
    assert pipeline.generator.head.weight.dtype == getattr(torch, dtype)
    precise = torch.promote_types(getattr(torch, dtype), torch.float32)  # 8 bits are not for pixels
    assert pipeline.tokenizer.quant_conv.weight.dtype == precise
    assert len(pipeline.sample([0, 1])) == 2


def test_grids_have_a_row_a_class():
    pictures = to_pil(torch.zeros(4, 3, 8, 8))
    grid = labelled_grid([pictures[:2], pictures[2:]], ["one", "a very long name " * 9])
    assert grid.height == 4 + 2 * (64 + 4) and grid.width <= 2 * 68 + 3 * 64 + 16
