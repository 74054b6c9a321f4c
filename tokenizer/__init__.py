"""Images <-> codes: VQ tokenizers, their quantizers, files and training losses.

Importing this needs torch, pydantic and safetensors; taming-transformers only when a tokenizer of
that kind is built.
"""

from tokenizer.base import AutoencoderTokenizer, Tokenizer, TrainingOutput
from tokenizer.codebook import Quantizer, code_statistics
from tokenizer.config import (
    IBQQuantizerConfig,
    SimVQQuantizerConfig,
    TamingConfig,
    TokenizerConfig,
    VQConfig,
    VQQuantizerConfig,
    parse_config,
)
from tokenizer.foreign import load_llamagen_vq, load_taming, read_weights
from tokenizer.io import build, load, save
from tokenizer.losses import DEFAULT_WEIGHTS, total_loss
from tokenizer.taming import TamingTokenizer
from tokenizer.vq import VQTokenizer
from tokenizer.winograd import fast_tokenizer

__all__ = [
    "DEFAULT_WEIGHTS",
    "AutoencoderTokenizer",
    "IBQQuantizerConfig",
    "Quantizer",
    "SimVQQuantizerConfig",
    "TamingConfig",
    "TamingTokenizer",
    "Tokenizer",
    "TokenizerConfig",
    "TrainingOutput",
    "VQConfig",
    "VQQuantizerConfig",
    "VQTokenizer",
    "build",
    "code_statistics",
    "fast_tokenizer",
    "load",
    "load_llamagen_vq",
    "load_taming",
    "parse_config",
    "read_weights",
    "save",
    "total_loss",
]
