"""`moveimg convert` and `push`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from typer import Argument, Option, Typer

from moveimg.commands.common import app, command
from moveimg.files import atomic_directory, parse_yaml

convert = Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Convert LlamaGen's, taming's or a dense model to a model directory.",
)
app.add_typer(convert, name="convert")
conversion = convert.command()

Out = Annotated[Path, Option(help="The directory to make.")]


@conversion
def llamagen(
    out: Out,
    vq: Path = Option(help="The tokenizer's weights, such as vq_ds16_c2i.pt."),
    gpt: Path | None = Option(None, help="The generator's weights; default: tokenizer only."),
    image_size: int | None = Option(None, min=1, max=8192, help="Pixels per side, if unknown."),
    heads: int | None = Option(None, min=1, max=4096, help="Attention heads, if unknown."),
) -> None:
    """Convert LlamaGen's generator and tokenizer, or its tokenizer alone."""
    from moveimg.pretrained.llamagen import convert_llamagen

    config = convert_llamagen(gpt, vq, out, image_size, heads)
    print(f"{out}: {config or f'the tokenizer of {vq.name}'}")


@conversion
def taming(
    out: Out,
    checkpoint: Path = Option(help="The checkpoint of a VQGAN, such as last.ckpt."),
    yaml: Path = Option(help="The model.yaml of the checkpoint."),
) -> None:
    """Convert a VQGAN of taming-transformers to a tokenizer directory."""
    import tokenizer as vq

    with atomic_directory(out) as temporary:
        vqgan = vq.load_taming(checkpoint, yaml)
        vq.save(vqgan, temporary)
    print(f"{out}: {vqgan.config}")


@conversion
def upcycle(
    out: Out,
    model: str = Argument(help="A model without memory: its name, directory or Hub id."),
    slots: int | None = Option(None, help="MoVE with this many slots."),
    lave: str | None = Option(None, help="LaVE on alternate or all layers."),
    memory: str | None = Option(None, help="Any memory, as '{kind: move, slots: 6}'."),
) -> None:
    """Add a zero-initialised value memory to a dense model; its logits do not change."""
    from moveimg.pipeline import resolve
    from moveimg.pretrained.upcycle import convert_upcycle

    if [slots, lave, memory].count(None) != 2:
        raise ValueError("give one of --slots M (MoVE), --lave alternate|all or --memory SETTINGS")
    settings: Any = {"kind": "move", "slots": slots}
    if memory is not None:
        settings = parse_yaml(memory, "--memory")
    elif lave is not None:
        settings = {"kind": "lave", "layers": lave}
    config = convert_upcycle(resolve(model), settings, out)
    print(f"{out}: memory {config.memory.model_dump()}")


@conversion
def quantize_bank(
    out: Out,
    model: str = Argument(help="A model with MoVE's bank: its name, directory or Hub id."),
    bits: int = Option(8, min=4, max=8, help="Bits per number of the bank: 8 or 4."),
) -> None:
    """Write a model with its bank's rows in 8 or 4 bits, for sampling."""
    from moveimg.pipeline import resolve
    from moveimg.pretrained.upcycle import convert_quantize_bank

    config = convert_quantize_bank(resolve(model), bits, out)
    print(f"{out}: memory {config.memory.model_dump()}")


@command
def push(
    model: str = Argument(help="A bundled model's name or a model directory."),
    repo: str | None = Argument(None, metavar="OWNER/NAME", help="On the Hugging Face Hub."),
    out: Path | None = Option(None, help="Write the files into this directory."),
    space: bool = Option(False, "--space", help="A Gradio Space with the demo, not the model."),
    private: bool = Option(False, help="Make the repository private."),
    license: str | None = Option(None, help="The weights' licence, such as mit."),
    base_model: str | None = Option(None, help="A Hub id; default: LlamaGen's."),
    dataset: list[str] = Option([], help="A Hub id of the training data; repeatable."),
    results: Path | None = Option(None, help="A results.json of `moveimg evaluate`."),
) -> None:
    """Upload a model to the Hugging Face Hub with a card and a pipeline for diffusers, or a Space.

    Log in first: `hf auth login`. With --out alone nothing is uploaded.
    """
    from moveimg.evaluation.run import read_results
    from moveimg.pipeline import resolve
    from moveimg.pretrained import share

    if repo is None and out is None:
        raise ValueError("push: expected OWNER/NAME on the Hub, --out DIRECTORY, or both")
    if repo is not None and (repo.count("/") != 1 or not all(repo.split("/"))):
        raise ValueError(f"{repo!r}: expected the Hub's owner/name")
    name = repo or f"owner/{Path(str(out)).name}"
    scores = read_results(results) if results else None
    about: dict[str, Any] = {"license": license, "base_model": base_model, "results": scores}
    with ExitStack() as stack:
        made: Any = atomic_directory(out) if out else TemporaryDirectory()
        folder = Path(stack.enter_context(made))
        if space:
            share.write_space(model, folder, name)
        else:
            share.write_model(resolve(model), folder, name, datasets=dataset, **about)
        if repo is not None:
            print(share.upload(folder, repo, private=private, space=space))
    if out is not None:
        print(f"{out}: {'a Space' if space else 'a model'} for the Hub")
