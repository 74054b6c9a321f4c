"""Images <-> codes: VQ tokenizers, their quantizers, files and training losses."""

from tokenizer.config import IBQQuantizerConfig, TamingConfig, VQConfig, parse_config
from tokenizer.io import build, load, load_llamagen_vq, load_taming, save
from tokenizer.losses import total_loss
from tokenizer.quantizers import code_statistics
from tokenizer.vq import AutoencoderTokenizer, TamingTokenizer, VQTokenizer
from tokenizer.weights import load_weights, read_weights

__all__ = [
    "AutoencoderTokenizer",
    "IBQQuantizerConfig",
    "TamingConfig",
    "TamingTokenizer",
    "VQConfig",
    "VQTokenizer",
    "build",
    "code_statistics",
    "load",
    "load_llamagen_vq",
    "load_taming",
    "load_weights",
    "parse_config",
    "read_weights",
    "save",
    "total_loss",
]
