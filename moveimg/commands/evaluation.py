"""`moveimg evaluate` and `reconstruct`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from moveimg import DEFAULT_MODEL
from moveimg.commands.common import (
    MAX_SEED,
    Device,
    Dtype,
    ImageSize,
    ModelOption,
    command,
    device_of,
    print_json,
)


class Split(StrEnum):
    """A part of an image source."""

    train = "train"
    val = "val"


Extractor = Annotated[
    Path | None, typer.Option(help="A classifier of --make-extractor, instead of Inception.")
]
Inception = Annotated[
    Path | None, typer.Option(help="Weights in torch-fidelity's layout; default: downloaded.")
]
Allow = Annotated[
    list[str] | None, typer.Option(metavar="GUARD", help="Overrule the guard of this name.")
]
Names = Annotated[
    list[str] | None,
    typer.Argument(help="a model; results.json files with --show; images with --make-..."),
]
Reference = Annotated[
    str | None, typer.Option(help="imagenet64/128/256/512, a data set's name, an .npz or a folder.")
]
Samples = Annotated[Path | None, typer.Option(help="Score this .npz or folder of any program.")]
Num = Annotated[  # not --num: torchrun reads that as an abbreviation of an option of its own
    int | None,
    typer.Option(
        "--num-samples", min=1, help="Default: 50000, with a classifier 2000; torchrun takes --num."
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Image i has the seed SEED + i.")]
Sampling = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A sampling setting, as cfg_scale=1.5."),
]
Sweep = Annotated[
    str | None,
    typer.Option(metavar="KEY=A:B:STEP", help="A table and a plot, as cfg_scale=1.25:2.5:0.25."),
]
Resize = Annotated[int | None, typer.Option(min=1, max=4096, help="Pixels to score at (bicubic).")]
BatchSize = Annotated[
    int, typer.Option(min=1, max=65536, help="Images in one batch; other sizes round otherwise.")
]
Png = Annotated[bool, typer.Option("--png", help="Keep samples as PNGs instead of an .npz.")]
Out = Annotated[Path | None, typer.Option(help="Folder; default: evaluation/MODEL-HASH.")]
Show = Annotated[bool, typer.Option("--show", help="Print results.json files as one table.")]
MakeReference = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Make an .npz of a data set or folder.")
]
MakeExtractor = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Train a classifier on a data set or folder.")
]


@command
def evaluate(
    names: Names = None,
    model: ModelOption = None,
    reference: Reference = None,
    samples: Samples = None,
    num: Num = None,
    seed: Seed = 0,
    batch_size: BatchSize = 100,
    set: Sampling = None,
    sweep: Sweep = None,
    resize: Resize = None,
    png: Png = False,
    out: Out = None,
    extractor: Extractor = None,
    inception_weights: Inception = None,
    allow: Allow = None,
    show: Show = False,
    make_reference: MakeReference = None,
    make_extractor: MakeExtractor = None,
    split: Annotated[Split, typer.Option(help="Of the images (--make-reference).")] = Split.train,
    size: ImageSize = "256",
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Checkpoint, or a set of samples -> FID, sFID, IS, precision, recall, KID."""
    names = [*([model] if model else []), *(names or [])]
    if show:
        _show(names)
        return
    from moveimg.config import as_pair, parse_size
    from moveimg.evaluation import run as runner
    from moveimg.evaluation.guards import check_allowed

    check_allowed(allow or [])
    pixels = as_pair(parse_size(size))
    comparison = runner.Comparison(reference, extractor, inception_weights, allow or [])
    if make_extractor is not None:
        accuracy = runner.make_extractor(_one(names), pixels, device_of(device), make_extractor)
        print(f"{make_extractor}: {accuracy:.1%} of held-out real images recognised")
    elif make_reference is not None:
        where = device_of(device)
        out = make_reference
        print_json(runner.make_reference(_one(names), split.value, pixels, comparison, where, out))
    elif samples is not None:
        _report([runner.score_files(samples, comparison, device_of(device), out)])
    else:
        model = _one(names) if names else DEFAULT_MODEL
        sampling = runner.Sampling(num, seed, batch_size, resize, png, _parse_settings(set or []))
        if sweep is None:
            done = runner.evaluate_model(model, comparison, sampling, out, device, dtype)
            if done is not None:
                _report([done[0]])
                print(f"-> {done[1]}")
            return
        key, values = _parse_sweep(sweep)
        swept = runner.sweep(model, comparison, sampling, key, values, out, device, dtype)
        if swept is not None:
            _report(swept[0])
            print(f"-> {swept[1]}/ (sweep.md, sweep.png)")


