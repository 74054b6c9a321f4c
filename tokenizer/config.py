"""What a tokenizer is made of: frozen pydantic models, one per kind.

Unknown keys are errors. `kind` picks the tokenizer, and `quantizer.kind` the way a vector becomes
a code. Everything here is part of a tokenizer's fingerprint.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PositiveInt,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

MAX_CODES = 65_536  # codes are stored as uint16


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class VQQuantizerConfig(_Config):
    """Nearest vector of a learned codebook (VQ-VAE, arXiv 1711.00937)."""

    kind: Literal["vq"] = Field(
        default="vq", description="nearest codebook vector, straight-through"
    )
    init_from_data: bool = Field(
        default=True,
        description="training from scratch starts the codebook at the first batch's vectors",
    )
    reseed_after: int = Field(
        default=100,
        ge=0,
        description="training steps a code may stay unused before it is moved onto one of the "
        "batch's vectors; 0 never moves one",
    )


# The kinds below have no default `kind`: a fingerprint leaves defaults out, and must know the kind.


class SimVQQuantizerConfig(_Config):
    """A frozen random codebook behind one learned linear map (SimVQ, arXiv 2411.02038)."""

    kind: Literal["simvq"] = Field(description="nearest row of C W, C frozen and W learned")


class IBQQuantizerConfig(_Config):
    """Index back-propagation (IBQ, arXiv 2412.02692); the weights of its authors' code.

    It compares by dot product; with the tokenizer's `l2_normalize` that is the cosine. The paper
    leaves it off; docs/tokenizer.md has a small comparison.
    """

    kind: Literal["ibq"] = Field(description="likeliest code; every code has a gradient")
    entropy_weight: float = Field(
        default=0.05, ge=0, description="weight of the loss that spreads the use of codes"
    )
    entropy_temperature: float = Field(
        default=0.01, gt=0, description="divides the scores in that loss"
    )


def _quantizer_kind(value: Any) -> Any:
    return value.get("kind", "vq") if isinstance(value, dict) else getattr(value, "kind", None)


QuantizerConfig = Annotated[
    Annotated[VQQuantizerConfig, Tag("vq")]
    | Annotated[SimVQQuantizerConfig, Tag("simvq")]
    | Annotated[IBQQuantizerConfig, Tag("ibq")],
    Discriminator(_quantizer_kind),  # a function, for `kind` may be left out: it is then vq
]


class VQConfig(_Config):
    """The convolutional VQ tokenizer of LlamaGen (arXiv 2406.06525); the defaults are VQ-16."""

    kind: Literal["vq"] = Field(
        default="vq", description="LlamaGen's layout of the VQGAN autoencoder"
    )
    in_channels: PositiveInt = Field(default=3, description="colour channels of an image")
    width: PositiveInt = Field(
        default=128, description="channels at full resolution, before multipliers"
    )
    multipliers: tuple[PositiveInt, ...] = Field(
        default=(1, 1, 2, 2, 4),
        min_length=1,
        description="channels of each resolution over `width`; every entry after the first halves "
        "the resolution (LlamaGen VQ-8: 1, 2, 2, 4)",
    )
    n_res_blocks: PositiveInt = Field(
        default=2,
        description="residual blocks per resolution in the encoder; the decoder has one more",
    )
    z_channels: PositiveInt = Field(
        default=256, description="channels between the convolutions and z"
    )
    codebook_size: int = Field(default=16_384, ge=1, le=MAX_CODES, description="number of codes")
    codebook_dim: PositiveInt = Field(default=8, description="dimension of a code's vector")
    l2_normalize: bool = Field(
        default=True, description="compare and decode unit vectors (ViT-VQGAN, arXiv 2110.04627)"
    )
    norm_groups: PositiveInt = Field(default=32, description="groups of every GroupNorm")
    attention: bool = Field(
        default=True, description="self-attention at the lowest resolution and between the halves"
    )
    quantizer: QuantizerConfig = Field(
        default=VQQuantizerConfig(), description="how a vector becomes a code"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout inside residual blocks")

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of every resolution, highest resolution first."""
        return tuple(self.width * multiplier for multiplier in self.multipliers)

    @property
    def downsample(self) -> int:
        """Pixels per code along one side."""
        return 2 ** (len(self.multipliers) - 1)

    @model_validator(mode="after")
    def _groups_divide_channels(self) -> VQConfig:
        _check_groups(self.norm_groups, (self.width, *self.channels), "norm_groups")
        return self


