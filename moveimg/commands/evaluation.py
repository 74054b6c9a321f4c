"""`moveimg evaluate` and `reconstruct`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from moveimg.commands.common import Device, Dtype, command, device_of, print_json


class Split(StrEnum):
    """Which part of an image source."""

    train = "train"
    val = "val"


Extractor = Annotated[
    Path | None, typer.Option(help="a classifier of --make-extractor, instead of Inception")
]
Inception = Annotated[
    Path | None, typer.Option(help="weights in torch-fidelity's layout (default: downloaded)")
]
Allow = Annotated[
    list[str] | None, typer.Option(metavar="GUARD", help="go on where this guard refuses")
]


What = Annotated[
    list[str] | None,
    typer.Argument(help="a model (default: digits); with --show results; with --make-... images"),
]
Reference = Annotated[
    str | None, typer.Option(help="imagenet64/128/256/512, digits, an .npz or a folder")
]
Samples = Annotated[Path | None, typer.Option(help="score this .npz or folder, of any program")]
Num = Annotated[  # not --num: torchrun takes that for the beginning of an option of its own
    int | None,
    typer.Option("--num-samples", min=1, help="default: 50000; with a classifier 2000"),
]
Sampling = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="a sampling setting, as cfg_scale=1.5"),
]
Sweep = Annotated[
    str | None,
    typer.Option(metavar="KEY=A:B:STEP", help="a table and a plot, as cfg_scale=1.25:2.5:0.25"),
]
Resize = Annotated[int | None, typer.Option(min=1, help="pixels to score at (bicubic)")]
Png = Annotated[bool, typer.Option(help="keep samples as PNGs, not as an .npz")]
Out = Annotated[Path | None, typer.Option(help="folder (default: evaluation/MODEL-HASH)")]
Show = Annotated[bool, typer.Option("--show", help="lay results.json files side by side")]
MakeReference = Annotated[
    Path | None, typer.Option(metavar="FILE", help="make an .npz of a folder of real images")
]
MakeExtractor = Annotated[
    Path | None, typer.Option(metavar="FILE", help="train a classifier on a folder of images")
]


@command
def evaluate(
    what: What = None,
    reference: Reference = None,
    samples: Samples = None,
    num: Num = None,
    seed: Annotated[int, typer.Option(help="image i is drawn with seed + i")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="images drawn side by side")] = 100,
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
    split: Annotated[Split, typer.Option(help="of the images (--make-reference)")] = Split.train,
    size: Annotated[int, typer.Option(min=8, help="pixels of a side (--make-...)")] = 256,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Checkpoint, or a set of samples -> FID, sFID, IS, precision, recall, KID."""
    named = what or []
    if show:
        _show(named)
        return
    from moveimg.evaluation import run as runner
    from moveimg.evaluation.guards import check_allowed

    check_allowed(allow or [])
    against = runner.Comparison(reference, extractor, inception_weights, allow or [])
    if make_extractor is not None:
        accuracy = runner.make_extractor(_one(named), size, device_of(device), make_extractor)
        print(f"{make_extractor}: {accuracy:.1%} of held-out real images recognised")
    elif make_reference is not None:
        images, where = _one(named), device_of(device)
        about = runner.make_reference(images, split.value, size, against, where, make_reference)
        print_json(about)
    elif samples is not None:
        _report([runner.score_files(samples, against, device_of(device), out)])
    else:
        drawn = runner.Sampling(num, seed, batch_size, resize, png, _settings(set or []))
        model = _one(named) if named else "digits"
        _draw_and_score(model, against, drawn, sweep, out, device, dtype)


def _draw_and_score(
    model: str,
    against: Any,
    drawn: Any,
    sweep: str | None,
    out: Path | None,
    device: str | None,
    dtype: str | None,
) -> None:
    from moveimg.evaluation import run as runner

    if sweep is None:
        done = runner.evaluate_model(model, against, drawn, out, device, dtype)
        if done is not None:
            _report([done[0]])
            print(f"-> {done[1]}")
        return
    key, values = _values(sweep)
    swept = runner.sweep(model, against, drawn, key, values, out, device, dtype)
    if swept is not None:
        _report(swept[0])
        print(f"-> {swept[1]}/ (sweep.md, sweep.png)")


