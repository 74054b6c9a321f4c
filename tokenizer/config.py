"""The settings of a tokenizer: one frozen pydantic model per kind."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from moveimg.errors import shorten, validate

MAX_CODES = 65_536  # codes are stored as uint16
Channels = Annotated[int, Field(ge=1, le=65_536)]
Blocks = Annotated[int, Field(ge=1, le=64)]
Multipliers = Annotated[
    tuple[Annotated[int, Field(ge=1, le=256)], ...], Field(min_length=1, max_length=12)
]
CodebookSize = Annotated[int, Field(ge=1, le=MAX_CODES)]
Dropout = Annotated[float, Field(ge=0, lt=1)]


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class VQQuantizerConfig(_Config):
    """Nearest vector of a learned codebook (VQ-VAE, arXiv 1711.00937)."""

    kind: Literal["vq"] = Field("vq", description="nearest vector, straight-through gradient")
    init_from_data: bool = Field(
        True, description="start the codebook at vectors of the first training batch"
    )
    reseed_after: Annotated[int, Field(ge=0, le=2**31)] = Field(
        100, description="training steps after which an unused code moves onto a vector; 0: never"
    )


# No default `kind` below: a fingerprint leaves out defaults, and it must contain the kind.
class SimVQQuantizerConfig(_Config):
    """A frozen random codebook behind one learned linear map (SimVQ, arXiv 2411.02038)."""

    kind: Literal["simvq"] = Field(description="nearest row of C W: C frozen, W learned")


class IBQQuantizerConfig(_Config):
    """Index backpropagation (IBQ, arXiv 2412.02692), with the loss weights of its authors' code.

    Scores are dot products; with the tokenizer's `l2_normalize` (not in the paper) cosines.
    """

    kind: Literal["ibq"] = Field(description="largest dot product; every code has a gradient")
    entropy_weight: float = Field(0.05, ge=0, le=1e6, description="weight of the entropy loss")
    entropy_temperature: float = Field(
        0.01, gt=0, le=1e6, description="divides the scores in the entropy loss"
    )


def _quantizer_kind(value: Any) -> Any:
    return value.get("kind", "vq") if isinstance(value, dict) else getattr(value, "kind", None)


QuantizerConfig = Annotated[
    Annotated[VQQuantizerConfig, Tag("vq")]
    | Annotated[SimVQQuantizerConfig, Tag("simvq")]
    | Annotated[IBQQuantizerConfig, Tag("ibq")],
    Discriminator(_quantizer_kind),  # a function, because `kind` may be left out for vq
]


class VQConfig(_Config):
    """The convolutional VQ tokenizer of LlamaGen (arXiv 2406.06525); the defaults are VQ-16."""

    kind: Literal["vq"] = Field("vq", description="LlamaGen's layout of the VQGAN autoencoder")
    in_channels: Channels = Field(3, description="colour channels of an image")
    width: Channels = Field(128, description="channels at full resolution, before multipliers")
    multipliers: Multipliers = Field(
        (1, 1, 2, 2, 4),
        description="channels over `width` of each resolution, which halves at every entry after "
        "the first (LlamaGen's VQ-8: 1, 2, 2, 4)",
    )
    n_res_blocks: Blocks = Field(2, description="residual blocks per resolution (decoder: + 1)")
    z_channels: Channels = Field(256, description="channels of the encoder's output")
    codebook_size: CodebookSize = Field(16_384, description="number of codes")
    codebook_dim: Channels = Field(8, description="dimension of a code's vector")
    l2_normalize: bool = Field(
        True, description="compare and decode unit vectors (ViT-VQGAN, arXiv 2110.04627)"
    )
    norm_groups: Channels = Field(32, description="groups of every GroupNorm")
    attention: bool = Field(True, description="self-attention at the lowest resolution")
    quantizer: QuantizerConfig = Field(
        VQQuantizerConfig(), description="how a vector becomes a code"
    )
    dropout: Dropout = Field(0.0, description="dropout inside residual blocks")

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of every resolution, highest resolution first."""
        return tuple(self.width * multiplier for multiplier in self.multipliers)

    @property
    def downsample(self) -> int:
        """Pixels per code along one side."""
        return 2 ** (len(self.multipliers) - 1)

    @model_validator(mode="after")
    def _check(self) -> VQConfig:
        _check_groups(self.norm_groups, (self.width, *self.channels))
        return self


class TamingConfig(_Config):
    """A VQGAN of taming-transformers (arXiv 2012.09841): the fields of its `model.yaml`."""

    kind: Literal["taming"] = Field("taming", description="VQGAN of taming-transformers")
    ch: Channels = Field(description="channels at full resolution, before multipliers")
    ch_mult: Multipliers = Field(description="channels of each resolution over `ch`")
    num_res_blocks: Blocks = Field(description="residual blocks per resolution (decoder: + 1)")
    attn_resolutions: tuple[Channels, ...] = Field(
        max_length=12, description="sides, at `resolution`, of the levels with self-attention"
    )
    resolution: Channels = Field(description="side of the training images; limits no other image")
    in_channels: Channels = Field(description="colour channels of an image")
    out_ch: Channels = Field(description="colour channels of a decoded image")
    z_channels: Channels = Field(description="channels of the encoder's output")
    double_z: Literal[False] = Field(False, description="True: a KL autoencoder, not supported")
    dropout: Dropout = Field(0.0, description="dropout inside residual blocks")
    n_embed: CodebookSize = Field(description="number of codes")
    embed_dim: Channels = Field(description="dimension of a code's vector")

    @property
    def downsample(self) -> int:
        """Pixels per code along one side."""
        return 2 ** (len(self.ch_mult) - 1)

    @model_validator(mode="after")
    def _check(self) -> TamingConfig:
        _check_groups(32, (self.ch, *(self.ch * multiplier for multiplier in self.ch_mult)))
        if self.in_channels != self.out_ch:
            raise ValueError(f"in_channels {self.in_channels} and out_ch {self.out_ch} differ")
        if self.resolution % (f := self.downsample):
            raise ValueError(f"resolution {self.resolution}: expected a multiple of {f}")
        return self


TokenizerConfig = VQConfig | TamingConfig


def parse_config(values: Any, source: str) -> TokenizerConfig:
    """The config of a mapping; ValueError, one line with `source`, the key and the value."""
    if not isinstance(values, dict):
        raise ValueError(f"{source}: expected a dictionary (got {shorten(values)})")
    kind = values.get("kind")
    if kind == "vq":
        return validate(VQConfig, values, source)
    if kind == "taming":
        return validate(TamingConfig, values, source)
    raise ValueError(f"{source}: kind: expected 'vq' or 'taming' (got {shorten(kind)})")


def _check_groups(groups: int, channels: tuple[int, ...]) -> None:
    for count in channels:
        if count % groups:
            raise ValueError(f"GroupNorm's {groups} groups do not divide {count} channels")
