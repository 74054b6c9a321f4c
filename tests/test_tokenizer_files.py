"""Tokenizer directories: what is written, read and refused, and what a fingerprint knows."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import tokenizer as tok
from tests.test_tokenizer import make, make_images, one_line_error


def test_round_trip(tmp_path):
    tokenizer = make()
    tok.save(tokenizer, tmp_path / "a" / "tokenizer")
    loaded = tok.load(tmp_path / "a" / "tokenizer")
    assert isinstance(loaded, tok.VQTokenizer) and not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.config == tokenizer.config
    images = make_images()
    assert torch.equal(loaded.encode(images), tokenizer.encode(images))
    assert loaded.fingerprint == tokenizer.fingerprint
    names = sorted(path.name for path in (tmp_path / "a" / "tokenizer").iterdir())
    assert names == ["config.json", "model.safetensors"], "nothing temporary is left"
    tok.save(loaded, tmp_path / "a" / "tokenizer")  # over the file its weights are mapped from
    assert tok.load(tmp_path / "a" / "tokenizer").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("kind", ["simvq", "ibq"])
def test_other_quantizers_round_trip(tmp_path, kind):
    tokenizer = make(
        quantizer=tok.parse_config({"kind": "vq", "quantizer": {"kind": kind}}, "test").quantizer
    )
    tok.save(tokenizer, tmp_path)
    loaded = tok.load(tmp_path)
    codes = loaded.encode(make_images())
    assert torch.equal(codes, tokenizer.encode(make_images()))
    assert torch.equal(loaded.decode(codes, (4, 2)), tokenizer.decode(codes, (4, 2)))
    assert loaded.fingerprint == tokenizer.fingerprint
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_saving_over_a_tokenizer_in_use_does_not_change_it(tmp_path):
    tok.save(make(), tmp_path)
    loaded = tok.load(tmp_path)
    tok.save(make(seed=1), tmp_path)
    assert torch.equal(loaded.last_layer, make().last_layer)
    assert tok.load(tmp_path).fingerprint == make(seed=1).fingerprint


def test_fingerprint_knows_config_and_weights_and_no_casts(tmp_path):
    base = make().fingerprint
    assert re.fullmatch(r"[0-9a-f]{64}", base)
    assert make().freeze().fingerprint == base
    assert make(seed=1).fingerprint != base
    assert make(dropout=0.1).fingerprint != base
    other = tok.IBQQuantizerConfig(kind="ibq")  # the same weights, read in another way
    assert make(quantizer=other).fingerprint != base
    trained = make()
    assert trained.fingerprint == base
    with torch.no_grad():
        trained.last_layer.mul_(1.001)
    assert trained.fingerprint != base
    tok.save(make(), tmp_path)
    for dtype in (torch.bfloat16, torch.float64):
        loaded = tok.load(tmp_path, dtype=dtype)
        assert loaded.quant_conv.weight.dtype == dtype and loaded.fingerprint == base
    assert tok.load(tmp_path).bfloat16().fingerprint == base
    reloaded = tok.load(tmp_path)
    assert reloaded.fingerprint == base
    reloaded.load_state_dict(make(seed=1).state_dict())
    assert reloaded.fingerprint == make(seed=1).fingerprint


def test_saving_what_a_cast_has_changed_is_refused(tmp_path):
    with one_line_error(ValueError, "bfloat16"):
        tok.save(make().freeze().bfloat16(), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    tok.save(make().freeze().double(), tmp_path / "new")  # float64 holds float32 exactly
    assert tok.load(tmp_path / "new").fingerprint == make().fingerprint


def test_save_leaves_nothing_half_written(tmp_path, monkeypatch):
    tok.save(make(), tmp_path)
    before = make().fingerprint

    def fail(weights, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("tokenizer.io.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        tok.save(make(seed=1), tmp_path)
    assert tok.load(tmp_path).fingerprint == before
    assert len(list(tmp_path.iterdir())) == 2


def change_config(directory, **changes):
    file = directory / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def change_weights(directory, **changes):
    file = directory / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    for name, tensor in changes.items():
        weights[name.replace("__", ".")] = tensor
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, file)


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda d: change_config(d, widht=4), ["config.json", "widht: unknown key"]),
        (lambda d: change_config(d, width=-3), ["config.json", "width: ", "greater than 0", "-3"]),
        (lambda d: change_config(d, kind="vqq"), ["config.json", "kind: ", "'vqq'"]),
        (lambda d: change_config(d, kind=None), ["config.json", "kind: missing"]),
        (lambda d: change_config(d, quantizer={"kind": "x"}), ["quantizer.kind: ", "'ibq'", "'x'"]),
        (lambda d: change_config(d, norm_groups=5), ["config.json", "norm_groups 5", "8"]),
        (lambda d: change_config(d, codebook_size=70_000), ["codebook_size: ", "65536", "70000"]),
        (lambda d: change_config(d, multipliers=[]), ["config.json", "multipliers: "]),
        (lambda d: (d / "config.json").write_text("{"), ["config.json", "JSON"]),
        (lambda d: (d / "config.json").write_bytes(b"\xff\xfe"), ["config.json", "JSON"]),
        (lambda d: (d / "config.json").write_text("[1]"), ["config.json", "dictionary"]),
        (
            lambda d: change_config(d, codebook_dim=4),
            ["model.safetensors", "quantize.embedding.weight", "[24, 5]", "[24, 4]"],
        ),
        (
            lambda d: change_weights(d, decoder__conv_in__bias=torch.zeros(7)),
            ["model.safetensors", "decoder.conv_in.bias", "[7]", "[16]"],
        ),
        (
            lambda d: change_weights(d, decoder__conv_in__bias=None, decoder__conv_in__weight=None),
            ["model.safetensors", "missing weight decoder.conv_in.bias", "1 more"],
        ),
        (
            lambda d: change_weights(d, extra=torch.zeros(1)),
            ["model.safetensors", "unexpected weight extra"],
        ),
        (
            lambda d: change_weights(d, quant_conv__bias=torch.zeros(5, dtype=torch.int64)),
            ["model.safetensors", "quant_conv.bias", "int64"],
        ),
    ],
)
def test_damaged_directory(tmp_path, damage, parts):
    tok.save(make(), tmp_path)
    damage(tmp_path)
    with one_line_error(ValueError, *parts):
        tok.load(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, 20_000])
def test_truncated_weights(tmp_path, keep):
    tok.save(make(), tmp_path)
    file = tmp_path / "model.safetensors"
    assert file.stat().st_size > keep
    file.write_bytes(file.read_bytes()[:keep])
    with one_line_error(ValueError, "model.safetensors", "damaged"):
        tok.load(tmp_path)


@pytest.mark.parametrize("name", ["", "config.json", "model.safetensors"])
def test_missing_files(tmp_path, name):
    directory = tmp_path / "tokenizer"
    if name:
        tok.save(make(), directory)
        (directory / name).unlink()
    with one_line_error(FileNotFoundError, str(directory / name)):
        tok.load(directory)
