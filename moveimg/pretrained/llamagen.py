"""Conversion of LlamaGen's class-conditional generators (arXiv 2406.06525): tensors are renamed."""

from __future__ import annotations

import re
from pathlib import Path

import tokenizer as vq
from moveimg.checkpoint import ModelParts, save_model
from moveimg.config import SIZES, ModelConfig, SamplingSettings, SwiGLUConfig
from moveimg.device import shapes_only
from moveimg.errors import validate
from moveimg.files import atomic_directory
from moveimg.model import Transformer, swiglu_hidden

# parts of LlamaGen's parameter names -> parts of ours
RENAMED = {
    "cls_embedding.embedding_table.": "label_embedding.",
    "tok_embeddings.": "code_embedding.",
    ".feed_forward.": ".ffn.",
    "output.": "head.",
}
# guidance scales of LlamaGen's published FIDs, at temperature 1 without top-k
PUBLISHED_CFG = {"B": 2.0, "L": 2.0, "XL": 1.75, "XXL": 1.75, "3B": 1.65}
SIZE_NAMES = {(size["n_layer"], size["width"]): name for name, size in SIZES.items()}


def convert_llamagen(
    gpt: Path | None, vq_file: Path, out: Path, image_size: int | None, n_head: int | None
) -> ModelConfig | None:
    """Write a model directory, without `gpt` a tokenizer's; returns the generator's config."""
    with atomic_directory(out) as temporary:
        tokenizer = vq.load_llamagen_vq(vq_file)
        if gpt is None:
            vq.save(tokenizer, temporary)
            return None
        generator = load_llamagen(gpt, tokenizer.downsample, image_size, n_head)
        config = generator.config
        if config.codebook_size != tokenizer.codebook_size:
            counts = f"{gpt} has {config.codebook_size} codes, {vq_file} {tokenizer.codebook_size}"
            raise ValueError(f"{counts}: expected the generator's own tokenizer")
        names = [str(label) for label in range(config.n_classes)]
        if config.n_classes == 1000:  # ImageNet's, in the order of WordNet ids
            from timm.data import ImageNetInfo

            info = ImageNetInfo()  # slow to make: it reads many lists
            names = [info.index_to_description(label) for label in range(1000)]
        cfg_scale = PUBLISHED_CFG.get(SIZE_NAMES.get((config.n_layer, config.width), ""), 1.0)
        settings = SamplingSettings(cfg_scale=cfg_scale)
        about = {"source": "LlamaGen", "files": {"gpt": gpt.name, "vq": vq_file.name}}
        save_model(temporary, ModelParts(generator, tokenizer, names, settings, about))
    return config


def load_llamagen(
    file: str | Path, downsample: int = 16, image_size: int | None = None, n_head: int | None = None
) -> Transformer:
    """Load a LlamaGen generator in eval mode and in its stored dtype.

    `downsample` is the tokenizer's number of pixels per code along a side. `image_size` may be left
    out if the file's name has it (c2i_B_256.pt), `n_head` if layers and width are those of a named
    size. Raises FileNotFoundError or ValueError.
    """
    weights = {}
    for key, value in vq.read_weights(file).items():
        for theirs, ours in RENAMED.items():
            key = key.replace(theirs, ours)
        weights[key] = value
    weights.pop("freqs_cis", None)  # the rotations of RoPE, which some tools store
    named = re.fullmatch(r"c2i_\w+_(\d{3})", Path(file).stem)
    image_size = image_size or (int(named[1]) if named else 0)
    if not image_size or image_size % downsample:
        wanted = f"expected --image-size, a multiple of the tokenizer's {downsample} pixels"
        raise ValueError(f"{file}: image size {image_size}: {wanted}")
    try:
        n_labels, width = weights["label_embedding.weight"].shape
        codebook_size, _ = weights["code_embedding.weight"].shape
        hidden, _ = weights["layers.0.ffn.w1.weight"].shape
    except (KeyError, ValueError) as error:  # a tensor is missing, or has other dimensions
        raise ValueError(f"{file}: not a class-conditional LlamaGen generator ({error})") from None
    n_layer = len({m[1] for key in weights if (m := re.match(r"layers\.(\d+)\.", key))})
    if n_head is None and (n_layer, width) not in SIZE_NAMES:
        raise ValueError(f"{file}: {n_layer} layers, width {width}: no named size, needs --heads")
    derived = hidden == swiglu_hidden(width, SwiGLUConfig())
    settings = {
        "n_layer": n_layer,
        "n_head": n_head or SIZES[SIZE_NAMES[n_layer, width]]["n_head"],
        "width": width,
        "codebook_size": codebook_size,
        "n_classes": n_labels - 1,  # the last row is the null label
        "grid": [image_size // downsample] * 2,
        "ffn": {"kind": "swiglu"} if derived else {"kind": "swiglu", "hidden": hidden},
    }
    with shapes_only():
        generator = Transformer(validate(ModelConfig, settings, str(file)))
    vq.load_weights(generator, weights, str(file), dtype=None)
    return generator.eval()
