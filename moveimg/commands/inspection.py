"""`moveimg inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moveimg.commands.common import Device, command, numbers


@command
def inspect(
    model: Annotated[str, typer.Argument(help="a bundled name or a model directory")],
    codes: Annotated[
        Path | None,
        typer.Option(help="packed codes to read (default: codes that the model draws itself)"),
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="images to read")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="images at a time")] = 32,
    seed: Annotated[int, typer.Option(help="of the draws")] = 0,
    out: Annotated[Path, typer.Option(help="folder for the report")] = Path("inspection"),
    device: Device = None,
) -> None:
    """Gates, memory, gradients and experts of a model -> JSON, plots and warnings."""
    from moveimg.inspection import inspect_model
    from moveimg.pipeline import Pipeline

    pipeline = Pipeline.from_pretrained(model, device=device)
    report = inspect_model(pipeline, out, codes, num, batch_size, seed)
    for layer, gates in report.get("layers", {}).items():
        columns = zip(*gates["mean"], strict=True)
        means = {
            name: sum(heads) / len(heads)
            for name, heads in zip(gates["gates"], columns, strict=True)
        }
        print(f"layer {layer}: {numbers(means)}; memory's share of V {gates['memory_share']:.0%}")
    for layer, load in report["experts"].items():
        print(f"layer {layer}: busiest expert {max(load) * len(load):.2f} times its even share")
    for line in report["warnings"]:
        print(f"warning: {line}")
    print(f"-> {out}/ (inspection.json and plots)")
