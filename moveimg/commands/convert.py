"""`moveimg convert` and `push`."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from typer import Argument, Option

from moveimg.commands.common import command, make_group
from moveimg.files import atomic_directory, parse_yaml

conversion = make_group("convert").command()

Out = Annotated[Path, Option(help="The new directory.")]


@conversion
def llamagen(
    out: Out,
    vq: Path = Option(help="The tokenizer's weights, such as vq_ds16_c2i.pt."),
    gpt: Path | None = Option(None, help="The generator's weights; default: tokenizer only."),
    image_size: int | None = Option(None, min=1, max=8192, help="Pixels; default: by file name."),
    heads: int | None = Option(None, min=1, max=4096, help="Default: by layers and width."),
) -> None:
    """Convert LlamaGen's generator and tokenizer, or the tokenizer alone."""
    from moveimg.pretrained.llamagen import convert_llamagen

    print(f"{out}: {convert_llamagen(gpt, vq, out, image_size, heads) or vq.name}")


@conversion
def taming(
    out: Out,
    checkpoint: Path = Option(help="The checkpoint of a VQGAN, such as last.ckpt."),
    yaml: Path = Option(help="The checkpoint's model.yaml."),
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
    memory: str | None = Option(None, help="Settings, as '{kind: lave, layers: all}'."),
) -> None:
    """Add a zero-initialised value memory to a dense model; its logits do not change."""
    from moveimg.pipeline import resolve
    from moveimg.pretrained.upcycle import convert_upcycle

    if (slots is None) == (memory is None):
        raise ValueError(f"expected one of --slots and --memory (got {slots} and {memory})")
    settings = parse_yaml(memory, "--memory") if memory else {"kind": "move", "slots": slots}
    print(f"{out}: memory {convert_upcycle(resolve(model), settings, out).memory!r}")


@conversion
def quantize_bank(
    out: Out,
    model: str = Argument(help="A model with a MoVE bank: its name, directory or Hub id."),
    bits: int = Option(8, min=4, max=8, help="Bits per number of the bank: 8 or 4."),
) -> None:
    """Quantize the rows of a model's bank to 8 or 4 bits, for sampling."""
    from moveimg.pipeline import resolve
    from moveimg.pretrained.upcycle import convert_quantize_bank

    config = convert_quantize_bank(resolve(model), bits, out)
    print(f"{out}: memory {config.memory.model_dump()}")


@command
def push(
    model: str = Argument(help="A bundled model's name or a model directory."),
    repo: str | None = Argument(None, metavar="OWNER/NAME", help="The Hub's repository."),
    out: Path | None = Option(None, help="Write the files into this directory."),
    space: bool = Option(False, "--space", help="Push a Gradio Space with the demo."),
    private: bool = Option(False, help="Make the repository private."),
    license: str | None = Option(None, help="The weights' licence, such as mit."),
    base_model: str | None = Option(None, help="A Hub id; LlamaGen's by default."),
    dataset: list[str] | None = Option(None, help="A Hub id of the training data; repeatable."),
    results: Path | None = Option(None, help="A results.json of `moveimg evaluate`."),
) -> None:
    """Upload a model to the Hugging Face Hub with a card and a pipeline for diffusers, or a Space.

    Log in first: `hf auth login`. With --out alone nothing is uploaded.
    """
    from moveimg.evaluation.run import read_results
    from moveimg.pipeline import resolve
    from moveimg.pretrained import share

    if (repo is None and out is None) or (repo and (repo.count("/") != 1 or "" in repo.split("/"))):
        raise ValueError(f"push {repo}: expected OWNER/NAME on the Hub, --out DIRECTORY, or both")
    name = repo or f"owner/{Path(str(out)).name}"
    about: dict[str, Any] = {"license": license, "base_model": base_model, "datasets": dataset}
    target: Any = atomic_directory(out) if out else TemporaryDirectory()
    with target as path:
        folder = Path(path)
        if space:
            share.write_space(model, folder, name)
        else:
            scores = read_results(results) if results else None
            share.write_model(resolve(model), folder, name, results=scores, **about)
        if repo is not None:
            print(share.upload(folder, repo, private, space))
    if out is not None:
        print(f"{out}: {'a Space' if space else 'a model'} for the Hub")
