"""`moveimg reconstruct`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moveimg.commands.common import Device, command, device_of, print_json


class Split(StrEnum):
    """Which part of an image source."""

    train = "train"
    val = "val"

@command
def reconstruct(
    images: Annotated[str, typer.Argument(help="a folder of class subfolders, or `digits`")],
    tokenizer: Annotated[Path, typer.Option(help="a tokenizer's directory, or a model's")],
    size: Annotated[int, typer.Option(min=1, help="pixels of a side")] = 256,
    ratio: Annotated[float, typer.Option("--range", help="cut from size * range pixels")] = 1.0,
    split: Annotated[Split, typer.Option(help="which part of the images")] = Split.val,
    out: Annotated[Path | None, typer.Option(help="a PNG of images and reconstructions")] = None,
    device: Device = None,
) -> None:
    """Images through a tokenizer and back: error and code usage, as JSON."""
    from moveimg.data.images import open_images
    from moveimg.pictures import save_png
    from moveimg.reconstruct import reconstruct
    from moveimg.training.generator import load_tokenizer

    vq = load_tokenizer(tokenizer, device_of(device))
    figures, picture = reconstruct(open_images(images, split.value), vq, size, ratio)
    if out is not None:
        save_png(picture, out, figures.as_dict())
    print_json(figures.as_dict())
