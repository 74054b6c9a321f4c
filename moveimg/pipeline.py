"""Pipeline: class names in, pictures out. The one object most users touch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from moveimg.checkpoint import BUNDLED, ModelParts, load_model
from moveimg.config import SamplingSettings
from moveimg.device import pick_device, pick_dtype
from moveimg.errors import validate
from moveimg.images import to_pil
from moveimg.model import Transformer, decoding_model
from moveimg.pretrained.hub import PUBLISHED, fetch
from moveimg.sampling import image_rngs, iter_codes, sample_codes

DEFAULT_MODEL = "digits"


class Pipeline:
    """A generator with its tokenizer, class names and sampling settings.

    >>> pipeline = Pipeline.from_pretrained("digits")
    >>> images = pipeline.sample(["seven", 3], seed=0)

    Attributes: generator, tokenizer, class_names, sampling (the model's own settings), device,
    quantize (see from_pretrained).
    """

    def __init__(
        self, parts: ModelParts, device: torch.device, quantize: str | None = None
    ) -> None:
        self.generator = parts.generator
        self.tokenizer = parts.tokenizer
        self.class_names = parts.class_names
        self.sampling = parts.sampling
        self.device, self.quantize = device, quantize
        self._prepared: tuple[tuple, Transformer] | None = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = DEFAULT_MODEL,
        *,
        device: str | None = None,
        dtype: str | None = None,
        quantize: str | None = None,
    ) -> Pipeline:
        """Load a model: bundled (`digits`), in a directory, published or on the Hub.

        Args:
            name_or_path: a bundled name, a model directory, a name of LlamaGen's public weights
                (`llamagen-b-256`; downloaded and converted once), or a Hub id `owner/name`.
            device: cpu, cuda, mps, ...; left out, an accelerator where there is one.
            dtype: of the generator, float32, bfloat16 or float64; left out, bfloat16 on CUDA, else
                float32. The tokenizer paints in float32 at least.
            quantize: int8 samples from matrices of 8 bits (CPU; faster, and slightly off).

        Raises:
            FileNotFoundError: there is no such model, or it cannot be downloaded.
            ValueError: it is damaged, or the device or dtype cannot be used.
        """
        where = pick_device(device)
        parts = load_model(resolve(name_or_path), where, pick_dtype(dtype, where))
        pipeline = cls(parts, where, quantize)
        if quantize is not None:
            _ = pipeline.decoder  # what cannot be quantized is refused now
        return pipeline

    @property
    def decoder(self) -> Transformer:
        """The generator as it is sampled: made ready for the device once (see decoding_model)."""
        weights = [p for p in self.generator.parameters() if not p.is_inference()]
        places = tuple((p.data_ptr(), p.dtype, p.device) for p in weights)
        now = (self.generator, self.quantize, sum(p._version for p in weights), places)
        if self._prepared is None or self._prepared[0] != now:  # swapped, or its weights changed
            self._prepared = (now, decoding_model(self.generator, self.quantize))
        return self._prepared[1]

    def label(self, name_or_index: str | int) -> int:
        """The label of a class: its index, its name, one of its synonyms, or an unambiguous part.

        Raises ValueError for an unknown class, one out of range, or a part that fits several.
        """
        return find_label(self.class_names, name_or_index)

    def search_classes(self, part: str) -> list[int]:
        """Labels of the classes whose name contains `part`, without regard to case."""
        return search_names(self.class_names, part)

    def settings(self, **overrides: Any) -> SamplingSettings:
        """The model's sampling settings with those not None replaced. ValueError if invalid."""
        given = {key: value for key, value in overrides.items() if value is not None}
        return validate(SamplingSettings, self.sampling.model_dump() | given, "sampling settings")

    def sample(
        self,
        classes: Sequence[str | int] | str | int,
        *,
        cfg_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        cfg_schedule: str | None = None,
        cfg_power: float | None = None,
        cfg_start: float | None = None,
        seed: int = 0,
        batch_size: int = 32,
    ) -> list[Image.Image]:
        """One picture for each class given; settings left out are the model's own.

        Args:
            classes: indices or names (see label); a class given n times makes n pictures.
            cfg_scale, temperature, top_k, top_p, cfg_schedule, cfg_power, cfg_start: see
                SamplingSettings.
            seed: picture i is drawn with seed + i, and can be made again alone (but with
                int8, which rounds by the numbers of the whole batch).
            batch_size: pictures generated side by side; more is faster and takes more memory.
        """
        settings = self.settings(
            cfg_scale=cfg_scale, temperature=temperature, top_k=top_k, top_p=top_p,
            cfg_schedule=cfg_schedule, cfg_power=cfg_power, cfg_start=cfg_start,
        )  # fmt: skip
        codes = self.sample_codes(classes, settings, seed=seed, batch_size=batch_size)
        return [image for part in codes.split(batch_size) for image in self.decode(part)]

    def sample_codes(
        self,
        classes: Sequence[str | int] | str | int,
        settings: SamplingSettings,
        *,
        seed: int = 0,
        batch_size: int = 32,
    ) -> Tensor:
        """As sample, but the codes: int64 [B, T] on the pipeline's device."""
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: expected at least 1")
        labels = self._labels(classes)
        rngs = image_rngs(range(seed, seed + len(labels)))
        parts = [
            sample_codes(self.decoder, part, settings, rngs[i : i + batch_size])
            for i, part in zip(
                range(0, len(labels), batch_size), labels.split(batch_size), strict=True
            )
        ]
        return torch.cat(parts)

    def stream(
        self,
        classes: Sequence[str | int] | str | int,
        settings: SamplingSettings,
        *,
        seed: int = 0,
        every: int | None = None,
    ) -> Iterator[tuple[int, list[Image.Image]]]:
        """Pictures while they grow: (codes drawn so far, pictures), after every `every` codes.

        Left out, `every` is one row of the grid. Codes still to come are shown as mid-grey. The
        last item holds the finished pictures; to stop early, stop iterating.
        """
        every = every or self.generator.config.grid[1]
        for done, codes in self.iter_codes(classes, settings, seed=seed):
            if done % every == 0 or done == codes.shape[1]:
                yield done, self.decode_partial(codes, done)

    def iter_codes(
        self,
        classes: Sequence[str | int] | str | int,
        settings: SamplingSettings,
        *,
        seed: int = 0,
    ) -> Iterator[tuple[int, Tensor]]:
        """As sample_codes in one batch, but after every code: (codes drawn so far, codes [B, T]).

        The tensor is the same each time, and is filled from the left.
        """
        labels = self._labels(classes)
        length = self.generator.config.seq_len
        codes = torch.zeros(len(labels), length, dtype=torch.int64, device=self.device)
        rngs = image_rngs(range(seed, seed + len(labels)))
        for position, drawn in enumerate(iter_codes(self.decoder, labels, settings, rngs)):
            codes[:, position] = drawn
            yield position + 1, codes

    def decode(self, codes: Tensor) -> list[Image.Image]:
        """codes int64 [B, T] -> pictures."""
        return to_pil(self.tokenizer.decode(codes, self.generator.config.grid))

    def decode_partial(self, codes: Tensor, done: int) -> list[Image.Image]:
        """Pictures of the first `done` codes of codes int64 [B, T], the rest mid-grey.

        Lines that have no code yet are not decoded, so the lower edge is not yet what it will be.
        """
        height, width = self.generator.config.grid
        lines, over = -(-done // width), -done % width
        images = self.tokenizer.decode(codes[:, : lines * width], (lines, width))  # [B, 3, h, W]
        pixels = self.tokenizer.downsample
        if over:
            images[:, :, -pixels:, -over * pixels :] = 0
        return to_pil(pad(images, (0, 0, 0, (height - lines) * pixels)))

    def _labels(self, classes: Sequence[str | int] | str | int) -> Tensor:
        if isinstance(classes, str | int):
            classes = [classes]
        labels = [self.label(item) for item in classes]  # of an array, too
        if not labels:
            raise ValueError("no classes given: expected at least one index or name")
        return torch.tensor(labels, dtype=torch.int64, device=self.device)


def search_names(class_names: Sequence[str], part: str) -> list[int]:
    """Indices of the names that contain `part`, without regard to case."""
    wanted = part.casefold()
    return [i for i, name in enumerate(class_names) if wanted in name.casefold()]


def find_label(class_names: Sequence[str], name_or_index: str | int) -> int:
    """As Pipeline.label, for a list of class names."""
    text = str(name_or_index).strip()
    named = [i for i, name in enumerate(class_names) if name == text]
    if len(named) == 1 and isinstance(name_or_index, str):  # a class may be called "10"
        return named[0]
    if re.fullmatch(r"-?\d+", text, re.ASCII):
        index = int(text)
        if not 0 <= index < len(class_names):
            raise ValueError(f"class {index}: expected 0..{len(class_names) - 1}")
        return index
    wanted = text.casefold()
    matches = search_names(class_names, wanted)
    exact = [i for i in matches if wanted in synonyms(class_names[i])]
    if len(exact or matches) == 1:
        return (exact or matches)[0]
    if not matches:
        known = {name: i for i, names in enumerate(class_names) for name in synonyms(names)}
        near = [f"{known[name]} ({name})" for name in get_close_matches(wanted, known)]
        some = (
            f"did you mean {' or '.join(near)}?"
            if near
            else f"such as {', '.join(class_names[:5])}"
        )
        last = len(class_names) - 1
        raise ValueError(f"unknown class {text!r}: expected an index (0..{last}) or a name; {some}")
    some = ", ".join(f"{i} ({class_names[i]})" for i in (exact or matches)[:5])
    raise ValueError(f"class {text!r} fits {len(exact or matches)} classes: {some}; be exact")


def synonyms(class_name: str) -> list[str]:
    """`Goldfish, Carassius auratus` -> its names, case-folded."""
    return [part.strip() for part in class_name.casefold().split(",")]


def resolve(name_or_path: str | Path) -> Path:
    """The directory of a path or a name, downloaded if need be (see Pipeline.from_pretrained).

    Raises FileNotFoundError if there is no such model or it is not to be had.
    """
    for path in (Path(name_or_path), BUNDLED / str(name_or_path)):
        if (path / "config.json").is_file():
            return path
    if Path(name_or_path).is_dir():
        raise FileNotFoundError(f"{name_or_path}: no model here (it has no config.json)")
    fetched = fetch(str(name_or_path))
    if fetched is not None:
        return fetched
    bundled = ", ".join(sorted(path.name for path in BUNDLED.glob("*"))) or "none"
    raise FileNotFoundError(
        f"no model {str(name_or_path)!r}: expected a model directory, a bundled name ({bundled}), "
        f"public weights ({', '.join(PUBLISHED)}) or a Hugging Face Hub id (owner/name)"
    )
