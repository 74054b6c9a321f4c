"""Tokenizers published by others: LlamaGen's and taming-transformers', in files made here."""

import argparse
import os
import pickle
import subprocess
import sys
from typing import TypeVar

import pytest
import torch
import yaml
from safetensors.torch import save_file

import tokenizer as tok
from tests.test_tokenizer import one_line_error

LLAMAGEN = tok.VQConfig(
    width=32, multipliers=(1, 2), n_res_blocks=1, z_channels=8, codebook_size=20, codebook_dim=4
)
DDCONFIG = {
    "double_z": False,
    "z_channels": 8,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [8],
    "dropout": 0.0,
}
VQGAN = {"embed_dim": 6, "n_embed": 20, "ddconfig": DDCONFIG}


def make_images() -> torch.Tensor:
    return torch.rand(2, 3, 8, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


T = TypeVar("T", bound=tok.AutoencoderTokenizer)


def lively(tokenizer: T) -> T:
    """Biases and norms that matter, and codes where the encoder's vectors are."""
    for parameter in tokenizer.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.5)
    with torch.no_grad():
        z = tokenizer.quant_conv(tokenizer.encoder(make_images()))
        vectors = z.permute(0, 2, 3, 1).flatten(0, 2)
        tokenizer.quantize.embedding.weight.copy_(vectors[:20])
    return tokenizer


@pytest.fixture(scope="module")
def llamagen() -> tok.VQTokenizer:
    torch.manual_seed(0)
    return lively(tok.VQTokenizer(LLAMAGEN)).freeze()


@pytest.fixture
def llamagen_weights(llamagen) -> dict[str, torch.Tensor]:
    """A state dict as LlamaGen writes it."""
    return {**llamagen.state_dict(), "quantize.codebook_used": torch.zeros(65536)}


@pytest.fixture(scope="module")
def vqgan() -> tok.TamingTokenizer:
    torch.manual_seed(0)
    sizes = {name: VQGAN[name] for name in ("embed_dim", "n_embed")}
    return lively(tok.TamingTokenizer(tok.TamingConfig(**DDCONFIG, **sizes))).freeze()


@pytest.fixture
def vqgan_files(vqgan, tmp_path):
    """A Lightning checkpoint and a model.yaml, and a function that writes them changed."""

    def write(weights=None, config=None):
        checkpoint, model_yaml = tmp_path / "last.ckpt", tmp_path / "model.yaml"
        discriminator = {"loss.discriminator.main.0.weight": torch.zeros(2, 2)}
        state = {**vqgan.state_dict(), **discriminator, **(weights or {})}
        state = {name: tensor for name, tensor in state.items() if tensor is not None}
        torch.save({"epoch": 3, "global_step": 7, "state_dict": state}, checkpoint)
        if config is None:
            params = {**VQGAN, "lossconfig": {"target": "os.abort", "params": {"disc_start": 0}}}
            target = "taming.models.vqgan.VQModel"
            config = {"model": {"base_learning_rate": 1e-6, "target": target, "params": params}}
        model_yaml.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
        return checkpoint, model_yaml

    return write


# --- LlamaGen ------------------------------------------------------------------------------------


CONTAINERS = ["ema", "model", "module", "state_dict", None]


@pytest.mark.parametrize(
    ("suffix", "container"),
    [(suffix, key) for suffix in ("pt", "legacy.pt") for key in CONTAINERS]
    + [("safetensors", None)],
)
def test_llamagen_layouts(llamagen, llamagen_weights, tmp_path, suffix, container):
    file = tmp_path / f"vq.{suffix}"
    if suffix == "safetensors":
        save_file(llamagen_weights, file)
    else:
        content = {container: llamagen_weights, "steps": 5} if container else llamagen_weights
        torch.save(content, file, _use_new_zipfile_serialization=suffix == "pt")
    loaded = tok.load_llamagen_vq(file)
    assert loaded.config == LLAMAGEN
    assert loaded.fingerprint == llamagen.fingerprint
    codes = loaded.encode(make_images())
    assert codes.unique().numel() > 5
    assert torch.equal(codes, llamagen.encode(make_images()))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("multipliers", [(1, 1, 2, 2, 4), (1, 2, 2, 4)], ids=["VQ-16", "VQ-8"])
def test_llamagen_sizes_are_read_from_tensors(tmp_path, multipliers):
    config = tok.VQConfig(multipliers=multipliers)
    with torch.device("meta"):
        shapes = tok.VQTokenizer(config).state_dict()
    # one number behind every tensor: real sizes, next to no bytes
    weights = {name: torch.zeros(1).expand(tensor.shape) for name, tensor in shapes.items()}
    torch.save({"model": weights}, tmp_path / "vq.pt")
    assert tok.load_llamagen_vq(tmp_path / "vq.pt").config == config


