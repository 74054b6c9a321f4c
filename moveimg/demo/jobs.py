"""Models in memory, and jobs that yield their progress: drawing and scoring images."""

from __future__ import annotations

import base64
import copy
import io
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from moveimg.checkpoint import read_class_names, read_model_config, read_sampling
from moveimg.config import ModelConfig, SamplingSettings
from moveimg.device import release_memory
from moveimg.editing import HALVES
from moveimg.errors import describe
from moveimg.images import encode_png, read_image
from moveimg.model.analysis import scale_bank
from moveimg.pipeline import Pipeline, find_label, resolve
from moveimg.sampling import UNKNOWN, Likelihood, code_log_probs

STRIP = 4  # images per row where rows are compared


@dataclass(frozen=True)
class ModelInfo:
    """A model's files without the weights; `name` is never a path."""

    name: str
    directory: Path
    config: ModelConfig
    class_names: list[str]
    sampling: SamplingSettings

    @property
    def has_bank(self) -> bool:
        return self.config.memory.kind != "none"


class Models:
    """The models of a demo, by name; only the last model used is in memory."""

    def __init__(self, names_or_paths: list[str], **options: Any) -> None:
        self.options, self.infos = options, dict[str, ModelInfo]()
        self.loaded: dict[str, Pipeline] = {}
        self._lock = threading.Lock()
        for item in names_or_paths:
            path = resolve(item)
            base = Path(item).name or path.resolve().name
            names = [base, *(f"{base} ({i})" for i in range(2, len(names_or_paths) + 1))]
            name = next(name for name in names if name not in self.infos)
            files = read_model_config(path), read_class_names(path), read_sampling(path)
            self.infos[name] = ModelInfo(name, path, *files)

    def describe(self, name: str = "") -> ModelInfo:
        """Return the named model's info (default: the first). ValueError for an unknown name."""
        name = name or next(iter(self.infos))
        if name not in self.infos:
            raise ValueError(f"model {name[:60]!r}: expected one of {', '.join(self.infos)}")
        return self.infos[name]

    def get(self, name: str = "", bank: float = 1.0) -> Pipeline:
        """Return a model, loaded if necessary, with the rows of its bank multiplied by `bank`."""
        info = self.describe(name)
        with self._lock:
            if info.name not in self.loaded:
                self.loaded.clear()  # before loading: two models may not fit
                try:
                    self.loaded[info.name] = Pipeline.from_pretrained(
                        info.directory, **self.options
                    )
                except (OSError, ValueError) as error:  # it names files: for the log alone
                    logging.error("%s: %s", info.name, describe(error))
                    raise ValueError(f"model {info.name!r} cannot be loaded: see the log") from None
            pipeline = self.loaded[info.name]
        if bank != 1:
            pipeline = copy.copy(pipeline)
            pipeline.generator = scale_bank(pipeline.generator, bank)
        return pipeline


@dataclass(frozen=True)
class Row:
    """Images to draw that differ in class and seed alone; image i has seed + i."""

    model: str
    labels: tuple[int, ...]
    seed: int
    settings: SamplingSettings
    bank: float  # factor on the rows of the value bank, 0..1
    edit: Any = None  # the api.Edit request, if an image is edited
    title: str = ""  # the row's heading on the page


def make_row(models: Models, request: Any) -> Row:
    """Return the row of images for an api.Generate or api.Edit. Raises ValueError."""
    info = models.describe(request.model)
    if request.class_name == "":
        labels = tuple(secrets.randbelow(info.config.n_classes) for _ in range(request.num))
    else:
        labels = (find_label(info.class_names, request.class_name),) * request.num
    seed = secrets.randbelow(10**6) if request.seed is None else request.seed
    changes = request.model_fields_set & SamplingSettings.model_fields.keys()
    settings = info.sampling.model_copy(update=request.model_dump(include=changes))
    edit = request if hasattr(request, "hole") else None
    return Row(info.name, labels, seed, settings, request.bank, edit)


def vary_guidance(row: Row) -> list[Row]:
    """Return rows of the first images: no guidance, and about half, equal and double guidance."""
    own = row.settings.cfg_scale if row.settings.cfg_scale > 1.2 else 2.0
    scales = (1.0, round((own + 1) / 2, 2), own, round(2 * own - 1, 2))
    settings = [row.settings.model_copy(update={"cfg_scale": scale}) for scale in scales]
    few = replace(row, labels=row.labels[:STRIP])
    return [replace(few, settings=s, title=f"guidance {s.cfg_scale:g}") for s in settings]


