"""LlamaGen's generators, in files made here, and whole conversions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import tokenizer as vq
from moveimg.checkpoint import load_model
from moveimg.config import ModelConfig
from moveimg.model import Transformer
from moveimg.pipeline import Pipeline
from moveimg.pretrained import llamagen
from tests.conftest import random_inputs, tiny_config
from tests.reference import reference_logits

CODES, CLASSES, WIDTH, HIDDEN = 11, 5, 16, 24
LABELS = "cls_embedding.embedding_table.weight"
# LlamaGen's tensors, and our names of those that it calls otherwise, written out independently.
SHAPES = {
    LABELS: (CLASSES + 1, WIDTH),
    "tok_embeddings.weight": (CODES, WIDTH),
    "norm.weight": (WIDTH,),
    "output.weight": (CODES, WIDTH),
}
OURS = {
    LABELS: "label_embedding.weight",
    "tok_embeddings.weight": "code_embedding.weight",
    "output.weight": "head.weight",
}
for layer in ("layers.0", "layers.1"):
    SHAPES |= {
        f"{layer}.attention.wqkv.weight": (3 * WIDTH, WIDTH),
        f"{layer}.attention.wo.weight": (WIDTH, WIDTH),
        f"{layer}.feed_forward.w1.weight": (HIDDEN, WIDTH),
        f"{layer}.feed_forward.w3.weight": (HIDDEN, WIDTH),
        f"{layer}.feed_forward.w2.weight": (WIDTH, HIDDEN),
        f"{layer}.attention_norm.weight": (WIDTH,),
        f"{layer}.ffn_norm.weight": (WIDTH,),
    }
    OURS |= {f"{layer}.feed_forward.w{i}.weight": f"{layer}.ffn.w{i}.weight" for i in (1, 2, 3)}


def llamagen_weights() -> dict[str, torch.Tensor]:
    """A state dict as LlamaGen writes it, of two layers."""
    g = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=g) * 0.5 + (len(shape) == 1)
        for name, shape in SHAPES.items()
    }


def write(folder, container=None, name="gpt.pt", **changes):
    weights = {k: v for k, v in {**llamagen_weights(), **changes}.items() if v is not None}
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
    assert model.config == tiny_config(grid=(3, 3), ffn={"kind": "swiglu", "hidden": HIDDEN})
    half = {name: value.bfloat16() for name, value in llamagen_weights().items()}
    assert load(write(tmp_path, **half)).head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("size", llamagen.PUBLISHED_CFG)
def test_named_sizes_need_no_heads_and_published_files_no_image_size(tmp_path, size):
    expected = ModelConfig.model_validate({"size": size, "grid": [24, 24]})
    with torch.device("meta"):
        state = Transformer(expected).state_dict()
    weights = {}
    for key, value in state.items():  # one number behind every tensor: real sizes, a small file
        for theirs, ours in llamagen.RENAMED.items():
            key = key.replace(ours, theirs)
        weights[key] = torch.zeros(1).bfloat16().expand(value.shape)
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
