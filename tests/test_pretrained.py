"""LlamaGen's generators, in files made here, and whole conversions."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import tokenizer as vq
from moveimg.checkpoint import load_model
from moveimg.cli import app
from moveimg.config import ModelConfig, SamplingSettings
from moveimg.files import atomic_directory
from moveimg.model import Transformer
from moveimg.pipeline import Pipeline
from moveimg.pretrained import llamagen
from tests.conftest import random_inputs
from tests.reference import reference_logits

CODES, CLASSES, WIDTH, HIDDEN, LAYERS, HEADS, SIDE = 11, 5, 16, 24, 2, 2, 3
# Our names of what is called otherwise by LlamaGen, spelled out once more.
OURS = {
    "cls_embedding.embedding_table.weight": "label_embedding.weight",
    "tok_embeddings.weight": "code_embedding.weight",
    "output.weight": "head.weight",
}
for layer in range(LAYERS):
    for matrix in ("w1", "w2", "w3"):
        name = f"layers.{layer}.feed_forward.{matrix}.weight"
        OURS[name] = f"layers.{layer}.ffn.{matrix}.weight"


def llamagen_weights() -> dict[str, torch.Tensor]:
    """A state dict as LlamaGen writes it, of two layers."""
    g = torch.Generator().manual_seed(0)

    def matrix(*shape):
        return torch.randn(shape, generator=g) * 0.5

    weights = {
        "cls_embedding.embedding_table.weight": matrix(CLASSES + 1, WIDTH),
        "tok_embeddings.weight": matrix(CODES, WIDTH),
        "norm.weight": matrix(WIDTH) + 1,
        "output.weight": matrix(CODES, WIDTH),
    }
    for layer in range(LAYERS):
        weights |= {
            f"layers.{layer}.attention.wqkv.weight": matrix(3 * WIDTH, WIDTH),
            f"layers.{layer}.attention.wo.weight": matrix(WIDTH, WIDTH),
            f"layers.{layer}.feed_forward.w1.weight": matrix(HIDDEN, WIDTH),
            f"layers.{layer}.feed_forward.w3.weight": matrix(HIDDEN, WIDTH),
            f"layers.{layer}.feed_forward.w2.weight": matrix(WIDTH, HIDDEN),
            f"layers.{layer}.attention_norm.weight": matrix(WIDTH) + 1,
            f"layers.{layer}.ffn_norm.weight": matrix(WIDTH) + 1,
        }
    return weights


def rotations(side: int = SIDE, head_dim: int = WIDTH // HEADS) -> torch.Tensor:
    """LlamaGen's `freqs_cis`, number by number."""
    pairs, quarter = head_dim // 2, head_dim // 4
    table = torch.zeros(1 + side * side, pairs, 2)
    for t in range(side * side):
        for i in range(pairs):
            where = t // side if i < quarter else t % side
            angle = torch.tensor(where * 10000.0 ** (-2 * (i % quarter) / pairs))
            table[1 + t, i] = torch.stack([angle.cos(), angle.sin()])
    return table


def write(tmp_path: Path, container=None, suffix="pt", **changes) -> Path:
    weights = {k: v for k, v in {**llamagen_weights(), **changes}.items() if v is not None}
    file = tmp_path / f"gpt.{suffix}"
    if suffix == "safetensors":
        save_file(weights, file)
    else:
        torch.save({container: weights, "steps": 3} if container else weights, file)
    return file


def load(file, **given):
    return llamagen.load_llamagen(
        file, **({"downsample": 4, "image_size": 12, "n_head": 2} | given)
    )


@pytest.fixture
def llamagen_vq(tmp_path) -> vq.VQTokenizer:
    """A small LlamaGen tokenizer (2 pixels a code), and its file vq.pt."""
    torch.manual_seed(0)
    config = vq.VQConfig(
        width=32, multipliers=(1, 2), n_res_blocks=1, z_channels=8,
        codebook_size=CODES, codebook_dim=4, attention=False,
    )  # fmt: skip
    tokenizer = vq.VQTokenizer(config).freeze()
    weights = {**tokenizer.state_dict(), "quantize.codebook_used": torch.zeros(9)}
    torch.save({"model": weights}, tmp_path / "vq.pt")
    return tokenizer