def test_half_precision_is_widened(llamagen_weights, tmp_path):
    half = {name: tensor.half() for name, tensor in llamagen_weights.items()}
    torch.save(half, tmp_path / "vq.pt")
    loaded = tok.load_llamagen_vq(tmp_path / "vq.pt")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_averaged_weights_are_preferred(llamagen, llamagen_weights, tmp_path):
    raw = {name: tensor + 1 for name, tensor in llamagen_weights.items()}
    torch.save({"model": raw, "ema": llamagen_weights}, tmp_path / "vq.pt")
    assert tok.load_llamagen_vq(tmp_path / "vq.pt").fingerprint == llamagen.fingerprint


def test_converted_llamagen_round_trip(llamagen, llamagen_weights, tmp_path):
    torch.save({"model": llamagen_weights}, tmp_path / "vq.pt")
    tok.save(tok.load_llamagen_vq(tmp_path / "vq.pt"), tmp_path / "out")
    loaded = tok.load(tmp_path / "out")
    assert loaded.fingerprint == llamagen.fingerprint
    codes = loaded.encode(make_images())
    assert torch.equal(loaded.decode(codes, (4, 8)), llamagen.decode(codes, (4, 8)))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"encoder.conv_in.weight": None}, ["not a LlamaGen", "encoder.conv_in.weight is missing"]),
        ({"decoder.mid.0.norm1.bias": None}, ["missing weight decoder.mid.0.norm1.bias"]),
        ({"decoder.other": torch.zeros(1)}, ["unexpected weight decoder.other"]),
        ({"quant_conv.weight": torch.zeros(4, 9, 1, 1)}, ["[4, 9, 1, 1]", "[4, 8, 1, 1]"]),
        ({"quantize.embedding.weight": torch.zeros(4)}, ["[4]", "2 dimensions"]),
        ({"quantize.embedding.weight": torch.zeros(0, 4)}, ["codebook_size", "(got 0)"]),
        ({"encoder.conv_in.weight": torch.zeros(0, 3, 3, 3)}, ["no multiple", "0"]),
        ({"encoder.conv_in.weight": torch.zeros(48, 3, 3, 3)}, ["32 channels", "48"]),
        ({"quant_conv.bias": [0.0] * 4}, ["quant_conv.bias is a list"]),
    ],
)
def test_other_weights_are_refused(llamagen_weights, tmp_path, changes, parts):
    weights = {k: v for k, v in {**llamagen_weights, **changes}.items() if v is not None}
    torch.save({"model": weights}, tmp_path / "vq.pt")
    with one_line_error(ValueError, "vq.pt", *parts):
        tok.load_llamagen_vq(tmp_path / "vq.pt")