def vary_bank(row: Row, percent: float) -> list[Row]:
    """Return rows of the first images with the whole bank and with a percentage of the bank."""
    few = replace(row, labels=row.labels[:STRIP])
    shares = (1.0, min(max(percent / 100, 0.0), 1.0))
    return [replace(few, bank=share, title=f"bank at {share:.0%}") for share in shares]


def draw(
    rows: Sequence[Row], models: Models, is_gone: Callable[[], bool]
) -> Iterator[tuple[float, list[list[dict[str, Any]]]]]:
    """Draw rows; yields the share done and the images so far. ValueError once `is_gone()`.

    An image is a dictionary: the settings to draw it again, and `png`, a data URI.
    """
    images: list[list[dict[str, Any]]] = []
    for row in rows:
        pipeline, edit = models.get(row.model, row.bank), row.edit
        length, width = pipeline.generator.config.seq_len, pipeline.generator.config.grid[1]
        about = {"model": row.model, "bank": row.bank, **row.settings.model_dump()}
        original, hole, known, passes, steps = None, None, None, 0, length
        if edit:
            original, passes = pipeline.crop(read_upload(edit.image)), edit.passes
            half = edit.hole if edit.hole in HALVES else None
            hole = pipeline.code_mask(half or read_upload(edit.hole))
            if not hole.any():
                raise ValueError("no code is masked: expected a painted part to redraw")
            known = pipeline.encode([original])[0].masked_fill(hole, UNKNOWN)
            steps += passes * int(hole.sum())
            about |= {"hole": half or "mask", "passes": passes}
        metas = [
            {"class": label, "class_name": pipeline.class_names[label], "seed": seed, **about}
            for seed, label in enumerate(row.labels, row.seed)
        ]
        images.append([])
        due = 0.0  # when to decode again: decoding takes at most a third of the time
        for done, codes in pipeline.iter_codes(
            row.labels, row.settings, seed=row.seed, known=known, passes=passes
        ):
            if is_gone():
                raise ValueError("stopped")
            now, line_is_full = time.perf_counter(), done % width == 0 or done > length
            if done == steps or (line_is_full and now >= due):
                decoded = pipeline.decode_partial(codes, done, hole, original)
                pairs = zip(metas, decoded, strict=True)
                images[-1] = [meta | {"png": image_uri(image, meta)} for meta, image in pairs]
                due = 3 * time.perf_counter() - 2 * now
                yield (len(images) - 1 + done / steps) / len(rows), images
    release_memory()


def score(
    models: Models, request: Any, is_gone: Callable[[], bool]
) -> Iterator[tuple[float, dict[str, Any]]]:
    """Score an image; yields the share done, and last the answer of /score (errors as in draw)."""
    pipeline = models.get(request.model)
    image = pipeline.crop(read_upload(request.image))
    codes, names = pipeline.encode([image]), pipeline.class_names
    log_probs: list[torch.Tensor] = []
    for batch in torch.arange(len(names), device=pipeline.device).split(8):
        yield len(log_probs) * 8 / len(names), {}
        if is_gone():
            raise ValueError("stopped")
        repeated = codes.expand(len(batch), -1)
        log_probs.append(code_log_probs(pipeline.prepared_generator, repeated, batch))
    likelihood = Likelihood(torch.cat(log_probs).cpu(), image.width * image.height)
    shares, nats = likelihood.total.softmax(0).tolist(), likelihood.nats_per_code
    best = nats.argsort()[:10].tolist()  # all classes have equal priors
    keys = ("index", "name", "probability", "nats_per_code")
    classes = [dict(zip(keys, (i, names[i], shares[i], nats[i].item()), strict=True)) for i in best]
    bits = likelihood.bits_per_pixel[best[0]].item()
    by_code = -likelihood.log_probs[best[0]].view(pipeline.generator.config.grid)
    release_memory()
    yield 1.0, {"classes": classes, "bits_per_pixel": bits, "nats": by_code.tolist()}


def read_upload(data: str) -> Image.Image:
    """Return the RGB image in a data URI or in base64. Raises ValueError for other text."""
    if not data:
        raise ValueError("no image: expected a file or a drawn image")
    return read_image(io.BytesIO(base64.b64decode(data.split(",", 1)[-1])), "upload")


def image_uri(image: Image.Image, about: dict[str, Any]) -> str:
    """Return a data URI of a PNG that holds the image and `about`."""
    return f"data:image/png;base64,{base64.b64encode(encode_png(image, about)).decode()}"
