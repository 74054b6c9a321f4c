"""`moveimg evaluate` and `reconstruct`."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option

from moveimg import DEFAULT_MODEL
from moveimg.commands import common
from moveimg.commands.common import command, prepare_device
from moveimg.config import as_pair, override, parse_size

Split = Literal["train", "val"]
Extractor = Annotated[Path | None, Option(help="A classifier's file, or efficientnet-lite0.")]
Inception = Annotated[Path | None, Option(help="Inception-v3 in torch-fidelity's layout.")]


@command
def evaluate(
    names: list[str] = Argument(None, help="A model; --show: files; --make-extractor: images."),
    reference: str | None = Option(None, help="imagenet256, an .npz, a folder or a data set."),
    samples: Path | None = Option(None, help="Score this .npz or folder of images."),
    # not --num, which torchrun takes for an abbreviation of a torchrun option
    num: int | None = Option(
        None, "--num-samples", min=4, help="Default: 50,000; 2,000 with a classifier."
    ),
    seed: common.Seed = 0,
    batch_size: common.BatchSize = 100,
    set: common.Set = None,
    sweep: str | None = Option(None, metavar="KEY=A,B,...", help="Evaluate each value."),
    resize: int | None = Option(None, min=1, max=4096, help="Side to resize to (bicubic)."),
    out: Path | None = Option(None, help="Output folder; default: evaluation/MODEL-HASH."),
    extractor: Extractor = None,
    inception_weights: Inception = None,
    show: bool = Option(False, "--show", help="Print results.json files as one table."),
    make_extractor: Path | None = Option(
        None, metavar="FILE", help="Train a classifier on images into FILE."
    ),
    size: str = Option("256", help="With --make-extractor: pixels of a side, or HEIGHTxWIDTH."),
    device: common.Device = None,
    dtype: common.Dtype = None,
) -> None:
    """Measure FID, sFID, IS, precision, recall and KID of a model or a set of samples."""
    from moveimg.checkpoint import read_class_names
    from moveimg.device import resolve_device
    from moveimg.evaluation import extractors, run, sets
    from moveimg.evaluation.reference import open_reference
    from moveimg.pipeline import Pipeline, resolve

    names, files = names or [], (extractor, inception_weights)
    if ((show or make_extractor) and not names) or (len(names) > 1 and not show):
        given = ", ".join(names) or "none"
        raise ValueError(f"expected one model, image source or results.json (got {given})")
    if show:
        print(run.results_table([run.read_results(Path(file)) for file in names]))
        return
    name = names[0] if names else DEFAULT_MODEL
    if make_extractor is not None:
        pixels = as_pair(parse_size(size))
        accuracy = extractors.train_classifier(name, pixels, prepare_device(device), make_extractor)
        print(f"{make_extractor}: {accuracy:.1%} of held-out real images recognised")
        return
    reference = reference or (None if samples else run.REFERENCES.get(name))
    if reference is None:
        raise ValueError(f"{samples or name}: expected --reference imagenet256, .npz or folder")
    results: list[dict[str, Any]] = []
    if samples is not None:
        network = run.open_extractor(reference, *files, prepare_device(device))
        classes = read_class_names(resolve(name)) if names else None
        images = sets.open_set(samples)
        real = open_reference(reference, images.size, network)
        about = {"name": samples.name}
        results.append(run.score(images, real, network, classes, about, out))
    else:
        pipeline = Pipeline.from_pretrained(name, device=resolve_device(device), dtype=dtype)
        network = run.open_extractor(reference, *files, pipeline.device)
        num = num or (50_000 if network.class_names is None else 2_000)
        for folder, changes in _list_changes(out, set or [], sweep):
            plan = run.make_plan(pipeline, num, seed, batch_size, resize, **changes)
            if done := run.evaluate_model(pipeline, plan, reference, network, folder):
                results.append(done)
    for line in dict.fromkeys(line for result in results for line in result["warnings"]):
        print(f"warning: {line}", file=sys.stderr)
    if results:
        print(run.results_table(results))


def _list_changes(out: Path | None, settings: list[str], sweep: str | None) -> list[Any]:
    """Return the folder and the settings of each set, one per value of the sweep KEY=A,B,..."""
    key, _, values = (sweep or "").partition("=")
    if sweep and not values:
        raise ValueError(f"--sweep {sweep}: expected KEY=A,B,...")
    sets = [[f"{key}={value}"] for value in values.split(",")] if sweep else [[]]
    return [(out and out.joinpath(*own), override({}, [*settings, *own])) for own in sets]


@command
def reconstruct(
    images: str = Argument(help="A data set's name or a folder."),
    tokenizer: Path = Option(help="Directory of a tokenizer or model, or a bundled model."),
    size: common.ImageSize = "256",
    split: Split = Option("val", help="The split of the images."),
    out: Path | None = Option(None, help="A PNG of images and reconstructions."),
    rfid: bool = Option(True, help="Compute rFID."),
    reference: str | None = Option(None, help="rFID's .npz or folder; default: the images."),
    extractor: Extractor = None,
    inception_weights: Inception = None,
    device: common.Device = None,
) -> None:
    """Encode and decode images, and print rFID, PSNR, SSIM and code usage as JSON."""
    from moveimg.checkpoint import load_tokenizer
    from moveimg.data import open_images
    from moveimg.evaluation.reconstruct import reconstruct
    from moveimg.evaluation.reference import open_reference
    from moveimg.evaluation.run import open_extractor
    from moveimg.files import lock
    from moveimg.images import save_png

    pixels = as_pair(parse_size(size))
    vq = load_tokenizer(tokenizer, where := prepare_device(device))
    source, network, real = open_images(images, split), None, None
    files = (extractor, inception_weights)
    try:
        if rfid:
            network = open_extractor(reference or images, *files, where)
    except FileNotFoundError as error:
        if any((*files, reference)):
            raise
        print(f"rFID left out: {error}", file=sys.stderr)  # no option asked for Inception
    with nullcontext() if out is None else lock(out, "moveimg reconstruct"):
        if network is not None and reference is not None:
            real = open_reference(reference, pixels, network)
        results, grid = reconstruct(source, vq, pixels, network, real)
        if out is not None:
            save_png(grid, out, results)
    print(json.dumps(results, indent=2))
