"""LlamaGen's class-conditional generators (arXiv 2406.06525), read without running their code.

The architecture is this program's standard transformer under other names, so conversion renames
tensors. Tensors hold neither the image size nor the number of heads of sizes without a name: both
are arguments.
"""

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

# LlamaGen's names -> ours; the rest of a name is the same.
RENAMED = {
    "cls_embedding.embedding_table.": "label_embedding.",
    "tok_embeddings.": "code_embedding.",
    ".feed_forward.": ".ffn.",
    "output.": "head.",
}
# The guidance of LlamaGen's published figures; temperature 1, all codes.
PUBLISHED_CFG = {"B": 2.0, "L": 2.0, "XL": 1.75, "XXL": 1.75, "3B": 1.65}


def convert_llamagen(
    gpt: str | Path | None,
    vq_file: str | Path,
    out: str | Path,
    image_size: int | None = None,
    n_head: int | None = None,
) -> ModelConfig | None:
    """Write a LlamaGen generator and its tokenizer as a model directory, which appears whole.

    Without `gpt` it is a tokenizer directory. Returns the generator's config, if there is one.
    Raises FileExistsError where `out` is there already; other errors are those of load_llamagen.
    """
    with atomic_directory(out) as temporary:
        tokenizer = vq.load_llamagen_vq(vq_file)
        if gpt is None:
            vq.save(tokenizer, temporary)
            return None
        generator = load_llamagen(gpt, tokenizer.downsample, image_size, n_head)
        config = generator.config
        if config.codebook_size != tokenizer.codebook_size:
            raise ValueError(
                f"{gpt} has {config.codebook_size} codes, {vq_file} {tokenizer.codebook_size}: "
                "expected a generator and the tokenizer it was trained with"
            )
        names = [str(label) for label in range(config.n_classes)]
        if config.n_classes == 1000:  # ImageNet, in WordNet-id order
            from timm.data import ImageNetInfo

            info = ImageNetInfo()  # reads every subset's lists
            names = [info.index_to_description(label) for label in range(1000)]
        settings = SamplingSettings()
        for name, cfg_scale in PUBLISHED_CFG.items():
            if (SIZES[name]["n_layer"], SIZES[name]["width"]) == (config.n_layer, config.width):
                settings = SamplingSettings(cfg_scale=cfg_scale)
        files = {"gpt": Path(gpt).name, "vq": Path(vq_file).name}
        parts = ModelParts(generator, tokenizer, names, settings)
        save_model(temporary, parts, {"source": "LlamaGen", "files": files})
    return config


def load_llamagen(
    file: str | Path,
    downsample: int = 16,
    image_size: int | None = None,
    n_head: int | None = None,
) -> Transformer:
    """A LlamaGen generator, in eval mode, in the number type it is stored in.

    `downsample` is the tokenizer's pixels of a side per code. `image_size` may be left out where a
    published file's name has it (c2i_B_256.pt), `n_head` where a named size has the weights' layers
    and width. Raises FileNotFoundError, or ValueError for a file that is damaged, needs code to be
    read or holds other weights, and for an argument that is missing or contradicts its name.
    """
    weights = {}
    for key, value in vq.read_weights(file).items():
        for theirs, ours in RENAMED.items():
            key = key.replace(theirs, ours)
        weights[key] = value
    weights.pop("freqs_cis", None)  # rotations, which some tools store
    if named := re.fullmatch(r"c2i_\w+_(\d{3})", Path(file).stem):
        if image_size not in (None, int(named[1])):
            raise ValueError(f"image size {image_size}: {file} is for {named[1]} pixels")
        image_size = int(named[1])
    if not image_size or image_size % downsample:
        raise ValueError(
            f"{file}: image size {image_size}: expected --image-size, a multiple of the "
            f"tokenizer's {downsample} pixels"
        )
    try:
        n_labels, width = weights["label_embedding.weight"].shape
        codebook_size, _ = weights["code_embedding.weight"].shape
        hidden, _ = weights["layers.0.ffn.w1.weight"].shape
    except (KeyError, ValueError) as error:  # a tensor is missing, or has other dimensions
        raise ValueError(f"{file}: not a class-conditional LlamaGen generator ({error})") from None
    n_layer = len({m[1] for key in weights if (m := re.match(r"layers\.(\d+)\.", key))})
    heads = {(size["n_layer"], size["width"]): size["n_head"] for size in SIZES.values()}
    if not (n_head := n_head or heads.get((n_layer, width))):
        raise ValueError(f"{file}: {n_layer} layers of width {width}: no named size: give --heads")
    derived = hidden == swiglu_hidden(width, SwiGLUConfig())
    settings = {
        "n_layer": n_layer,
        "n_head": n_head,
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
