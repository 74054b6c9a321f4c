"""Publication on the Hugging Face Hub: models with their cards, Spaces with the demo."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moveimg import __version__
from moveimg.checkpoint import read_class_names, read_description, read_sampling
from moveimg.errors import describe, list_names
from moveimg.files import read_json, read_text, write_json, write_text
from moveimg.model import model_cost
from moveimg.pretrained.hub import MODEL_FILES, REPO

TEMPLATES = Path(__file__).parent / "templates"
TASK = "unconditional-image-generation"  # the Hub's term, also for class-conditional models
PUBLIC = ("source", "step", "val")  # keys of `about` in config.json; other keys hold paths


def write_model(directory: Path, out: Path, repo_id: str, **metadata: Any) -> None:
    """Write a model's repository: its files, its README.md or else a card, diffusers' files."""
    own = directory / "README.md"
    card = read_text(own) if own.is_file() else model_card(directory, repo_id, **metadata)
    (out / "tokenizer").mkdir(parents=True, exist_ok=True)
    for file in MODEL_FILES:
        shutil.copyfile(directory / file, out / file)
    config = read_json(directory / "config.json")
    config["about"] = {
        key: value for key, value in config.get("about", {}).items() if key in PUBLIC
    }
    write_json(out / "config.json", config)
    write_text(out / "README.md", card)
    write_diffusers(out)


def write_diffusers(out: Path) -> None:
    """Write the files that let diffusers load a model directory as a pipeline."""
    shutil.copyfile(TEMPLATES / "pipeline.py.txt", out / "pipeline.py")
    write_json(out / "model_index.json", {"_class_name": ["pipeline", "MoveimgPipeline"]})


def write_space(model: str, out: Path, name: str) -> None:
    """Write a Gradio Space with a model's web demo; a local model is copied into the Space."""
    out.mkdir(parents=True, exist_ok=True)
    if (Path(model) / "config.json").is_file():
        write_model(Path(model), out / "model", name)
        model = "model"
    app, card = (read_text(TEMPLATES / file) for file in ("app.py.txt", "space.md"))
    title = json.dumps(name.rsplit("/", 1)[-1])
    write_text(out / "app.py", app.replace('"MODEL"', json.dumps(model)))
    write_text(out / "requirements.txt", f"moveimg=={__version__}\n")
    card = card.replace("TITLE", title).replace("GRADIO", version("gradio"))
    write_text(out / "README.md", card)


def upload(folder: Path, repo_id: str, private: bool = False, space: bool = False) -> str:
    """Upload a folder as a model or a Space; returns the URL. Raises OSError."""
    from huggingface_hub import HfApi

    kind, sdk = ("space", "gradio") if space else ("model", None)
    try:
        HfApi().create_repo(repo_id, exist_ok=True, private=private, repo_type=kind, space_sdk=sdk)
        HfApi().upload_folder(repo_id=repo_id, folder_path=folder, repo_type=kind)
    except Exception as error:  # its kind depends on huggingface_hub's transport
        raise OSError(f"huggingface.co/{repo_id}: not uploaded: {describe(error)}") from None
    return f"https://huggingface.co/{'spaces/' if space else ''}{repo_id}"


def model_card(
    directory: Path, repo_id: str, results: dict[str, Any] | None = None, **metadata: Any
) -> str:
    """Return the card of a model directory in Markdown, with metadata (license, datasets, ...)."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    description, name = read_description(directory), repo_id.rsplit("/", 1)[-1]
    config, figures = description.model, {"held-out images": description.about.get("val", {})}
    if results is not None:
        figures[results["reference"]["name"].rsplit("/", 1)[-1]] = results["metrics"]
    if "llamagen" in json.dumps(description.about).lower():
        metadata["base_model"] = metadata.get("base_model") or REPO
    scores = [
        EvalResult(TASK, source, source, key, round(value, 4))
        for source, numbers in figures.items()
        for key, value in numbers.items()
        if isinstance(value, int | float)
    ]
    tags = ["class-conditional", "autoregressive", "diffusers", f"{config.memory.kind}-memory"]
    kinds: Any = {"library_name": "moveimg", "pipeline_tag": TASK, "model_name": name}
    data = ModelCardData(eval_results=scores, tags=tags, **kinds, **metadata)
    text: dict[str, Any] = {
        "name": name,
        "repo_id": repo_id,
        "n_classes": config.n_classes,
        "classes": list_names(read_class_names(directory), 20),
        "tables": {
            "Model": {"parameters": f"{model_cost(config).parameters:,}", **config.model_dump()},
            "Sampling settings": read_sampling(directory).model_dump(),
            "Results": {f"{s.dataset_name}: {s.metric_type}": s.metric_value for s in scores},
        },
    }
    return str(ModelCard.from_template(data, str(TEMPLATES / "card.md"), **text))
