"""FID and the other scores of `moveimg evaluate` during training, of a small sample set."""

from __future__ import annotations

import numpy as np
import torch

import tokenizer as vq
from moveimg.config import EvaluationConfig, SamplingSettings
from moveimg.dist import World
from moveimg.evaluation.features import run
from moveimg.evaluation.reference import Reference, open_reference
from moveimg.evaluation.run import features_cache, open_extractor
from moveimg.evaluation.sample import class_labels
from moveimg.evaluation.scoring import Guards, check_pair, compute, condition
from moveimg.images import to_uint8
from moveimg.model import Transformer
from moveimg.sampling import image_rngs, sample_codes

BATCH = 50  # images that a process samples at once


class Scorer:
    """Samples the same images by index each time, divided among the ranks, and scores them.

    Opens the extractor and, on rank 0, the reference before training begins, so that missing or
    unfit ones end the run at once (with the errors of `moveimg evaluate`).
    """

    def __init__(
        self,
        config: EvaluationConfig,
        sampling: SamplingSettings,
        tokenizer: vq.AutoencoderTokenizer,
        grid: tuple[int, int],
        world: World,
    ) -> None:
        self.config, self.sampling, self.tokenizer, self.world = config, sampling, tokenizer, world
        if config.images < world.size:
            raise ValueError(f"evaluation.images {config.images}: expected {world.size} or more")
        files = (config.extractor, config.inception_weights)
        size = (grid[0] * tokenizer.downsample, grid[1] * tokenizer.downsample)
        self.extractor = open_extractor(config.reference, *files, world.device)
        self.reference: Reference | None = None
        if world.main:
            cache = features_cache()
            self.reference = open_reference(config.reference, size, self.extractor, cache)
            check_pair(size, self.reference, Guards())

    @torch.inference_mode()
    def __call__(self, model: Transformer) -> dict[str, float]:
        """FID and other scores of `images` samples on rank 0; empty on other ranks.

        FID of few images is far above that of 50,000; use it to compare steps of a run only.
        """
        count, world = self.config.images, self.world
        labels = class_labels(np.arange(count), model.config.n_classes)
        found: dict[str, torch.Tensor] = {}
        first, last = (count * rank // world.size for rank in (world.rank, world.rank + 1))
        for start in range(first, last, BATCH):
            rows = slice(start, min(start + BATCH, last))
            chosen = torch.from_numpy(labels[rows]).to(world.device)
            codes = sample_codes(model, chosen, self.sampling, image_rngs(range(start, rows.stop)))
            pixels = to_uint8(self.tokenizer.decode(codes, model.config.grid))
            for role, values in run(self.extractor, pixels).items():
                if role not in found:
                    found[role] = torch.zeros(count, values.shape[1], dtype=torch.float64)
                found[role][rows] = torch.from_numpy(values).double()
        # rows of other ranks are zero here, so the sum over ranks has all of them
        features = {
            role: (world.mean(found[role]) * world.size).float().numpy() for role in sorted(found)
        }
        if self.reference is None:
            return {}
        numbers = compute(features, self.reference)
        numbers |= condition(features, labels, self.extractor)
        return {key: float(value) for key, value in numbers.items() if isinstance(value, float)}
