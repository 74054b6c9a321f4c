"""Pipeline: class names in, images out. The one object most users touch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Unpack

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from moveimg import DEFAULT_MODEL
from moveimg.checkpoint import ModelParts, load_model
from moveimg.class_names import find_label, search_names
from moveimg.config import SamplingOptions, SamplingSettings
from moveimg.device import pick_device, pick_dtype
from moveimg.dist import print_rank0
from moveimg.errors import validate
from moveimg.images import to_pil
from moveimg.model import Transformer, decoding_model
from moveimg.pretrained.hub import resolve
from moveimg.sampling import image_rngs, iter_codes, sample_codes

__all__ = ["DEFAULT_MODEL", "Pipeline", "find_label", "resolve", "search_names"]

MAX_IMAGES = 2**20  # of one call
Classes = Iterable[str | int] | str | int


class Pipeline:
    """A generator with its tokenizer, class names and sampling settings.

    >>> pipeline = Pipeline.from_pretrained("fashion")
    >>> images = pipeline.sample(["sneaker", 3], seed=0)

    Attributes: generator, tokenizer, class_names, sampling (the model's own settings), about (how
    the model was made), device, quantize and compile (see from_pretrained), name.
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
        self._warned = False

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = DEFAULT_MODEL,
        *,
        device: str | None = None,
        dtype: str | None = None,
        quantize: str | None = None,
        compile: bool = False,
    ) -> Pipeline:
        """Load a model: bundled (`digits`), in a directory, published or on the Hub.

        Args:
            name_or_path: a bundled name, a model directory, a name of LlamaGen's public weights
                (`llamagen-b-256`; downloaded and converted once), or a Hub id `owner/name`.
            device: cpu, cuda, mps, ...; left out, an accelerator if there is one.
            dtype: of the generator: float32, bfloat16 or float64; left out, bfloat16 on CUDA, else
                float32. The tokenizer decodes in float32 at least.
            quantize: int8 samples from matrices of 8 bits (CPU; faster, less exact).
            compile: sample by a compiled decoding step (slow to start, then faster).

        Raises:
            FileNotFoundError: there is no such model, or it cannot be downloaded.
            ValueError: it is damaged, or an option cannot be used.
        """
        where = pick_device(device)
        parts = load_model(resolve(name_or_path), where, pick_dtype(dtype, where))
        pipeline = cls(parts, where, quantize, compile, str(name_or_path))
        if quantize is not None or compile:
            _ = pipeline.decoder  # refuse now what cannot be quantized or compiled
        return pipeline

    def __repr__(self) -> str:
        config, head = self.generator.config, self.generator.head.weight
        millions = sum(p.numel() for p in self.generator.parameters()) / 1e6
        return (
            f"Pipeline({self.name!r}: {len(self.class_names)} classes, {millions:.1f}M parameters, "
            f"memory {config.memory.kind}, {config.grid[0]} x {config.grid[1]} codes of "
            f"{config.codebook_size}, {str(head.dtype).removeprefix('torch.')} on {self.device})"
        )

    @property
    def decoder(self) -> Transformer:
        """The generator prepared for sampling on its device; made anew when weights change."""
        weights = [p for p in self.generator.parameters() if not p.is_inference()]
        state = tuple((p.data_ptr(), p.dtype, p._version) for p in weights)
        key = (self.generator, self.quantize, self.compile, state)
        if self._prepared is None or self._prepared[0] != key:
            options: dict[str, Any] = {"compile": True} if self.compile else {}
            self._prepared = (key, decoding_model(self.generator, self.quantize, **options))
        return self._prepared[1]

    def label(self, name_or_index: str | int) -> int:
        """The label of a class by its index, name, synonym or unambiguous part (see find_label)."""
        return find_label(self.class_names, name_or_index)

    def search_classes(self, part: str) -> list[int]:
        """Labels of the classes whose name contains `part`, without regard to case."""
        return search_names(self.class_names, part)

    def settings(self, **options: Unpack[SamplingOptions]) -> SamplingSettings:
        """The model's sampling settings with the options that are not None. ValueError if bad."""
        changes = {key: value for key, value in options.items() if value is not None}
        return validate(SamplingSettings, self.sampling.model_dump() | changes, "sampling settings")

    def sample(
        self,
        classes: Classes,
        *,
        num: int = 1,
        seed: int = 0,
        batch_size: int = 32,
        **options: Unpack[SamplingOptions],
    ) -> list[Image.Image]:
        """Images of classes, `num` of each in a row.

        Args:
            classes: indices or names (see label), or one of them.
            num: images per class.
            seed: image i is drawn with seed + i, and can be drawn again alone (except with int8,
                which rounds by the values of the whole batch).
            batch_size: images generated at once; more is faster and needs more memory.
            options: fields of SamplingSettings; those left out are the model's own.
        """
        settings, labels = self.settings(**options), self._labels(classes)
        if not 1 <= num <= MAX_IMAGES // len(labels):
            raise ValueError(f"num {num}: expected 1..{MAX_IMAGES // len(labels)}")
        batches = self._batches(labels.repeat_interleave(num), settings, seed, batch_size)
        return [image for codes in batches for image in self.decode(codes)]

    def sample_codes(
        self, classes: Classes, settings: SamplingSettings, *, seed: int = 0, batch_size: int = 32
    ) -> Tensor:
        """Codes int64 [B, T] of classes, on the pipeline's device (arguments as of sample)."""
        return torch.cat([*self._batches(self._labels(classes), settings, seed, batch_size)])

    def iter_codes(
        self, classes: Classes, settings: SamplingSettings, *, seed: int = 0
    ) -> Iterator[tuple[int, Tensor]]:
        """As sample_codes in one batch, but after every code: (codes drawn so far, codes [B, T]).

        The tensor is the same each time, and is filled from the left.
        """
        self._check_guidance(settings)
        labels, length = self._labels(classes), self.generator.config.seq_len
        codes = torch.zeros(len(labels), length, dtype=torch.int64, device=self.device)
        rngs = image_rngs(range(seed, seed + len(labels)))
        for position, drawn in enumerate(iter_codes(self.decoder, labels, settings, rngs)):
            codes[:, position] = drawn
            yield position + 1, codes

    def stream(
        self, classes: Classes, settings: SamplingSettings, *, seed: int = 0, every: int = 0
    ) -> Iterator[tuple[int, list[Image.Image]]]:
        """Growing images: (codes drawn so far, images) after every `every` codes (0: a row).

        Codes still to come are shown as mid-grey. To stop early, stop iterating.
        """
        every = every or self.generator.config.grid[1]
        for done, codes in self.iter_codes(classes, settings, seed=seed):
            if done % every == 0 or done == codes.shape[1]:
                yield done, self.decode_partial(codes, done)

    def decode(self, codes: Tensor) -> list[Image.Image]:
        """Images of codes int64 [B, T]."""
        return to_pil(self._decode(codes, self.generator.config.grid))

    def decode_partial(self, codes: Tensor, done: int) -> list[Image.Image]:
        """Images of the first `done` codes of codes int64 [B, T]; the rest is mid-grey.

        Rows without codes are not decoded, so the lower edge still changes with the next row.
        """
        height, width = self.generator.config.grid
        rows, missing = -(-done // width), -done % width
        images = self._decode(codes[:, : rows * width], (rows, width))  # [B, 3, h, W]
        pixels = self.tokenizer.downsample
        if missing:
            images[:, :, -pixels:, -missing * pixels :] = 0
        return to_pil(pad(images, (0, 0, 0, (height - rows) * pixels)))

    def _decode(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):  # the caller's would change pixels
            return self.tokenizer.decode(codes, grid)

    def _labels(self, classes: Classes) -> Tensor:
        items = [classes] if isinstance(classes, str | int) else classes
        labels = [self.label(item) for item in items]
        if not labels:
            raise ValueError("no classes: expected at least one index or name")
        return torch.tensor(labels, dtype=torch.int64, device=self.device)

    def _batches(
        self, labels: Tensor, settings: SamplingSettings, seed: int, batch_size: int
    ) -> Iterator[Tensor]:
        """Codes [b, T] of the labels, batch by batch."""
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: expected at least 1")
        image_rngs([seed, seed + len(labels) - 1])  # refuse a bad seed before the first batch
        self._check_guidance(settings)
        for batch in labels.split(min(batch_size, len(labels))):
            rngs = image_rngs(range(seed, seed + len(batch)))
            yield sample_codes(self.decoder, batch, settings, rngs)
            seed += len(batch)

    def _check_guidance(self, settings: SamplingSettings) -> None:
        """Warn, once, of guidance by a null label that was never trained."""
        before = self.about.get("before")  # of an upcycled model
        run = (before if isinstance(before, dict) else self.about).get("run")
        untrained = isinstance(run, dict) and run.get("class_dropout") == 0
        if untrained and settings.cfg_scale != 1 and not self._warned:
            self._warned = True
            print_rank0(
                f"cfg_scale {settings.cfg_scale}: the model was trained with class_dropout 0, so "
                "its null label is untrained and guidance is meaningless; use cfg_scale 1"
            )
