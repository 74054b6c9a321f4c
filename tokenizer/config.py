"""Settings of tokenizers: one frozen pydantic model per kind."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from moveimg.errors import validate

Size = Annotated[int, Field(ge=1, le=65_536)]  # packed codes are uint16
Blocks = Annotated[int, Field(ge=1, le=64)]
Multipliers = Annotated[
    tuple[Annotated[int, Field(ge=1, le=256)], ...], Field(min_length=1, max_length=12)
]
Dropout = Annotated[float, Field(ge=0, lt=1)]


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class QuantizerConfig(_Config):
    """Settings of the quantizer; a comment that begins with a kind restricts the option to it."""

    # nearest code vector (VQ-VAE, arXiv 1711.00937), a learned linear map of a frozen random
    # codebook (SimVQ, arXiv 2411.02038), or index backpropagation (IBQ, arXiv 2412.02692)
    kind: Literal["vq", "simvq", "ibq"] = "vq"
    init_from_data: bool = True  # vq: initialise the codebook from the first training batch
    # vq: training steps after which an unused code is reset to an encoder output; 0: never
    reseed_after: int = Field(100, ge=0, le=2**31)
    entropy_weight: float = Field(0.05, ge=0, le=1e6)  # ibq: weight of the entropy loss
    entropy_temperature: float = Field(0.01, gt=0, le=1e6)  # ibq: of the entropy loss


class VQConfig(_Config):
    """The convolutional VQ tokenizer of LlamaGen (arXiv 2406.06525); the defaults are VQ-16."""

    kind: Literal["vq"] = "vq"
    in_channels: Size = 3
    width: Size = 128  # channels at full resolution, before multipliers
    # channels per level, as multiples of `width`; each new level halves the resolution
    multipliers: Multipliers = (1, 1, 2, 2, 4)
    n_res_blocks: Blocks = 2  # residual blocks per level; the decoder has one more
    z_channels: Size = 256  # channels of the encoder's output
    codebook_size: Size = 16_384
    codebook_dim: Size = 8
    l2_normalize: bool = True  # look up and embed unit vectors (ViT-VQGAN, arXiv 2110.04627)
    norm_groups: Size = 32  # groups of every GroupNorm
    attention: bool = True  # self-attention at the lowest resolution
    quantizer: QuantizerConfig = QuantizerConfig()
    dropout: Dropout = 0.0  # inside residual blocks


class TamingConfig(_Config):
    """Settings of taming-transformers' VQGAN (arXiv 2012.09841), as in its `model.yaml`."""

    kind: Literal["taming"] = "taming"
    ch: Size
    ch_mult: Multipliers
    num_res_blocks: Blocks
    attn_resolutions: tuple[Size, ...] = Field(max_length=12)
    resolution: Size  # of the training images; images of other sizes can be encoded, too
    in_channels: Size
    out_ch: Size
    z_channels: Size
    double_z: Literal[False] = False  # True would be a KL autoencoder
    dropout: Dropout = 0.0
    n_embed: Size
    embed_dim: Size


TokenizerConfig = VQConfig | TamingConfig
_ANY_KIND = TypeAdapter(Annotated[TokenizerConfig, Field(discriminator="kind")])


def parse_config(values: Any, source: str) -> TokenizerConfig:
    """Validate a mapping as a config. Raises ValueError with `source`, the key and the value."""
    config: TokenizerConfig = validate(_ANY_KIND, values, source)
    return config
