"""Tokenizer directories and the files of other projects: what is written, read and refused."""

import argparse
import json
import os
import pickle
import re

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import tokenizer as tok
from tests.test_tokenizer import make, make_images

LLAMAGEN = tok.VQConfig(
    width=32, multipliers=(1, 2), n_res_blocks=1, z_channels=8, codebook_size=20, codebook_dim=4
)
DDCONFIG = {
    "double_z": False, "z_channels": 8, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32,
    "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [8], "dropout": 0.0,
}  # fmt: skip
VQGAN = {"embed_dim": 6, "n_embed": 20, "ddconfig": DDCONFIG}
VQ_MODEL = "taming.models.vqgan.VQModel"


def refusal(*values: str):
    """Expect a ValueError of one line that holds the values in order."""
    pattern = r"[^\n]*".join(map(re.escape, values))
    return pytest.raises(ValueError, match=rf"\A[^\n]*{pattern}[^\n]*\Z")


# --- tokenizer directories -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vq", "simvq", "ibq"])
def test_round_trip(tmp_path, kind):
    tokenizer, directory = make(quantizer=tok.QuantizerConfig(kind=kind)), tmp_path / "a" / "b"
    tok.save(tokenizer, directory)
    loaded = tok.load(directory)
    assert loaded.config == tokenizer.config and loaded.fingerprint == tokenizer.fingerprint
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    codes = loaded.encode(make_images())
    assert torch.equal(codes, tokenizer.encode(make_images()))
    assert torch.equal(loaded.decode(codes, (4, 2)), tokenizer.decode(codes, (4, 2)))
    for dtype in (torch.bfloat16, torch.float64):
        cast = tok.load(directory, dtype=dtype)
        assert cast.quant_conv.weight.dtype == dtype and cast.fingerprint == loaded.fingerprint
    tok.save(make(seed=1), directory)  # over the file that the weights are mapped from
    assert torch.equal(loaded.encode(make_images()), codes)
    assert tok.load(directory).fingerprint == make(seed=1).fingerprint


def test_fingerprint_depends_on_config_and_weights():
    # codes and models of the bundled tokenizer must stay readable
    bundled = "8c581d8aa06094f7e77f069b0d13721aace8d1300ce401b1d381d141bf08f69d"
    assert tok.load("moveimg/bundled/digits/tokenizer").fingerprint == bundled
    assert make().fingerprint == make().freeze().fingerprint
    trained = make()
    with torch.no_grad():
        trained.decoder.get_parameter("conv_out.weight").mul_(1.001)
    assert len({x.fingerprint for x in (make(), make(seed=1), make(dropout=0.1), trained)}) == 4


@pytest.mark.parametrize(
    ("file", "changes", "values"),
    [
        ("config.json", {"widht": 4}, ["widht"]),
        ("config.json", {"width": -3}, ["width: ", "-3"]),
        ("config.json", {"n_res_blocks": 10**9}, ["n_res_blocks: ", "1000000000"]),
        ("config.json", {"multipliers": [1] * 40}, ["multipliers: "]),
        ("config.json", {"dropout": float("nan")}, ["dropout: ", "nan"]),
        ("config.json", {"kind": None}, ["'kind'", "None"]),
        ("config.json", {"quantizer": {"kind": "x"}}, ["quantizer", "'ibq'", "'x'"]),
        ("config.json", {"quantizer": {"reseed_after": -3}}, ["quantizer.reseed_after: ", "-3"]),
        ("config.json", {"codebook_dim": 4}, ["post_quant_conv", "[6, 5, 1, 1]", "[6, 4, 1, 1]"]),
        ("weights", {"quant_conv.bias": torch.zeros(7)}, ["quant_conv.bias", "[7]", "[5]"]),
        ("weights", {"quant_conv.bias": None}, ["quant_conv.bias"]),
        ("weights", {"extra": torch.zeros(1)}, ["extra"]),
        ("weights", {"quant_conv.bias": torch.zeros(5).long()}, ["quant_conv.bias", "int64"]),
        ("weights", {"quant_conv.bias": torch.full((5,), torch.nan)}, ["quant_conv.bias", "NaN"]),
        ("config.json", 1, ["config.json"]),
        ("model.safetensors", 0, ["model.safetensors"]),
        ("model.safetensors", 20_000, ["model.safetensors"]),
    ],
)
def test_bad_directories_are_refused(tmp_path, file, changes, values):
    """Changed settings or tensors, and files cut after some bytes."""
    tok.save(make(), tmp_path)
    if isinstance(changes, int):
        (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:changes])
    elif file == "config.json":
        settings = json.loads((tmp_path / file).read_text()) | changes
        (tmp_path / file).write_text(json.dumps(settings))
    else:
        path = tmp_path / "model.safetensors"
        weights = {name: tensor.clone() for name, tensor in load_file(path).items()} | changes
        save_file({name: x for name, x in weights.items() if x is not None}, path)
    with refusal(str(tmp_path), *values):
        tok.load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        tok.load(tmp_path)