class TamingConfig(_Config):
    """A VQGAN of taming-transformers (arXiv 2012.09841): the fields of its `model.yaml`.

    There are no defaults of shape: the values come with the checkpoint.
    """

    kind: Literal["taming"] = Field(default="taming", description="VQGAN of taming-transformers")
    ch: PositiveInt = Field(description="channels at full resolution, before multipliers")
    ch_mult: tuple[PositiveInt, ...] = Field(
        min_length=1, description="channels of each resolution over `ch`"
    )
    num_res_blocks: PositiveInt = Field(
        description="residual blocks per resolution in the encoder; the decoder has one more"
    )
    attn_resolutions: tuple[PositiveInt, ...] = Field(
        description="sides, in pixels at `resolution`, of the levels that have self-attention"
    )
    resolution: PositiveInt = Field(
        description="side of the images the model was built for; says where attention stands, "
        "and does not limit the images"
    )
    in_channels: PositiveInt = Field(description="colour channels of an image")
    out_ch: PositiveInt = Field(description="colour channels of a decoded image")
    z_channels: PositiveInt = Field(description="channels between the convolutions and z")
    double_z: Literal[False] = Field(
        default=False, description="True is for KL autoencoders: refused"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout inside residual blocks")
    n_embed: int = Field(ge=1, le=MAX_CODES, description="number of codes")
    embed_dim: PositiveInt = Field(description="dimension of a code's vector")

    @property
    def downsample(self) -> int:
        """Pixels per code along one side."""
        return 2 ** (len(self.ch_mult) - 1)

    @model_validator(mode="after")
    def _is_buildable(self) -> TamingConfig:
        _check_groups(32, (self.ch, *(self.ch * m for m in self.ch_mult)), "GroupNorm's groups")
        if self.in_channels != self.out_ch:
            raise ValueError(f"in_channels {self.in_channels} and out_ch {self.out_ch} differ")
        if self.resolution % self.downsample:
            raise ValueError(
                f"resolution {self.resolution} is not a multiple of the downsampling "
                f"factor {self.downsample}"
            )
        return self


TokenizerConfig = Annotated[VQConfig | TamingConfig, Field(discriminator="kind")]

_ADAPTER: TypeAdapter[VQConfig | TamingConfig] = TypeAdapter(TokenizerConfig)
_KINDS = ("vq", "taming", "simvq", "ibq")


def parse_config(values: Any, source: str) -> VQConfig | TamingConfig:
    """Validate a mapping read from a file.

    Raises:
        ValueError: one line that names `source`, the key, the fault and the value.
    """
    try:
        return _ADAPTER.validate_python(values)
    except ValidationError as error:
        raise ValueError(f"{source}: {one_line(error)}") from None


def one_line(error: ValidationError) -> str:
    """Every fault of a pydantic error on one line, as `key: fault (got value)`."""
    return "; ".join(_fault(item) for item in error.errors(include_url=False))


def _fault(item: ErrorDetails) -> str:
    # pydantic puts a union's tag into the path, which is no key of the file
    path = [str(part) for part in item["loc"] if part not in _KINDS]
    context = item.get("ctx", {})
    match item["type"]:
        case "union_tag_invalid":
            path.append("kind")
            fault = f"Input should be one of {context['expected_tags']} (got {context['tag']!r})"
        case "union_tag_not_found":
            path.append("kind")
            fault = "missing"
        case "extra_forbidden":
            fault = "unknown key"
        case "missing":
            fault = "missing"
        case "value_error":
            fault = item["msg"].removeprefix("Value error, ")
        case _:
            fault = f"{item['msg']} (got {_short(item['input'])})"
    return ": ".join(filter(None, (".".join(path), fault)))


def _short(value: Any, limit: int = 60) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _check_groups(groups: int, channels: tuple[int, ...], name: str) -> None:
    for count in channels:
        if count % groups:
            raise ValueError(
                f"{name} {groups} does not divide {count}, one of the channel counts "
                f"{', '.join(map(str, dict.fromkeys(channels)))}"
            )
