"""`moveimg encode`, `train-tokenizer`, `train`, `compare`, `configs` and `config-reference`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer import Argument, Option

from moveimg.commands import common
from moveimg.commands.common import Device, Set, command, open_world, prepare_device
from moveimg.config import (
    ImagesConfig,
    TokenizerTrainConfig,
    TrainConfig,
    format_recipe,
    list_recipes,
    load_config,
    parse_size,
)
from moveimg.errors import validate
from moveimg.tables import markdown_table

REFERENCE = """\
# All keys of the configs

Made by `moveimg config-reference` from moveimg/config/. A key of a nested group is written
`group.key` on the command line: `--set optimizer.lr=1e-3`. A file may name another file or a recipe
(`moveimg configs`) as its `base:`; its own keys win. `model.size` (B, L, XL, XXL, 3B, digits) sets
`n_layer`, `n_head` and `width`. A group with a `kind` takes the keys of that kind."""
LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
LIMITS |= {"multipleOf": "a multiple of"}


@command
def encode(
    images: str = Argument(help="A folder of class folders, archives, Parquet, or a data set."),
    tokenizer: Path = Option(help="A tokenizer or model directory, or a bundled name."),
    out: Path = Option(help="The folder for train/ and val/ codes."),
    size: common.ImageSize = "256",
    crops: str = Option("center", help="Views: center, flip, five or ten."),
    ranges: list[float] = Option(
        [1.0], "--range", help="Resize to size * range first; repeatable."
    ),
    val_fraction: float | None = Option(
        None, help="Share to hold out; default: the source's split."
    ),
    data_root: Path | None = Option(None, help="Folder of downloads; default: $MOVEIMG_DATA."),
    batch_size: int | None = Option(None, min=1, max=65536, help="Views; default: by device."),
    device: Device = None,
    dtype: common.Dtype = None,
) -> None:
    """Encode images as packed codes; the same command continues a run that was stopped."""
    data = {"source": images, "size": parse_size(size), "crops": crops, "ranges": ranges}
    settings = validate(ImagesConfig, data | {"val_fraction": val_fraction}, "encode")
    with open_world(device) as world:
        from moveimg.checkpoint import load_tokenizer
        from moveimg.data import encode_splits
        from moveimg.device import pick_dtype

        vq = load_tokenizer(tokenizer, world.device)
        chosen: dict[str, Any] = {"batch_size": batch_size} if batch_size else {}
        chosen |= {"dtype": pick_dtype(dtype, world.device)} if dtype else {}
        manifests = encode_splits(settings, vq, out, data_root, device=world.device, **chosen)
        for split, manifest in manifests.items() if world.main else ():
            encoded = common.format_count(manifest.n_images, "image")
            views = common.format_count(manifest.settings.n_crops, "view")
            print(f"{out / split}: {encoded} x {views}, {len(manifest.skipped)} skipped")


@command
def train_tokenizer(
    config: common.Config, set: Set = None, restart: common.Restart = False, device: Device = None
) -> None:
    """Train a tokenizer on images; the same command continues a run that was stopped."""
    settings = load_config(config, TokenizerTrainConfig, set or [])
    with open_world(device) as world:
        from moveimg.training import tokenizer

        result = tokenizer.train_tokenizer(settings, world, restart)
        if world.main:
            print(f"{settings.out}: {common.format_numbers(result)}")


@command
def train(
    config: common.Config,
    set: Set = None,
    init_from: str | None = Option(None, help="Start from this model: a directory or a name."),
    train: str | None = Option(None, help="Weights to train: all, or memory (bank and routers)."),
    restart: common.Restart = False,
    device: Device = None,
) -> None:
    """Train a generator on codes or images; the same command continues a run that was stopped."""
    chosen = {"init_from": init_from, "train": train}
    extra = [f"{key}={json.dumps(value)}" for key, value in chosen.items() if value is not None]
    settings = load_config(config, TrainConfig, [*(set or []), *extra])
    with open_world(device) as world:
        from moveimg.training.generator import train_generator

        result = train_generator(settings, world, restart)
        if world.main:
            print(f"{settings.out}: {common.format_numbers(result)}")


@command
def compare(
    configs: list[str] = Argument(help="A study's YAML file, or configs as for `train`."),
    out: Path = Option(help="The folder for the runs and the report."),
    seeds: str | None = Option(None, help="Comma-separated; default: the study's, or 0,1,2."),
    jobs: int = Option(1, min=1, max=256, help="Runs to train in parallel."),
    set: Set = None,
    vary: list[str] = Option(
        [], metavar="KEY.PATH", help="Another key that may differ; repeatable."
    ),
    rounds: int = Option(0, min=0, max=1000, help="Measure speed in this many rounds."),
    device: Device = None,
) -> None:
    """Train several configs with several seeds; write tables, plots and all numbers as JSON.

    Finished runs are not repeated; the same command continues stopped runs.
    """
    where = prepare_device(device)
    from moveimg.compare import compare, load_study
    from moveimg.files import lock

    study = load_study(configs, seeds, vary)
    with lock(out, "moveimg compare"):
        print(compare(study, out, set or [], where, jobs, rounds))


@command
def configs(
    name: str | None = Argument(None, help="Print this recipe; default: list all."),
) -> None:
    """List the recipes, which commands accept by name, or print one as YAML."""
    if name is not None:
        print(format_recipe(name), end="")
        return
    for recipe, about in list_recipes().items():
        print(f"{recipe:<36}{about}")


@command
def config_reference() -> None:
    """Print all keys of the YAML configs with their defaults, as Markdown."""
    sections: dict[str, str] = {}
    runs: dict[str, Any] = {"train": TrainConfig, "train-tokenizer": TokenizerTrainConfig}
    for name, run in runs.items():
        schema = run.model_json_schema()
        groups = {f"## `moveimg {name}`": schema}
        groups |= {f"### {group}": described for group, described in schema["$defs"].items()}
        for title, group in groups.items():
            rows = [_describe_key(key, field, group) for key, field in group["properties"].items()]
            sections[title] = f"{title}\n\n{group['description']}\n\n{markdown_table(rows)}"
    print("\n\n".join([REFERENCE, *sections.values()]))


def _describe_key(key: str, field: dict[str, Any], group: dict[str, Any]) -> dict[str, str]:
    """The row of a key in the table of its group, from a JSON schema."""
    default = field.get("default")
    shown = "see there" if isinstance(default, dict) else f"`{json.dumps(default)}`"
    return {
        "key": f"`{key}`",
        "type": _describe_type(field),
        "default": "required" if key in group.get("required", []) else shown,
        "meaning": field.get("description", "").replace("|", "\\|"),
    }


def _describe_type(field: dict[str, Any]) -> str:
    """A type in words, with its range; a group is a link to its section."""
    if "$ref" in field:
        name = field["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    if values := field.get("enum", [field["const"]] if "const" in field else []):
        return ", ".join(f"`{value}`" for value in values)
    if choices := field.get("anyOf") or field.get("oneOf"):
        return " or ".join(_describe_type(c) for c in choices if c.get("type") != "null")
    if field.get("type") == "array":
        return f"list: {_describe_type(field.get('items') or field['prefixItems'][0])}"
    limits = [f"{words} {field[limit]:g}" for limit, words in LIMITS.items() if limit in field]
    return ", ".join([field.get("type", "any"), *limits])
