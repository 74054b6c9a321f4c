"""Models in memory, and jobs that yield their progress: drawing and scoring images."""

from __future__ import annotations

import base64
import copy
import io
import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from moveimg.checkpoint import read_class_names, read_model_config, read_sampling
from moveimg.config import ModelConfig, SamplingSettings
from moveimg.demo.requests import MAX_STRIP, MAX_UPLOAD, SETTINGS
from moveimg.device import release_memory
from moveimg.editing import HALVES
from moveimg.errors import describe, validate
from moveimg.images import png_bytes, to_rgb
from moveimg.model.analysis import scale_bank
from moveimg.pipeline import Pipeline, find_label, resolve
from moveimg.sampling import UNKNOWN, Likelihood, code_log_probs

LOG = logging.getLogger("moveimg.demo")
MAX_PIXELS = 40_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
SCORED = 8  # classes scored at once


@dataclass(frozen=True)
class ModelInfo:
    """A model's config, class names and settings without weights; `name` is never a path."""

    name: str
    directory: Path
    config: ModelConfig
    class_names: list[str]
    sampling: SamplingSettings

    @property
    def has_bank(self) -> bool:
        return self.config.memory.kind != "none"


class Models:
    """The models of one demo, at most `keep` of them in memory, least recently used first out.

    names_or_paths, device and dtype are as for Pipeline.from_pretrained. Raises ValueError or
    FileNotFoundError for a model that is missing or damaged.
    """

    def __init__(
        self,
        names_or_paths: list[str],
        keep: int = 1,
        device: str | None = None,
        dtype: str | None = None,
    ) -> None:
        self.keep, self.device, self.dtype = keep, device, dtype
        self.infos: dict[str, ModelInfo] = {}
        for item in names_or_paths:
            path = resolve(item)
            name = base = Path(item).name or path.resolve().name
            while name in self.infos:
                name = f"{base} ({len(self.infos)})"
            config, names = read_model_config(path), read_class_names(path)
            if len(names) != config.n_classes:
                raise ValueError(f"{path / 'classes.json'}: expected {config.n_classes} names")
            self.infos[name] = ModelInfo(name, path, config, names, read_sampling(path))
        self.pipelines: OrderedDict[str, Pipeline] = OrderedDict()
        self._lock = threading.Lock()

    def describe(self, name: str = "") -> ModelInfo:
        """Return a model by name, or the first one. Raises ValueError for an unknown name."""
        name = name or next(iter(self.infos))
        if name not in self.infos:
            raise ValueError(f"model {name[:60]!r}: expected one of {', '.join(self.infos)}")
        return self.infos[name]

    def get(self, name: str = "", bank: bool = True) -> Pipeline:
        """Load a model if it is not in memory; `bank=False` zeroes the slots of its memory."""
        info = self.describe(name)
        if not bank and not info.has_bank:
            raise ValueError(f"{info.name} has no value memory that could be turned off")
        with self._lock:
            if info.name not in self.pipelines:
                while len(self.pipelines) >= self.keep:  # first, since both may not fit
                    self.pipelines.popitem(last=False)
                self.pipelines[info.name] = self._load(info)
            self.pipelines.move_to_end(info.name)
            pipeline = self.pipelines[info.name]
        if not bank:
            pipeline = copy.copy(pipeline)
            pipeline.generator = scale_bank(pipeline.generator, 0.0)
        return pipeline

    def _load(self, info: ModelInfo) -> Pipeline:
        try:
            return Pipeline.from_pretrained(info.directory, device=self.device, dtype=self.dtype)
        except (OSError, ValueError) as error:  # names the server's files: for its log alone
            LOG.error("%s: %s", info.name, describe(error))
            raise ValueError(f"model {info.name!r} cannot be loaded: see the log") from None


@dataclass(frozen=True)
class Row:
    """Images that differ in class and seed alone; image i has seed + i.

    Attributes:
        bank: False to draw with every slot of the value memory at zero.
        title: what the page writes beside the row.
        image, hole, passes: of an edit (see requests.Edit).
    """

    model: str
    labels: tuple[int, ...]
    seed: int
    settings: SamplingSettings
    bank: bool = True
    title: str = ""
    image: str = ""
    hole: str = ""
    passes: int = 0

    def first(self, **changes: Any) -> Row:
        """Return the first images of the row with other settings."""
        return replace(self, labels=self.labels[:MAX_STRIP], **changes)


def make_row(models: Models, request: Any) -> Row:
    """Return the row of images that a request describes. Raises ValueError out of bounds."""
    info = models.describe(request.model)
    if request.class_name not in (None, ""):
        labels = (find_label(info.class_names, request.class_name),) * request.num
    else:
        labels = tuple(secrets.randbelow(info.config.n_classes) for _ in range(request.num))
    seed = secrets.randbelow(10**6) if request.seed is None else request.seed
    own = {name: value for name in SETTINGS if (value := getattr(request, name)) is not None}
    values = info.sampling.model_dump() | own
    settings = validate(SamplingSettings, values, "sampling settings")
    edit = request.model_dump(include={"image", "hole", "passes"})
    return Row(info.name, labels, seed, settings, request.bank, **edit)


