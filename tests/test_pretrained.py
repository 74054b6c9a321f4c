"""LlamaGen's generators, in files made here, and whole conversions."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import tokenizer as vq
from moveimg.checkpoint import load_model
from moveimg.config import ModelConfig, SamplingSettings
from moveimg.model import Transformer
from moveimg.pipeline import Pipeline
from moveimg.pretrained import llamagen
from tests.conftest import random_inputs
from tests.reference import reference_logits

CODES, CLASSES, WIDTH, HIDDEN, LAYERS, HEADS, SIDE = 11, 5, 16, 24, 2, 2, 3
LABELS = "cls_embedding.embedding_table.weight"
# Our names of tensors that LlamaGen calls otherwise, written out independently.
OURS = {
    LABELS: "label_embedding.weight",
    "tok_embeddings.weight": "code_embedding.weight",
    "output.weight": "head.weight",
} | {
    f"layers.{layer}.feed_forward.{matrix}.weight": f"layers.{layer}.ffn.{matrix}.weight"
    for layer in range(LAYERS)
    for matrix in ("w1", "w2", "w3")
}
SHAPES = {
    LABELS: (CLASSES + 1, WIDTH),
    "tok_embeddings.weight": (CODES, WIDTH),
    "norm.weight": (WIDTH,),
    "output.weight": (CODES, WIDTH),
}
for layer in range(LAYERS):
    SHAPES |= {
        f"layers.{layer}.attention.wqkv.weight": (3 * WIDTH, WIDTH),
        f"layers.{layer}.attention.wo.weight": (WIDTH, WIDTH),
        f"layers.{layer}.feed_forward.w1.weight": (HIDDEN, WIDTH),
        f"layers.{layer}.feed_forward.w3.weight": (HIDDEN, WIDTH),
        f"layers.{layer}.feed_forward.w2.weight": (WIDTH, HIDDEN),
        f"layers.{layer}.attention_norm.weight": (WIDTH,),
        f"layers.{layer}.ffn_norm.weight": (WIDTH,),
    }


def llamagen_weights() -> dict[str, torch.Tensor]:
    """A state dict as LlamaGen writes it, of two layers."""
    g = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=g) * 0.5 + (len(shape) == 1)
        for name, shape in SHAPES.items()
    }


def rotations(side: int = SIDE, head_dim: int = WIDTH // HEADS) -> torch.Tensor:
    """LlamaGen's `freqs_cis`, number by number."""
    pairs, quarter = head_dim // 2, head_dim // 4
    table = torch.zeros(1 + side * side, pairs, 2)
    for t in range(side * side):
        for i in range(pairs):
            position = t // side if i < quarter else t % side
            angle = torch.tensor(position * 10000.0 ** (-2 * (i % quarter) / pairs))
            table[1 + t, i] = torch.stack([angle.cos(), angle.sin()])
    return table


def write(folder: Path, container=None, name="gpt.pt", **changes) -> Path:
    weights = {k: v for k, v in {**llamagen_weights(), **changes}.items() if v is not None}
    file = folder / name
    if file.suffix == ".safetensors":
        save_file(weights, file)
    else:
        torch.save({container: weights, "steps": 3} if container else weights, file)
    return file


def load(file, **arguments):
    defaults = {"downsample": 4, "image_size": 12, "n_head": 2}
    return llamagen.load_llamagen(file, **(defaults | arguments))


@pytest.fixture
def vq_file(tmp_path) -> Path:
    """A small LlamaGen tokenizer (2 pixels per code)."""
    torch.manual_seed(0)
    config = vq.VQConfig(
        width=32, multipliers=(1, 2), n_res_blocks=1, z_channels=8,
        codebook_size=CODES, codebook_dim=4, attention=False,
    )  # fmt: skip
    weights = vq.VQTokenizer(config).state_dict() | {"quantize.codebook_used": torch.zeros(9)}
    torch.save({"model": weights}, tmp_path / "vq.pt")
    return tmp_path / "vq.pt"


@pytest.mark.parametrize("container", ["model", "module", "state_dict", None])
def test_logits_equal_the_reference(tmp_path, container):
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


def test_config_and_types_are_read_from_the_tensors(tmp_path):
    model = load(write(tmp_path, name="gpt.safetensors"))
    assert model.config == ModelConfig(
        n_layer=2, n_head=2, width=16, codebook_size=11, n_classes=5, grid=(3, 3),
        ffn={"kind": "swiglu", "hidden": 24},
    )  # fmt: skip
    assert torch.equal(model.head.weight, llamagen_weights()["output.weight"])
    half = {name: value.bfloat16() for name, value in llamagen_weights().items()}
    assert load(write(tmp_path, **half)).head.weight.dtype == torch.bfloat16


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
    config = load(write(tmp_path, freqs_cis=rotations()), image_size=None, n_head=None).config
    assert (config.n_head, config.grid) == (2, (3, 3))
    load(write(tmp_path, freqs_cis=rotations().bfloat16()))


