"""What the page and the API may ask for: types, ranges and help, declared once."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, create_model

from moveimg.config import SamplingSettings
from moveimg.config.model import Config
from moveimg.editing import HALVES
from moveimg.errors import validate
from moveimg.sampling import MAX_SEED

MAX_IMAGES = 16  # of a row
MAX_STRIP = 4  # images of each of several rows that are compared
MAX_EDITS = 8  # of an edited image
MAX_UPLOAD = 8 * 2**20  # bytes of a file
MAX_BODY = 12 * 2**20  # bytes of a request: an upload in base64, and some room


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
    """Score an image: its likeliest classes, and the nats of each code under the likeliest."""


class _Generate(Request):
    """Draw images of a class; settings left out are the model's own."""

    class_name: Annotated[str, Field(max_length=200)] | int | None = Field(
        None, description="an index, a name or part of one; empty: random classes"
    )
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="image i is drawn with seed + i; empty: a new one"
    )
    num: int = Field(1, ge=1, le=MAX_IMAGES, description="images")
    bank: bool = Field(True, description="false: every slot of the value memory is zero")


class _VaryGuidance(_Generate):
    """Draw the same seeds with several guidance scales."""

    num: int = Field(2, ge=1, le=MAX_STRIP, description="images per scale")
    scales: list[Annotated[float, Field(ge=0, le=1000)]] | None = Field(
        None, min_length=1, max_length=6, description="values of cfg_scale"
    )


class _Edit(_Generate):
    """Draw a part of an image anew, as a class; pixels outside the part stay the image's."""

    num: int = Field(1, ge=1, le=MAX_EDITS, description="versions")
    image: str = IMAGE
    hole: str = Field(
        "bottom", max_length=MAX_UPLOAD, pattern=f"^({'|'.join(HALVES)}|data:.*)$",
        description="the part: top, bottom, left, right (half), or a mask, white in the part, as a "
        "data URI; it is cropped as the image is",
    )  # fmt: skip
    passes: int = Field(
        0, ge=0, le=20, description="resampling passes: the part sees what comes after it"
    )


SETTINGS: dict[str, Any] = {
    name: (
        Annotated[field.annotation, Field(), *field.metadata] | None,
        Field(None, description=field.description),
    )
    for name, field in SamplingSettings.model_fields.items()
}
Generate, VaryGuidance, Edit = (
    create_model(kind.__name__[1:], __base__=kind, __doc__=kind.__doc__, **SETTINGS)
    for kind in (_Generate, _VaryGuidance, _Edit)
)

ENDPOINTS: dict[str, type[Config]] = {
    "generate": Generate, "vary_guidance": VaryGuidance, "edit": Edit, "score": Score,
    "reconstruct": Reconstruct, "classes": Search, "models": ListModels,
}  # fmt: skip


def parse_call(name: str, body: Any) -> Any:
    """Return the request in the JSON body of a call: keyword values, or a list as `data`.

    Raises ValueError: one line that names the parameter.
    """
    kind = ENDPOINTS[name]
    if isinstance(body, dict) and isinstance(body.get("data"), list | tuple):
        body = dict(zip(kind.model_fields, body["data"], strict=False))
    return validate(kind, body, f"/{name}")
