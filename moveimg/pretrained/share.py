"""Publishing on the Hugging Face Hub: models with their cards, Spaces with the demo."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moveimg import __version__
from moveimg.checkpoint import BUNDLED, read_class_names, read_description, read_sampling
from moveimg.errors import describe, list_names
from moveimg.files import read_json, read_text, write_json, write_text
from moveimg.model import model_cost
from moveimg.pretrained.hub import MODEL_FILES, REPO

TEMPLATES = Path(__file__).parent / "templates"
TASK = "unconditional-image-generation"  # the Hub's name for images of classes, too
PUBLIC = ("source", "step", "val")  # of `about`: other notes name files and folders


def write_model(directory: Path, out: Path, repo_id: str, **metadata: Any) -> None:
    """Write what the Hub gets of a model directory: its files, a card, and those of diffusers.

    The card is the directory's README.md, or else model_card with `metadata`. Of the notes on how
    the model was made, config.json keeps those without names of files and folders. Raises
    FileNotFoundError where a file is missing.
    """
    own = directory / "README.md"
    card = read_text(own) if own.is_file() else model_card(directory, repo_id, **metadata)
    (out / "tokenizer").mkdir(parents=True, exist_ok=True)
    for file in MODEL_FILES:
        shutil.copyfile(directory / file, out / file)
    config = read_json(directory / "config.json")
    config["about"] = {key: value for key, value in config["about"].items() if key in PUBLIC}
    write_json(out / "config.json", config)
    write_text(out / "README.md", card)
    write_diffusers(out)


def write_diffusers(out: Path) -> None:
    """Write the files by which diffusers finds its pipeline of a model directory."""
    shutil.copyfile(TEMPLATES / "pipeline.py.txt", out / "pipeline.py")
    write_json(out / "model_index.json", {"_class_name": ["pipeline", "MoveimgPipeline"]})


def write_space(model: str, out: Path, name: str) -> None:
    """Write a Gradio Space with the web demo of a model; a local directory is copied into it."""
    from huggingface_hub import SpaceCard, SpaceCardData

    out.mkdir(parents=True, exist_ok=True)
    if (Path(model) / "config.json").is_file():
        write_model(Path(model), out / "model", name)
        model = "model"
    app = read_text(TEMPLATES / "app.py.txt").replace('"MODEL"', json.dumps(model))
    data = SpaceCardData(
        title=name.rsplit("/", 1)[-1], sdk="gradio", sdk_version=version("gradio"),
        python_version="3.11", app_file="app.py",
    )  # fmt: skip
    write_text(out / "app.py", app)
    write_text(out / "requirements.txt", f"moveimg=={__version__}\n")
    write_text(out / "README.md", str(SpaceCard.from_template(data, str(TEMPLATES / "space.md"))))


def upload(folder: Path, repo_id: str, *, private: bool = False, space: bool = False) -> str:
    """Upload a folder in one commit, as a model or a Space; returns the repository's address.

    Raises OSError where the Hub cannot be reached or refuses, with its reason.
    """
    from huggingface_hub import HfApi

    kind: dict[str, Any] = {"repo_type": "space" if space else "model"}
    sdk: dict[str, Any] = {"space_sdk": "gradio"} if space else {}
    try:
        HfApi().create_repo(repo_id, exist_ok=True, private=private, **kind, **sdk)
        HfApi().upload_folder(repo_id=repo_id, folder_path=folder, **kind)
    except Exception as error:  # its kind depends on huggingface_hub's transport
        raise OSError(f"huggingface.co/{repo_id}: not uploaded: {describe(error)}") from None
    return f"https://huggingface.co/{'spaces/' if space else ''}{repo_id}"


def model_card(
    directory: Path,
    repo_id: str,
    *,
    license: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    results: dict[str, Any] | None = None,
) -> str:
    """The Markdown card of a model directory, with the Hub's metadata.

    Args:
        license: an SPDX id; left out, that of a bundled model, else none.
        base_model: a Hub id; left out, LlamaGen's where the model began from it.
        datasets: Hub ids of the training data.
        results: those of `moveimg evaluate`, beside the held-out figures of the training.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    description = read_description(directory)
    config, about = description.model, description.about
    cost, name = model_cost(config), repo_id.rsplit("/", 1)[-1]
    if base_model is None and "llamagen" in json.dumps(about).lower():
        base_model = REPO
    if license is None and directory.parent == BUNDLED:
        license = "mit"
    figures = {"held-out images": about.get("val", {})}
    if results is not None:
        figures[results["reference"]["name"].rsplit("/", 1)[-1]] = results["metrics"]
    figures = {
        source: {key: round(x, 4) for key, x in numbers.items() if isinstance(x, int | float)}
        for source, numbers in figures.items()
    }
    data = ModelCardData(
        library_name="moveimg", pipeline_tag=TASK, license=license, base_model=base_model,
        datasets=[*datasets] or None, model_name=name,
        eval_results=[
            EvalResult(TASK, source, source, key, value)
            for source, numbers in figures.items()
            for key, value in numbers.items()
        ],
        tags=["image-generation", "class-conditional", "autoregressive", "diffusers",
              f"{config.memory.kind}-memory"],
    )  # fmt: skip
    architecture = {
        "layers, heads, width": f"{config.n_layer}, {config.n_head}, {config.width}",
        "parameters": f"{cost.parameters:,} (value memory {cost.bank:,})",
        "attention, feed-forward": f"{config.attention.kind}, {config.ffn.kind}",
        "memory": ", ".join(f"{key} {value}" for key, value in config.memory),
        "codes": f"{config.grid[0]} x {config.grid[1]} of {config.codebook_size:,}",
    }
    tables = {
        "Model": architecture,
        "Sampling settings": read_sampling(directory).model_dump(),
        **{f"Results, {source}": numbers for source, numbers in figures.items()},
    }
    card = ModelCard.from_template(
        data, str(TEMPLATES / "card.md"), name=name, repo_id=repo_id, tables=tables,
        n_classes=config.n_classes, classes=list_names(read_class_names(directory), 20),
    )  # fmt: skip
    return str(card)