def vary_guidance(row: Row, scales: Sequence[float] | None = None) -> list[Row]:
    """Return the first images of a row with several guidance scales and the same seeds.

    The scales left out are 1 (no guidance) and about half, once and twice the row's own.
    """
    own = row.settings.cfg_scale if row.settings.cfg_scale > 1.2 else 2.0
    scales = scales or [1.0, round(1 + (own - 1) / 2, 2), own, round(1 + 2 * (own - 1), 2)]
    settings = [row.settings.model_copy(update={"cfg_scale": scale}) for scale in scales]
    return [row.first(settings=s, title=f"guidance {s.cfg_scale:g}") for s in settings]


def turn_bank_off(row: Row) -> list[Row]:
    """Return the first images of a row with its bank and with every slot at zero."""
    return [row.first(bank=True, title="with the bank"), row.first(bank=False, title="bank off")]


def draw(
    rows: Sequence[Row], models: Models, is_gone: Callable[[], bool]
) -> Iterator[tuple[float, list[list[Image.Image]]]]:
    """Draw rows one after another; yields the share done, up to 1, and the images of each row.

    Images are decoded when a line of the grid is full and twice the time of the last decoding has
    passed: decoding is at most a third of the time. Raises ValueError once `is_gone` returns true.
    """
    images: list[list[Image.Image]] = [[] for _ in rows]
    for number, row in enumerate(rows):
        pipeline = models.get(row.model, row.bank)
        length, width = pipeline.generator.config.seq_len, pipeline.generator.config.grid[1]
        image, hole, known, steps = None, None, None, length
        if row.image:
            image = pipeline.crop(read_upload(row.image))
            hole = pipeline.hole(row.hole if row.hole in HALVES else read_upload(row.hole))
            if not hole.any():
                raise ValueError("nothing is masked: paint over what is to be drawn anew")
            known = pipeline.encode([image])[0].masked_fill(hole, UNKNOWN)
            steps += row.passes * int(hole.sum())
        shown, cost = time.perf_counter(), 0.0
        for done, codes in pipeline.iter_codes(
            row.labels, row.settings, seed=row.seed, known=known, passes=row.passes
        ):
            if is_gone():
                raise ValueError("stopped")
            now = time.perf_counter()
            line_is_full = done % width == 0 or done > length
            if done == steps or (line_is_full and now - shown >= 2 * cost):
                images[number] = pipeline.decode_partial(codes, done, hole, image)
                shown = time.perf_counter()
                cost = shown - now
                yield (number + done / steps) / len(rows), images
    release_memory()


def score(
    data: str, name: str, models: Models, is_gone: Callable[[], bool]
) -> Iterator[tuple[float, dict[str, Any]]]:
    """Score an uploaded image; yields the share done, and finally the answer of /score.

    Raises ValueError once `is_gone` returns true.
    """
    pipeline = models.get(name)
    image = pipeline.crop(read_upload(data))
    codes = pipeline.encode([image])
    log_probs: list[torch.Tensor] = []
    labels = torch.arange(len(pipeline.class_names), device=pipeline.device)
    for batch in labels.split(SCORED):
        yield len(log_probs) * SCORED / len(labels), {}
        if is_gone():
            raise ValueError("stopped")
        scored = code_log_probs(pipeline.decoder, codes.expand(len(batch), -1), batch)
        log_probs.append(scored.cpu())
    likelihood = Likelihood(torch.cat(log_probs), image.width * image.height)
    shares, nats = likelihood.total.softmax(0).tolist(), likelihood.nats_per_code
    best = nats.argsort()[:10].tolist()  # equal priors
    by_code = -likelihood.log_probs[best[0]].view(pipeline.generator.config.grid)
    classes = [
        {
            "index": i, "name": pipeline.class_names[i], "probability": shares[i],
            "nats_per_code": nats[i].item(),
        }
        for i in best
    ]  # fmt: skip
    bits = likelihood.bits_per_pixel[best[0]].item()
    release_memory()
    yield 1.0, {"classes": classes, "bits_per_pixel": bits, "nats": by_code.tolist()}


def read_upload(data: str) -> Image.Image:
    """Return the RGB image in a data URI or in bare base64, as a browser shows it.

    Raises ValueError, with a message for visitors, for data that is no image or too large.
    """
    encoded = data.split(",", 1)[-1] if data.startswith("data:") else data
    if len(encoded) > MAX_UPLOAD * 4 / 3 + 8:
        raise ValueError(f"the file is larger than {MAX_UPLOAD // 2**20} MB")
    try:
        raw = base64.b64decode("".join(encoded.split()), validate=True)
        image = Image.open(io.BytesIO(raw), formats=FORMATS)
        if image.width * image.height <= MAX_PIXELS:
            return to_rgb(image)
    except Exception:  # Pillow's decoders raise many kinds of errors for broken files
        expected = ", ".join(FORMATS)
        raise ValueError(f"this is not an image that can be read (expected {expected})") from None
    raise ValueError(f"{image.width} x {image.height} pixels: expected at most {MAX_PIXELS:,}")


def metadata(row: Row, index: int, models: Models) -> dict[str, Any]:
    """Return the settings that draw image `index` of a row again, with `moveimg sample`'s keys."""
    label = row.labels[index]
    name = models.describe(row.model).class_names[label]
    values = {"model": row.model, "class": label, "class_name": name, "seed": row.seed + index}
    values |= row.settings.model_dump()
    if row.image:
        values |= {"hole": row.hole if row.hole in HALVES else "mask", "passes": row.passes}
    return values if row.bank else values | {"bank": False}


def image_uri(image: Image.Image, meta: dict[str, Any]) -> str:
    """Return a PNG with its metadata as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(png_bytes(image, meta)).decode()}"
