"""Write a folder of emoji by class, from the npm packages of Noto and Twemoji.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    python tools/emoji_images.py emoji emoji-datasource-*.tgz

Noto Emoji is Apache-2.0, Twemoji CC-BY 4.0. Of an emoji in six skin tones, one tone is chosen at
random: all six would count one drawing six times.
"""

import json
import random
import tarfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import typer
from PIL import Image

from moveimg.files import atomic_directory

# name of a class -> patterns of its subcategories in emoji.json
CLASSES = {
    "smiley": "face-*", "heart": "heart", "hand": "hand-* hands", "bird": "animal-bird",
    "person": "person person-role person-fantasy person-gesture", "sea animal": "animal-marine",
    "mammal": "animal-mammal cat-face monkey-face", "bug": "animal-bug", "flower": "plant-flower",
    "fruit": "food-fruit", "vegetable": "food-vegetable", "meal": "food-prepared food-asian",
    "sweet": "food-sweet", "drink": "drink", "weather": "sky?&?weather", "clock": "time",
    "vehicle": "transport-ground transport-air transport-water", "clothing": "clothing",
    "building": "place-building place-religious", "flag": "country-flag subdivision-flag",
}  # fmt: skip


def write_images(package: Path, out: Path) -> None:
    """Write the 64-pixel images of a package to a folder per class below `out`."""
    rng = random.Random(0)
    with tarfile.open(package) as archive:
        names = archive.getnames()
        vendor = next(name.split("/")[2] for name in names if name.startswith("package/img/"))
        emojis: Any = json.load(archive.extractfile("package/emoji.json"))  # type: ignore[arg-type]
        for emoji in emojis:
            tones = [emoji, *emoji.get("skin_variations", {}).values()]
            files = [f"package/img/{vendor}/64/{tone['image']}" for tone in tones]
            files = [file for file in files if file in names]
            for name, patterns in CLASSES.items():
                in_class = any(fnmatch(emoji["subcategory"], part) for part in patterns.split())
                if in_class and files:
                    file: Any = archive.extractfile(rng.choice(files))
                    image = Image.open(file).convert("RGBA")
                    white = Image.new("RGBA", image.size, "white")
                    white.alpha_composite(image)
                    path = out / name / f"{emoji['short_name']}-{vendor}.png"
                    path.parent.mkdir(exist_ok=True)
                    white.convert("RGB").save(path)


def main(out: Path, packages: list[Path]) -> None:
    with atomic_directory(out) as folder:
        for package in packages:
            write_images(package, folder)


if __name__ == "__main__":
    typer.run(main)
