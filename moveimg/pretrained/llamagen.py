"""LlamaGen's class-conditional generators (arXiv 2406.06525), read without running their code.

The architecture is this program's standard transformer under other names, so conversion renames
tensors. Tensors do not hold the image size, unless a rotation table is stored, nor the number of
heads of sizes without a name: both are arguments.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

import tokenizer as vq
from moveimg.checkpoint import ModelParts, check_shapes, require_finite, save_model
from moveimg.config import SIZES, ModelConfig, SamplingSettings, SwiGLUConfig
from moveimg.device import shapes_only
from moveimg.errors import validate
from moveimg.files import atomic_directory
from moveimg.model import Transformer, rope_2d, swiglu_hidden

# Our names -> LlamaGen's; the rest of a name is the same.
RENAMED = {
    "label_embedding.": "cls_embedding.embedding_table.",
    "code_embedding.": "tok_embeddings.",
    ".ffn.": ".feed_forward.",
    "head.": "output.",
}
TABLE = "freqs_cis"  # the rotation table [1 + T, head_dim / 2, 2]: not a weight, sometimes stored
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
    Raises FileExistsError where `out` is there already, ValueError where the two files do not
    belong together; other arguments and errors are those of load_llamagen.
    """
    with atomic_directory(out) as temporary:
        tokenizer = vq.load_llamagen_vq(vq_file)
        require_finite(tokenizer.state_dict(), str(vq_file))
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
        names, settings = class_names(config.n_classes), published_settings(config)
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

    Args:
        file: the checkpoint (see tokenizer.read_weights).
        downsample: pixels of a side per code, of the tokenizer it was trained with.
        image_size: pixels of a side; needed unless the file holds its rotation table.
        n_head: attention heads; needed where neither a table nor a named size tells them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, needs code to be read, lacks or has weights that a LlamaGen
            generator does not, or an argument is missing or contradicts the file.
    """
    weights = vq.read_weights(file)
    table = weights.pop(TABLE, None)
    named = re.fullmatch(r"c2i_\w+_(\d{3})", Path(file).stem)
    if named and image_size not in (None, int(named[1])):
        raise ValueError(f"image size {image_size} was given, but {file} is for {named[1]} pixels")
    config = llamagen_config(weights, table, str(file), downsample, image_size, n_head)
    with shapes_only():
        generator = Transformer(config)
    expected = {llamagen_name(k): tuple(v.shape) for k, v in generator.state_dict().items()}
    check_shapes(expected, {key: tuple(v.shape) for key, v in weights.items()}, str(file))
    for key, value in weights.items():
        if not value.is_floating_point():
            raise ValueError(f"{file}: {key!r} holds {value.dtype}, expected floats")
    require_finite(weights, str(file))
    state = {key: weights[llamagen_name(key)] for key in generator.state_dict()}
    generator.load_state_dict(state, assign=True)  # the file's own tensors: no second copy
    return generator.eval()


def llamagen_config(
    weights: Mapping[str, Tensor],
    table: Tensor | None,
    origin: str,
    downsample: int,
    image_size: int | None,
    n_head: int | None,
) -> ModelConfig:
    """The config of a generator in LlamaGen's layout (arguments: load_llamagen)."""

    def shape(key: str) -> tuple[int, int]:
        if key not in weights:
            raise ValueError(f"{origin}: not a class-conditional LlamaGen generator: lacks {key!r}")
        if weights[key].ndim != 2:
            raise ValueError(f"{origin}: {key!r} is {list(weights[key].shape)}, expected a matrix")
        return weights[key].shape[0], weights[key].shape[1]

    n_labels, width = shape("cls_embedding.embedding_table.weight")
    n_layer = len({m[1] for key in weights if (m := re.match(r"layers\.(\d+)\.", key))})
    hidden = shape("layers.0.feed_forward.w1.weight")[0]
    if table is not None and table.ndim == 3 and table.shape[1]:
        side = math.isqrt(len(table) - 1)
        n_head = _agree("heads", n_head, width // (2 * table.shape[1]), origin)
        image_size = _agree("image size", image_size, side * downsample, origin)
    named = {(size["n_layer"], size["width"]): size["n_head"] for size in SIZES.values()}
    n_head = n_head or named.get((n_layer, width))
    if n_head is None:
        raise ValueError(
            f"{origin}: {n_layer} layers of width {width} are no named size: give --heads"
        )
    if image_size is None:
        raise ValueError(f"{origin}: tensors do not tell the image size: give --image-size")
    if image_size < downsample or image_size % downsample:
        raise ValueError(
            f"image size {image_size}: expected a multiple of the tokenizer's {downsample} pixels"
        )
    derived = hidden == swiglu_hidden(width, SwiGLUConfig())
    settings = {
        "n_layer": n_layer,
        "n_head": n_head,
        "width": width,
        "codebook_size": shape("tok_embeddings.weight")[0],
        "n_classes": n_labels - 1,  # the last row is the null label
        "grid": [image_size // downsample] * 2,
        "ffn": {"kind": "swiglu"} if derived else {"kind": "swiglu", "hidden": hidden},
    }
    config = validate(ModelConfig, settings, origin)
    if table is not None:
        _check_table(table, config, origin)
    return config


def llamagen_name(key: str) -> str:
    """LlamaGen's name of one of our weights."""
    for ours, theirs in RENAMED.items():
        key = key.replace(ours, theirs)
    return key


def class_names(n_classes: int) -> list[str]:
    """ImageNet's names in WordNet-id order for 1,000 classes; else their numbers."""
    if n_classes != 1000:
        return [str(label) for label in range(n_classes)]
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return [info.index_to_description(label) for label in range(n_classes)]


def published_settings(config: ModelConfig) -> SamplingSettings:
    """The sampling settings of LlamaGen's figures for a named size; else the defaults."""
    for name, cfg_scale in PUBLISHED_CFG.items():
        if (SIZES[name]["n_layer"], SIZES[name]["width"]) == (config.n_layer, config.width):
            return SamplingSettings(cfg_scale=cfg_scale)
    return SamplingSettings()


def _agree(name: str, argument: int | None, stored: int, origin: str) -> int:
    if argument not in (None, stored):
        raise ValueError(f"{origin}: {name} {argument} was given, but its {TABLE!r} says {stored}")
    return stored


def _check_table(table: Tensor, config: ModelConfig, origin: str) -> None:
    """Refuse weights that were trained with other rotary positions than ours."""
    ours = rope_2d(config.grid, config.head_dim, config.rope_base, table.device, torch.float32)
    # a table cast to bfloat16 is off by up to 2^-9
    if table.shape != ours.shape or not torch.allclose(table.float(), ours, atol=4e-3, rtol=0):
        raise ValueError(
            f"{origin}: its {TABLE!r} {list(table.shape)} is not LlamaGen's 2D rotation of "
            f"{config.grid[0]} x {config.grid[1]} codes"
        )