# --- the generator -------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["model", "module", "state_dict", None])
def test_logits_equal_the_plain_reference(tmp_path, container):
    model = load(write(tmp_path, container)).double()
    weights = {OURS.get(name, name): value for name, value in llamagen_weights().items()}
    plain = SimpleNamespace(config=model.config, state_dict=lambda: weights)
    codes, labels = random_inputs(model.config)
    with torch.no_grad():
        logits = model(codes, labels)
    assert logits.std() > 0.1
    for i in range(len(labels)):
        expected = torch.from_numpy(reference_logits(plain, codes[i], labels[i]))
        torch.testing.assert_close(logits[i], expected, rtol=1e-10, atol=1e-10)


def test_safetensors_and_stored_types(tmp_path):
    model = load(write(tmp_path, suffix="safetensors"))
    assert torch.equal(model.head.weight, llamagen_weights()["output.weight"])
    half = {name: value.bfloat16() for name, value in llamagen_weights().items()}
    assert load(write(tmp_path, **half)).head.weight.dtype == torch.bfloat16


def test_the_config_is_read_from_the_tensors(tmp_path):
    config = load(write(tmp_path)).config
    assert config == ModelConfig(
        n_layer=2, n_head=2, width=16, codebook_size=11, n_classes=5, grid=(3, 3),
        ffn={"kind": "swiglu", "hidden": 24},
    )  # fmt: skip


@pytest.mark.parametrize("size", ["B", "L", "XL", "XXL", "3B"])
def test_named_sizes_need_no_heads(size):
    expected = ModelConfig.model_validate({"size": size, "grid": [24, 24]})
    with torch.device("meta"):
        state = Transformer(expected).state_dict()
    weights = {llamagen.llamagen_name(key): value for key, value in state.items()}
    config = llamagen.llamagen_config(weights, None, "file", 16, 384, None)
    assert config == expected
    cfg_scale = {"B": 2.0, "L": 2.0, "XL": 1.75, "XXL": 1.75, "3B": 1.65}[size]
    assert llamagen.published_settings(config) == SamplingSettings(cfg_scale=cfg_scale)


