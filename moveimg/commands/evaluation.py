"""`moveimg evaluate` and `reconstruct`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option

from moveimg import DEFAULT_MODEL
from moveimg.commands import common
from moveimg.commands.common import command, device_of
from moveimg.config import as_pair, override, parse_size

Split = Literal["train", "val"]
Extractor = Annotated[
    Path | None, Option(help="efficientnet-lite0, or a file of --make-extractor.")
]
Inception = Annotated[Path | None, Option(help="Weights in torch-fidelity's layout.")]


@command
def evaluate(
    names: list[str] | None = Argument(
        None, help="A model; results.json files with --show; images with --make-extractor."
    ),
    reference: str | None = Option(
        None,
        help="imagenet256, an .npz, a folder, or a data set (NAME, NAME:val, NAME:val:0.1).",
    ),
    samples: Path | None = Option(None, help="Score this .npz or folder of images."),
    # not --num: torchrun reads that as an abbreviation of an option of its own
    num: int | None = Option(
        None, "--num-samples", min=4, help="50,000, or 2,000 with a classifier."
    ),
    seed: common.Seed = 0,
    batch_size: common.BatchSize = 100,
    set: common.Set = None,
    sweep: str | None = Option(None, metavar="KEY=A,B,...", help="As cfg_scale=1.25,1.5,1.75."),
    resize: int | None = Option(None, min=1, max=4096, help="Resize to these pixels (bicubic)."),
    out: Path | None = Option(None, help="Folder; default: evaluation/MODEL-HASH."),
    extractor: Extractor = None,
    inception_weights: Inception = None,
    show: bool = Option(False, "--show", help="Print results.json files as one table."),
    make_extractor: Path | None = Option(None, metavar="FILE", help="Train a classifier."),
    size: common.ImageSize = "256",
    device: common.Device = None,
    dtype: common.Dtype = None,
) -> None:
    """Measure FID, sFID, IS, precision, recall and KID of a model or a set of samples."""
    from moveimg.evaluation import run as runner

    names, files = names or [], (extractor, inception_weights)
    if show:
        if not names:
            raise ValueError("--show: name one or more results.json files")
        print(runner.results_table([runner.read_results(Path(file)) for file in names]))
    elif make_extractor is not None:
        from moveimg.evaluation.extractors import make_extractor as train

        pixels = as_pair(parse_size(size))
        accuracy = train(_one(names), pixels, device_of(device), make_extractor)
        print(f"{make_extractor}: {accuracy:.1%} of held-out real images recognised")
    elif samples is not None:
        if reference is None:
            raise ValueError("--samples needs a --reference to compare with")
        network = runner.open_extractor(reference, *files, device_of(device))
        _report([runner.score(samples, reference, network, out)])
    else:
        from moveimg.device import own_device
        from moveimg.evaluation.sample import make_plan
        from moveimg.pipeline import Pipeline

        name = _one(names or [DEFAULT_MODEL])
        reference = reference or runner.REFERENCES.get(name)
        if reference is None:
            raise ValueError(f"{name} needs a --reference: imagenet256, an .npz or a folder")
        changes = _list_changes(set or [], sweep)
        pipeline = Pipeline.from_pretrained(name, device=own_device(device), dtype=dtype)
        network = runner.open_extractor(reference, *files, pipeline.device)
        num = num or (50_000 if network.class_names is None else 2_000)
        results = []
        for changed in changes:
            plan = make_plan(pipeline, num, seed, batch_size, resize, override({}, changed))
            folder = out / changed[-1] if out and sweep else out
            if done := runner.evaluate_model(pipeline, plan, reference, network, folder):
                results.append(done[0])
                print(f"-> {done[1]}/", file=sys.stderr)
        if results:
            _report(results)


@command
def reconstruct(
    images: str = Argument(help="A data set's name, or a folder."),
    tokenizer: Path = Option(help="Directory of a tokenizer or model, or a bundled name."),
    size: common.ImageSize = "256",
    split: Split = Option("val", help="The split of the images."),
    out: Path | None = Option(None, help="A PNG of images and reconstructions."),
    rfid: bool = Option(True, help="Compute rFID."),
    reference: str | None = Option(None, help="For rFID: an .npz or folder; default: the images."),
    extractor: Extractor = None,
    inception_weights: Inception = None,
    device: common.Device = None,
) -> None:
    """Encode and decode images, and print rFID, PSNR, SSIM and code usage as JSON."""
    from moveimg.checkpoint import load_tokenizer
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
    source, network, real = open_images(images, split), None, None
    if rfid:
        files = (extractor, inception_weights)
        try:
            network = runner.open_extractor(reference or images, *files, where)
        except FileNotFoundError as error:
            if any((*files, reference)):
                raise
            print(f"rFID left out: {error}", file=sys.stderr)  # Inception was not asked for
    if network is not None and reference is not None:
        real = open_reference(reference, pixels, network)
    with nullcontext() if out is None else lock(out, "moveimg reconstruct"):
        figures, grid = reconstruct(source, vq, pixels, network, real)
        if out is not None:
            save_png(grid, out, figures)
    print(json.dumps(figures, indent=2))


def _list_changes(settings: list[str], sweep: str | None) -> list[list[str]]:
    """The settings KEY=VALUE of each set of samples: one for each value of a sweep KEY=A,B,..."""
    if sweep is None:
        return [settings]
    key, _, values = sweep.partition("=")
    if not values:
        raise ValueError(f"--sweep {sweep}: expected KEY=A,B,...")
    return [[*settings, f"{key}={value}"] for value in values.split(",")]


def _report(results: Sequence[dict[str, Any]]) -> None:
    """Print warnings on stderr and the metrics as a Markdown table."""
    from moveimg.evaluation.run import results_table

    for line in dict.fromkeys(line for result in results for line in result["warnings"]):
        print(f"warning: {line}", file=sys.stderr)
    print(results_table(results))


def _one(names: Sequence[str]) -> str:
    if len(names) != 1:
        raise ValueError(f"expected one model or image source (got {', '.join(names) or 'none'})")
    return names[0]
