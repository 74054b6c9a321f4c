"""VQGANs of taming-transformers (arXiv 2012.09841), by that package's own encoder and decoder.

The package is `taming-transformers-rom1504` on PyPI. It is imported when a tokenizer of this kind
is built, not before.
"""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from importlib import import_module

from tokenizer.base import AutoencoderTokenizer
from tokenizer.config import TamingConfig, VQQuantizerConfig
from tokenizer.quantizers import VectorQuantizer


class TamingTokenizer(AutoencoderTokenizer):
    """The tokenizer of kind `taming`: a VQGAN, whose codebook is not normalised.

    Raises:
        ImportError: taming-transformers is not installed.
    """

    config: TamingConfig

    def __init__(self, config: TamingConfig) -> None:
        try:
            layers = import_module("taming.modules.diffusionmodules.model")
        except ImportError as error:
            raise ImportError(
                f"tokenizers of kind 'taming' need the package taming-transformers-rom1504: {error}"
            ) from None
        settings = config.model_dump(exclude={"kind", "n_embed", "embed_dim"})
        encoder = layers.Encoder(**settings)
        with redirect_stdout(io.StringIO()):  # its constructor prints
            decoder = layers.Decoder(**settings)
        quantize = VectorQuantizer(
            VQQuantizerConfig(), config.n_embed, config.embed_dim, l2_normalize=False
        )
        super().__init__(config, encoder, decoder, quantize)
