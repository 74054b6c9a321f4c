"""Reconstruction metrics of a tokenizer: pixel errors, rFID and codebook usage."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image

import tokenizer as vq
from moveimg.data import (
    ImageSource,
    code_grid,
    default_batch_size,
    drop_unreadable,
    evenly_spaced,
)
from moveimg.evaluation.extractors import Extractor, run
from moveimg.evaluation.metrics import WINDOW, compute_statistics, frechet_distance, ssim
from moveimg.evaluation.reference import Reference, make_reference
from moveimg.evaluation.sets import source_images
from moveimg.images import draw_grid, normalize, to_pil, to_uint8
from moveimg.progress import progress_bar


def reconstruct(
    source: ImageSource,
    tokenizer: vq.AutoencoderTokenizer,
    size: tuple[int, int],
    extractor: Extractor | None,
    reference: Reference | None,
) -> tuple[dict[str, Any], Image.Image]:
    """Reconstruct centre crops of (H, W) `size` of all readable images, and measure the errors.

    Without an extractor there is no rFID; its default reference are the images themselves.
    Returns the metrics below, and a grid of ten images with their reconstructions.

        images              number of images
        mse                 mean squared error, pixels in [-1, 1]
        psnr                10 log10(2^2 / mse), in dB, of the mean error over all images
        ssim                structural similarity, a mean over images; None below 11 x 11 pixels
        usage, perplexity   share of codes that occur; exp of the codes' entropy
        rfid, rfid_space, rfid_reference    Fréchet distance, feature space, name of the reference

    Raises ValueError for reconstructions that are not finite.
    """
    source, grid = drop_unreadable(source), code_grid(size, tokenizer.downsample)
    if extractor is not None and reference is None:
        reference = make_reference(source_images(source, size), extractor)
    counts = torch.zeros(tokenizer.codebook_size, dtype=torch.int64)
    errors, similarities, features, shown = [], [], [], []
    columns = {*evenly_spaced(len(source), 10)}
    step = default_batch_size(size, next(tokenizer.parameters()).device)
    with progress_bar(len(source), "reconstruct", "image") as bar:
        for views in source_images(source, size).read(step):
            images = normalize(torch.from_numpy(views).permute(0, 3, 1, 2))
            codes = tokenizer.encode(images)
            decoded = tokenizer.decode(codes, grid).float().cpu()
            counts += codes.flatten().bincount(minlength=len(counts)).cpu()
            errors.append((decoded - images).square().flatten(1).mean(1))
            pair = views, to_uint8(decoded)
            if min(size) >= WINDOW:
                a, b = (torch.from_numpy(p).permute(0, 3, 1, 2).double() / 255 for p in pair)
                similarities.append(ssim(a, b))
            if extractor is not None:
                features.append(run(extractor, pair[1])["fid"])
            rows = [i for i in range(len(views)) if bar.n + i in columns]
            shown.append(torch.stack([images[rows], decoded[rows]]))
            bar.update(len(views))
    mse = torch.cat(errors).double().mean().item()
    if not math.isfinite(mse):
        raise ValueError(f"{source.name}: mean squared error {mse}, expected a finite one")
    results: dict[str, Any] = {
        "images": len(source),
        "mse": mse,
        "psnr": 10 * math.log10(4 / mse) if mse else math.inf,
        "ssim": torch.cat(similarities).mean().item() if similarities else None,
        **{key: value.item() for key, value in vq.code_statistics(counts).items()},
        "rfid": None,
    }
    if extractor is not None and reference is not None:
        ours = compute_statistics(np.concatenate(features))
        results["rfid"] = frechet_distance(ours, reference.statistics["fid"])
        results |= {"rfid_space": extractor.space, "rfid_reference": reference.name}
    pairs = torch.cat(shown, dim=1)  # [2, 10, 3, H, W]
    return results, draw_grid([*map(to_pil, pairs)], ["image", "decoded"])
