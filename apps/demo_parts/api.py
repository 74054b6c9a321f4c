"""The named endpoints: the page's jobs with plain values in and out, for scripts."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from typing import Any

import gradio as gr
import numpy as np

from apps.demo_parts import drawing, looking
from apps.demo_parts.drawing import Frame, Row
from apps.demo_parts.gallery import metadata, picture_uri
from apps.demo_parts.handlers import Handlers, words
from apps.demo_parts.turns import Waiting

MAX_FOUND = 1000  # classes in one answer


class Api:
    """The endpoints of one demo; each method is one, and raises gr.Error with a message."""

    def __init__(self, handlers: Handlers) -> None:
        self.handlers, self.models = handlers, handlers.models

    async def generate(
        self,
        request: gr.Request,
        class_name: str = "",
        num: int = 1,
        seed: int | None = None,
        model: str = "",
        cfg_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        cfg_schedule: str | None = None,
        bank: bool = True,
    ) -> dict:
        """Pictures of a class; settings left out are the model's own."""

        def plan() -> list[Row]:
            about = self.models.describe(model)
            given = {
                "cfg_scale": cfg_scale, "temperature": temperature, "top_k": top_k,
                "top_p": top_p, "cfg_schedule": cfg_schedule, "bank": bank,
            }  # fmt: skip
            if not bank and not about.has_bank:
                raise ValueError(f"{about.name} has no value memory that could be turned off")
            return [drawing.row_of(about, _class(class_name), num, seed, **given)]

        return (await self._rows(request, plan))[0]

    async def vary_guidance(
        self, request: gr.Request, class_name: str = "", scales: list[float] | None = None,
        num: int = 2, seed: int | None = None, model: str = "",
    ) -> dict:  # fmt: skip
        """The same seeds at several values of guidance."""

        def plan() -> list[Row]:
            drawing.check_count(num, drawing.MAX_STRIP)
            row = drawing.row_of(self.models.describe(model), _class(class_name), num, seed)
            return drawing.vary_guidance(row, scales)

        return {"rows": await self._rows(request, plan)}

    async def compare(
        self, request: gr.Request, class_name: str = "", models: list[str] | None = None,
        num: int = 2, seed: int | None = None,
    ) -> dict:  # fmt: skip
        """The same classes and seeds by two models."""

        def plan() -> list[Row]:
            names = models or self.models.names[:2]
            if len(names) != 2:
                raise ValueError(f"models {names}: expected two of {', '.join(self.models.names)}")
            drawing.check_count(num, drawing.MAX_STRIP)
            row = drawing.row_of(self.models.describe(names[0]), _class(class_name), num, seed)
            return drawing.beside(row, self.models.describe(names[1]), self.models)

        return {"rows": await self._rows(request, plan)}

    async def memory(
        self, request: gr.Request, class_name: str = "", seed: int | None = None, model: str = ""
    ) -> dict:
        """A picture, and where each layer leans on the bank in it."""

        def job(stop: threading.Event) -> Iterator[Any]:
            about = self.models.describe(model)
            row = drawing.row_of(about, _class(class_name), 1, seed)
            frame: Frame | None = None
            for item in drawing.draw([row], self.models, stop):
                frame = item
                yield None
            if frame is not None and frame.ended == "done":
                drawn = frame.rows[0]
                for _, layers in looking.bank_of(drawn, self.models):
                    yield self._answer(drawn, frame.pictures[0]), layers

        picture, layers = await self._last(request, job)
        return {
            "image": picture["images"][0],
            "layers": [
                {
                    "layer": m.layer, "share": _grid(m.share), "gates": _grid(m.gates),
                    "g_0": m.g_0, "slots": m.slots,
                }
                for m in layers
            ],
        }  # fmt: skip

    async def reconstruct(self, request: gr.Request, image: str, model: str = "") -> dict:
        """An image through a model's tokenizer and back."""

        def job(stop: threading.Event) -> Iterator[Any]:
            return looking.reconstruct(looking.read_upload(image), model, self.models)

        result = await self._last(request, job)
        return {
            "mse": result.mse,
            "psnr": None if np.isinf(result.psnr) else result.psnr,
            "codes": result.codes.tolist(),
            "image": picture_uri(result.after, {}),
        }

    def classes(self, search: str = "", model: str = "") -> list[dict]:
        """The classes whose name contains `search`, and the one with that index."""
        from moveimg.pipeline import search_names

        try:
            names = self.models.describe(model).class_names
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None
        found = search_names(names, search.strip())
        if search.strip().isdecimal() and len(search) < 9 and int(search) < len(names):
            found = sorted({*found, int(search)})
        return [{"index": i, "name": names[i]} for i in found[:MAX_FOUND]]

    def list_models(self) -> list[dict]:
        """The models on offer; the first is the default."""
        return [
            {
                "name": about.name, "classes": len(about.class_names), "grid": list(about.grid),
                "settings": about.settings, "bank": about.has_bank,
            }
            for about in self.models.about.values()
        ]  # fmt: skip

    async def _rows(self, request: gr.Request, plan: Callable[[], list[Row]]) -> list[dict]:
        def job(stop: threading.Event) -> Iterator[Frame | None]:
            return drawing.draw(plan(), self.models, stop)

        frame = await self._last(request, job)
        return [
            self._answer(row, pictures)
            for row, pictures in zip(frame.rows, frame.pictures, strict=True)
        ]

    async def _last(
        self, request: gr.Request, job: Callable[[threading.Event], Iterator[Any]]
    ) -> Any:
        """What a job yields last. gr.Error where it fails or is stopped."""
        result = None
        try:
            stream: AsyncGenerator[Any] = self.handlers.run(request, job)
            async with aclosing(stream) as items:
                async for item in items:
                    if not isinstance(item, Waiting):
                        result = item
        except Exception as error:
            raise gr.Error(words(error), print_exception=False) from None
        if result is None or getattr(result, "ended", "done") != "done":
            raise gr.Error("stopped", print_exception=False)
        return result

    def _answer(self, row: Row, pictures: list) -> dict:
        names = self.models.describe(row.model).class_names
        images = []
        for i, picture in enumerate(pictures):
            meta = metadata(row, i, names)
            about = {key: meta[key] for key in ("class", "class_name", "seed")}
            images.append(about | {"png": picture_uri(picture, meta)})
        answer = {"model": row.model, "settings": row.settings.model_dump(), "images": images}
        return answer | {"bank": row.bank}


def _class(given: Any) -> str | int | None:
    """None, for random classes, where nothing is given."""
    return None if given is None or not str(given).strip() else given


def _grid(values: np.ndarray) -> list[list[float | None]]:
    return [[None if np.isnan(v) else round(float(v), 4) for v in line] for line in values]
