"""`moveimg evaluate` and `reconstruct`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from enum import StrEnum
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


class Refusal(StrEnum):
    """The guards that can be overruled; without the others there would be nothing to compute."""

    duplicate = "duplicate-images"
    blank = "blank-images"
    narrow = "narrow-range"
    size = "wrong-size"
    validation = "validation-reference"
    training = "training-reference"


Extractor = Annotated[
    Path | None,
    typer.Option(help="Instead of Inception: efficientnet-lite0, or a file of --make-extractor."),
]
Inception = Annotated[
    Path | None, typer.Option(help="Weights in torch-fidelity's layout; default: downloaded.")
]
Allow = Annotated[list[Refusal] | None, typer.Option(help="Overrule the guard of this name.")]
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
Sweep = Annotated[
    str | None,
    typer.Option(metavar="KEY=A:B:STEP", help="A table and a plot, as cfg_scale=1.25:2.5:0.25."),
]
Resize = Annotated[int | None, typer.Option(min=1, max=4096, help="Pixels to score at (bicubic).")]
BatchSize = Annotated[
    int, typer.Option(min=1, max=65536, help="Images in one batch; other sizes round otherwise.")
]
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
    out: Out = None,
    extractor: Extractor = None,
    inception_weights: Inception = None,
    allow: Allow = None,
    show: Show = False,
    make_reference: MakeReference = None,
    make_extractor: MakeExtractor = None,
    split: Annotated[Split, typer.Option(help="Of the images (--make-reference).")] = "train",
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

    pixels = as_pair(parse_size(size))
    if make_extractor is not None:
        accuracy = runner.make_extractor(_one(names), pixels, device_of(device), make_extractor)
        print(f"{make_extractor}: {accuracy:.1%} of held-out real images recognised")
    elif make_reference is not None:
        network = runner.open_extractor(None, extractor, inception_weights, device_of(device))
        print_json(runner.make_reference(_one(names), split, pixels, network, make_reference))
    elif samples is not None:
        if reference is None:
            raise ValueError("--samples needs a --reference to compare with")
        network = runner.open_extractor(reference, extractor, inception_weights, device_of(device))
        _report([runner.score_files(samples, reference, network, allow or [], out)])
    else:
        from moveimg.config import SamplingSettings
        from moveimg.device import own_device
        from moveimg.evaluation.sample import make_plan
        from moveimg.pipeline import Pipeline

        name = _one(names) if names else DEFAULT_MODEL
        reference = reference or runner.default_reference(name)
        changes = _parse_settings(set or [])
        swept = None if sweep is None else _parse_sweep(sweep, SamplingSettings.model_fields)
        changed = [changes | {swept[0]: value} for value in swept[1]] if swept else [changes]
        pipeline = Pipeline.from_pretrained(name, device=own_device(device), dtype=dtype)
        files = (extractor, inception_weights)
        network = runner.open_extractor(reference, *files, pipeline.device)
        num = num or (50_000 if network.class_names is None else 2_000)
        plans = [make_plan(pipeline, num, seed, batch_size, resize, made) for made in changed]
        done = runner.evaluate_model(pipeline, plans, reference, network, allow or [], out, swept)
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
    allow: Allow = None,
    device: Device = None,
) -> None:
    """Images through a tokenizer and back: rFID, PSNR, SSIM and code usage, as JSON."""
    from moveimg.checkpoint import load_tokenizer
    from moveimg.config import as_pair, parse_size
    from moveimg.data import open_images
    from moveimg.evaluation import run as runner
    from moveimg.evaluation.reconstruct import reconstruct
    from moveimg.evaluation.reference import open_reference
    from moveimg.evaluation.scoring import Guards
    from moveimg.files import lock, require_file_name
    from moveimg.images import save_png

    if out is not None:
        require_file_name(out)
    pixels = as_pair(parse_size(size))
    vq = load_tokenizer(tokenizer, where := device_of(device))
    source, guards = open_images(images, split), Guards(allow or [])
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
        real = open_reference(reference, pixels, network, runner.features_cache())
    if split == "train" and rfid and reference is None:
        text = "the tokenizer may have been trained on them: rFID is published on --split val"
        guards.warn("training-images", text)
    with nullcontext() if out is None else lock(out, "moveimg reconstruct"):
        figures, grid = reconstruct(source, vq, pixels, network, real, guards)
        if out is not None:
            save_png(grid, out, figures)
    print_json(figures)


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


def _parse_sweep(text: str, known: Iterable[str]) -> tuple[str, list[float]]:
    """`cfg_scale=1:2:0.5` -> its key, and 1.0, 1.5, 2.0."""
    key, _, ends = text.partition("=")
    if key not in known:
        raise ValueError(f"--sweep {key}: expected one of {', '.join(known)}")
    try:
        first, last, step = (float(part) for part in ends.split(":"))
        count = round((last - first) / step) + 1
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(f"--sweep {text}: expected KEY=FIRST:LAST:STEP") from None
    if not 1 <= count <= 1000:
        raise ValueError(f"--sweep {text}: expected FIRST:LAST:STEP with LAST beyond FIRST")
    return key, [round(first + i * step, 10) for i in range(count)]
