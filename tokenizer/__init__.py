"""VQ tokenizers, which encode images to codes and decode codes to images."""

from tokenizer.config import QuantizerConfig, TamingConfig, VQConfig, parse_config
from tokenizer.io import load, load_llamagen_vq, load_taming, load_weights, read_weights, save
from tokenizer.quantizers import code_statistics
from tokenizer.vq import AutoencoderTokenizer

__all__ = [
    "AutoencoderTokenizer",
    "QuantizerConfig",
    "TamingConfig",
    "VQConfig",
    "code_statistics",
    "load",
    "load_llamagen_vq",
    "load_taming",
    "load_weights",
    "parse_config",
    "read_weights",
    "save",
]
