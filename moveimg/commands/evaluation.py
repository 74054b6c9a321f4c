"""`moveimg evaluate` and `reconstruct`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

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

Split = Literal["train", "val"]


Extractor = Annotated[
    Path | None,
    typer.Option(help="Instead of Inception: efficientnet-lite0, or a file of --make-extractor."),
]
Inception = Annotated[
    Path | None, typer.Option(help="Weights in torch-fidelity's layout; default: downloaded.")
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
        "--num-samples", min=4, help="Default: 50000, with a classifier 2000; torchrun takes --num."
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Image i has the seed SEED + i.")]
Sampling = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A sampling setting, as cfg_scale=1.5."),
]
Resize = Annotated[int | None, typer.Option(min=1, max=4096, help="Pixels to score at (bicubic).")]
BatchSize = Annotated[
    int, typer.Option(min=1, max=65536, help="Images in one batch; other sizes round otherwise.")
]
Out = Annotated[Path | None, typer.Option(help="Folder; default: evaluation/MODEL-HASH.")]
Show = Annotated[bool, typer.Option("--show", help="Print results.json files as one table.")]
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
    resize: Resize = None,
    out: Out = None,
    extractor: Extractor = None,
    inception_weights: Inception = None,
    show: Show = False,
    make_extractor: MakeExtractor = None,
    size: ImageSize = "256",
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Checkpoint, or a set of samples -> FID, sFID, IS, precision, recall, KID."""
    names = [*([model] if model else []), *(names or [])]
    if show:
        _show(names)
        return
    from moveimg.evaluation import run as runner

    if extractor is not None and inception_weights is not None:
        raise ValueError("--extractor and --inception-weights: expected one of the two")
    if make_extractor is not None:
        from moveimg.config import as_pair, parse_size
        from moveimg.evaluation.extractors import make_extractor as train

        pixels = as_pair(parse_size(size))
        accuracy = train(_one(names), pixels, device_of(device), make_extractor)
        print(f"{make_extractor}: {accuracy:.1%} of held-out real images recognised")
    elif samples is not None:
        if reference is None:
            raise ValueError("--samples needs a --reference to compare with")
        network = runner.open_extractor(reference, extractor, inception_weights, device_of(device))
        _report(runner.score(samples, reference, network, out))
    else:
        from moveimg.device import own_device
        from moveimg.evaluation.sample import make_plan
        from moveimg.pipeline import Pipeline

        name = _one(names) if names else DEFAULT_MODEL
        reference = reference or runner.REFERENCES.get(name)
        if reference is None:
            raise ValueError(f"{name} needs a --reference: imagenet256, an .npz or a folder")
        changes = _parse_settings(set or [])
        pipeline = Pipeline.from_pretrained(name, device=own_device(device), dtype=dtype)
        files = (extractor, inception_weights)
        network = runner.open_extractor(reference, *files, pipeline.device)
        num = num or (50_000 if network.class_names is None else 2_000)
        plan = make_plan(pipeline, num, seed, batch_size, resize, changes)
        done = runner.evaluate_model(pipeline, plan, reference, network, out)
        if done is not None:
            _report(done[0])
            print(f"-> {done[1]}/")


@command
def reconstruct(
    images: Annotated[str, typer.Argument(help="a data set's name, or a folder")],
    tokenizer: Annotated[Path, typer.Option(help="Directory of a tokenizer or model, or digits.")],
    size: ImageSize = "256",
    split: Annotated[Split, typer.Option(help="Of the images.")] = "val",
    out: Annotated[Path | None, typer.Option(help="A PNG of images and reconstructions.")] = None,
    rfid: Annotated[bool, typer.Option(help="Compute rFID, too.")] = True,
    reference: Annotated[
        str | None, typer.Option(help="For rFID: an .npz or folder; default: the images.")
    ] = None,
    extractor: Extractor = None,
    inception_weights: Inception = None,
    device: Device = None,
) -> None:
    """Images through a tokenizer and back: rFID, PSNR, SSIM and code usage, as JSON."""
    from moveimg.checkpoint import load_tokenizer
    from moveimg.config import as_pair, parse_size
    from moveimg.data import open_images
    from moveimg.evaluation import run as runner
    from moveimg.evaluation.reconstruct import reconstruct
    from moveimg.evaluation.reference import open_reference
    from moveimg.files import lock, require_file_name
    from moveimg.images import save_png

    if out is not None:
        require_file_name(out)
    pixels = as_pair(parse_size(size))
    vq = load_tokenizer(tokenizer, where := device_of(device))
    source = open_images(images, split)
    network = real = None
    if rfid:
        try:
            network = runner.open_extractor(
                reference or images, extractor, inception_weights, where
            )
        except FileNotFoundError as error:
            if extractor or inception_weights or reference:
                raise
            print(f"rFID left out: {error}", file=sys.stderr)  # nobody asked for Inception
    if network is not None and reference is not None:
        real = open_reference(reference, pixels, network)
    with nullcontext() if out is None else lock(out, "moveimg reconstruct"):
        figures, grid = reconstruct(source, vq, pixels, network, real)
        if out is not None:
            save_png(grid, out, figures)
    print_json(figures)


def _show(files: Sequence[str]) -> None:
    from moveimg.evaluation.run import read_results, results_table

    if not files:
        raise ValueError("--show: name one or more results.json files")
    print(results_table([read_results(Path(file)) for file in files]))


def _report(results: dict[str, Any]) -> None:
    """Warnings on stderr, the numbers as a Markdown table."""
    from moveimg.evaluation.run import results_table

    for line in results["warnings"]:
        print(f"warning: {line}", file=sys.stderr)
    print(results_table([results]))


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
