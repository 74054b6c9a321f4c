"""`moveimg encode`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moveimg.commands.common import Device, Dtype, command


@command
def encode(
    images: Annotated[
        str,
        typer.Argument(
            help="a folder of class subfolders, ImageNet's archives or Parquet files; or a data "
            "set such as fashion-mnist or cifar10"
        ),
    ],
    tokenizer: Annotated[
        Path, typer.Option(help="directory of a tokenizer or model, or a bundled name")
    ],
    out: Annotated[Path, typer.Option(help="folder for train/ and val/ codes")],
    size: Annotated[int, typer.Option(min=1, help="pixels of a side")] = 256,
    crops: Annotated[str, typer.Option(help="center, flip, five or ten views")] = "center",
    ranges: Annotated[
        list[float], typer.Option("--range", help="cut from size * range pixels; repeatable")
    ] = [1.0],  # noqa: B006
    val_fraction: Annotated[
        float | None,
        typer.Option(
            help="share of the training images held out (default: the source's own split)"
        ),
    ] = None,
    data_root: Annotated[
        Path | None, typer.Option(help="folder of downloaded data sets (default: $MOVEIMG_DATA)")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="views per call of the tokenizer (default: by device)")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Images -> packed codes. The same command continues what was stopped.

    On several devices: torchrun --nproc-per-node N -m moveimg encode ...
    """
    from moveimg.checkpoint import load_tokenizer
    from moveimg.config import ImagesConfig
    from moveimg.data import encode_splits
    from moveimg.device import pick_dtype
    from moveimg.dist import processes
    from moveimg.errors import validate

    given = {"source": images, "size": size, "crops": crops, "ranges": ranges}
    given["val_fraction"] = val_fraction
    settings = validate(ImagesConfig, given, "encode")
    with processes(device) as world:
        vq = load_tokenizer(tokenizer, world.device)
        chosen: dict[str, Any] = {}
        if dtype is not None:
            chosen["dtype"] = pick_dtype(dtype, world.device)
        if batch_size is not None:
            chosen["batch_size"] = batch_size
        manifests = encode_splits(settings, vq, out, data_root, device=world.device, **chosen)
        if world.main:
            for split, manifest in manifests.items():
                n, views = manifest.n_images, manifest.settings.n_crops
                print(f"{out / split}: {n} images x {views} views, {len(manifest.skipped)} skipped")