class Hostile:
    """Makes a directory when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("style", ["zip", "legacy", "bare pickle"])
def test_a_file_that_needs_code_is_refused_and_not_run(tmp_path, style):
    mark, file = tmp_path / "was-run", tmp_path / "vq.pt"
    content = {"model": {}, "extra": Hostile(mark)}
    if style == "bare pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=style == "zip")
    with one_line_error(ValueError, "vq.pt", "not readable as plain tensors"):
        tok.load_llamagen_vq(file)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "parts"),
    [(b"", ["damaged"]), (b"hello", ["damaged", "Error: "]), (b"PK\3\4" + b"x" * 99, ["damaged"])],
)
def test_damaged_torch_files(tmp_path, content, parts):
    (tmp_path / "vq.pt").write_bytes(content)
    with one_line_error(ValueError, "vq.pt", *parts):
        tok.load_llamagen_vq(tmp_path / "vq.pt")


def test_truncated_missing_and_odd_files(llamagen_weights, tmp_path):
    file = tmp_path / "vq.pt"
    with one_line_error(FileNotFoundError, "vq.pt"):
        tok.load_llamagen_vq(file)
    torch.save({"model": llamagen_weights}, file)
    file.write_bytes(file.read_bytes()[:5000])
    with one_line_error(ValueError, "vq.pt", "damaged"):
        tok.load_llamagen_vq(file)
    torch.save([torch.zeros(1)], file)
    with one_line_error(ValueError, "vq.pt", "holds a list"):
        tok.load_llamagen_vq(file)


# --- taming --------------------------------------------------------------------------------------


def test_taming_matches_its_own_modules(vqgan, vqgan_files, capsys):
    from taming.modules.diffusionmodules.model import Decoder, Encoder

    loaded = tok.load_taming(*vqgan_files())
    assert capsys.readouterr().out == ""
    assert isinstance(loaded, tok.TamingTokenizer)
    assert loaded.fingerprint == vqgan.fingerprint
    encoder, decoder = Encoder(**DDCONFIG).eval(), Decoder(**DDCONFIG).eval()
    weights = vqgan.state_dict()
    for name, part in (("encoder.", encoder), ("decoder.", decoder)):
        part.load_state_dict(
            {k.removeprefix(name): v for k, v in weights.items() if k.startswith(name)}
        )
    images = make_images()
    with torch.no_grad():
        z = vqgan.quant_conv(encoder(images)).permute(0, 2, 3, 1).flatten(1, 2)  # [B, T, D]
        codebook = weights["quantize.embedding.weight"]
        codes = (z[:, :, None] - codebook).square().sum(3).argmin(2)
        chosen = codebook[codes].mT.reshape(2, 6, 4, 8).contiguous()
        pixels = decoder(vqgan.post_quant_conv(chosen)).clamp(-1, 1)
    assert codes.unique().numel() > 5
    assert torch.equal(loaded.encode(images), codes)
    torch.testing.assert_close(loaded.decode(codes, (4, 8)), pixels, rtol=1e-4, atol=1e-5)


def test_converted_taming_round_trip(vqgan, vqgan_files, tmp_path):
    tok.save(tok.load_taming(*vqgan_files()), tmp_path / "out")
    loaded = tok.load(tmp_path / "out")
    assert isinstance(loaded, tok.TamingTokenizer)
    assert loaded.config == vqgan.config and loaded.fingerprint == vqgan.fingerprint
    assert torch.equal(loaded.encode(make_images()), vqgan.encode(make_images()))


def test_taming_yaml_may_hold_params_at_the_top(vqgan, vqgan_files):
    assert tok.load_taming(*vqgan_files(config={"params": VQGAN})).config == vqgan.config


def nested(**changes):
    return {"model": {"params": {**VQGAN, **changes}}}


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"model": {"target": "a.GumbelVQ", "params": VQGAN}}, ["GumbelVQ", "only VQModel"]),
        ({"model": {}}, ["model.params is missing"]),
        ("just text", ["model.params is missing"]),
        ("a: [1", ["not readable as plain YAML"]),
        ("a: !!python/object/apply:os.abort []", ["not readable as plain YAML"]),
        (nested(ddconfig=None), ["ddconfig is missing"]),
        (nested(n_embed=0), ["n_embed: ", "(got 0)"]),
        (nested(ddconfig={**DDCONFIG, "double_z": True}), ["double_z: ", "True"]),
        (nested(ddconfig={**DDCONFIG, "ch": 48}), ["does not divide 48"]),
        (nested(ddconfig={**DDCONFIG, "out_ch": 1}), ["in_channels 3 and out_ch 1"]),
        (nested(ddconfig={**DDCONFIG, "resolution": 15}), ["resolution 15"]),
        (nested(ddconfig={**DDCONFIG, "surprise": 1}), ["surprise: unknown key"]),
    ],
)
def test_other_yaml_is_refused(vqgan_files, config, parts):
    with one_line_error(ValueError, "model.yaml", *parts):
        tok.load_taming(*vqgan_files(config=config))


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        ({"encoder.conv_in.bias": None}, ["missing weight encoder.conv_in.bias"]),
        ({"encoder.extra": torch.zeros(1)}, ["unexpected weight encoder.extra"]),
        ({"quantize.embedding.weight": torch.zeros(21, 6)}, ["[21, 6]", "[20, 6]"]),
    ],
)
def test_other_taming_weights_are_refused(vqgan_files, weights, parts):
    with one_line_error(ValueError, "last.ckpt", *parts):
        tok.load_taming(*vqgan_files(weights=weights))


def test_a_checkpoint_with_objects_says_what_to_do(vqgan, vqgan_files):
    checkpoint, model_yaml = vqgan_files()
    objects = {"state_dict": vqgan.state_dict(), "hyper_parameters": argparse.Namespace(lr=1)}
    torch.save(objects, checkpoint)
    with one_line_error(ValueError, "last.ckpt", "argparse.Namespace", "torch.save("):
        tok.load_taming(checkpoint, model_yaml)


def test_import_is_light():
    code = "import sys, tokenizer; print([m for m in ('taming', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_taming_package_is_named_when_it_is_missing(monkeypatch, vqgan):
    monkeypatch.setitem(sys.modules, "taming.modules.diffusionmodules.model", None)
    with one_line_error(ImportError, "taming-transformers-rom1504"):
        tok.TamingTokenizer(vqgan.config)