@pytest.mark.parametrize(
    ("changes", "arguments", "value"),
    [
        ({"norm.weight": None}, {}, "lacks 'norm.weight'"),
        ({"extra.weight": torch.zeros(1)}, {}, "has 'extra.weight'"),
        ({"output.weight": torch.zeros(3, 16)}, {}, "is [3, 16], expected [11, 16]"),
        ({"norm.weight": torch.zeros(16, dtype=torch.int)}, {}, "'norm.weight' holds torch.int32"),
        ({"norm.weight": torch.full((16,), torch.nan)}, {}, "'norm.weight' holds NaN"),
        ({"layers.0.ffn_norm.weight": None, "layers.1.ffn_norm.weight": None}, {}, "and 1 more"),
        ({"tok_embeddings.weight": None}, {}, "lacks 'tok_embeddings.weight'"),
        ({LABELS: None}, {}, f"lacks {LABELS!r}"),
        ({"tok_embeddings.weight": torch.zeros(3)}, {}, "is [3], expected a matrix"),
        ({}, {"image_size": None}, "--image-size"),
        ({}, {"image_size": 13}, "image size 13"),
        ({}, {"n_head": None}, "--heads"),
        ({}, {"n_head": 3}, "width 16 over 3 heads"),
        ({"freqs_cis": rotations()}, {"n_head": 4}, "heads 4 was given"),
        ({"freqs_cis": rotations()}, {"image_size": 16}, "image size 16 was given"),
        ({"freqs_cis": rotations().flip(1)}, {}, "'freqs_cis'"),
        ({"freqs_cis": torch.zeros(10, 4)}, {}, "'freqs_cis' [10, 4]"),
    ],
)  # fmt: skip
def test_other_files_are_refused_on_one_line(tmp_path, changes, arguments, value):
    with pytest.raises(ValueError) as error:
        load(write(tmp_path, "model", **changes), **arguments)
    assert value in str(error.value) and "\n" not in str(error.value)


def test_a_file_name_that_contradicts_the_image_size_is_refused(tmp_path):
    file = write(tmp_path, name="c2i_B_384.pt")
    with pytest.raises(ValueError, match=r"256.*384"):
        load(file, image_size=256, downsample=64)
    assert load(file, image_size=384, downsample=128).config.grid == (3, 3)


def test_convert_makes_a_model_directory(tmp_path, vq_file):
    out, gpt = tmp_path / "model", write(tmp_path, "model")
    llamagen.convert_llamagen(gpt, vq_file, out, 6, 2)
    parts = load_model(out)
    assert parts.class_names == ["0", "1", "2", "3", "4"]
    assert parts.tokenizer.fingerprint == vq.load_llamagen_vq(vq_file).fingerprint
    assert parts.about["files"] == {"gpt": "gpt.pt", "vq": "vq.pt"}
    assert Pipeline.from_pretrained(out, device="cpu").sample([3])[0].size == (6, 6)
    with pytest.raises(FileExistsError, match="model"):
        llamagen.convert_llamagen(gpt, vq_file, out, 6, 2)


def test_convert_makes_a_tokenizer_directory(tmp_path, vq_file):
    assert llamagen.convert_llamagen(None, vq_file, tmp_path / "vq") is None
    converted = vq.load(tmp_path / "vq")
    assert converted.fingerprint == vq.load_llamagen_vq(vq_file).fingerprint


def test_a_tokenizer_of_another_codebook_is_refused_and_leaves_nothing(tmp_path, vq_file):
    changes = {"tok_embeddings.weight": torch.zeros(12, 16), "output.weight": torch.zeros(12, 16)}
    file = write(tmp_path, **changes)
    with pytest.raises(ValueError, match=r"gpt.pt has 12 codes, .*vq.pt 11"):
        llamagen.convert_llamagen(file, vq_file, tmp_path / "out", 6, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpt.pt", "vq.pt"]


def test_imagenet_names_are_in_wordnet_id_order():
    names = llamagen.class_names(1000)
    assert names[0] == "tench, Tinca tinca" and names[207] == "golden retriever"
    assert names[388].startswith("giant panda") and names[999].startswith("toilet tissue")
