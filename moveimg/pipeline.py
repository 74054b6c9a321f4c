"""Pipeline: images from class names, with the model's tokenizer and sampling settings."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d, pad

from moveimg import DEFAULT_MODEL, sampling
from moveimg.bank_editing import blend_banks, erase_rows
from moveimg.checkpoint import ModelParts, load_model, save_model
from moveimg.class_names import find_label, search_names
from moveimg.config import SamplingSettings
from moveimg.device import pick_device, pick_dtype
from moveimg.editing import Area, area_pixels, composite, resample
from moveimg.errors import shorten, validate
from moveimg.files import atomic_directory
from moveimg.images import ImageList, center_crop, to_pil, to_rgb, to_tensor
from moveimg.model import Transformer, prepare_for_sampling
from moveimg.pretrained.hub import resolve
from moveimg.sampling import UNKNOWN, Likelihood, image_rngs

__all__ = ["DEFAULT_MODEL", "Pipeline", "find_label", "resolve", "search_names"]

MAX_IMAGES = 2**20  # per call
Classes = Iterable[str | int] | str | int
Images = Iterable[Image.Image] | Image.Image | Tensor  # PIL images, or codes int64 [B, T]


class Pipeline:
    """A generator with its tokenizer, class names and sampling settings.

    >>> pipeline = Pipeline.from_pretrained("fashion")
    >>> images = pipeline.sample(["sneaker", 3], seed=0)

    Attributes: generator, tokenizer, class_names, sampling (default settings), about, device, name.
    """

    def __init__(
        self,
        parts: ModelParts,
        device: torch.device,
        quantize: str | None = None,
        compile: bool = False,
        name: str = "",
    ) -> None:
        self.generator, self.tokenizer = parts.generator, parts.tokenizer
        self.class_names, self.sampling, self.about = parts.class_names, parts.sampling, parts.about
        self.device, self.quantize, self.compile, self.name = device, quantize, compile, name
        self._prepared: tuple[tuple, Transformer] | None = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = DEFAULT_MODEL,
        *,
        device: str | None = None,
        dtype: str | None = None,
        quantize: str | None = None,
        compile: bool = False,
        bank: str | None = None,
    ) -> Pipeline:
        """Load a bundled or published model, a model directory or a model on the Hub.

        Args:
            name_or_path: a bundled name, a model directory, a name of LlamaGen's public weights
                (`llamagen-b-256`; downloaded and converted once), or a Hub id `owner/name`.
            device: cpu, cuda, mps, ...; left out, an accelerator if there is one.
            dtype: the generator's: float32, bfloat16 or float64; left out, by device.
            quantize: int8 samples with 8-bit weights (CPU; faster, less exact).
            compile: compile the decoding step (slow to start, then faster).
            bank: int8 or int4 rounds the rows of the value bank, disk reads them from the model's
                file when they are used, cpu keeps them in the memory of the CPU (for CUDA).

        Raises FileNotFoundError for a missing model, ValueError for a damaged model or an option
        that cannot be used.
        """
        where = pick_device(device)
        parts = load_model(resolve(name_or_path), where, pick_dtype(dtype, where), bank)
        pipeline = cls(parts, where, quantize, compile, str(name_or_path))
        if quantize is not None or compile:
            _ = pipeline.prepared_generator  # fail now if the options do not fit
        return pipeline

    def __repr__(self) -> str:
        config, head = self.generator.config, self.generator.head.weight
        millions = sum(p.numel() for p in self.generator.parameters()) / 1e6
        return (
            f"Pipeline({self.name!r}: {len(self.class_names)} classes, {millions:.1f}M parameters, "
            f"memory {config.memory.kind}, {config.grid[0]} x {config.grid[1]} codes of "
            f"{config.codebook_size}, {str(head.dtype).removeprefix('torch.')} on {self.device})"
        )

    def _repr_html_(self) -> str:
        names, more = self.class_names[:20], len(self.class_names) - 20
        text = ", ".join(names) + (f" and {more} more" if more > 0 else "")
        return f"<p>{html.escape(repr(self))}</p><p>Classes: {html.escape(text)}</p>"

    @property
    def prepared_generator(self) -> Transformer:
        """The generator prepared for sampling, and prepared again after a change of its weights."""
        weights = [p for p in self.generator.parameters() if not p.is_inference()]
        state = tuple((p.data_ptr(), p.dtype, p._version) for p in weights)
        key = (self.generator, self.quantize, self.compile, state)
        if self._prepared is None or self._prepared[0] != key:
            fast = prepare_for_sampling(self.generator, self.quantize, self.compile)
            self._prepared = key, fast
        return self._prepared[1]

    @property
    def parts(self) -> ModelParts:
        """What a model directory holds: generator, tokenizer, class names, settings, notes."""
        own = self.generator, self.tokenizer, self.class_names, self.sampling, self.about
        return ModelParts(*own)

    def without_rows(self, codes: Sequence[int]) -> Pipeline:
        """A copy whose bank holds zeros in the rows of `codes` (see moveimg.bank_editing)."""
        return self.with_generator(erase_rows(self.generator, codes))

    def blend(self, other: Pipeline, share: float) -> Pipeline:
        """A copy with the bank (1 - share) * this bank + share * other's (moveimg.bank_editing)."""
        if self.tokenizer.fingerprint != other.tokenizer.fingerprint:
            raise ValueError(f"blend with {other.name}: expected a model of the same tokenizer")
        return self.with_generator(blend_banks(self.generator, other.generator, share))

    def with_generator(self, generator: Transformer) -> Pipeline:
        """A copy with another generator."""
        parts = replace(self.parts, generator=generator)
        return Pipeline(parts, self.device, self.quantize, self.compile, self.name)

    def save(self, directory: str | Path) -> None:
        """Write a model directory, atomically.

        Raises FileExistsError if it exists, ValueError for a model loaded with `bank`.
        """
        with atomic_directory(Path(directory)) as temporary:
            save_model(temporary, self.parts)

    def label(self, name_or_index: str | int) -> int:
        """The label of a class by index, name, synonym or unambiguous part of a name."""
        return find_label(self.class_names, name_or_index)

    def settings(self, **options: Any) -> SamplingSettings:
        """The model's sampling settings, overridden by the options that are not None."""
        changes = {key: value for key, value in options.items() if value is not None}
        return validate(SamplingSettings, self.sampling.model_dump() | changes, "sampling settings")

    def sample(
        self, classes: Classes, *, num: int = 1, seed: int = 0, batch_size: int = 32, **options: Any
    ) -> list[Image.Image]:
        """Draw `num` images of each class, class after class.

        Args:
            classes: indices or names (see label), or a single one.
            seed: image i is drawn with seed + i and does not depend on the others (except with
                int8, which rounds by the values of the whole batch).
            batch_size: images generated at once; more is faster and needs more memory.
            options: fields of SamplingSettings; those left out are the model's own.
        """
        settings, labels = self.settings(**options), self._labels(classes, num)
        codes = self.sample_codes(labels, settings, seed=seed, batch_size=batch_size)
        return ImageList(i for batch in codes.split(batch_size) for i in self.decode(batch))

    def complete(
        self, image: Image.Image, classes: Classes, *, keep: Area = "top", **options: Any
    ) -> list[Image.Image]:
        """Completions of an image: the codes of an area are kept, the others are drawn.

        Args:
            image: cropped to the model's size around its centre.
            classes: see sample.
            keep: top, bottom, left or right (half); a number of rows of codes from the top; a box
                (left, top, right, bottom) of pixels; or a mask, light where the image is kept.
            options: num=1, seed=0 and fields of SamplingSettings, as for sample, and passes=0:
                resampling passes, where kept codes come after drawn ones (see moveimg.editing).
        """
        drawn = self.code_mask(keep, invert=True)
        return self.decode(self._redraw(image, classes, drawn, **options))

    def edit(
        self, image: Image.Image, classes: Classes, *, hole: Area, **options: Any
    ) -> list[Image.Image]:
        """Versions of an image with the area `hole` redrawn, for its own class or another.

        Pixels outside the hole are the image's, blended across the seam. `hole` has the forms of
        complete's `keep`; for the other arguments see complete.
        """
        mask = self.code_mask(hole)
        codes = self._redraw(image, classes, mask, **options)
        return self.decode_partial(codes, codes.shape[1], mask, image)

    def _redraw(self, image: Image.Image, classes: Classes, hole: Tensor, **options: Any) -> Tensor:
        labels = self._labels(classes, options.pop("num", 1))
        drawing = {key: options.pop(key, 0) for key in ("seed", "passes")}
        known = self.encode([image])[0].masked_fill(hole, UNKNOWN)
        return self.sample_codes(labels, self.settings(**options), known=known, **drawing)

    def log_likelihood(
        self, images: Images, classes: Classes, *, batch_size: int = 32
    ) -> Likelihood:
        """log p(codes | class) of images or codes, each with its own class or all with one."""
        codes, labels = self.encode(images, batch_size=batch_size), self._labels(classes)
        if len(labels) not in (1, len(codes)):
            raise ValueError(f"{len(labels)} classes for {len(codes)} images: expected 1 or equal")
        pairs = codes.split(batch_size), labels.expand(len(codes)).split(batch_size)
        model = self.prepared_generator
        log_probs = [sampling.code_log_probs(model, *pair) for pair in zip(*pairs, strict=True)]
        return Likelihood(torch.cat(log_probs), math.prod(self.image_size))

    def classify(
        self, images: Images, *, top_k: int = 5, batch_size: int = 32
    ) -> list[list[tuple[str, float]]]:
        """The likeliest classes of each image (or its codes) and their probabilities.

        By Bayes' rule with equal priors: p(class | codes) = p(codes | class) / sum over classes.
        """
        codes = self.encode(images, batch_size=batch_size)
        scores = sampling.class_log_likelihoods(self.prepared_generator, codes, batch_size)
        best = scores.softmax(dim=1).topk(min(top_k, len(self.class_names)), dim=1)
        names = self.class_names
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [[(names[label], p) for label, p in zip(*row, strict=True)] for row in rows]

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the model's images in pixels."""
        height, width = self.generator.config.grid
        return height * self.tokenizer.downsample, width * self.tokenizer.downsample

    def crop(self, image: Image.Image) -> Image.Image:
        """An image converted to RGB, resized and centre-cropped to the model's image size."""
        if not isinstance(image, Image.Image):
            raise ValueError(f"image {shorten(image)}: expected a PIL image")
        return center_crop(to_rgb(image), self.image_size)

    def encode(self, images: Images, *, batch_size: int = 32) -> Tensor:
        """Codes int64 [B, T], on the device, of images, which are cropped first, or of codes."""
        if isinstance(images, Tensor):
            return images.to(self.device)
        images = [images] if isinstance(images, Image.Image) else images
        cropped = [self.crop(image) for image in images]
        if not cropped or batch_size < 1:
            raise ValueError(
                f"{len(cropped)} images in batches of {batch_size}: expected 1 or more of both"
            )
        batches = (cropped[i : i + batch_size] for i in range(0, len(cropped), batch_size))
        with torch.autocast(self.device.type, enabled=False):
            encode = self.tokenizer.encode
            return torch.cat([encode(to_tensor(batch).to(self.device)) for batch in batches])

    def code_mask(self, area: Area, invert: bool = False) -> Tensor:
        """Which codes overlap an area or, with `invert`, its outside: bool [T]."""
        pixels = area_pixels(area, self.image_size, self.tokenizer.downsample) ^ invert
        codes = max_pool2d(pixels[None].float(), self.tokenizer.downsample)
        return codes.bool().flatten().to(self.device)

    def sample_codes(
        self,
        classes: Classes,
        settings: SamplingSettings,
        *,
        seed: int = 0,
        batch_size: int = 32,
        known: Tensor | None = None,
        passes: int = 0,
    ) -> Tensor:
        """Codes int64 [B, T] of classes, on the pipeline's device (arguments: see iter_codes)."""
        labels, drawn = self._labels(classes), []
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: expected at least 1")
        image_rngs([seed, seed + len(labels) - 1])  # refuse a bad seed before the first batch
        for first in range(0, len(labels), batch_size):
            part = slice(first, first + batch_size)
            kept = known[part] if known is not None and known.ndim == 2 else known
            *_, (_, codes) = self.iter_codes(
                labels[part], settings, seed=seed + first, known=kept, passes=passes
            )
            drawn.append(codes)
        return torch.cat(drawn)

    def iter_codes(
        self,
        classes: Classes,
        settings: SamplingSettings,
        *,
        seed: int = 0,
        known: Tensor | None = None,
        passes: int = 0,
    ) -> Iterator[tuple[int, Tensor]]:
        """Draw an image per class in one batch; yields (codes drawn, codes [B, T]) after each code.

        The codes are the same tensor each time, and codes not yet drawn are 0 in it.
        known: int64 [T] or [B, T], codes to keep, and -1 for codes to draw. passes: resampling
        passes over the drawn codes (with `known` [T]; see moveimg.editing), counted after T.
        """
        labels, done = self._labels(classes), self.generator.config.seq_len
        codes = torch.zeros(len(labels), done, dtype=torch.int64, device=self.device)
        if known is not None:
            hole = known == UNKNOWN  # [T], where there are passes
            known = known.expand(len(labels), -1)
            codes = known.clamp(min=0)
        rngs = image_rngs(range(seed, seed + len(labels)))
        model = self.prepared_generator
        drawing = sampling.iter_codes(model, labels, settings, rngs, known)
        for position, drawn in enumerate(drawing):
            codes[:, position] = drawn
            yield position + 1, codes
        for _ in range(passes if known is not None else 0):
            for block, changed in resample(model, labels, codes, hole, settings, rngs):
                done, codes = done + block.stop - block.start, changed
                yield done, codes

    def decode(self, codes: Tensor) -> list[Image.Image]:
        """Images of codes int64 [B, T]."""
        return self.decode_partial(codes, codes.shape[1])

    def decode_partial(
        self,
        codes: Tensor,
        done: int,
        hole: Tensor | None = None,
        original: Image.Image | None = None,
    ) -> list[Image.Image]:
        """Images of the first `done` codes of codes int64 [B, T]; later codes are mid-grey.

        hole: bool [T], the codes that are drawn; kept codes are always shown. original: the image
        whose pixels are shown outside the hole, blended at the seam.
        """
        (height, width), pixels = self.generator.config.grid, self.tokenizer.downsample
        rows = height if hole is not None else -(-done // width)  # later rows are not decoded
        with torch.autocast(self.device.type, enabled=False):  # the caller's would change pixels
            images = self.tokenizer.decode(codes[:, : rows * width], (rows, width))
        images = pad(images, (0, 0, 0, (height - rows) * pixels))
        if hole is not None and original is not None:
            outside = to_tensor([self.crop(original)]).to(images).expand_as(images)
            images = composite(outside, images, hole.view(height, width), pixels)
        grey = images.new_ones(height * width) if hole is None else hole.to(images)
        grey[:done] = 0
        mask = interpolate(grey.view(1, 1, height, width), scale_factor=pixels).bool()
        return ImageList(to_pil(images.masked_fill(mask, 0)))

    def _labels(self, classes: Classes | Tensor, num: int = 1) -> Tensor:
        """Labels [B] of classes, each `num` times in a row."""
        classes = classes.tolist() if isinstance(classes, Tensor) else classes
        items = [classes] if isinstance(classes, str | int) else classes
        labels = [self.label(item) for item in items]
        if not labels or not 1 <= num <= MAX_IMAGES // len(labels):
            raise ValueError(f"{len(labels)} classes, num {num}: expected 1 to {MAX_IMAGES} images")
        return torch.tensor(labels, device=self.device).repeat_interleave(num)
