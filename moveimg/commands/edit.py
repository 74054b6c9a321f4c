"""`moveimg edit` and `moveimg score`."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moveimg import DEFAULT_MODEL
from moveimg.commands.common import (
    BatchSize,
    Compile,
    Device,
    Dtype,
    Num,
    Seed,
    check_images,
    check_model_name,
    command,
    count,
    device_of,
    sampling_options,
)

if TYPE_CHECKING:
    from PIL import Image

    from moveimg.data import ImageSource
    from moveimg.pipeline import Pipeline

Model = Annotated[str, typer.Option(help="A name, a model directory or a Hub id.")]
SHOWN = 10  # images of each end in the grid of `score`


@command
@sampling_options
def edit(
    *,
    image: Annotated[Path, typer.Argument(help="An image file; cropped to the model's size.")],
    classes: Annotated[
        list[str] | None, typer.Argument(help="Class names or indices; default: the likeliest.")
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(help="Complete: top, bottom, left, right, rows of codes, a box or a mask."),
    ] = None,
    hole: Annotated[
        str | None,
        typer.Option(help="Draw anew: an area; boxes are left,top,right,bottom."),
    ] = None,
    passes: Annotated[
        int,
        typer.Option(
            min=0,
            max=1000,
            help="Resampling passes, to fit the kept codes after the hole, too.",
        ),
    ] = 0,
    model: Model = DEFAULT_MODEL,
    num: Num = 4,
    seed: Seed = 0,
    settings: dict,
    out: Annotated[Path, typer.Option(help="The folder for the images.")] = Path("edited"),
    device: Device = None,
    dtype: Dtype = None,
    compile: Compile = False,
) -> None:
    """Complete an image, draw a part of it anew, or change its class.

    With --keep, the kept part is decoded from its codes; with --hole, pixels outside the hole stay
    those of the image. Without both, the upper half is kept.
    """
    if keep is not None and hole is not None:
        raise ValueError("--keep and --hole: expected one of the two")
    check_model_name(model)
    if not image.is_file():
        raise FileNotFoundError(f"{image}: no such image file")
    device_of(device)
    from moveimg.images import labelled_grid, read_image, save_png
    from moveimg.pipeline import Pipeline

    if keep is None and hole is None:
        keep = "top"
    area = _parse_area(str(hole if keep is None else keep))
    original = read_image(image, str(image))
    pipeline = Pipeline.from_pretrained(model, device=device, dtype=dtype, compile=compile)
    names = pipeline.class_names
    pipeline.hole(area)  # refused before the image is classified
    if not classes:
        likeliest, share = pipeline.classify([original], top_k=1)[0][0]
        print(f"class {likeliest} ({share:.1%} by likelihood)")
        classes = [str(names.index(likeliest))]
    labels = [pipeline.label(name) for name in classes]
    options: dict[str, Any] = {"num": num, "seed": seed, "passes": passes, **settings}
    if hole is None:
        images = pipeline.complete(original, labels, keep=area, **options)
    else:
        images = pipeline.edit(original, labels, hole=area, **options)
    out.mkdir(parents=True, exist_ok=True)
    about = {"model": model, "image": image.name, "keep": keep, "hole": hole, **options}
    for i, edited in enumerate(images):
        label = labels[i // num]
        described = about | {"class": label, "class_name": names[label], "seed": seed + i}
        save_png(edited, out / f"{image.stem}-{label:04d}-seed{seed + i}.png", described)
    rows = [[pipeline.crop(original), *images[i : i + num]] for i in range(0, len(images), num)]
    save_png(labelled_grid(rows, [names[label] for label in labels]), out / "grid.png", about)
    print(f"{count(len(images), 'image')} -> {out}/ (beside the original: {out / 'grid.png'})")


@command
def score(
    source: Annotated[str, typer.Argument(help="A folder of images, by class or not, or a set.")],
    class_name: Annotated[
        str | None,
        typer.Option("--class", help="The class of all images; default: that of their folder."),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="train, val or test; default: val, if there are splits.")
    ] = None,
    classify: Annotated[
        bool, typer.Option("--classify", help="Find the likeliest class, too (takes C passes).")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Score this many images, spread over the source.")
    ] = None,
    model: Model = DEFAULT_MODEL,
    batch_size: BatchSize = 32,
    out: Annotated[Path, typer.Option(help="The table; a grid is beside it.")] = Path("scores.csv"),
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Write the likelihood of each image as CSV, the strangest first.

    Images in class folders are scored given their class; images without class, given --class or
    their likeliest class.
    """
    check_images(source)
    check_model_name(model)
    device_of(device)
    from moveimg.files import require_file_name, write_text
    from moveimg.images import labelled_grid, save_png
    from moveimg.pipeline import Pipeline

    require_file_name(out)
    if out.suffix == ".png":
        raise ValueError(f"--out {out}: expected another suffix, such as .csv; a .png is beside it")
    pipeline = Pipeline.from_pretrained(model, device=device, dtype=dtype)
    images, labels = _open_labelled(source, split, class_name, pipeline)
    if limit is not None and limit < len(images):
        import numpy as np

        spread = np.linspace(0, len(images) - 1, limit).round().astype(int)
        images, labels = images.select(spread), None if labels is None else labels[spread]
    names = pipeline.class_names
    table: list[tuple[dict[str, Any], int]] = []
    right = 0
    for rows, batch in _read_batches(images, batch_size):
        codes = pipeline.encode(batch)
        guesses: list[tuple[int, float]] = []
        if classify or labels is None:
            likeliest = pipeline.classify(codes, top_k=1)
            guesses = [(names.index(name), share) for ((name, share),) in likeliest]
        given = [label for label, _ in guesses] if labels is None else labels[rows].tolist()
        found = pipeline.log_likelihood(codes, given)
        for i, row in enumerate(rows):
            line: dict[str, Any] = {"image": images.identifiers[row], "class": names[given[i]]}
            for key in ("nats_per_code", "bits_per_code", "bits_per_pixel"):
                line[key] = getattr(found, key)[i].item()
            if guesses:
                line["likeliest"], line["probability"] = names[guesses[i][0]], guesses[i][1]
                right += guesses[i][0] == given[i]
            table.append((line, row))
    table.sort(key=lambda entry: -entry[0]["nats_per_code"])
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, table[0][0], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _round(value) for key, value in line.items()} for line, _ in table)
    write_text(out, text.getvalue())
    ends = {"strangest": table[:SHOWN], "likeliest": table[::-1][:SHOWN]}
    shown = [[pipeline.crop(images.load(row)) for _, row in end] for end in ends.values()]
    save_png(labelled_grid(shown, [*ends]), out.with_suffix(".png"), {"source": source})
    mean = sum(line["nats_per_code"] for line, _ in table) / len(table)
    print(f"{count(len(table), 'image')}: {mean:.4f} nats per code -> {out}, {out.stem}.png")
    if classify and labels is not None:
        print(f"accuracy by likelihood: {right / len(table):.2%}")


