"""`moveimg sample`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from moveimg.commands.common import Device, Dtype, command


@command
def sample(
    classes: Annotated[
        list[str] | None, typer.Argument(help="indices or names (default: every class, up to 20)")
    ] = None,
    model: Annotated[str, typer.Option(help="a name, a model directory or a Hub id")] = "digits",
    num: Annotated[int, typer.Option(min=1, help="images for each class")] = 2,
    seed: Annotated[int, typer.Option(help="image i is drawn with seed + i")] = 0,
    cfg_scale: Annotated[float | None, typer.Option(help="guidance; 1 is none")] = None,
    cfg_schedule: Annotated[
        str | None, typer.Option(help="constant, linear or power-cosine")
    ] = None,
    cfg_power: Annotated[float | None, typer.Option(help="power-cosine's exponent")] = None,
    cfg_start: Annotated[
        float | None, typer.Option(help="fraction of codes before guidance starts")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy")] = None,
    top_k: Annotated[int | None, typer.Option(help="keep the k likeliest codes; 0 is all")] = None,
    top_p: Annotated[float | None, typer.Option(help="keep this much probability")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="images generated side by side")] = 32,
    out: Annotated[Path, typer.Option(help="folder for the images")] = Path("samples"),
    device: Device = None,
    dtype: Dtype = None,
    quantize: Annotated[
        str | None, typer.Option(help="int8: faster on a CPU, slightly off; codes vary by batch")
    ] = None,
) -> None:
    """Class labels -> PNGs and a labelled grid.

    Settings left out, --cfg-scale to --top-p, are the model's own (its sampling.json).
    """
    from moveimg.images import labelled_grid, save_png
    from moveimg.pipeline import Pipeline
    from moveimg.sampling import image_rngs

    pipeline = Pipeline.from_pretrained(model, device=device, dtype=dtype, quantize=quantize)
    if classes:
        labels = [pipeline.label(name) for name in classes]
    else:
        labels = list(range(min(20, len(pipeline.class_names))))
    given: dict[str, Any] = {
        "cfg_scale": cfg_scale, "cfg_schedule": cfg_schedule, "cfg_power": cfg_power,
        "cfg_start": cfg_start, "temperature": temperature, "top_k": top_k, "top_p": top_p,
    }  # fmt: skip
    settings = pipeline.settings(**given)
    shown = Path(model).resolve().name if Path(model).is_dir() else model  # pictures are passed on
    repeated = [label for label in labels for _ in range(num)]
    image_rngs([seed, seed + len(repeated) - 1])  # a bad seed is refused before a folder is made
    out.mkdir(parents=True, exist_ok=True)
    number_type = str(pipeline.generator.head.weight.dtype).removeprefix("torch.")
    begun = time.perf_counter()
    pictures = pipeline.sample(repeated, **given, seed=seed, batch_size=batch_size)
    seconds = time.perf_counter() - begun
    for i, (label, picture) in enumerate(zip(repeated, pictures, strict=True)):
        name = pipeline.class_names[label]
        about = {"model": shown, "class": label, "class_name": name, "seed": seed + i}
        about |= {"dtype": number_type, "quantize": quantize}
        path = out / f"{label:04d}-{_slug(name)}-seed{seed + i}.png"
        save_png(picture, path, about | settings.model_dump())
    rows = [pictures[i : i + num] for i in range(0, len(pictures), num)]
    names = [pipeline.class_names[label] for label in labels]
    about = {"model": shown, "classes": labels, "num": num, "seed": seed}
    save_png(labelled_grid(rows, names), out / "grid.png", about | settings.model_dump())
    print(f"{len(pictures)} images in {seconds:.1f} s -> {out}/ (all of them: {out / 'grid.png'})")


def _slug(name: str) -> str:
    first = name.split(",")[0].strip().lower()
    return "".join(c if c.isalnum() else "-" for c in first)[:40]
