"""Models by name: LlamaGen's published files, and model directories on the Hugging Face Hub.

Downloads go through huggingface_hub: cached under HF_HOME, resumed when they were cut off, shown
with a progress bar.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from moveimg.pretrained.llamagen import convert_llamagen

REPO = "FoundationVision/LlamaGen"
TOKENIZER_FILE = "vq_ds16_c2i.pt"
MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "classes.json",
    "sampling.json",
    "tokenizer/config.json",
    "tokenizer/model.safetensors",
)


@dataclass(frozen=True)
class Published:
    """A generator file of REPO and the pixels of a side it was trained for."""

    file: str
    image_size: int


PUBLISHED = {
    "llamagen-b-256": Published("c2i_B_256.pt", 256),
    "llamagen-l-256": Published("c2i_L_256.pt", 256),
    "llamagen-b-384": Published("c2i_B_384.pt", 384),
    "llamagen-l-384": Published("c2i_L_384.pt", 384),
    "llamagen-xl-384": Published("c2i_XL_384.pt", 384),
    "llamagen-xxl-384": Published("c2i_XXL_384.pt", 384),
    "llamagen-3b-384": Published("c2i_3B_384.pt", 384),
}


def fetch(name: str) -> Path | None:
    """The local directory of a published name or of a Hub id `owner/name`; None for neither.

    Downloads, and for published names converts, at first use.

    Raises:
        FileNotFoundError: a file is neither here nor to be had; one line says which, and how to
            bring it.
        ValueError: a file is damaged or holds something else.
    """
    if name in PUBLISHED:
        return published(name)
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII):
        return from_hub(name)
    return None


def published(name: str) -> Path:
    """The converted model directory of a published name (errors as of fetch)."""
    directory = cache_directory() / name
    if (directory / "config.json").is_file():
        return directory
    gpt, vq_file = _download(name, directory)
    print(f"{name}: converting, once, into {directory}", file=sys.stderr)
    try:
        convert_llamagen(gpt, vq_file, directory, PUBLISHED[name].image_size)
    except OSError:
        # another process may have been faster
        if not (directory / "config.json").is_file():
            raise
    return directory


def from_hub(repo_id: str) -> Path:
    """The local copy of a model directory on the Hub (errors as of fetch)."""
    try:
        folder = _snapshot(repo_id, MODEL_FILES)
    except Exception as error:  # as in _download
        raise FileNotFoundError(
            f"no model {repo_id!r}: no such directory here, and it cannot be downloaded from the "
            f"Hugging Face Hub ({reason_of(error)})"
        ) from None
    missing = [file for file in MODEL_FILES if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"huggingface.co/{repo_id} is no moveimg model, or its copy here is not whole: it "
            f"lacks {', '.join(missing)}"
        )
    return folder


def cache_directory() -> Path:
    """Where converted models are kept: MOVEIMG_CACHE, or `moveimg` in huggingface_hub's home.

    That home is HF_HOME, or else `huggingface` in XDG_CACHE_HOME or in ~/.cache.
    """
    if given := os.environ.get("MOVEIMG_CACHE"):
        return Path(given).expanduser()
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "moveimg"


def reason_of(error: Exception) -> str:
    """The first line of an error of huggingface_hub, whose messages run over many."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _download(name: str, directory: Path) -> tuple[Path, Path]:
    """The generator's and the tokenizer's files of a published name."""
    files = (PUBLISHED[name].file, TOKENIZER_FILE)
    reason, folder = "the repository lacks it", None
    try:
        folder = _snapshot(REPO, files)
    except Exception as error:  # which kinds, depends on huggingface_hub's transport
        reason = reason_of(error)
    missing = [file for file in files if folder is None or not (folder / file).is_file()]
    if folder is None or missing:
        raise FileNotFoundError(
            f"{name}: {' and '.join(missing)} of huggingface.co/{REPO} cannot be downloaded "
            f"({reason}); bring {' and '.join(files)} from where there is a network, then run "
            f"`moveimg convert llamagen --gpt {files[0]} --vq {files[1]} "
            f"--image-size {PUBLISHED[name].image_size} --out {directory}`"
        )
    return folder / files[0], folder / files[1]


def _snapshot(repo_id: str, files: tuple[str, ...]) -> Path:
    """A folder with those of `files` that the repository has; raises where there is none.

    Looks the repository up first, so that a missing network is noticed at once.
    """
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo_id, allow_patterns=list(files)))
