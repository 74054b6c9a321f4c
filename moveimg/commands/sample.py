"""`moveimg sample`, `edit` and `score`."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

from typer import Argument, Option

from moveimg import DEFAULT_MODEL
from moveimg.commands import common
from moveimg.commands.common import command, format_count, prepare_device, sampling_options

GRID = (64, 32)  # maximum rows and columns of grid.png


@command
@sampling_options
def sample(
    *,
    classes: common.Classes = None,
    model: common.Model = DEFAULT_MODEL,
    num: common.Num = 2,
    seed: common.Seed = 0,
    settings: dict,
    batch_size: common.BatchSize = 32,
    out: Path = Option(Path("samples"), help="The folder for the images."),
    device: common.Device = None,
    dtype: common.Dtype = None,
    quantize: common.Quantize = None,
    compile: common.Compile = False,
    bank: common.Bank = None,
) -> None:
    """Draw images of classes (default: the first 20) as PNG files and a labelled grid."""
    prepare_device(device)
    from moveimg.files import lock
    from moveimg.images import draw_grid, save_png
    from moveimg.pipeline import Pipeline
    from moveimg.progress import progress_bar

    pipeline = Pipeline.from_pretrained(
        model, device=device, dtype=dtype, quantize=quantize, compile=compile, bank=bank
    )
    names = pipeline.class_names
    chosen = [pipeline.label(name) for name in classes or range(min(20, len(names)))]
    labels = [label for label in chosen for _ in range(num)]
    sampling = pipeline.settings(**settings)
    shown = Path(model).resolve().name if Path(model).is_dir() else model  # not its path
    number_type = str(pipeline.generator.head.weight.dtype).removeprefix("torch.")
    origin = {"model": shown, "dtype": number_type, "quantize": quantize, "bank": bank}
    origin |= sampling.model_dump()
    rows: list[list] = [[] for _ in chosen[: GRID[0]]]
    total = len(labels) * pipeline.generator.config.seq_len
    with lock(out, "moveimg sample"), progress_bar(total, "sample", "code", delay=2) as bar:
        for first in range(0, len(labels), batch_size):
            batch = labels[first : first + batch_size]
            for _, codes in pipeline.iter_codes(batch, sampling, seed=seed + first):  # noqa: B007
                bar.update(len(batch))
            for i, image in enumerate(pipeline.decode(codes), first):
                label, name = labels[i], names[labels[i]]
                slug = re.sub(r"[\W_]", "-", name.split(",")[0].strip().lower()[:40])
                about = {"class": label, "class_name": name, "seed": seed + i, **origin}
                save_png(image, out / f"{label:04d}-{slug}-seed{seed + i}.png", about)
                if i // num < GRID[0] and i % num < GRID[1]:
                    rows[i // num].append(image)
    grid = draw_grid(rows, [names[label] for label in chosen[: GRID[0]]])
    save_png(grid, out / "grid.png", {"classes": chosen, "num": num, "seed": seed, **origin})
    print(f"{format_count(len(labels), 'image')} -> {out}/ (see {out / 'grid.png'})")


@command
@sampling_options
def edit(
    *,
    image: Path = Argument(help="An image file, cropped to the model's size."),
    classes: common.Classes = None,
    keep: str | None = Option(None, help="Keep a half (as top), rows of codes, a box or a mask."),
    hole: str | None = Option(None, help="Redraw such an area; a box is left,top,right,bottom."),
    passes: int = Option(0, min=0, max=1000, help="Resampling passes, to fit kept codes below."),
    model: common.Model = DEFAULT_MODEL,
    num: common.Num = 4,
    seed: common.Seed = 0,
    settings: dict,
    out: Path = Option(Path("edited"), help="The folder for the images."),
    device: common.Device = None,
    dtype: common.Dtype = None,
    compile: common.Compile = False,
) -> None:
    """Complete an image, or redraw a part of the image as a class (default: the likeliest).

    With --keep, the kept part is decoded from its codes; with --hole, the image's pixels outside
    the hole are kept. Without either option, the upper half is kept.
    """
    if keep is not None and hole is not None:
        raise ValueError(f"--keep {keep} and --hole {hole}: expected one of the two")
    prepare_device(device)
    from moveimg.files import lock
    from moveimg.images import draw_grid, read_image, save_png
    from moveimg.pipeline import Pipeline

    text = hole or keep or "top"
    numbers = text.split(",")
    area: Any = text  # a half, a number of rows of codes, a box, or the file of a mask
    if Path(text).is_file():
        area = read_image(Path(text), text)
    elif all(part.strip().isdecimal() for part in numbers):
        area = int(text) if len(numbers) == 1 else [int(part) for part in numbers]
    original = read_image(image, str(image))
    pipeline = Pipeline.from_pretrained(model, device=device, dtype=dtype, compile=compile)
    names = pipeline.class_names
    if not classes:
        likeliest, probability = pipeline.classify([original], top_k=1)[0][0]
        print(f"class {likeliest} ({probability:.1%} by likelihood)")
        classes = [str(names.index(likeliest))]
    labels = [pipeline.label(name) for name in classes]
    options: dict[str, Any] = {"num": num, "seed": seed, "passes": passes, **settings}
    redraw: Any = pipeline.complete if hole is None else pipeline.edit
    images = redraw(original, labels, **{"keep" if hole is None else "hole": area}, **options)
    about = {"model": model, "image": image.name, "keep": keep, "hole": hole, **options}
    rows = [[pipeline.crop(original), *images[i : i + num]] for i in range(0, len(images), num)]
    with lock(out, "moveimg edit"):
        for i, edited in enumerate(images):
            label = labels[i // num]
            described = about | {"class": label, "class_name": names[label], "seed": seed + i}
            save_png(edited, out / f"{image.stem}-{label:04d}-seed{seed + i}.png", described)
        save_png(draw_grid(rows, [names[label] for label in labels]), out / "grid.png", about)
    print(f"{format_count(len(images), 'image')} -> {out}/ (with the original: {out}/grid.png)")


@command
def score(
    source: str = Argument(help="A folder of images or of class folders, or a data set."),
    split: str | None = Option(None, help="train, val or test; default: val, or a whole folder."),
    classify: bool = Option(False, "--classify", help="Find the likeliest class, too (slow)."),
    model: common.Model = DEFAULT_MODEL,
    batch_size: common.BatchSize = 32,
    out: Path = Option(Path("scores.csv"), help="The CSV file; a grid is written next to it."),
    device: common.Device = None,
    dtype: common.Dtype = None,
) -> None:
    """Write the likelihood of each image as CSV, the least likely image first.

    Images with classes are scored given their class, other images given their likeliest class.
    """
    prepare_device(device)
    from moveimg.files import atomic
    from moveimg.images import draw_grid, save_png
    from moveimg.pipeline import Pipeline
    from moveimg.progress import progress_bar

    pipeline = Pipeline.from_pretrained(model, device=device, dtype=dtype)
    images, labels = _open_labelled(source, split, pipeline)
    names, lines, nats, correct = pipeline.class_names, [], [], 0
    with progress_bar(len(images), "score", "image", delay=2) as bar:
        for first in range(0, len(images), batch_size):
            rows = range(first, min(first + batch_size, len(images)))
            codes = pipeline.encode([images.load(row) for row in rows])
            guesses = pipeline.classify(codes, top_k=1) if classify or labels is None else []
            likeliest = [names.index(name) for ((name, _),) in guesses]
            chosen = likeliest if labels is None else [labels[images.labels[row]] for row in rows]
            likelihood = pipeline.log_likelihood(codes, chosen)
            nats += likelihood.nats_per_code.tolist()
            correct += sum(a == b for a, b in zip(likeliest, chosen, strict=False))
            for i, row in enumerate(rows):
                line: dict[str, Any] = {"image": images.identifiers[row], "class": names[chosen[i]]}
                for key in ("nats_per_code", "bits_per_code", "bits_per_pixel"):
                    line[key] = f"{getattr(likelihood, key)[i]:.5f}"
                if guesses:
                    line["likeliest"], probability = guesses[i][0]
                    line["probability"] = f"{probability:.5f}"
                lines.append(line)
            bar.update(len(rows))
    order = sorted(range(len(lines)), key=lambda row: -nats[row])
    with atomic(out) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, lines[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines[row] for row in order)
    grid, ends = out.with_name(f"{out.stem}.png"), (order[:10], order[::-1][:10])
    shown = [[pipeline.crop(images.load(row)) for row in end] for end in ends]
    save_png(draw_grid(shown, ["least likely", "likeliest"]), grid, {"source": source})
    mean = sum(nats) / len(nats)
    print(f"{format_count(len(nats), 'image')}: {mean:.4f} nats per code -> {out}, {grid.name}")
    if classify and labels is not None:
        print(f"accuracy by likelihood: {correct / len(nats):.2%}")


def _open_labelled(source: str, split: Any, pipeline: Any) -> tuple[Any, list[int] | None]:
    """Open the readable images; returns them and the model's label per class (None: no classes)."""
    from moveimg.data import drop_unreadable, find_split_folders, open_flat_folder, open_images
    from moveimg.images import SUFFIXES

    folder = Path(source)
    if folder.is_dir() and any(p.suffix.lower() in SUFFIXES for p in folder.iterdir()):
        return drop_unreadable(open_flat_folder(folder)), None
    whole = split is None and folder.is_dir() and not find_split_folders(folder)
    images = open_images(source, "train", 0.0) if whole else open_images(source, split or "val")
    return drop_unreadable(images), [pipeline.label(name) for name in images.class_names]
