"""What the page and scripts may ask for, declared once, and the endpoints that answer it."""

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

MAX_IMAGES = 16  # of a row
MAX_EDITS = 8  # of an edited image
MAX_UPLOAD = 8 * 2**20  # bytes of a file
BASE64 = MAX_UPLOAD * 4 // 3 + 200
SETTINGS = SamplingSettings.model_fields
MODEL = Field("", max_length=200, description="a name from /models; empty: the first one")


class Score(Config):
    """An image for a model."""

    model: str = MODEL
    image: str = Field(max_length=BASE64, description="the file as a data URI or base64")


class Generate(SamplingSettings):
    """Images of a class; settings left out are those of the model, not the defaults below."""

    model: str = MODEL
    class_name: Annotated[str, Field(max_length=200)] | int = Field(
        "", description="an index, a name or part of one; empty: random classes"
    )
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="image i is drawn with seed + i; empty: a new one"
    )
    num: int = Field(1, ge=1, le=MAX_IMAGES, description="images")
    bank: float = Field(1.0, ge=0, le=1, description="what the value bank is multiplied by")


class Edit(Generate, Score):
    """A part of an image, drawn anew as a class; pixels outside the part stay the image's."""

    num: int = Field(1, ge=1, le=MAX_EDITS, description="versions")
    hole: str = Field(
        "bottom", max_length=BASE64, pattern=f"^({'|'.join(HALVES)}|data:.*)$",
        description="the part: top, bottom, left, right (half), or a mask, white in the part, as a "
        "data URI; it is cropped as the image is",
    )  # fmt: skip
    passes: int = Field(
        0, ge=0, le=20, description="resampling passes: the part sees what comes after it"
    )


def generate(models: Models, request: Any) -> dict[str, Any]:
    """Draw images of a class, or a part of an image; settings left out are the model's own."""
    *_, (_, (images,)) = jobs.draw([jobs.make_row(models, request)], models, listener_check())
    return {"images": images}


def score(models: Models, request: Any) -> dict[str, Any]:
    """Score an image: its likeliest classes, and the nats of each code under the likeliest."""
    *_, (_, answer) = jobs.score(models, request, listener_check())
    return answer


def reconstruct(models: Models, request: Any) -> dict[str, Any]:
    """Send an image through a model's tokenizer and back."""
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
    """Return a request to an endpoint; null is left out. Raises ValueError on one line."""
    if isinstance(body, dict):
        body = {key: value for key, value in body.items() if value is not None}
    return validate(ENDPOINTS[name][0], body, f"/{name}")


def make_endpoint(models: Models, name: str) -> Callable[..., Any]:
    """Return the function of a named endpoint, with a parameter per field of its request."""
    kind, answer = ENDPOINTS[name]
    fields = dict(sorted(kind.model_fields.items(), key=lambda field: field[0] in SETTINGS))

    def call(*values: Any) -> Any:
        try:
            return answer(models, parse(name, dict(zip(fields, values, strict=True))))
        except ValueError as error:  # of others, gradio shows no details
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
    """Return a function that says whether the listener of the current event has gone."""
    queue: Any = LocalContext.blocks.get()._queue  # type: ignore[union-attr]
    event = queue.event_ids_to_events.get(LocalContext.event_id.get(None))
    return lambda: event is not None and not event.alive
