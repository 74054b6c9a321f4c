"""Recipes: configs that are found by a name, such as `fashion` or `imagenet-l-256-mla-move-x2`.

A name is a file of configs/, or another recipe and one more part:

    imagenet-SIZE-256    imagenet-256.yaml, SIZE being b, l, xl, xxl or 3b; so too -384
    RECIPE-mla           latent attention, a quarter of the width
    RECIPE-standard      without value memory
    RECIPE-lave-xN       tables on every second layer (x1, the default) or on all (x2)
    RECIPE-move-xN       N * n_layer / 2 slots; under latent attention a bank of the same size
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

from moveimg.config.model import MLAConfig, ModelConfig
from moveimg.errors import shorten, validate

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" if (ROOT / "configs").is_dir() else ROOT.parent / "configs"  # a checkout
MODELS = {"digits": "digits-move", "fashion": "fashion-move"}  # the bundled models' recipes
FORMS = {
    "imagenet-{b,l,xl,xxl,3b}-{256,384}": "A size of LlamaGen's at 256 or 384 pixels; add to it:",
    "...-mla": "latent attention;",
    "...-standard": "no value memory;",
    "...-lave-{x1,x2}": "LaVE, a table on every second layer or on all;",
    "...-move-{x1,x2,x4,...}": "MoVE, n_layer / 2 slots times the number.",
}
NAME = "[a-z0-9-]{1,100}"
LAVE = {1: "alternate", 2: "all"}


def find_recipe(name: str) -> Path | None:
    """The file in configs/ of a recipe's name; none for names put together from parts."""
    path = CONFIGS / f"{name}.yaml"
    return path if re.fullmatch(NAME, name) and path.is_file() else None


def list_recipes() -> dict[str, str]:
    """The recipes' names with a line about each: files by their first line, then the forms."""
    names = {}
    for path in sorted(CONFIGS.glob("*.yaml")):
        names[path.stem] = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
    models = {name: f"The bundled model {name}: {recipe}." for name, recipe in MODELS.items()}
    return models | names | FORMS


def compose(name: str, read: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """The settings that a name's last part adds to the recipe it names as `base`.

    `read` returns the settings of a recipe. Raises FileNotFoundError for a name that is none,
    ValueError for a part that does not fit the model.
    """
    if name in MODELS:
        return {"base": MODELS[name]}
    if match := re.fullmatch(r"imagenet-(b|l|xl|xxl|3b)-(256|384)", name):
        settings: dict[str, Any] = {"model": {"size": match[1].upper()}}
        if match[1] in ("xl", "xxl", "3b"):
            settings |= {"distributed": "fsdp", "activation_checkpointing": True}
        return {"base": f"imagenet-{match[2]}", "out": f"runs/{name}", **settings}
    match = re.fullmatch(r"([a-z0-9-]+?)-(mla|standard|lave|move)(?:-x([1-9]\d{0,2}))?", name)
    if match is None or (match[3] and match[2] in ("mla", "standard")):
        raise FileNotFoundError(
            f"no config {shorten(name)}: expected a YAML file or a recipe (see `moveimg configs`)"
        )
    base, part, scale = match[1], match[2], int(match[3] or 1)
    if find_recipe(base) is None and find_recipe(f"{base}-base"):
        base = f"{base}-base"
    data = read(base)
    if "model" not in data:
        raise FileNotFoundError(f"no config {name!r}: {base} has no model to change")
    model = validate(ModelConfig, data["model"], base)
    changes: dict[str, dict[str, Any]] = {
        "mla": {"kind": "mla", "kv_rank": model.width // 4, "rope_dim": model.head_dim // 8 * 4},
        "standard": {"kind": "none"},
        "lave": {"kind": "lave", "layers": LAVE.get(scale)},
        "move": {"kind": "move", "slots": _slots(model, scale)},
    }
    if changes[part].get("layers", "") is None:
        raise ValueError(f"{name}: expected lave-x1 or lave-x2")
    slot = "attention" if part == "mla" else "memory"
    return {"base": base, "out": f"runs/{name}", "model": {slot: changes[part]}}


def _slots(model: ModelConfig, scale: int) -> int:
    """Slots of a MoVE bank of `scale` times the paper's x1, whatever the width of a value."""
    attention = model.attention
    width = attention.kv_rank if isinstance(attention, MLAConfig) else model.width
    return max(1, round(Fraction(scale * model.n_layer * model.width, 2 * width)))
