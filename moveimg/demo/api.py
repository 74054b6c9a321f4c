"""The demo's requests, which the page and the HTTP API share, and the endpoints that answer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import gradio as gr
from gradio.context import LocalContext
from pydantic import Field

from moveimg.config import SamplingSettings
from moveimg.config.model import Config
from moveimg.demo import jobs
from moveimg.demo.jobs import Models
from moveimg.editing import HALVES
from moveimg.errors import describe, validate
from moveimg.images import to_tensor
from moveimg.sampling import MAX_SEED

MAX_IMAGES = 16  # per request
MAX_EDITS = 8  # versions of an edited image
MAX_UPLOAD = 8 * 2**20  # bytes of an image file
MAX_URI = MAX_UPLOAD * 4 // 3 + 200  # characters of such a file as a data URI
SETTINGS = SamplingSettings.model_fields
MODEL = Field("", max_length=200, description="a name from /models; empty: the first model")


class Score(Config):
    """A request for an image to be scored or reconstructed by a model."""

    model: str = MODEL
    image: str = Field(max_length=MAX_URI, description="an image file as a data URI or base64")


class Generate(SamplingSettings):
    """A request for images of a class; settings left out are the model's, not SamplingSettings'."""

    model: str = MODEL
    class_name: Annotated[str, Field(max_length=200)] | int = Field(
        "", description="an index, a name or a part of a name; empty: random classes"
    )
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="image i is drawn with seed + i; empty: a random seed"
    )
    num: int = Field(1, ge=1, le=MAX_IMAGES, description="number of images")
    bank: float = Field(1.0, ge=0, le=1, description="factor on the rows of the value bank")


class Edit(Generate, Score):
    """A request to redraw a part of an image as a class; pixels outside the part are kept."""

    num: int = Field(1, ge=1, le=MAX_EDITS, description="number of versions")
    hole: str = Field(
        "bottom", max_length=MAX_URI, pattern=f"^({'|'.join(HALVES)}|data:.*)$",
        description="the part: top, bottom, left or right (half), or a mask, white where the image "
        "is redrawn, as a data URI; a mask is cropped like the image",
    )  # fmt: skip
    passes: int = Field(
        0, ge=0, le=20, description="resampling passes, which fit the part to later codes"
    )


def generate(models: Models, request: Any) -> dict[str, Any]:
    """Draw images of a class, or redraw a part of an image; default settings are the model's."""
    *_, (_, (images,)) = jobs.draw([jobs.make_row(models, request)], models, listener_check())
    return {"images": images}


def score(models: Models, request: Any) -> dict[str, Any]:
    """Score an image: its likeliest classes, and the nats of each code under the likeliest."""
    *_, (_, answer) = jobs.score(models, request, listener_check())
    return answer


def reconstruct(models: Models, request: Any) -> dict[str, Any]:
    """Encode and decode an image: its codes, the decoded image and the mean squared error."""
    pipeline = models.get(request.model)
    image = pipeline.crop(jobs.read_upload(request.image))
    codes = pipeline.encode([image])
    (decoded,) = pipeline.decode(codes)
    mse = (to_tensor([decoded]) - to_tensor([image])).square().mean().item()
    grid = codes.view(pipeline.generator.config.grid).tolist()
    return {"mse": mse, "codes": grid, "png": jobs.image_uri(decoded, {})}


def list_models(models: Models, _: Any) -> list[dict[str, Any]]:
    """List the models with their classes and settings; the first one is the default."""
    return [
        {"name": info.name, "classes": info.class_names, "settings": info.sampling.model_dump()}
        for info in models.infos.values()
    ]


ENDPOINTS: dict[str, tuple[type[Config], Callable[[Models, Any], Any]]] = {
    "generate": (Generate, generate), "edit": (Edit, generate), "score": (Score, score),
    "reconstruct": (Score, reconstruct), "models": (Config, list_models),
}  # fmt: skip


def parse(name: str, body: Any) -> Any:
    """Validate the body of a request to endpoint `name`; null values are left out."""
    if isinstance(body, dict):
        body = {key: value for key, value in body.items() if value is not None}
    return validate(ENDPOINTS[name][0], body, f"/{name}")


def make_endpoint(models: Models, name: str) -> Callable[..., Any]:
    """Return the function of endpoint `name`, with a parameter per field of the request."""
    kind, answer = ENDPOINTS[name]
    fields = dict(sorted(kind.model_fields.items(), key=lambda field: field[0] in SETTINGS))

    def call(*values: Any) -> Any:
        try:
            return answer(models, parse(name, dict(zip(fields, values, strict=True))))
        except ValueError as error:  # gradio hides the message of other errors
            raise gr.Error(describe(error), print_exception=False) from None

    position = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(key, position, default=None) for key in fields]
    signature = inspect.Signature(parameters, return_annotation=dict)
    call.__signature__ = signature  # type: ignore[attr-defined]
    call.__annotations__ = {key: field.annotation for key, field in fields.items()}
    help = [f"    {key}: {field.description}" for key, field in fields.items()]
    call.__doc__ = "\n".join([f"{answer.__doc__}\n", "Parameters:", *help])
    return call


def listener_check() -> Callable[[], bool]:
    """Return a function that returns whether the client of the current event has gone."""
    queue: Any = LocalContext.blocks.get()._queue  # type: ignore[union-attr]
    event = queue.event_ids_to_events.get(LocalContext.event_id.get(None))
    return lambda: event is not None and not event.alive
