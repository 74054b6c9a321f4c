"""The pipeline by which diffusers loads a model directory that `moveimg push` has written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput

from moveimg.checkpoint import save_model
from moveimg.pipeline import Classes, Pipeline
from moveimg.pretrained.share import write_diffusers
from moveimg.sampling import MAX_SEED, image_rngs, iter_codes


class MoveimgPipeline(DiffusionPipeline):
    """A moveimg.Pipeline with the interface of diffusers' pipelines."""

    moveimg: Pipeline

    def __init__(self) -> None:  # diffusers reads the signature
        super().__init__()

    def register_to_config(self, **settings: Any) -> None:
        """Load the model as soon as diffusers passes its path."""
        super().register_to_config(**settings)
        if source := settings.get("_name_or_path"):
            self.moveimg = Pipeline.from_pretrained(source, device="cpu", dtype="float32")

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Classes,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
        **options: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw `num_images_per_prompt` images of each class, class after class.

        Args:
            generator: source of the images' seeds, one for all images or one per image.
            output_type: pil, or np: float32 [B, H, W, 3] in 0..1.
            callback_on_step_end: called as (pipeline, step, step, {"codes": int64 [B, T]}) after
                each code. If it sets `pipeline._interrupt`, the remaining codes stay mid-grey.
            options: further fields of moveimg's SamplingSettings, such as temperature.
        """
        if output_type not in ("pil", "np"):
            raise ValueError(f"output_type {output_type!r}: expected pil or np")
        pipeline, self._interrupt = self.moveimg, False
        settings = pipeline.settings(cfg_scale=guidance_scale, **options)
        classes = [class_labels] if isinstance(class_labels, str | int) else class_labels
        indices = [pipeline.label(name) for name in classes for _ in range(num_images_per_prompt)]
        generators = generator if isinstance(generator, Iterable) else [generator] * len(indices)
        seeds = [
            int(torch.randint(MAX_SEED + 1, (), generator=g, device=g.device if g else "cpu"))
            for _, g in zip(indices, generators, strict=True)
        ]
        labels = torch.tensor(indices, device=pipeline.device)
        codes = labels.new_zeros(len(labels), pipeline.generator.config.seq_len)
        drawn = iter_codes(pipeline.prepared_generator, labels, settings, image_rngs(seeds))
        for step, column in enumerate(self.progress_bar(drawn)):
            codes[:, step] = column
            if callback_on_step_end is not None:
                callback_on_step_end(self, step, step, {"codes": codes})
            if self._interrupt:
                break
        images: Any = pipeline.decode_partial(codes, step + 1)
        if output_type == "np":
            images = np.stack([np.asarray(image, dtype=np.float32) / 255 for image in images])
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def to(self, *args: Any, silence_dtype_warnings: bool = True, **options: Any) -> Any:
        """Move the model to a device and cast the generator to a dtype; returns the pipeline."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **options)
        self.moveimg.generator.to(device, dtype)
        self.moveimg.tokenizer.to(device)  # decodes in float32
        self.moveimg.device = device or self.moveimg.device
        return self

    device = property(lambda self: self.moveimg.device)
    dtype = property(lambda self: self.moveimg.generator.head.weight.dtype)

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write the model directory, with the files that let diffusers load it."""
        save_model(save_directory, self.moveimg.parts)
        write_diffusers(Path(save_directory))