# --- LlamaGen ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llamagen():
    return make(LLAMAGEN).freeze()


@pytest.fixture
def weights(llamagen):
    """A state dict as LlamaGen writes it."""
    return {**llamagen.state_dict(), "quantize.codebook_used": torch.zeros(65536)}


@pytest.mark.parametrize(
    ("suffix", "container", "beside"),
    [
        ("safetensors", "", {}),
        ("legacy.pt", "", {}),
        ("pt", "ema", {"model": {"quant_conv.bias": torch.ones(4)}}),
        ("pt", "model", {"ema": {}, "args": argparse.Namespace(lr=1.0), "steps": 5}),
        ("pt", "state_dict", {"epoch": 3}),
    ],
)
def test_llamagen_files_containers_and_prefixes(
    llamagen, weights, tmp_path, suffix, container, beside
):
    file = tmp_path / f"vq.{suffix}"
    content = {f"module._orig_mod.{name}": tensor for name, tensor in weights.items()}
    if suffix == "safetensors":
        save_file(content, file)
    else:
        content = {container: content, **beside} if container else content
        torch.save(content, file, _use_new_zipfile_serialization=suffix == "pt")
    loaded = tok.load_llamagen_vq(file)  # sizes are read off the tensors
    assert loaded.config == LLAMAGEN and loaded.fingerprint == llamagen.fingerprint
    codes = loaded.encode(make_images())
    assert codes.unique().numel() > 5 and torch.equal(codes, llamagen.encode(make_images()))


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({"encoder.conv_in.weight": None}, ["encoder.conv_in.weight"]),
        ({"encoder.conv_in.weight": torch.tensor(1.0)}, ["not a LlamaGen tokenizer", "0-d"]),
        ({"quant_conv.weight": torch.zeros(4, 9, 1, 1)}, ["[4, 9, 1, 1]", "[4, 8, 1, 1]"]),
        ({"quantize.embedding.weight": torch.zeros(4)}, ["not a LlamaGen tokenizer"]),
        ({"encoder.conv_in.weight": torch.zeros(0, 3, 3, 3)}, ["width", "0"]),
        ({"encoder.conv_in.weight": torch.zeros(48, 3, 3, 3)}, ["multipliers.0", "0"]),
        ({"quant_conv.bias": [0.0] * 4}, ["quant_conv.bias", "list"]),
        ({"module.quant_conv.bias": torch.zeros(4)}, ["quant_conv.bias", "twice"]),
    ],
)
def test_other_weights_are_refused(weights, tmp_path, changes, values):
    weights = {k: v for k, v in {**weights, **changes}.items() if v is not None}
    torch.save({"model": weights}, tmp_path / "vq.pt")
    with refusal("vq.pt", *values):
        tok.load_llamagen_vq(tmp_path / "vq.pt")


