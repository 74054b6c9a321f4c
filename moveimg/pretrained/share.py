"""Publishing a model directory on the Hugging Face Hub, with a model card."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from moveimg.checkpoint import read_about, read_model_config
from moveimg.files import read_json, write_json, write_text
from moveimg.model.cost import model_cost
from moveimg.pretrained.hub import MODEL_FILES, PUBLISHED, reason_of

CARD = "README.md"
SHOWN_CLASSES = 20
# Settings of a run that name files and folders of the machine it ran on, and values that do not
LOCAL = {
    "out", "codes", "source", "tokenizer", "init_from",
    "reference", "extractor", "inception_weights",
}  # fmt: skip
PUBLIC = (None, "digits", *PUBLISHED)


def push(directory: Path, repo_id: str, *, private: bool = False, api: Any = None) -> str:
    """Upload a model directory and its card in one commit; returns the repository's address.

    What config.json says of the folders here is left out (see public_config).

    Args:
        directory: a model directory. A README.md in it is taken as the card; without one, a card
            is written from config, settings, classes and results.
        repo_id: `owner/name`; made if it does not exist.
        private: whether a repository made here is private.
        api: in place of `huggingface_hub.HfApi()`, which takes the token of `hf auth login`.

    Raises:
        FileNotFoundError: the directory lacks a file.
        ValueError: `repo_id` is no `owner/name`, or a file is damaged.
        OSError: the Hub cannot be reached or refuses, with its reason.
    """
    if repo_id.count("/") != 1 or not all(repo_id.split("/")):
        raise ValueError(f"{repo_id!r}: expected the Hub's owner/name")
    missing = [file for file in MODEL_FILES if not (directory / file).is_file()]
    if missing:
        raise FileNotFoundError(f"{directory}: no whole model here (it lacks {missing[0]})")
    own = directory / CARD
    config = public_config(directory)
    text = own.read_text(encoding="utf-8") if own.is_file() else model_card(directory, repo_id)
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi()
    with tempfile.TemporaryDirectory() as name:
        # one folder of links, so that one commit holds all files and nothing else
        staged = Path(name)
        for file in MODEL_FILES:
            (staged / file).parent.mkdir(exist_ok=True)
            (staged / file).symlink_to((directory / file).resolve())
        (staged / "config.json").unlink()
        write_json(staged / "config.json", config)
        write_text(staged / CARD, text)
        try:
            api.create_repo(repo_id, exist_ok=True, private=private)
            api.upload_folder(repo_id=repo_id, folder_path=staged, commit_message="moveimg model")
        except Exception as error:  # which kinds, depends on huggingface_hub's transport
            raise OSError(f"huggingface.co/{repo_id}: not uploaded: {reason_of(error)}") from None
    return f"https://huggingface.co/{repo_id}"


def public_config(directory: Path) -> dict[str, Any]:
    """config.json as it is published: without the names of files and folders of this machine.

    Raises ValueError if it is not of a model.
    """
    read_model_config(directory)
    return read_json(directory / "config.json") | {"about": _nameless(read_about(directory))}


def _nameless(about: dict[str, Any], in_run: bool = False) -> dict[str, Any]:
    """`about` without the folder a model was made from, and without its run's LOCAL settings."""
    kept: dict[str, Any] = {}
    for key, value in about.items():
        if isinstance(value, dict):
            kept[key] = _nameless(value, in_run or key == "run")
        elif not (key in LOCAL if in_run else key == "from") or value in PUBLIC:
            kept[key] = value
    return kept


def model_card(directory: Path, repo_id: str) -> str:
    """The card of a model directory, in Markdown with the Hub's front matter."""
    config, about = read_model_config(directory), read_about(directory)
    names, sampling = (read_json(directory / f"{part}.json") for part in ("classes", "sampling"))
    cost = model_cost(config)
    shown = "; ".join(names[:SHOWN_CLASSES]) + ("; ..." if len(names) > SHOWN_CLASSES else "")
    memory = ", ".join(f"{key} {value}" for key, value in config.memory.model_dump().items())
    facts = {
        "layers, heads, width": f"{config.n_layer}, {config.n_head}, {config.width}",
        "parameters": f"{cost.parameters:,} (value memory {cost.bank:,})",
        "attention": config.attention.kind,
        "memory": memory,
        "feed-forward": config.ffn.kind,
        "codes": f"{config.grid[0]} x {config.grid[1]} out of {config.codebook_size:,}",
    }
    return "\n".join(
        [
            *("---", "library_name: moveimg", "tags:", "- image-generation"),
            *("- class-conditional", "- autoregressive", f"- {config.memory.kind}-memory", "---"),
            f"\n# {repo_id.split('/')[1]}\n",
            "A class-conditional generator of images by discrete codes, for `moveimg`.\n",
            "```python\nfrom moveimg import Pipeline\n",
            f'pipeline = Pipeline.from_pretrained("{repo_id}")',
            "images = pipeline.sample([0], seed=0)\n```\n",
            "## Model\n",
            *table("", facts),
            "\n## Sampling settings\n",
            *table("setting", sampling),
            f"\n## Classes ({len(names)})\n",
            shown,
            *results(about),
            "",
        ]
    )


def results(about: dict[str, Any]) -> list[str]:
    """Lines on where the model comes from and on its figures, as far as config.json has them."""
    lines = []
    if about.get("source"):
        lines += ["\n## Origin\n", str(about["source"]), ""]
    if isinstance(about.get("val"), dict):
        figures = {key: f"{value:.4f}" for key, value in about["val"].items()}
        lines += [f"\n## Results (held out, after {about.get('step')} steps)\n"]
        lines += table("figure", figures)
    return lines


def table(heading: str, rows: dict[str, Any]) -> list[str]:
    """A Markdown table of keys and values."""
    return [f"| {heading} | |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in rows.items())]
