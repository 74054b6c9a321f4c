"""Models found by name: directories, bundled models, LlamaGen's published weights, the Hub.

Downloads go through huggingface_hub: cached under HF_HOME, resumed, shown with a progress bar.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from moveimg.checkpoint import BUNDLED
from moveimg.dist import print_rank0
from moveimg.errors import describe
from moveimg.pretrained.llamagen import convert_llamagen

REPO = "FoundationVision/LlamaGen"
PARTS = ("config.json", "model.safetensors")
MODEL_FILES = (*PARTS, "classes.json", "sampling.json", *(f"tokenizer/{file}" for file in PARTS))
# name of a generator -> its file in REPO, and the pixels of its images' sides
PUBLISHED = {
    f"llamagen-{size.lower()}-{pixels}": (f"c2i_{size}_{pixels}.pt", pixels)
    for pixels, sizes in {256: ("B", "L"), 384: ("B", "L", "XL", "XXL", "3B")}.items()
    for size in sizes
}


def resolve(name_or_path: str | Path) -> Path:
    """Return a model's directory, downloaded at first use (names: Pipeline.from_pretrained)."""
    name = str(name_or_path)
    for path in (Path(name), BUNDLED / name):
        if (path / "config.json").is_file():
            return path
    if Path(name).is_dir():
        raise FileNotFoundError(f"{name} holds no model: expected a config.json")
    if name in PUBLISHED:
        return _fetch_published(name)
    if re.fullmatch(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", name, re.ASCII):
        return _download(name, MODEL_FILES, f"and there is no local model {name!r}")
    known = ", ".join([*sorted(path.name for path in BUNDLED.glob("*")), *PUBLISHED])
    wanted = f"expected a model directory, a Hub id (owner/name) or one of {known}"
    raise FileNotFoundError(f"no model {name[:200]!r}: {wanted}")


def cache_directory() -> Path:
    """Return the cache's folder: MOVEIMG_CACHE, or `moveimg` in huggingface_hub's HF_HOME."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get("MOVEIMG_CACHE") or Path(HF_HOME, "moveimg")).expanduser()


def _fetch_published(name: str) -> Path:
    """Return the directory of a published model, downloaded and converted at first use."""
    directory = cache_directory() / name
    if not (directory / "config.json").is_file():
        (gpt, pixels), vq = PUBLISHED[name], "vq_ds16_c2i.pt"
        command = f"--gpt {gpt} --vq {vq} --image-size {pixels} --out {directory}"
        help = f"copy {gpt} and {vq} from a machine with a network, then run "
        folder = _download(REPO, (gpt, vq), f"{help}`moveimg convert llamagen {command}`")
        print_rank0(f"{name}: converting, once, into {directory}")
        try:
            convert_llamagen(folder / gpt, folder / vq, directory, pixels, None)
        except OSError:  # another rank has converted the model
            if not (directory / "config.json").is_file():
                raise
    return directory


def _download(repo_id: str, files: Sequence[str], help: str) -> Path:
    """Download files of a repository; returns their folder. FileNotFoundError ends with `help`."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo_id, allow_patterns=list(files)))
        missing = [file for file in files if not (folder / file).is_file()]
        reason = f"it lacks {', '.join(missing)}" if missing else ""
    except Exception as error:  # its kind depends on huggingface_hub's transport
        reason = describe(error, 300)
    if reason:
        raise FileNotFoundError(f"huggingface.co/{repo_id}: not downloaded ({reason}): {help}")
    return folder