@command
def reconstruct(
    images: Annotated[str, typer.Argument(help="a folder of class subfolders, or `digits`")],
    tokenizer: Annotated[Path, typer.Option(help="a tokenizer's directory, a model's, or digits")],
    size: Annotated[int, typer.Option(min=1, help="pixels of a side")] = 256,
    ratio: Annotated[float, typer.Option("--range", help="cut from size * range pixels")] = 1.0,
    split: Annotated[Split, typer.Option(help="which part of the images")] = Split.val,
    out: Annotated[Path | None, typer.Option(help="a PNG of images and reconstructions")] = None,
    rfid: Annotated[bool, typer.Option(help="compute rFID, too")] = True,
    reference: Annotated[
        str | None, typer.Option(help="for rFID: an .npz or folder (default: the images)")
    ] = None,
    extractor: Extractor = None,
    inception_weights: Inception = None,
    allow: Allow = None,
    device: Device = None,
) -> None:
    """Images through a tokenizer and back: rFID, PSNR, SSIM and code usage, as JSON."""
    from moveimg.checkpoint import load_tokenizer
    from moveimg.data import open_images
    from moveimg.evaluation import run as runner
    from moveimg.evaluation.guards import check_allowed
    from moveimg.evaluation.reconstruct import reconstruct
    from moveimg.files import require_file_name
    from moveimg.images import save_png

    check_allowed(allow or [])
    if out is not None:
        require_file_name(out)
    vq = load_tokenizer(tokenizer, where := device_of(device))
    source = open_images(images, split.value)
    against = runner.Comparison(reference or images, extractor, inception_weights, allow or [])
    eyes = _eyes(against, where, reference) if rfid else None
    real = None
    if eyes is not None and reference is not None:
        real = runner.load_reference(against, (size, size), eyes, runner.features_cache())
    if split is Split.train and rfid and reference is None:
        print("warning: the tokenizer may have seen these images: rFID is published on validation "
              "images (--split val)", file=sys.stderr)  # fmt: skip
    found, picture = reconstruct(source, vq, size, ratio, eyes, real, allow or [])
    if out is not None:
        save_png(picture, out, found.as_dict())
    print_json(found.as_dict())


def _eyes(against: Any, device: Any, reference: str | None) -> Any:
    """The extractor; None, and a line on stderr, where Inception was not asked for nor is here."""
    from moveimg.evaluation.run import open_extractor

    try:
        return open_extractor(against, device)
    except FileNotFoundError as error:
        if against.extractor or against.inception_weights or reference:
            raise
        print(f"rFID left out: {error}", file=sys.stderr)
        return None


def _show(files: Sequence[str]) -> None:
    from moveimg.evaluation.results import markdown_table, read_results

    if not files:
        raise ValueError("--show: name one or more results.json files")
    print(markdown_table([read_results(Path(file)) for file in files], peers=True))


def _report(results: Sequence[dict[str, Any]]) -> None:
    """Warnings on stderr, the numbers as Markdown rows."""
    from moveimg.evaluation.results import markdown_table

    for line in dict.fromkeys(line for result in results for line in result["warnings"]):
        print(f"warning: {line}", file=sys.stderr)
    if results:
        print(markdown_table(results))


def _one(named: Sequence[str]) -> str:
    if len(named) != 1:
        given = f"{len(named)} ({', '.join(named)})" if named else "none"
        raise ValueError(f"expected one name of images or of a model, and {given} given")
    return named[0]


def _settings(given: Sequence[str]) -> dict[str, Any]:
    from moveimg.files import parse_yaml

    pairs = [text.partition("=") for text in given]
    for key, equals, _ in pairs:
        if not equals:
            raise ValueError(f"--set {key}: expected KEY=VALUE")
    return {key: parse_yaml(value, f"--set {key}={value}") for key, _, value in pairs}


def _values(text: str) -> tuple[str, list[float]]:
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
