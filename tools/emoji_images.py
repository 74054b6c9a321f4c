"""Write a folder of emoji by class, from the npm packages of Noto and Twemoji.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    python tools/emoji_images.py emoji-datasource-*.tgz --out emoji

Noto Emoji is Apache-2.0, Twemoji CC-BY 4.0. Each image has one skin tone, drawn at random: all six
would count one drawing six times.
"""

from __future__ import annotations

import io
import json
import random
import sys
import tarfile
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image

from moveimg.errors import describe
from moveimg.files import atomic_directory

# Classes that a person would ask for, by the subcategories of emoji.json; a trailing * is any.
CLASSES = {
    "smiley": ("face-*",),
    "heart": ("heart",),
    "hand": ("hand-*", "hands"),
    "person": ("person", "person-role", "person-fantasy", "person-gesture"),
    "mammal": ("animal-mammal", "cat-face", "monkey-face"),
    "bird": ("animal-bird",),
    "sea animal": ("animal-marine",),
    "bug": ("animal-bug",),
    "flower": ("plant-flower",),
    "fruit": ("food-fruit",),
    "vegetable": ("food-vegetable",),
    "meal": ("food-prepared", "food-asian"),
    "sweet": ("food-sweet",),
    "drink": ("drink",),
    "vehicle": ("transport-ground", "transport-air", "transport-water"),
    "building": ("place-building", "place-religious"),
    "weather": ("sky & weather",),
    "clock": ("time",),
    "clothing": ("clothing",),
    "flag": ("country-flag", "subdivision-flag"),
}


def find_class(emoji: dict[str, Any]) -> str | None:
    """The class of an entry of emoji.json, or None where no class asks for its subcategory."""
    subcategory = emoji["subcategory"]
    for name, patterns in CLASSES.items():
        for pattern in patterns:
            if subcategory == pattern or (
                pattern.endswith("*") and subcategory.startswith(pattern[:-1])
            ):
                return name
    return None


def write_images(package: Path, out: Path) -> int:
    """Write one package's 64-pixel images below `out`, by class, and return their number."""
    with tarfile.open(package) as archive:
        entries = {member.name: member for member in archive if member.isfile()}
        file = archive.extractfile(entries["package/emoji.json"])
        assert file is not None
        vendor = next(name.split("/")[2] for name in entries if name.startswith("package/img/"))
        count, rng = 0, random.Random(0)
        for emoji in json.load(file):
            name = find_class(emoji)
            tones = [emoji, *emoji.get("skin_variations", {}).values()]
            files = [f"package/img/{vendor}/64/{tone['image']}" for tone in tones]
            files = [file for file in files if file in entries]
            if name is None or not files:
                continue
            member = rng.choice(files)
            data = archive.extractfile(entries[member])
            assert data is not None
            image = Image.open(io.BytesIO(data.read())).convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            white.alpha_composite(image)
            folder = out / name
            folder.mkdir(exist_ok=True)
            white.convert("RGB").save(folder / f"{emoji['short_name']}-{vendor}.png")
            count += 1
    return count


def main(
    packages: Annotated[list[Path], typer.Argument(help="packed npm packages (.tgz)")],
    out: Annotated[Path, typer.Option(help="the folder to make")] = Path("emoji"),
) -> None:
    """Write a folder of emoji by class, from the npm packages of Noto and Twemoji."""
    try:
        with atomic_directory(out) as folder:
            count = sum(write_images(package, folder) for package in packages)
    except (OSError, tarfile.TarError, KeyError, StopIteration) as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        raise typer.Exit(2) from None
    print(f"{count} images of {len(CLASSES)} classes -> {out}/")


if __name__ == "__main__":
    typer.run(main)
