"""Tokenizers side by side on held-out images: error, use of codes, and a picture.

    python apps/tokenizer_report.py runs/digits-tokenizer runs/digits-tokenizer-simvq \
        --images digits --size 32 --out runs/tokenizers.png

Prints a table in Markdown; the picture has the images above each tokenizer's reconstructions.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

import tokenizer as vq
from moveimg.data import center_crop, open_images, to_tensor
from moveimg.errors import describe
from moveimg.images import labelled_grid, save_png, to_pil

BATCH, SHOWN = 64, 10


@torch.no_grad()
def reconstructed(tokenizer: vq.AutoencoderTokenizer, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images [B, 3, H, W] through a tokenizer and back, and how often each code occurred [N]."""
    height, width = images.shape[2:]
    grid = height // tokenizer.downsample, width // tokenizer.downsample
    codes = [tokenizer.encode(part) for part in images.split(BATCH)]
    decoded = torch.cat([tokenizer.decode(part, grid) for part in codes])
    return decoded, torch.cat(codes).flatten().bincount(minlength=tokenizer.codebook_size)


def report(tokenizers: list[Path], name: str, size: int, out: Path) -> None:
    """Compare tokenizers on the held-out images of `name`, centres of size x size pixels."""
    source = open_images(name, "val")
    views = [center_crop(source[i][0], size) for i in range(len(source))]
    images = to_tensor(views)
    shown = torch.linspace(0, len(images) - 1, SHOWN).round().long()
    rows, names = [to_pil(images[shown])], ["image"]
    print("| tokenizer | held-out MSE | codes used | perplexity |\n| --- | --- | --- | --- |")
    for directory in tokenizers:
        decoded, counts = reconstructed(vq.load(directory), images)
        error = (decoded - images).square().mean().item()
        stats = vq.code_statistics(counts)
        used = f"{100 * stats['usage']:.1f} % of {len(counts)}"
        print(f"| {directory.name} | {error:.4f} | {used} | {stats['perplexity']:.1f} |")
        rows.append(to_pil(decoded[shown]))
        names.append(directory.name)
    save_png(labelled_grid(rows, names), out, {"images": name})


def main() -> None:
    """Print the table and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("tokenizers", type=Path, nargs="+", help="tokenizer directories")
    parser.add_argument("--images", required=True, help="a folder of class subfolders, or digits")
    parser.add_argument("--size", type=int, default=32, help="pixels of a side")
    parser.add_argument("--out", type=Path, required=True, help="the picture to write")
    given = parser.parse_args()
    try:
        report(given.tokenizers, given.images, given.size, given.out)
    except (ValueError, OSError) as error:
        parser.error(describe(error))


if __name__ == "__main__":
    main()
