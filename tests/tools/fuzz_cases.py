"""Bad inputs of every kind, read as the program reads them; `python -m tools.fuzz` tries thousands.

`KINDS` maps a kind to a function of (rng, folder, material): it writes one input into the empty
`folder`, reads it, and checks what was accepted. `material` is what `make_material` wrote.
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import chdir, suppress
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from moveimg.checkpoint import load_tokenizer
from moveimg.config import TokenizerTrainConfig, TrainConfig, load_config
from moveimg.data import PackedCodes, draw_batch, encode_splits, open_images
from moveimg.device import peak_memory
from moveimg.errors import describe
from moveimg.evaluation.extractors import Extractor
from moveimg.evaluation.reference import open_reference
from moveimg.evaluation.sets import open_set, scan_image_set
from moveimg.images import FORMATS, MAX_PIXELS, read_image
from moveimg.pipeline import Pipeline
from moveimg.training.generator import train_generator
from tests.test_training import CPU, tokenizer_config, train_config
from tokenizer import parse_config

SECONDS, BYTES = 10, 2**30  # of the processor and of memory, for one case
MAX_MESSAGE = 2000  # characters
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
JUNK: tuple[Any, ...] = (
    None, True, 0, -1, 7, 2**31, 2**64, 10**30, 0.5, 1e-300, 1e308, math.inf, math.nan, "", "7",
    "\0", "é\ud7ff", "x" * 5000, "../..", [], {}, [0, 0], [1] * 300, {"x": {"x": [None]}},
)  # fmt: skip
YAML_TEXTS = (
    '!!int ""', "!!bool maybe", "!!timestamp x", "!!binary =", "!!omap []", "&a [*a]", "{<<: 3}",
    "!!python/object/apply:os.mkdir [x]", "? {a: b}\n: c", "---\n---\n", "\t", "2001-99-99", "0x",
    "1" * 5000, "[" * 100_000, "{a: " * 2000, "\ufeff",
)  # fmt: skip
JSON_TEXTS = ("[" * 100_000, '{"a":' * 100_000, "1" * 5000, "[" + "0," * 10**6 + "0]", "NaN",
              '"\\ud800"', "\ufeff{}", "[1e999]")  # fmt: skip
FILES = (b"", b"<!DOCTYPE html>", b"PK\3\4", b"\x80\2.", b"{}", b"\0" * 100, b"\xff\xfe",
         b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")  # fmt: skip
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16")


class FuzzFailure(BaseException):
    """An input that was neither refused in one line nor accepted and right."""


def try_case(kind: str, seed: int, folder: Path, material: Path) -> str:
    """Try one input: `accepted`, or the line of its refusal. Raises FuzzFailure for anything else.

    The failure's first word is its kind: traceback, hang or memory.
    """

    def ring(*_: object) -> None:
        raise FuzzFailure(f"hang: more than {SECONDS} s")

    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is now
    before, handler = peak_memory(CPU), signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of the processor's time
    try:
        with chdir(folder), patch.dict(os.environ, {"MOVEIMG_CACHE": str(folder / "cache")}):
            KINDS[kind](Random(f"{kind} {seed}"), folder, material)
        said = "accepted"
    except (ValueError, FileNotFoundError) as error:
        said = describe(error)
        if not said or len(str(error)) > MAX_MESSAGE:
            raise FuzzFailure(f"traceback: a message of {len(str(error))} characters") from error
    except Exception as error:
        raise FuzzFailure(f"traceback: {type(error).__name__}: {describe(error, 200)}") from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
    if (used := peak_memory(CPU) - before) > BYTES:
        raise FuzzFailure(f"memory: {used / 2**20:.0f} MiB")
    return said


def make_material(digits: Path, folder: Path) -> Path:
    """Write valid inputs into `folder`; `digits` is what encode_tiny_digits made."""
    config = train_config(digits, folder / "run", steps=2)
    train_generator(config, CPU)
    settings = config.model_dump(mode="json", exclude_unset=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)
    np.savez(folder / "set.npz", arr_0=pixels, arr_1=np.arange(6))
    shutil.copytree(digits / "codes", folder / "codes")
    for number, image in enumerate(pixels):
        path = folder / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def mutate(data: Any, rng: Random) -> Any:
    """Plain data with one value replaced or removed."""
    data = json.loads(json.dumps(data))
    places = [(data, key) for key in _keys(data)]
    for parent, key in places:
        places += [(parent[key], inner) for inner in _keys(parent[key])]
    if not places:
        return rng.choice(JUNK)
    parent, key = rng.choice(places)
    parent[key] = rng.choice([*JUNK, [parent[key]], {"x": parent[key]}, str(parent[key])])
    if rng.random() < 0.2:
        del parent[key]
    return data


def _keys(data: Any) -> list[Any]:
    return list(range(len(data)) if isinstance(data, list) else data if type(data) is dict else [])


def damage(data: bytes, rng: Random) -> bytes:
    """The bytes of a file cut, flipped, or those of another file."""
    raw, start = bytearray(data or b"x"), rng.randrange(max(1, len(data)))
    shorter = raw[:start] + raw[start + rng.choice([1, 8, 1000, len(raw)]) :]
    for _ in range(rng.choice([1, 2, 10])):  # headers are at the beginning
        reach = rng.choice([64, 256, len(raw)])
        raw[rng.randrange(min(reach, len(raw)))] ^= 1 << rng.randrange(8)
    return bytes(rng.choice([raw, raw, raw, shorter, rng.choice(FILES)]))


def damage_file(path: Path, rng: Random) -> None:
    """Overwrite a file by one whose bytes or values are bad."""
    if rng.random() < 0.3 or path.suffix not in (".json", ".npy", ".safetensors"):
        path.write_bytes(damage(path.read_bytes(), rng))
    elif path.suffix == ".json":
        texts = [json.dumps(mutate(json.loads(path.read_text()), rng))] * 4
        path.write_text(rng.choice([*texts, rng.choice(JSON_TEXTS)]))
    elif path.suffix == ".npy":
        array = np.load(path)
        array.flat[rng.randrange(array.size)] = rng.choice([17, np.iinfo(array.dtype).max])
        wrong = [array, array.ravel()[:-1], array[None], array.astype("O"), array.astype("<f8")]
        with path.open("wb") as file:
            rng.choice([np.save, np.save, np.savez])(file, rng.choice(wrong))
    else:
        state = load_file(path)
        key, bad = rng.choice(list(state)), rng.choice([math.nan, math.inf, 1e38])
        value, kinds = state.pop(key), [torch.int64, torch.bool, torch.complex64, torch.float16]
        wrong = [value.to(rng.choice(kinds)), torch.full_like(value, bad), value[:0], value[None]]
        state[rng.choice([key] * 4 + ["x", f"module.{key}"])] = rng.choice(wrong)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)


def draw_image(rng: Random) -> bytes:
    """An image of any mode and format, whole or damaged; or a bomb."""
    buffer, bomb = io.BytesIO(), rng.choice([(1, 30_000_000), (60_000, 1), (8100, 8100)])
    if rng.random() < 0.06:
        Image.new("1", bomb).save(buffer, "PNG")
        return buffer.getvalue()
    image = Image.effect_noise(rng.choice([(1, 1), (7, 5), (64, 64), (300, 2)]), 80)
    exif = b"Exif\0\0" + rng.choice([b"II*\0", b"MM\0*", b""]) + rng.randbytes(40)
    for kind in rng.sample(FORMATS, len(FORMATS)):
        with suppress(Exception):  # not from grey, or this format has no such mode
            buffer = io.BytesIO()
            image.convert(rng.choice(MODES)).save(buffer, kind, exif=exif)
            break
    return damage(buffer.getvalue(), rng) if rng.random() < 0.7 else buffer.getvalue()


def try_config(rng: Random, folder: Path, material: Path) -> None:
    """A run's YAML with mutated values, or a text that YAML's readers stumble over."""
    path, source, chosen = folder / "config.yaml", rng.choice(CONFIGS), rng.random()
    kind: Any = TokenizerTrainConfig if "tokenizer" in source.name else TrainConfig
    known = load_config(source, kind).model_dump(mode="json")
    if chosen < 0.7:
        text = yaml.safe_dump(mutate(known, rng))
    elif chosen < 0.9:
        line = f"{rng.choice(['steps', 'model', 'base'])}: {rng.choice(YAML_TEXTS)}"
        text = rng.choice([line, f"{yaml.safe_dump(known)}\n{line}", rng.choice(YAML_TEXTS)])
    else:  # each line multiplies the one before by its aliases
        width, depth = rng.choice([(2, 30), (9, 40), (1, 3000)])
        lines = [f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * width)}]" for i in range(depth)]
        text = "\n".join(["a0: &a0 [x]", *lines])
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    config = load_config(path, kind)
    if isinstance(config, TokenizerTrainConfig):
        parse_config(config.tokenizer, str(path))


def try_model(rng: Random, folder: Path, material: Path) -> None:
    """A model directory with one bad file; what loads must sample images."""
    shutil.copytree(material / "run", folder, dirs_exist_ok=True, ignore=lambda *_: ["training"])
    names = ["config.json", "sampling.json", "classes.json", "model.safetensors"]
    damage_file(folder / rng.choice([*names, *(f"tokenizer/{name}" for name in names[::3])]), rng)
    pipeline = Pipeline.from_pretrained(folder, device="cpu")
    (image,) = pipeline.sample([0], seed=1)
    height, width = pipeline.generator.config.grid
    assert image.size == (8 * width, 8 * height)
    assert len(image.getcolors(image.width * image.height) or ()) > 1


def try_codes(rng: Random, folder: Path, material: Path) -> None:
    """Packed codes with one bad file; what opens must give codes of the codebook and labels."""
    shutil.copytree(material / "codes" / "val", folder, dirs_exist_ok=True)
    damage_file(folder / rng.choice(["manifest.json", "codes-00000.npy", "labels-00000.npy"]), rng)
    packed = PackedCodes(folder)
    codes, labels, _ = draw_batch(packed, 8, 0, rng.randrange(100))
    assert codes.shape == (8, packed.grid[0] * packed.grid[1])
    assert codes.max() < packed.codebook_size and codes.min() >= 0
    assert labels.max() < len(packed.class_names) and labels.min() >= 0


def try_set(rng: Random, folder: Path, material: Path) -> None:
    """A sample set or a reference."""
    path, chosen = folder / "set.npz", rng.random()
    if chosen < 0.4:
        path = folder / "images"
        shutil.copytree(material / "images", path)
        (path / "a" / rng.choice(["0.png", "9.png"])).write_bytes(draw_image(rng))
    elif chosen < 0.7:
        path.write_bytes(damage((material / "set.npz").read_bytes(), rng))
    else:
        arrays = dict(np.load(material / "set.npz")) | {"mu": np.zeros(3), "sigma": np.eye(3)}
        np.savez(path, **{key: arrays[key] for key in rng.sample(list(arrays), 3)})
    images = open_set(path)
    assert 0 <= scan_image_set(images)[1] < images.count
    labels = images.labels
    assert labels is None or (len(labels) == images.count and labels.min() >= 0)
    means = lambda pixels: {"fid": pixels.float().mean((2, 3))}  # noqa: E731
    reference = open_reference(str(path), images.size, Extractor("means", "0" * 64, means, CPU))
    assert np.isfinite(reference.statistics["fid"][0]).all()


def try_image(rng: Random, folder: Path, material: Path) -> None:
    """One image by itself, or in a folder of classes that is encoded."""
    raw, images = draw_image(rng), folder / "images"
    if rng.random() < 0.7:
        image = read_image(io.BytesIO(raw), "image")
        assert image.mode == "RGB" and 0 < image.width * image.height <= MAX_PIXELS
        return
    shutil.copytree(material / "images", images)
    path = images / rng.choice(["a/9.png", "b/0.jpg", "a/9.tif", "c/1.png", "train/1.png"])
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(raw)
    assert {"a", "b"} <= set(open_images(images, "train").class_names)
    config = tokenizer_config(folder, images={"source": str(images), "size": 16}).images
    encode_splits(config, load_tokenizer(material / "run", CPU), folder / "out")
    packed = PackedCodes(folder / "out" / "train")
    assert len(packed) + len(packed.manifest.skipped) >= 4


KINDS: dict[str, Callable[[Random, Path, Path], None]] = {
    "configs": try_config, "models": try_model, "codes": try_codes, "sample sets": try_set,
    "images": try_image,
}  # fmt: skip
