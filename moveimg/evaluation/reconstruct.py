"""Images through a tokenizer and back: the error, rFID, and how evenly the codes are used."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import tokenizer as vq
from moveimg.data import ImageSource, code_grid, default_batch_size, drop_unreadable
from moveimg.evaluation.features import Extractor, run
from moveimg.evaluation.metrics import WINDOW, frechet_distance, psnr, ssim, statistics_of
from moveimg.evaluation.reference import Reference
from moveimg.evaluation.scoring import Guards, check_pair
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
    guards: Guards,
) -> tuple[dict[str, Any], Image.Image]:
    """Encode and decode the centre `size` pixels of every image of `source` that can be read.

    `size` is (H, W), multiples of the tokenizer's downsample. rFID is left out without extractor;
    its reference is the images themselves by default.

    Returns the figures and a grid of images, spread over the source, above their reconstructions:

        images              number of images read
        mse                 mean squared error, pixels in [-1, 1]
        psnr                10 log10(2^2 / mse), in dB, of the mean error over all images
        psnr_of_images      mean PSNR, of pixels rounded to 0..255, of the images that are not equal
        ssim                structural similarity, a mean over images; None below 11 x 11 pixels
        usage, perplexity   share of the codebook that occurred; exp of the codes' entropy
        rfid, rfid_space, rfid_reference    Fréchet distance between reconstructions and reference

    Raises ValueError for a reference of training images or of another size.
    """
    if reference is not None:
        check_pair(size, reference, guards, wanted="val")
    source = drop_unreadable(source)
    spread = set(np.linspace(0, len(source) - 1, SHOWN).round().astype(int).tolist())
    shown: list[list[Image.Image]] = [[], []]
    counts = torch.zeros(tokenizer.codebook_size, dtype=torch.int64)
    numbers: dict[str, list[Tensor]] = {"mse": [], "psnr": [], "ssim": []}
    features: list[list[np.ndarray]] = [[], []]  # of the images, of their reconstructions
    step, start = default_batch_size(size, next(tokenizer.parameters()).device), 0
    grid = code_grid(size, tokenizer.downsample)
    with progress_bar(len(source), "reconstruct", "image") as bar:
        for views in source_images(source, size).read(step):
            images = normalize(torch.from_numpy(views).permute(0, 3, 1, 2))
            codes = tokenizer.encode(images)
            decoded = tokenizer.decode(codes, grid).float().cpu()
            if not torch.isfinite(decoded).all():
                raise ValueError(f"non-finite: reconstructions of images {start}.. are not finite")
            counts += codes.flatten().bincount(minlength=len(counts)).cpu()
            numbers["mse"].append((decoded - images).square().flatten(1).mean(1))
            pair = views, to_uint8(decoded)
            a, b = (torch.from_numpy(p).permute(0, 3, 1, 2).double() / 255 for p in pair)
            numbers["psnr"].append(psnr(a, b))
            if min(size) >= WINDOW:
                numbers["ssim"].append(ssim(a, b))
            for pixels, found in zip(pair, features, strict=True):
                if extractor is not None and (reference is None or found is features[1]):
                    found.append(run(extractor, pixels)["fid"])
            chosen = [i for i in range(len(views)) if start + i in spread]
            for row, batch in zip(shown, (images, decoded), strict=True):
                row += to_pil(batch[chosen])
            start += len(views)
            bar.update(len(views))
    mse = torch.cat(numbers["mse"]).double().mean().item()
    own = torch.cat(numbers["psnr"])
    figures: dict[str, Any] = {
        "images": len(source),
        "mse": mse,
        "psnr": 10 * math.log10(4 / mse) if mse else math.inf,
        "psnr_of_images": own[own.isfinite()].mean().item() if own.isfinite().any() else math.inf,
        "ssim": torch.cat(numbers["ssim"]).mean().item() if numbers["ssim"] else None,
        **{key: value.item() for key, value in vq.code_statistics(counts).items()},
        "rfid": None,
    }
    if extractor is not None:
        decoded_statistics = statistics_of(np.concatenate(features[1]))
        if reference is None:
            theirs = statistics_of(np.concatenate(features[0]))
        else:
            theirs = reference.statistics["fid"]
        figures["rfid"] = frechet_distance(decoded_statistics, theirs)
        figures["rfid_space"] = extractor.space
        figures["rfid_reference"] = source.name if reference is None else reference.name
    figures["warnings"] = guards.lines
    return figures, labelled_grid(shown, ["image", "decoded"])