def _parse_area(text: str) -> Any:
    """A half's name, rows of codes, a box `left,top,right,bottom`, or the file of a mask."""
    numbers = text.split(",")
    if all(number.strip().isdecimal() for number in numbers):
        values = [int(number) for number in numbers]
        return values[0] if len(values) == 1 else values
    if not Path(text).is_file():
        return text  # a half, or refused
    from moveimg.images import read_image

    return read_image(Path(text), text)


def _open_labelled(
    source: str, split: str | None, class_name: str | None, pipeline: Pipeline
) -> tuple[ImageSource, Any]:
    """Images, and their labels [N] in the model's numbering; None where they have no class."""
    import numpy as np

    from moveimg.data import find_splits, open_flat_folder, open_images
    from moveimg.images import SUFFIXES

    folder = Path(source)
    flat = folder.is_dir() and any(p.suffix.lower() in SUFFIXES for p in folder.iterdir())
    if flat:
        if split is not None:
            raise ValueError(f"--split {split}: '{source}' is a folder of images without splits")
        images = open_flat_folder(folder)
    elif split is None and folder.is_dir() and not find_splits(folder):
        images = open_images(source, "train", 0.0)  # all of them
    else:
        images = open_images(source, split or "val")  # type: ignore[arg-type]
    if class_name is not None:
        return images, np.full(len(images), pipeline.label(class_name))
    if flat:
        return images, None
    try:
        labels = np.array([pipeline.label(name) for name in images.class_names])
    except ValueError as error:
        raise ValueError(f"{source}: {error}; --class gives all images one class") from None
    return images, labels[images.labels]


def _read_batches(
    images: ImageSource, batch_size: int
) -> Iterator[tuple[list[int], list[Image.Image]]]:
    """Row numbers and images, batch by batch; unreadable images are left out and named."""
    from moveimg.data import report_unreadable
    from moveimg.images import UnreadableImageError
    from moveimg.progress import progress_bar

    unreadable: list[str] = []
    with progress_bar(len(images), "score", "image", delay=2) as bar:
        for first in range(0, len(images), batch_size):
            rows, batch = [], []
            for row in range(first, min(first + batch_size, len(images))):
                try:
                    batch.append(images.load(row))
                    rows.append(row)
                except UnreadableImageError as error:
                    unreadable.append(str(error))
            if rows:
                yield rows, batch
            bar.update(min(batch_size, len(images) - first))
    report_unreadable(unreadable, len(images))
    if len(unreadable) == len(images):
        raise ValueError(f"none of {len(images)} images could be read")


def _round(value: Any) -> Any:
    return f"{value:.5f}" if isinstance(value, float) else value