def test_a_stored_rotation_table_tells_heads_and_grid(tmp_path):
    file = write(tmp_path, freqs_cis=rotations())
    config = load(file, image_size=None, n_head=None).config
    assert (config.n_head, config.grid) == (2, (3, 3))
    load(write(tmp_path, freqs_cis=rotations().bfloat16()))
    for given, message in (
        ({"n_head": 4}, "heads 4 was given, but its 'freqs_cis' says 2"),
        ({"image_size": 16}, "image size 16 was given, but its 'freqs_cis' says 12"),
    ):
        with pytest.raises(ValueError, match=message):
            load(file, **given)
    with pytest.raises(ValueError, match="is not LlamaGen's 2D rotation of 3 x 3"):
        load(write(tmp_path, freqs_cis=rotations().flip(1)))
    with pytest.raises(ValueError, match=r"'freqs_cis' is \[10, 4\], expected"):
        load(write(tmp_path, freqs_cis=torch.zeros(10, 4)))


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({"norm.weight": None}, {}, "lacks 'norm.weight'"),
        ({"extra.weight": torch.zeros(1)}, {}, "has 'extra.weight', not in the model"),
        ({"output.weight": torch.zeros(3, 16)}, {}, "is [3, 16], expected [11, 16]"),
        ({"norm.weight": torch.zeros(16, dtype=torch.int)}, {}, "'norm.weight' holds torch.int32"),
        ({"layers.0.ffn_norm.weight": None, "layers.1.ffn_norm.weight": None}, {}, "and 1 more"),
        ({"tok_embeddings.weight": None}, {}, "no class-conditional LlamaGen generator: lacks"),
        ({"cls_embedding.embedding_table.weight": None}, {}, "no class-conditional"),
        ({"tok_embeddings.weight": torch.zeros(3)}, {}, "is [3], expected a matrix"),
        ({}, {"image_size": None}, "give --image-size"),
        ({}, {"image_size": 13}, "image size 13: expected a multiple of the tokenizer's 4"),
        ({}, {"n_head": None}, "2 layers of width 16 are no named size"),
        ({}, {"n_head": 3}, "width 16 over 3 heads"),
    ],
)  # fmt: skip
def test_other_files_are_refused_on_one_line(tmp_path, changes, given, message):
    with pytest.raises(ValueError) as error:
        load(write(tmp_path, "model", **changes), **given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


class Hostile:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def test_a_file_that_needs_code_is_refused_and_not_run(tmp_path):
    torch.save({"model": llamagen_weights(), "args": Hostile(tmp_path / "run")}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"not readable as plain tensors: it needs posix\.mkdir"):
        load(tmp_path / "a.pt")
    assert not (tmp_path / "run").exists()


# --- whole conversions ---------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_convert_llamagen_makes_a_model_directory(tmp_path, llamagen_vq):
    out = tmp_path / "model"
    options = [
        "--gpt",
        write(tmp_path, "model"),
        "--vq",
        tmp_path / "vq.pt",
        "--out",
        out,
        "--heads",
        2,
    ]
    done = run("convert", "llamagen", *options, "--image-size", 6)
    assert done.exit_code == 0, done.output
    parts = load_model(out)
    assert parts.class_names == ["0", "1", "2", "3", "4"]
    assert parts.tokenizer.fingerprint == llamagen_vq.fingerprint
    assert json.loads((out / "config.json").read_text())["about"]["files"]["gpt"] == "gpt.pt"
    assert Pipeline.from_pretrained(out, device="cpu").sample([3])[0].size == (6, 6)
    again = run("convert", "llamagen", *options, "--image-size", 6)
    assert again.exit_code == 2 and "is there already" in again.output
    unknown = run("convert", "llamagen", *options[:-4], "--out", tmp_path / "b", "--heads", 2)
    assert unknown.exit_code == 2 and "give --image-size" in unknown.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpt.pt", "model", "vq.pt"]


@pytest.mark.usefixtures("llamagen_vq")
def test_a_tokenizer_of_another_codebook_is_refused(tmp_path):
    changes = {"tok_embeddings.weight": torch.zeros(12, 16), "output.weight": torch.zeros(12, 16)}
    file = write(tmp_path, **changes)
    with pytest.raises(ValueError, match=r"gpt.pt has 12 codes, .*vq.pt 11"):
        llamagen.convert_llamagen(file, tmp_path / "vq.pt", tmp_path / "out", 6, 2)
    assert not (tmp_path / "out").exists()


def test_convert_taming_makes_a_tokenizer_directory(tmp_path):
    ddconfig = {
        "double_z": False, "z_channels": 8, "resolution": 16, "in_channels": 3, "out_ch": 3,
        "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    config = vq.TamingConfig(**ddconfig, n_embed=7, embed_dim=4)
    made = vq.TamingTokenizer(config).freeze()
    torch.save({"state_dict": made.state_dict()}, tmp_path / "last.ckpt")
    model = {"params": {"embed_dim": 4, "n_embed": 7, "ddconfig": ddconfig}}
    (tmp_path / "model.yaml").write_text(json.dumps({"model": model}))
    options = ["--checkpoint", tmp_path / "last.ckpt", "--yaml", tmp_path / "model.yaml"]
    done = run("convert", "taming", *options, "--out", tmp_path / "vqgan")
    assert done.exit_code == 0, done.output
    assert vq.load(tmp_path / "vqgan").fingerprint == made.fingerprint


def test_imagenet_names_stand_in_wordnet_id_order():
    names = llamagen.class_names(1000)
    assert names[0] == "tench, Tinca tinca" and names[207] == "golden retriever"
    assert names[388].startswith("giant panda") and names[999].startswith("toilet tissue")


def test_a_failed_directory_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "a") as temporary:
        (temporary / "file").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic_directory(tmp_path / "b") as temporary:
        (temporary / "file").write_text("x")
    assert (tmp_path / "b" / "file").read_text() == "x"
    with pytest.raises(FileExistsError, match="is there already"), atomic_directory(tmp_path / "b"):
        pass
