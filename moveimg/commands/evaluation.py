"""`moveimg evaluate` and `reconstruct`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option

from moveimg import DEFAULT_MODEL
from moveimg.commands import common
from moveimg.commands.common import command, device_of
from moveimg.config import SamplingSettings, as_pair, override, parse_size

Split = Literal["train", "val"]


class Refusal(StrEnum):
    """The guards that can be overruled; without the others there would be nothing to compute."""

    duplicate = "duplicate-images"
    blank = "blank-images"
    narrow = "narrow-range"
    size = "wrong-size"
    validation = "validation-reference"
    training = "training-reference"


Extractor = Annotated[Path | None, Option(help="A classifier of --make-extractor.")]
Inception = Annotated[Path | None, Option(help="Weights in torch-fidelity's layout.")]
Allow = Annotated[list[Refusal] | None, Option(help="Overrule the guard of this name.")]


@command
def evaluate(
    names: list[str] | None = Argument(
        None, help="A model; results.json files with --show; images with --make-..."
    ),
    reference: str | None = Option(None, help="imagenet64/..., a data set, an .npz or a folder."),
    samples: Path | None = Option(None, help="Score this .npz or folder of any program."),
    # not --num: torchrun reads that as an abbreviation of an option of its own
    num: int | None = Option(
        None, "--num-samples", min=4, help="50,000, or 2,000 with classifier."
    ),
    seed: common.Seed = 0,
    batch_size: common.BatchSize = 100,
    set: common.Set = None,
    sweep: str | None = Option(None, metavar="KEY=A:B:STEP", help="As cfg_scale=1.25:2.5:0.25."),
    resize: int | None = Option(None, min=1, max=4096, help="Pixels to score at (bicubic)."),
    out: Path | None = Option(None, help="Folder; default: evaluation/MODEL-HASH."),
    extractor: Extractor = None,
    inception_weights: Inception = None,
    allow: Allow = None,
    show: bool = Option(False, "--show", help="Print results.json files as one table."),
    make_reference: Path | None = Option(None, metavar="FILE", help="Make an .npz of images."),
    make_extractor: Path | None = Option(None, metavar="FILE", help="Train a classifier on them."),
    split: Split = Option("train", help="Of the images (--make-reference)."),
    size: common.ImageSize = "256",
    device: common.Device = None,
    dtype: common.Dtype = None,
) -> None:
    """Checkpoint, or a set of samples -> FID, sFID, IS, precision, recall, KID."""
    from moveimg.evaluation import results
    from moveimg.evaluation import run as runner

    names, pixels, files = names or [], as_pair(parse_size(size)), (extractor, inception_weights)
    if show:
        if not names:
            raise ValueError("--show: name one or more results.json files")
        tables = [results.read_results(Path(file)) for file in names]
        print(results.results_table(tables, published=True))
    elif make_extractor is not None:
        accuracy = runner.make_extractor(_one(names), pixels, device_of(device), make_extractor)
        print(f"{make_extractor}: {accuracy:.1%} of held-out real images recognised")
    elif make_reference is not None:
        network = runner.open_extractor(None, *files, device_of(device))
        made = runner.make_reference(_one(names), split, pixels, network, make_reference)
        print(json.dumps(made, indent=2))
    elif samples is not None:
        if reference is None:
            raise ValueError("--samples needs a --reference to compare with")
        network = runner.open_extractor(reference, *files, device_of(device))
        _report([runner.score_files(samples, reference, network, allow or [], out)])
    else:
        from moveimg.device import own_device
        from moveimg.evaluation.sample import make_plan
        from moveimg.pipeline import Pipeline

        name = _one(names or [DEFAULT_MODEL])
        reference, changes = reference or runner.default_reference(name), override({}, set or [])
        swept = _parse_sweep(sweep) if sweep else None
        changed = [changes | {swept[0]: value} for value in swept[1]] if swept else [changes]
        pipeline = Pipeline.from_pretrained(name, device=own_device(device), dtype=dtype)
        network = runner.open_extractor(reference, *files, pipeline.device)
        num = num or (50_000 if network.class_names is None else 2_000)
        plans = [make_plan(pipeline, num, seed, batch_size, resize, made) for made in changed]
        done = runner.evaluate_model(pipeline, plans, reference, network, allow or [], out, swept)
        if done is not None:
            _report(done[0])
            print(f"-> {done[1]}/")


@command
def reconstruct(
    images: str = Argument(help="A data set's name, or a folder."),
    tokenizer: Path = Option(help="Directory of a tokenizer or model, or a bundled name."),
    size: common.ImageSize = "256",
    split: Split = Option("val", help="Of the images."),
    out: Path | None = Option(None, help="A PNG of images and reconstructions."),
    rfid: bool = Option(True, help="Compute rFID, too."),
    reference: str | None = Option(None, help="For rFID: an .npz or folder; default: the images."),
    extractor: Extractor = None,
    inception_weights: Inception = None,
    allow: Allow = None,
    device: common.Device = None,
) -> None:
    """Images through a tokenizer and back: rFID, PSNR, SSIM and code usage, as JSON."""
    from moveimg.checkpoint import load_tokenizer
    from moveimg.data import open_images
    from moveimg.evaluation import run as runner
    from moveimg.evaluation.reconstruct import reconstruct
    from moveimg.evaluation.reference import open_reference
    from moveimg.evaluation.scoring import Guards
    from moveimg.files import lock
    from moveimg.images import save_png

    pixels = as_pair(parse_size(size))
    vq = load_tokenizer(tokenizer, where := device_of(device))
    source, guards, network, real = open_images(images, split), Guards(allow or []), None, None
    if rfid:
        files = (extractor, inception_weights)
        try:
            network = runner.open_extractor(reference or images, *files, where)
        except FileNotFoundError as error:
            if any((*files, reference)):
                raise
            print(f"rFID left out: {error}", file=sys.stderr)  # nobody asked for Inception
    if network is not None and reference is not None:
        real = open_reference(reference, pixels, network, runner.features_cache())
    if split == "train" and rfid and reference is None:
        text = "the tokenizer may have been trained on them: rFID is published on --split val"
        guards.warn("training-images", text)
    with lock(out, "moveimg reconstruct") if out else nullcontext():
        figures, grid = reconstruct(source, vq, pixels, network, real, guards)
        if out is not None:
            save_png(grid, out, figures)
    print(json.dumps(figures, indent=2))


def _report(scored: Sequence[dict[str, Any]]) -> None:
    """Warnings on stderr, the numbers as Markdown rows."""
    from moveimg.evaluation.results import results_table

    for line in dict.fromkeys(line for result in scored for line in result["warnings"]):
        print(f"warning: {line}", file=sys.stderr)
    print(results_table(scored))


def _one(names: Sequence[str]) -> str:
    if len(names) != 1:
        raise ValueError(f"expected one model or image source (got {', '.join(names) or 'none'})")
    return names[0]


def _parse_sweep(text: str) -> tuple[str, list[float]]:
    """`cfg_scale=1:2:0.5` -> its key, and 1.0, 1.5, 2.0."""
    key, _, ends = text.partition("=")
    if key not in (known := SamplingSettings.model_fields):
        raise ValueError(f"--sweep {key}: expected one of {', '.join(known)}")
    try:
        first, last, step = (float(part) for part in ends.split(":"))
        count = round((last - first) / step) + 1
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(f"--sweep {text}: expected KEY=FIRST:LAST:STEP") from None
    if not 1 <= count <= 1000:
        raise ValueError(f"--sweep {text}: expected FIRST:LAST:STEP with LAST beyond FIRST")
    return key, [round(first + i * step, 10) for i in range(count)]
