"""LlamaGen's generators, in files made here, and whole conversions."""

from __future__ import annotations

from functools import reduce

import pytest
import torch
from safetensors.torch import save_file

import tokenizer as vq
from moveimg.checkpoint import load_model
from moveimg.config import ModelConfig
from moveimg.model import Transformer
from moveimg.pipeline import Pipeline
from moveimg.pretrained import llamagen
from tests.conftest import lively, random_inputs, tiny_config
from tests.reference import reference_logits

LABELS = "cls_embedding.embedding_table.weight"
# LlamaGen's names of the tensors of a layer, and of our tensors that it calls otherwise.
LAYER = {"attention.wqkv", "attention.wo", "attention_norm", "ffn_norm"}
LAYER |= {f"feed_forward.w{i}" for i in (1, 2, 3)}
THEIRS = {"label_embedding": "cls_embedding.embedding_table", "code_embedding": "tok_embeddings",
          ".ffn.": ".feed_forward.", "head.": "output."}  # fmt: skip
CONFIG = tiny_config(grid=[3, 3], ffn={"kind": "swiglu", "hidden": 24})


def rename(weights):
    """A state dict under LlamaGen's names."""
    return {
        reduce(lambda key, ours: key.replace(ours, THEIRS[ours]), THEIRS, name): value
        for name, value in weights.items()
    }


def write(folder, container=None, name="gpt.pt", **changes):
    weights = rename(lively(CONFIG, dtype=torch.float32).state_dict()) | changes
    weights = {key: value for key, value in weights.items() if value is not None}
    file = folder / name
    if file.suffix == ".safetensors":
        save_file(weights, file)
    else:
        torch.save({container: weights, "steps": 3} if container else weights, file)
    return file


def load(file, **arguments):
    return llamagen.load_llamagen(
        file, **{"downsample": 4, "image_size": 12, "n_head": 2} | arguments
    )


@pytest.fixture
def vq_file(tmp_path):
    """A small LlamaGen tokenizer (2 pixels per code)."""
    torch.manual_seed(0)
    config = vq.VQConfig(
        width=32, multipliers=(1, 2), n_res_blocks=1, z_channels=8,
        codebook_size=11, codebook_dim=4, attention=False,
    )  # fmt: skip
    weights = vq.AutoencoderTokenizer(config).state_dict() | {
        "quantize.codebook_used": torch.zeros(9)
    }
    torch.save({"model": weights}, tmp_path / "vq.pt")
    return tmp_path / "vq.pt"


@pytest.mark.parametrize("container", ["model", "module", None])
def test_logits_equal_the_reference(tmp_path, container):
    plain = lively(CONFIG, dtype=torch.float32)
    names = {name.removeprefix("layers.0.") for name in rename(plain.state_dict())}
    assert names >= {f"{name}.weight" for name in LAYER}
    model = load(write(tmp_path, container)).double()
    assert model.config == CONFIG
    codes, labels = random_inputs(CONFIG)
    with torch.no_grad():
        logits = model(codes, labels)
    assert logits.std() > 0.1
    for i in range(len(labels)):
        expected = torch.from_numpy(reference_logits(plain.double(), codes[i], labels[i]))
        torch.testing.assert_close(logits[i], expected, rtol=1e-10, atol=1e-10)


def test_types_are_those_of_the_file(tmp_path):
    half = {name: value.bfloat16() for name, value in rename(lively(CONFIG).state_dict()).items()}
    assert load(write(tmp_path, name="gpt.safetensors", **half)).head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("size", llamagen.PUBLISHED_CFG)
def test_named_sizes_need_no_heads_and_published_files_no_image_size(tmp_path, size):
    expected = ModelConfig.model_validate({"size": size, "grid": [24, 24]})
    with torch.device("meta"):
        state = Transformer(expected).state_dict()
    # one number behind every tensor: real sizes, a small file
    one = torch.zeros(1).bfloat16()
    weights = {key: one.expand(value.shape) for key, value in rename(state).items()}
    file = tmp_path / f"c2i_{size}_384.pt"
    torch.save({"model": weights, "freqs_cis": None}, file)
    assert llamagen.load_llamagen(file).config == expected


@pytest.mark.parametrize(
    ("changes", "arguments", "value"),
    [
        ({"norm.weight": None}, {}, "'norm.weight' is nothing, expected [16]"),
        ({"extra.weight": torch.zeros(1)}, {}, "'extra.weight' is [1], expected nothing"),
        ({"output.weight": torch.zeros(3, 16)}, {}, "is [3, 16], expected [11, 16]"),
        ({"norm.weight": torch.zeros(16, dtype=torch.int)}, {}, "torch.int32"),
        ({"norm.weight": torch.full((16,), torch.nan)}, {}, "NaN"),
        ({LABELS: None}, {}, "label_embedding"),
        ({"tok_embeddings.weight": torch.zeros(3)}, {}, "gpt.pt"),
        ({}, {"image_size": None}, "--image-size"),
        ({}, {"image_size": 13}, "image size 13"),
        ({}, {"n_head": None}, "--heads"),
        ({}, {"n_head": 3}, "width 16 over 3 heads"),
    ],
)
def test_other_files_are_refused_on_one_line(tmp_path, changes, arguments, value):
    with pytest.raises(ValueError) as error:
        load(write(tmp_path, "model", **changes), **arguments)
    assert value in str(error.value) and "\n" not in str(error.value)


def test_convert_makes_a_model_directory(tmp_path, vq_file):
    out, gpt = tmp_path / "model", write(tmp_path, "model")
    llamagen.convert_llamagen(gpt, vq_file, out, 6, 2)
    parts = load_model(out)
    assert parts.class_names == ["0", "1", "2", "3", "4"]
    assert parts.about["files"] == {"gpt": "gpt.pt", "vq": "vq.pt"}
    assert Pipeline.from_pretrained(out, device="cpu").sample([3])[0].size == (6, 6)
    with pytest.raises(FileExistsError, match="model"):
        llamagen.convert_llamagen(gpt, vq_file, out, 6, 2)
    assert llamagen.convert_llamagen(None, vq_file, tmp_path / "vq", None, None) is None
    assert vq.load(tmp_path / "vq").fingerprint == parts.tokenizer.fingerprint
    imagenet = write(tmp_path, name="imagenet.pt", **{LABELS: torch.zeros(1001, 16)})
    llamagen.convert_llamagen(imagenet, vq_file, tmp_path / "imagenet", 6, 2)
    names = load_model(tmp_path / "imagenet").class_names  # in WordNet-id order
    assert names[0] == "tench, Tinca tinca" and names[207] == "golden retriever"
    assert names[388].startswith("giant panda") and names[999].startswith("toilet tissue")


def test_a_tokenizer_of_another_codebook_is_refused_and_leaves_nothing(tmp_path, vq_file):
    larger = torch.zeros(12, 16)
    file = write(tmp_path, **{"tok_embeddings.weight": larger, "output.weight": larger})
    with pytest.raises(ValueError, match=r"gpt.pt has 12 codes, .*vq.pt 11"):
        llamagen.convert_llamagen(file, vq_file, tmp_path / "out", 6, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpt.pt", "vq.pt"]
