"""Publishing a model directory on the Hugging Face Hub, with a model card."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from moveimg.checkpoint import read_class_names, read_description, read_sampling
from moveimg.errors import list_names
from moveimg.files import read_json, read_text, write_json, write_text
from moveimg.model import model_cost
from moveimg.pretrained.hub import MODEL_FILES, PUBLISHED, first_line

CARD = "README.md"
# Settings of a run that name files and folders of its machine, and the values that are public
LOCAL = {
    "out", "codes", "source", "tokenizer", "init_from",
    "reference", "extractor", "inception_weights",
}  # fmt: skip
PUBLIC = (None, "digits", "fashion", *PUBLISHED)
CARD_TEXT = """
A class-conditional generator of images by discrete codes, for `moveimg`.

```python
from moveimg import Pipeline

pipeline = Pipeline.from_pretrained("{repo_id}")
images = pipeline.sample([0], seed=0)
```
"""


def push(directory: Path, repo_id: str, *, private: bool = False, api: Any = None) -> str:
    """Upload a model directory and its card in one commit; returns the repository's address.

    The card is the directory's README.md, or else model_card. Names of local files and folders are
    removed from config.json. `api` replaces `huggingface_hub.HfApi()`.

    Raises:
        FileNotFoundError: the directory lacks a file.
        ValueError: `repo_id` is no `owner/name`, or a file is damaged.
        OSError: the Hub cannot be reached or refuses, with its reason.
    """
    if repo_id.count("/") != 1 or not all(repo_id.split("/")):
        raise ValueError(f"{repo_id!r}: expected the Hub's owner/name")
    if missing := [file for file in MODEL_FILES if not (directory / file).is_file()]:
        raise FileNotFoundError(f"{directory}: not a whole model (it lacks {missing[0]})")
    own = directory / CARD
    card = read_text(own) if own.is_file() else model_card(directory, repo_id)
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi()
    with tempfile.TemporaryDirectory() as name:  # links, so that one commit has all files, no more
        staged = Path(name)
        (staged / "tokenizer").mkdir()
        for file in MODEL_FILES[1:]:
            (staged / file).symlink_to((directory / file).resolve())
        write_json(staged / "config.json", public_config(directory))
        write_text(staged / CARD, card)
        try:
            api.create_repo(repo_id, exist_ok=True, private=private)
            api.upload_folder(repo_id=repo_id, folder_path=staged, commit_message="moveimg model")
        except Exception as error:  # its kind depends on huggingface_hub's transport
            raise OSError(f"huggingface.co/{repo_id}: not uploaded: {first_line(error)}") from None
    return f"https://huggingface.co/{repo_id}"


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


def model_card(directory: Path, repo_id: str) -> str:
    """The Markdown card of a model directory, with the Hub's metadata."""
    from huggingface_hub import ModelCard, ModelCardData

    description = read_description(directory)
    config, about = description.model, description.about
    names, sampling = read_class_names(directory), read_sampling(directory).model_dump()
    cost = model_cost(config)
    memory = ", ".join(f"{key} {value}" for key, value in config.memory.model_dump().items())
    architecture = {
        "layers, heads, width": f"{config.n_layer}, {config.n_head}, {config.width}",
        "parameters": f"{cost.parameters:,} (value memory {cost.bank:,})",
        "attention, memory, feed-forward": f"{config.attention.kind}; {memory}; {config.ffn.kind}",
        "codes": f"{config.grid[0]} x {config.grid[1]} out of {config.codebook_size:,}",
        "origin": about.get("source", "trained with moveimg"),
    }
    results = about.get("val")
    figures = results if isinstance(results, dict) else {}
    figures = {k: f"{v:.4f}" for k, v in figures.items() if isinstance(v, int | float)}
    tags = ["image-generation", "class-conditional", "autoregressive"]
    data = ModelCardData(library_name="moveimg", tags=[*tags, f"{config.memory.kind}-memory"])
    sections = [
        f"---\n{data.to_yaml()}\n---\n\n# {repo_id.split('/')[1]}",
        CARD_TEXT.format(repo_id=repo_id).strip(),
        f"## Model\n\n{_table(architecture)}",
        f"## Sampling settings\n\n{_table(sampling)}",
        f"## Classes ({len(names)})\n\n{list_names(names, 20)}",
        f"## Results (held out, after {about.get('step')} steps)\n\n{_table(figures)}",
    ]
    return str(ModelCard("\n\n".join(sections if figures else sections[:-1]) + "\n"))


def _table(rows: dict[str, Any]) -> str:
    """A Markdown table of keys and values."""
    return "\n".join(["| | |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in rows.items())])
