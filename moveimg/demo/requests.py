"""What the page and the API may ask for: types, ranges and help, declared once."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from pydantic import Field, create_model, field_validator, model_validator

from moveimg.config import SamplingSettings
from moveimg.config.model import Config
from moveimg.editing import HALVES
from moveimg.errors import validate
from moveimg.sampling import MAX_SEED

MAX_IMAGES = 16  # per press
MAX_STRIP = 4  # images of each of several rows that are compared
MAX_SCALES = 6
MAX_VERSIONS = 8  # of an edited image
MAX_PASSES = 20
MAX_UPLOAD = 8 * 2**20  # bytes of a file
MAX_BODY = 12 * 2**20  # bytes of a request: an upload in base64, and some room
FRESH_SEEDS = 1_000_000  # a seed that nobody chose is below this, short enough to read out


def fresh_seed() -> int:
    """Return a random seed."""
    return secrets.randbelow(FRESH_SEEDS)


class ListModels(Config):
    """List the models; the first one is the default."""


class Request(Config):
    """A request to one model."""

    model: str = Field("", max_length=200, description="a name from /models; empty: the first one")


class Search(Request):
    """Find the classes whose name contains a text, and the one with that index."""

    search: str = Field("", max_length=200, description="part of a name, or an index")


IMAGE: Any = Field(
    "", min_length=1, max_length=MAX_UPLOAD * 4 // 3 + 200, validate_default=True,
    description="the file as a data URI or base64",
)  # fmt: skip


class Reconstruct(Request):
    """Send an image through a model's tokenizer and back."""

    image: str = IMAGE


class Score(Reconstruct):
    """Score an image: its likeliest classes, and nats per code of all codes, given the first."""


class _Draw(Request):
    class_name: str | int = Field(
        "", description="an index, a name or part of one; empty: random classes"
    )
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="image i is drawn with seed + i; empty: a new one"
    )

    @field_validator("class_name")
    @classmethod
    def _is_short(cls, value: str | int) -> str | int:
        if len(text := str(value)[:201]) > 200:  # before anything searches for it
            raise ValueError(f"expected at most 200 characters (got {text[:40]!r}...)")
        return value

    @field_validator("seed", mode="before")
    @classmethod
    def _is_given(cls, value: Any) -> Any:
        return None if isinstance(value, str) and not value.strip() else value


class VaryGuidance(_Draw):
    """Draw the same seeds with several guidance scales."""

    num: int = Field(2, ge=1, le=MAX_STRIP, description="images per scale")
    scales: list[float] | None = Field(
        None, min_length=1, max_length=MAX_SCALES, description="values of cfg_scale"
    )


class _Generate(_Draw):
    """Draw images of a class; settings left out are the model's own."""

    num: int = Field(1, ge=1, le=MAX_IMAGES, description="images")
    bank: bool = Field(True, description="false: every slot of the value memory is zero")

    def overrides(self) -> dict[str, Any]:
        """Return the sampling settings that the request sets."""
        values = {name: getattr(self, name) for name in SamplingSettings.model_fields}
        return {name: value for name, value in values.items() if value is not None}

    @model_validator(mode="after")
    def _in_range(self) -> _Generate:
        validate(SamplingSettings, self.overrides(), "sampling settings")
        return self


class _Edit(_Generate):
    """Draw a part of an image anew, as a class; pixels outside the part stay its own."""

    num: int = Field(1, ge=1, le=MAX_VERSIONS, description="versions")
    image: str = IMAGE
    hole: str = Field(
        "bottom", max_length=MAX_UPLOAD,
        description="the part: top, bottom, left, right (half), or a mask, white in the part, as a "
        "data URI; it is cropped as the image is",
    )  # fmt: skip
    passes: int = Field(
        0, ge=0, le=MAX_PASSES, description="resampling passes: the part sees what comes after it"
    )

    @model_validator(mode="after")
    def _can_be_drawn(self) -> _Edit:
        if not str(self.class_name).strip():
            raise ValueError("class_name: expected a name or an index")
        if self.hole not in HALVES and not self.hole.startswith("data:"):
            expected = f"expected {', '.join(HALVES)}, or a mask as a data URI"
            raise ValueError(f"hole {self.hole[:40]!r}: {expected}")
        return self


SETTINGS: dict[str, Any] = {
    name: (field.annotation | None, Field(None, description=field.description))  # type: ignore[operator]
    for name, field in SamplingSettings.model_fields.items()
}
Generate: Any = create_model("Generate", __base__=_Generate, __doc__=_Generate.__doc__, **SETTINGS)
Edit: Any = create_model("Edit", __base__=_Edit, __doc__=_Edit.__doc__, **SETTINGS)

ENDPOINTS: dict[str, type[Config]] = {
    "generate": Generate, "vary_guidance": VaryGuidance, "edit": Edit, "score": Score,
    "reconstruct": Reconstruct, "classes": Search, "models": ListModels,
}  # fmt: skip


def parse_call(name: str, body: Any) -> Config:
    """Return the request in the JSON body of a call: keyword values, or a list as `data`.

    Raises ValueError: one line that names the parameter.
    """
    kind = ENDPOINTS[name]
    if isinstance(body, dict) and isinstance(body.get("data"), Sequence):
        if len(body["data"]) > len(kind.model_fields):
            raise ValueError(f"/{name}: expected at most {len(kind.model_fields)} values")
        body = dict(zip(kind.model_fields, body["data"], strict=False))
    return validate(kind, body, f"/{name}")


def endpoint_table() -> str:
    """Describe all endpoints in Markdown."""
    lines = []
    for name, kind in ENDPOINTS.items():
        lines.append(f"\n**`/{name}`**: {(kind.__doc__ or '').splitlines()[0]}\n")
        lines += [f"- `{key}`: {field.description}" for key, field in kind.model_fields.items()]
    return "\n".join(lines)
