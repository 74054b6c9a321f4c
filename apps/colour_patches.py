"""A small colour set without a download: scikit-learn's two sample photographs, cut into patches.

    python apps/colour_patches.py --out runs/colour-patches

Writes train/ and val/ with the classes china and flower, as PNGs of 32 x 32 pixels. The right
quarter of each photograph is held out: val patches there do not overlap, train patches of the rest
overlap by half.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

SIDE = 32
HELD_OUT = 0.25  # of a photograph's width, at the right


def patches(photograph: Image.Image, left: int, right: int, stride: int) -> Iterator[Image.Image]:
    """SIDE x SIDE patches of the columns left..right, `stride` pixels apart, row by row."""
    for y in range(0, photograph.height - SIDE + 1, stride):
        for x in range(left, right - SIDE + 1, stride):
            yield photograph.crop((x, y, x + SIDE, y + SIDE))


def main() -> None:
    from sklearn.datasets import load_sample_images

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    out: Path = parser.parse_args().out
    if out.exists():
        parser.error(f"{out} is there already: expected the name of a new folder")
    bunch = load_sample_images()
    for file, pixels in zip(bunch.filenames, bunch.images, strict=True):
        photograph = Image.fromarray(pixels)
        border = round(photograph.width * (1 - HELD_OUT))
        parts = {
            "train": patches(photograph, 0, border, SIDE // 2),
            "val": patches(photograph, border, photograph.width, SIDE),
        }
        for split, found in parts.items():
            folder = out / split / Path(file).stem
            folder.mkdir(parents=True)
            for index, patch in enumerate(found):
                patch.save(folder / f"{index:04d}.png")
            print(f"{folder}: {len(list(folder.iterdir()))} patches")


if __name__ == "__main__":
    main()
