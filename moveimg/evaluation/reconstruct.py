"""Reconstruction metrics of a tokenizer: errors, rFID and usage of the codebook."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import tokenizer as vq
from moveimg.data import ImageSource, code_grid, default_batch_size, drop_unreadable
from moveimg.evaluation.extractors import Extractor, run
from moveimg.evaluation.metrics import WINDOW, frechet_distance, ssim, statistics_of
from moveimg.evaluation.reference import Reference
from moveimg.evaluation.sets import source_images
from moveimg.images import labelled_grid, normalize, to_pil, to_uint8
from moveimg.progress import progress_bar

SHOWN = 10


def reconstruct(
    source: ImageSource,
    tokenizer: vq.AutoencoderTokenizer,
    size: tuple[int, int],
    extractor: Extractor | None,
    reference: Reference | None,
) -> tuple[dict[str, Any], Image.Image]:
    """Encode and decode the centre `size` pixels of every image of `source` that can be read.

    `size` is (H, W), multiples of the tokenizer's downsample. rFID is left out without an
    extractor; its reference is by default the images themselves.

    Returns the figures and a grid of images, spread over the source, above their reconstructions:

        images              number of images read
        mse                 mean squared error, pixels in [-1, 1]
        psnr                10 log10(2^2 / mse), in dB, of the mean error over all images
        ssim                structural similarity, a mean over images; None below 11 x 11 pixels
        usage, perplexity   share of the codebook that occurred; exp of the codes' entropy
        rfid, rfid_space, rfid_reference    Fréchet distance between reconstructions and reference

    Raises ValueError for reconstructions that are not finite.
    """
    source = drop_unreadable(source)
    counts = torch.zeros(tokenizer.codebook_size, dtype=torch.int64)
    errors, similarities = [], []
    features: list[list[np.ndarray]] = [[], []]  # of the images, of their reconstructions
    grid = code_grid(size, tokenizer.downsample)

    def decode(views: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        images = normalize(torch.from_numpy(views).permute(0, 3, 1, 2))
        codes = tokenizer.encode(images)
        return images, codes, tokenizer.decode(codes, grid).float().cpu()

    step = default_batch_size(size, next(tokenizer.parameters()).device)
    with progress_bar(len(source), "reconstruct", "image") as bar:
        for views in source_images(source, size).read(step):
            images, codes, decoded = decode(views)
            counts += codes.flatten().bincount(minlength=len(counts)).cpu()
            errors.append((decoded - images).square().flatten(1).mean(1))
            pair = views, to_uint8(decoded)
            if min(size) >= WINDOW:
                a, b = (torch.from_numpy(p).permute(0, 3, 1, 2).double() / 255 for p in pair)
                similarities.append(ssim(a, b))
            if extractor is not None:
                features[1].append(run(extractor, pair[1])["fid"])
                if reference is None:
                    features[0].append(run(extractor, views)["fid"])
            bar.update(len(views))
    mse = torch.cat(errors).double().mean().item()
    if not math.isfinite(mse):
        raise ValueError(f"{source.name}: reconstructions are not finite")
    figures: dict[str, Any] = {
        "images": len(source),
        "mse": mse,
        "psnr": 10 * math.log10(4 / mse) if mse else math.inf,
        "ssim": torch.cat(similarities).mean().item() if similarities else None,
        **{key: value.item() for key, value in vq.code_statistics(counts).items()},
        "rfid": None,
    }
    if extractor is not None:
        if reference is None:
            theirs, name = statistics_of(np.concatenate(features[0])), source.name
        else:
            theirs, name = reference.statistics["fid"], reference.name
        figures["rfid"] = frechet_distance(statistics_of(np.concatenate(features[1])), theirs)
        figures |= {"rfid_space": extractor.space, "rfid_reference": name}
    spread = np.unique(np.linspace(0, len(source) - 1, SHOWN).round().astype(int))
    shown = [decode(views) for views in source_images(source.select(spread), size).read(step)]
    rows = [to_pil(torch.cat([batch[k] for batch in shown])) for k in (0, 2)]
    return figures, labelled_grid(rows, ["image", "decoded"])
