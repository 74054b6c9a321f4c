"""`moveimg convert` and `push`: models of others, other models, and models for others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moveimg.commands.common import app, command

convert = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Foreign weights -> model directory; dense -> with value memory.",
)
app.add_typer(convert, name="convert")

Out = Annotated[Path, typer.Option(help="the directory to make")]


def llamagen(
    gpt: Annotated[Path, typer.Option(help="a generator, such as c2i_B_256.pt")],
    vq: Annotated[Path, typer.Option(help="its tokenizer, such as vq_ds16_c2i.pt")],
    out: Out,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="pixels of a side, where the file does not tell")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(min=1, help="attention heads, where the file does not tell")
    ] = None,
) -> None:
    """LlamaGen's generator and tokenizer -> model directory."""
    from moveimg.pretrained.llamagen import convert_llamagen

    config = convert_llamagen(gpt, vq, out, image_size, heads)
    print(
        f"{out}: {config.n_layer} layers of width {config.width}, {config.n_head} heads, "
        f"{config.n_classes} classes, {config.grid[0]} x {config.grid[1]} codes out of "
        f"{config.codebook_size}"
    )


def taming(
    checkpoint: Annotated[Path, typer.Option(help="a VQGAN's checkpoint, such as last.ckpt")],
    yaml: Annotated[Path, typer.Option(help="the model.yaml beside it")],
    out: Out,
) -> None:
    """taming-transformers' VQGAN -> tokenizer directory."""
    import tokenizer as vq
    from moveimg.files import atomic_directory

    with atomic_directory(out) as temporary:
        vqgan = vq.load_taming(checkpoint, yaml)
        vq.save(vqgan, temporary)
    print(f"{out}: {vqgan.codebook_size} codes, a code for {vqgan.downsample} pixels of a side")


def upcycle(
    model: Annotated[str, typer.Argument(help="a bundled name, a model directory or a Hub id")],
    out: Out,
    slots: Annotated[int | None, typer.Option(min=1, help="MoVE with this many slots")] = None,
    lave: Annotated[str | None, typer.Option(help="LaVE on alternate or all layers")] = None,
    memory: Annotated[
        str | None, typer.Option(help="any, as in a config: '{kind: move, slots: 6}'")
    ] = None,
) -> None:
    """Dense model -> the same with a zero value memory; its logits do not change in any bit."""
    from moveimg.files import parse_yaml
    from moveimg.pipeline import resolve
    from moveimg.pretrained.upcycle import convert_upcycle

    if [slots, lave, memory].count(None) != 2:
        raise ValueError("give one of --slots M (MoVE), --lave alternate|all and --memory SETTINGS")
    settings = {"kind": "move", "slots": slots}
    if memory is not None:
        settings = parse_yaml(memory, "--memory")
    elif lave is not None:
        settings = {"kind": "lave", "layers": lave}
    config = convert_upcycle(resolve(model), settings, out)
    print(f"{out}: memory {config.memory.model_dump()}")


def push(
    model: Annotated[str, typer.Argument(help="a bundled name or a model directory")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="on the Hugging Face Hub")],
    private: Annotated[bool, typer.Option(help="make the repository private")] = False,
) -> None:
    """Model directory -> the Hugging Face Hub, with a model card (`hf auth login` first)."""
    from moveimg.pipeline import resolve
    from moveimg.pretrained import share

    print(share.push(resolve(model), repo, private=private))


for conversion in (llamagen, taming, upcycle):
    command(conversion, convert)
command(push)
