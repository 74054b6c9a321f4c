"""Publishing models on the Hugging Face Hub, with their cards and a pipeline for diffusers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def upload(folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Upload a folder in one commit; returns the repository's address.

    Raises OSError where the Hub cannot be reached or refuses, with its reason.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repo_id, exist_ok=True, private=private)
        HfApi().upload_folder(repo_id=repo_id, folder_path=folder)
    except Exception as error:  # its kind depends on huggingface_hub's transport
        raise OSError(f"huggingface.co/{repo_id}: not uploaded: {describe(error)}") from None
    return f"https://huggingface.co/{repo_id}"


def model_card(
    directory: Path,
    repo_id: str,
    *,
    license: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
) -> str:
    """The Markdown card of a model directory, with the Hub's metadata.

    `license` is an SPDX id (left out: a bundled model's), `base_model` a Hub id (left out:
    LlamaGen's where the model began from it), `datasets` are those of the training data.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    description = read_description(directory)
    config, about = description.model, description.about
    cost, name = model_cost(config), repo_id.rsplit("/", 1)[-1]
    if base_model is None and "llamagen" in json.dumps(about).lower():
        base_model = REPO
    if license is None and directory.parent == BUNDLED:
        license = "mit"
    held_out = {key: round(value, 4) for key, value in about.get("val", {}).items()}
    data = ModelCardData(
        library_name="moveimg", pipeline_tag=TASK, license=license, base_model=base_model,
        datasets=[*datasets] or None, model_name=name,
        eval_results=[EvalResult(TASK, "own", "held-out images", *x) for x in held_out.items()],
        tags=["image-generation", "diffusers", f"{config.memory.kind}-memory"],
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
        "Results, held-out images": held_out,
    }
    card = ModelCard.from_template(
        data, str(TEMPLATES / "card.md"), name=name, repo_id=repo_id, tables=tables,
        n_classes=config.n_classes, classes=list_names(read_class_names(directory), 20),
    )  # fmt: skip
    return str(card)
