"""Publishing on the Hugging Face Hub: models with their cards, and Spaces with the web demo."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moveimg import __version__
from moveimg.checkpoint import BUNDLED, read_class_names, read_description, read_sampling
from moveimg.errors import list_names
from moveimg.files import read_json, read_text, write_json, write_text
from moveimg.model import model_cost
from moveimg.pretrained.hub import MODEL_FILES, PUBLISHED, REPO, first_line

TEMPLATES = Path(__file__).parent / "templates"
TASK = "unconditional-image-generation"  # the Hub's name for images of classes, too
TAGS = ("image-generation", "class-conditional", "autoregressive", "diffusers")
# Settings of a run that name files and folders of its machine, and the values that are public
LOCAL = {
    "out", "codes", "source", "tokenizer", "init_from",
    "reference", "extractor", "inception_weights",
}  # fmt: skip
PUBLIC = (None, "digits", "fashion", *PUBLISHED)


def write_model(
    directory: Path, out: Path, repo_id: str, *, link: bool = False, **metadata: Any
) -> None:
    """Write what the Hub gets of a model directory: its files, a card, and those of diffusers.

    The card is the directory's README.md, or else model_card with `metadata`. Names of local files
    and folders are removed from config.json. With `link`, weights are links and not copies. Raises
    FileNotFoundError where a file is missing.
    """
    if missing := [file for file in MODEL_FILES if not (directory / file).is_file()]:
        raise FileNotFoundError(f"{directory}: not a whole model (it lacks {missing[0]})")
    own = directory / "README.md"
    card = read_text(own) if own.is_file() else model_card(directory, repo_id, **metadata)
    (out / "tokenizer").mkdir(parents=True, exist_ok=True)
    for file in MODEL_FILES[1:]:
        if link:
            (out / file).symlink_to((directory / file).resolve())
        else:
            shutil.copyfile(directory / file, out / file)
    write_json(out / "config.json", public_config(directory))
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


def upload(
    folder: Path, repo_id: str, *, private: bool = False, space: bool = False, api: Any = None
) -> str:
    """Upload a folder in one commit, as a model or a Space; returns the repository's address.

    `api` replaces `huggingface_hub.HfApi()`. Raises OSError where the Hub cannot be reached or
    refuses, with its reason.
    """
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi()
    kind = {"repo_type": "space" if space else "model"}
    sdk = {"space_sdk": "gradio"} if space else {}
    try:
        api.create_repo(repo_id, exist_ok=True, private=private, **kind, **sdk)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="moveimg", **kind)
    except Exception as error:  # its kind depends on huggingface_hub's transport
        raise OSError(f"huggingface.co/{repo_id}: not uploaded: {first_line(error)}") from None
    return f"https://huggingface.co/{'spaces/' if space else ''}{repo_id}"


def public_config(directory: Path) -> dict[str, Any]:
    """The config.json to publish: without names of files and folders of this machine."""
    about = read_description(directory).about
    return read_json(directory / "config.json") | {"about": _without_paths(about)}


def _without_paths(about: dict[str, Any], in_run: bool = False) -> dict[str, Any]:
    """`about` without the folder a model was made from, and without its run's LOCAL settings."""
    public: dict[str, Any] = {}
    for key, value in about.items():
        if isinstance(value, dict):
            public[key] = _without_paths(value, in_run or key == "run")
        elif not (key in LOCAL if in_run else key == "from") or value in PUBLIC:
            public[key] = value
    return public


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
    cost = model_cost(config)
    memory = ", ".join(f"{key} {value}" for key, value in config.memory.model_dump().items())
    if base_model is None and "llamagen" in json.dumps(public_config(directory)).lower():
        base_model = REPO
    if license is None and directory.parent == BUNDLED:
        license = "mit"
    reference = results["reference"]["name"].rsplit("/", 1)[-1] if results else ""
    held_out, scores = _numbers(about.get("val")), _numbers((results or {}).get("metrics"))
    evaluations = [
        EvalResult(TASK, datasets[0] if datasets else name, name, key, value, dataset_split=split)
        for figures, name, split in ((held_out, "held-out images", "held out"),
                                     (scores, reference, None))
        for key, value in figures.items()
    ]  # fmt: skip
    name = repo_id.rsplit("/", 1)[-1]
    data = ModelCardData(
        library_name="moveimg", pipeline_tag=TASK, license=license, base_model=base_model,
        datasets=[*datasets] or None, tags=[*TAGS, f"{config.memory.kind}-memory"],
        model_name=name, eval_results=evaluations or None,
    )  # fmt: skip
    architecture = {
        "layers, heads, width": f"{config.n_layer}, {config.n_head}, {config.width}",
        "parameters": f"{cost.parameters:,} (value memory {cost.bank:,})",
        "attention, memory, feed-forward": f"{config.attention.kind}; {memory}; {config.ffn.kind}",
        "codes": f"{config.grid[0]} x {config.grid[1]} of {config.codebook_size:,}",
        "origin": about.get("source", "trained with moveimg"),
    }
    tables = {
        "Model": architecture,
        "Sampling settings": read_sampling(directory).model_dump(),
        f"Results, held out, after {about.get('step')} steps": held_out,
        f"Results against {reference}": scores,
    }
    classes = list_names(read_class_names(directory), 20)
    card = ModelCard.from_template(
        data, str(TEMPLATES / "card.md"), name=name, repo_id=repo_id, tables=tables,
        n_classes=config.n_classes, classes=classes,
    )  # fmt: skip
    return str(card)


def _numbers(figures: Any) -> dict[str, float]:
    """The single numbers of a dictionary, rounded; empty for anything else."""
    items = figures.items() if isinstance(figures, dict) else ()
    return {key: round(value, 4) for key, value in items if isinstance(value, int | float)}