@command
def reconstruct(
    images: Annotated[str, typer.Argument(help="a data set's name, or a folder")],
    tokenizer: Annotated[Path, typer.Option(help="Directory of a tokenizer or model, or digits.")],
    size: ImageSize = "256",
    ratio: Annotated[float, typer.Option("--range", help="Crop from size * range pixels.")] = 1.0,
    split: Annotated[Split, typer.Option(help="Of the images.")] = Split.val,
    out: Annotated[Path | None, typer.Option(help="A PNG of images and reconstructions.")] = None,
    rfid: Annotated[bool, typer.Option(help="Compute rFID, too.")] = True,
    reference: Annotated[
        str | None, typer.Option(help="For rFID: an .npz or folder; default: the images.")
    ] = None,
    extractor: Extractor = None,
    inception_weights: Inception = None,
    allow: Allow = None,
    device: Device = None,
) -> None:
    """Images through a tokenizer and back: rFID, PSNR, SSIM and code usage, as JSON."""
    from moveimg.checkpoint import load_tokenizer
    from moveimg.config import as_pair, parse_size
    from moveimg.data import open_images
    from moveimg.evaluation import run as runner
    from moveimg.evaluation.guards import check_allowed
    from moveimg.evaluation.reconstruct import reconstruct
    from moveimg.files import lock, require_file_name
    from moveimg.images import save_png

    check_allowed(allow or [])
    if out is not None:
        require_file_name(out)
    pixels = as_pair(parse_size(size))
    vq = load_tokenizer(tokenizer, where := device_of(device))
    source = open_images(images, split.value)
    comparison = runner.Comparison(reference or images, extractor, inception_weights, allow or [])
    network = real = None
    if rfid:
        try:
            network = runner.open_extractor(comparison, where)
        except FileNotFoundError as error:
            if extractor or inception_weights or reference:
                raise
            print(f"rFID left out: {error}", file=sys.stderr)  # nobody asked for Inception
    if network is not None and reference is not None:
        real = runner.load_reference(comparison, pixels, network, runner.features_cache())
    if split is Split.train and rfid and reference is None:
        print(
            "warning: the tokenizer may have been trained on these images: rFID is published on "
            "validation images (--split val)",
            file=sys.stderr,
        )
    with nullcontext() if out is None else lock(out, "moveimg reconstruct"):
        figures, grid = reconstruct(source, vq, pixels, ratio, network, real, allow or [])
        if out is not None:
            save_png(grid, out, figures.as_dict())
    print_json(figures.as_dict())


def _show(files: Sequence[str]) -> None:
    from moveimg.evaluation.results import read_results, results_table

    if not files:
        raise ValueError("--show: name one or more results.json files")
    print(results_table([read_results(Path(file)) for file in files], published=True))


def _report(results: Sequence[dict[str, Any]]) -> None:
    """Warnings on stderr, the numbers as Markdown rows."""
    from moveimg.evaluation.results import results_table

    for line in dict.fromkeys(line for result in results for line in result["warnings"]):
        print(f"warning: {line}", file=sys.stderr)
    if results:
        print(results_table(results))


def _one(names: Sequence[str]) -> str:
    if len(names) != 1:
        raise ValueError(f"expected one model or image source (got {', '.join(names) or 'none'})")
    return names[0]


def _parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    from moveimg.files import parse_yaml

    pairs = [text.partition("=") for text in texts]
    for key, equals, _ in pairs:
        if not equals:
            raise ValueError(f"--set {key}: expected KEY=VALUE")
    return {key: parse_yaml(value, f"--set {key}={value}") for key, _, value in pairs}


def _parse_sweep(text: str) -> tuple[str, list[float]]:
    """`cfg_scale=1:2:0.5` -> its key, and 1.0, 1.5, 2.0."""
    key, _, ends = text.partition("=")
    try:
        first, last, step = (float(part) for part in ends.split(":"))
        count = round((last - first) / step) + 1
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(f"--sweep {text}: expected KEY=FIRST:LAST:STEP") from None
    if not 1 <= count <= 1000:
        raise ValueError(f"--sweep {text}: expected FIRST:LAST:STEP with LAST beyond FIRST")
    return key, [round(first + i * step, 10) for i in range(count)]
