"""`moveimg convert` and `push`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from moveimg.commands.common import app, check_model_name, check_source, command

convert = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Convert LlamaGen's, taming's or a dense model to a model directory.",
)
app.add_typer(convert, name="convert")

Out = Annotated[Path, typer.Option(help="The directory to make.")]


@contextmanager
def new_directory(out: Path) -> Iterator[None]:
    """Lock the directory that a conversion makes, and remove what a killed one has left beside it.

    Raises FileExistsError where `out` exists, ValueError where another process is making it.
    """
    from moveimg.files import lock

    with lock(out, "moveimg convert"):
        if out.is_file() or (out.is_dir() and any(out.iterdir())):
            raise FileExistsError(f"{out} is there already: expected a name for a new directory")
        for left in out.absolute().parent.glob(f".{out.name}.????????"):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
        yield


def llamagen(
    out: Out,
    vq: Annotated[Path, typer.Option(help="The tokenizer's weights, such as vq_ds16_c2i.pt.")],
    gpt: Annotated[
        Path | None,
        typer.Option(help="The generator's weights, such as c2i_B_256.pt; default: tokenizer only"),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, max=8192, help="Pixels per side, if the file has none.")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Attention heads, if the file has none.")
    ] = None,
) -> None:
    """Convert LlamaGen's generator and tokenizer, or its tokenizer alone."""
    for path in filter(None, (gpt, vq)):
        check_source(path, "file")
    with new_directory(out):
        from moveimg.pretrained.llamagen import convert_llamagen

        config = convert_llamagen(gpt, vq, out, image_size, heads)
    if config is None:
        print(f"{out}: the tokenizer of {vq.name}")
        return
    print(
        f"{out}: {config.n_layer} layers of width {config.width}, {config.n_head} heads, "
        f"{config.n_classes} classes, {config.grid[0]} x {config.grid[1]} codes out of "
        f"{config.codebook_size}"
    )


def taming(
    checkpoint: Annotated[Path, typer.Option(help="The checkpoint of a VQGAN, such as last.ckpt.")],
    yaml: Annotated[Path, typer.Option(help="The model.yaml of the checkpoint.")],
    out: Out,
) -> None:
    """Convert a VQGAN of taming-transformers to a tokenizer directory."""
    for path in (checkpoint, yaml):
        check_source(path, "file")
    with new_directory(out):
        import tokenizer as vq
        from moveimg.files import atomic_directory

        with atomic_directory(out) as temporary:
            vqgan = vq.load_taming(checkpoint, yaml)
            vq.save(vqgan, temporary)
    size = vqgan.downsample
    print(f"{out}: {vqgan.codebook_size} codes, one for each {size} x {size} pixels")


def upcycle(
    model: Annotated[
        str, typer.Argument(help="A bundled name, a model directory or a Hub id; without memory.")
    ],
    out: Out,
    slots: Annotated[
        int | None, typer.Option(min=1, max=4096, help="MoVE with this many slots.")
    ] = None,
    lave: Annotated[str | None, typer.Option(help="LaVE on alternate or all layers.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Any memory, as in a config: '{kind: move, slots: 6}'.")
    ] = None,
) -> None:
    """Add a zero-initialised value memory to a dense model; its logits stay the same bits."""
    from moveimg.files import parse_yaml

    if [slots, lave, memory].count(None) != 2:
        raise ValueError("give one of --slots M (MoVE), --lave alternate|all or --memory SETTINGS")
    settings = {"kind": "move", "slots": slots}
    if memory is not None:
        settings = parse_yaml(memory, "--memory")
    elif lave is not None:
        settings = {"kind": "lave", "layers": lave}
    check_model_name(model)
    with new_directory(out):
        from moveimg.pipeline import resolve
        from moveimg.pretrained.upcycle import convert_upcycle

        config = convert_upcycle(resolve(model), settings, out)
    print(f"{out}: memory {config.memory.model_dump()}")


def push(
    model: Annotated[str, typer.Argument(help="A bundled name or a model directory.")],
    repo: Annotated[
        str | None, typer.Argument(metavar="OWNER/NAME", help="On the Hugging Face Hub.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the files into this new directory, too.")
    ] = None,
    private: Annotated[bool, typer.Option(help="Make the repository private.")] = False,
    license: Annotated[str | None, typer.Option(help="The weights' licence, such as mit.")] = None,
    base_model: Annotated[str | None, typer.Option(help="A Hub id; default: LlamaGen's.")] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(help="A Hub id of the training data; repeatable.")
    ] = None,
) -> None:
    """Upload a model to the Hugging Face Hub with a card and a pipeline for diffusers.

    Log in first: `hf auth login`. With --out alone nothing is uploaded.
    """
    check_model_name(model)
    if repo is None and out is None:
        raise ValueError("push: expected OWNER/NAME on the Hub, --out DIRECTORY, or both")
    if repo is not None and (repo.count("/") != 1 or not all(repo.split("/"))):
        raise ValueError(f"{repo!r}: expected the Hub's owner/name")
    from moveimg.files import atomic_directory
    from moveimg.pipeline import resolve
    from moveimg.pretrained import share

    name = repo or f"owner/{Path(str(out)).name}"
    about = {"license": license, "base_model": base_model, "datasets": dataset or ()}
    with ExitStack() as stack:
        if out is None:
            folder = Path(stack.enter_context(TemporaryDirectory()))
        else:
            stack.enter_context(new_directory(out))
            folder = stack.enter_context(atomic_directory(out))
        share.write_model(resolve(model), folder, name, **about)
        if repo is not None:
            print(share.upload(folder, repo, private=private))
    if out is not None:
        print(f"{out}: a model for the Hub")


for _conversion in (llamagen, taming, upcycle):
    command(_conversion, convert)
command(push)