class Hostile:
    """Makes a directory when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["vq.pt", "vq.safetensors"])
def test_files_without_weights_are_refused_and_no_code_is_run(tmp_path, name):
    file, mark = tmp_path / name, tmp_path / "was-run"
    hostile = {"model": {}, "extra": Hostile(mark)}
    contents = [b"", b"hello", b"PK\3\4" + b"x" * 99, pickle.dumps(hostile)]
    for content in (hostile, [torch.zeros(1)], {"ema": {}, "args": {"lr": 1}}):
        for zipped in (True, False):
            torch.save(content, file, _use_new_zipfile_serialization=zipped)
            contents.append(file.read_bytes())
    for content in contents:
        file.write_bytes(content)
        with refusal(name) as error:
            tok.load_llamagen_vq(file)
        assert "weights_only" not in str(error.value)
    assert not mark.exists()


# --- taming --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vqgan():
    return make(tok.TamingConfig(**DDCONFIG, embed_dim=6, n_embed=20)).freeze()


@pytest.fixture
def write(vqgan, tmp_path):
    """A function that writes a Lightning checkpoint and a model.yaml."""
    files = tmp_path / "last.ckpt", tmp_path / "model.yaml"
    other = {"loss.discriminator.0.weight": torch.zeros(2), "model_ema.decay": torch.zeros(())}

    def write_files(config):
        torch.save({"epoch": 3, "state_dict": {**vqgan.state_dict(), **other}}, files[0])
        files[1].write_text(config if isinstance(config, str) else yaml.safe_dump(config))
        return files

    return write_files


def nested(**changes):
    return {"model": {"target": VQ_MODEL, "params": {**VQGAN, **changes}}}


def test_taming_matches_its_own_modules(vqgan, write, capsys, tmp_path):
    from taming.modules.diffusionmodules.model import Decoder, Encoder

    loaded = tok.load_taming(*write(nested(lossconfig={"target": "os.abort"})))
    assert capsys.readouterr().out == ""
    assert loaded.config == vqgan.config and loaded.fingerprint == vqgan.fingerprint
    tok.save(loaded, tmp_path / "out")
    assert tok.load(tmp_path / "out").fingerprint == vqgan.fingerprint
    encoder, decoder = Encoder(**DDCONFIG).eval(), Decoder(**DDCONFIG).eval()
    encoder.load_state_dict(vqgan.encoder.state_dict())
    decoder.load_state_dict(vqgan.decoder.state_dict())
    images = make_images(2, 8, 16)
    with torch.no_grad():
        z = vqgan.quant_conv(encoder(images)).permute(0, 2, 3, 1).flatten(1, 2)  # [B, T, D]
        codebook = vqgan.state_dict()["quantize.embedding.weight"]
        codes = (z[:, :, None] - codebook).square().sum(3).argmin(2)
        chosen = codebook[codes].mT.reshape(2, 6, 4, 8).contiguous()
        pixels = decoder(vqgan.post_quant_conv(chosen)).clamp(-1, 1)
    assert codes.unique().numel() > 5 and torch.equal(loaded.encode(images), codes)
    torch.testing.assert_close(loaded.decode(codes, (4, 8)), pixels, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "values"),
    [
        ({"model": {"target": "taming.models.vqgan.GumbelVQ", "params": VQGAN}}, ["GumbelVQ"]),
        ({"model": {"target": VQ_MODEL}}, ["params"]),
        ("just text", ["not the config"]),
        ("a: !!python/object/apply:os.abort []", ["YAML"]),
        (nested(ddconfig=None), ["not the config"]),
        (nested(n_embed=0), ["n_embed: ", "0"]),
        (nested(ddconfig={**DDCONFIG, "double_z": True}), ["double_z: ", "True"]),
        (nested(ddconfig={**DDCONFIG, "num_res_blocks": 10**9}), ["num_res_blocks"]),
        (nested(ddconfig={**DDCONFIG, "surprise": 1}), ["surprise"]),
    ],
)
def test_other_yaml_is_refused(write, config, values):
    with refusal("model.yaml", *values):
        tok.load_taming(*write(config))
