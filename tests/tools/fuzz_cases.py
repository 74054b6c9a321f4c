"""Bad inputs of every kind, read as the program reads them; `python -m tools.fuzz` tries thousands.

`KINDS` maps a kind to a function of (rng, folder, material): it writes one input into the empty
`folder`, reads it, and checks what was accepted. `material` is what `make_material` wrote.
"""

from __future__ import annotations

import io
import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from moveimg.checkpoint import BUNDLED
from moveimg.commands import app
from moveimg.config import TokenizerTrainConfig, TrainConfig, load_config
from moveimg.data import Batches, PackedCodes, crop_views, open_images
from moveimg.device import peak_memory
from moveimg.errors import describe
from moveimg.evaluation.extractors import Extractor
from moveimg.evaluation.reference import open_reference
from moveimg.evaluation.run import read_results, results_table
from moveimg.evaluation.sets import open_set, scan_image_set
from moveimg.images import MAX_PIXELS, read_image
from moveimg.pipeline import Pipeline
from moveimg.training.generator import train_generator
from tests.test_training import CPU, train_config
from tests.tools import fuzz_inputs as inputs
from tests.tools.limits import HangError, isolated, time_limit
from tokenizer import parse_config

SECONDS, BYTES = 10, 2**30  # of the processor and of memory, for one case
MAX_MESSAGE = 2000  # characters
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


class FuzzFailure(AssertionError):
    """An input that was neither refused in one line nor accepted and right."""


def try_case(kind: str, seed: int, folder: Path, material: Path) -> str:
    """Try one input: `accepted`, or the line of its refusal. Raises FuzzFailure for anything else.

    The failure's first word is its kind: traceback, hang or memory.
    """
    rng, said = random.Random(f"{kind} {seed}"), "accepted"
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is now
    before = peak_memory(CPU)
    try:
        with isolated(folder), time_limit(SECONDS):
            KINDS[kind](rng, folder, material)
    except (ValueError, FileNotFoundError) as error:
        said = describe(error)
        if not said or len(str(error)) > MAX_MESSAGE:
            raise FuzzFailure(f"traceback: a message of {len(str(error))} characters") from error
    except HangError as error:
        raise FuzzFailure(f"hang: more than {SECONDS} s") from error
    except Exception as error:
        raise FuzzFailure(f"traceback: {type(error).__name__}: {describe(error, 200)}") from error
    if (used := peak_memory(CPU) - before) > BYTES:
        raise FuzzFailure(f"memory: {used / 2**20:.0f} MiB")
    return said


def run_command(*words: object) -> None:
    """Run a command. Raises ValueError with its one line where it is refused."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise RuntimeError(f"{result.exception!r} of {words}") from result.exception
    if result.exit_code:
        lines = result.stderr.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        if result.exit_code != 2 or errors != lines[-1:]:
            raise RuntimeError(f"exit code {result.exit_code} of {words}: {result.stderr[-500:]}")
        raise ValueError(errors[0])


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


def try_config(rng: random.Random, folder: Path, material: Path) -> None:
    """A run's YAML with mutated values, or a text that YAML's readers stumble over."""
    path, source = folder / "config.yaml", rng.choice(CONFIGS)
    kind: Any = TokenizerTrainConfig if "tokenizer" in source.name else TrainConfig
    known = load_config(source, kind).model_dump(mode="json")
    chosen, text = rng.random(), yaml.safe_dump(known)
    if chosen < 0.65:
        text = yaml.safe_dump(inputs.mutate(known, rng))
    elif chosen < 0.75:
        text = inputs.damage(text.encode(), rng).decode("utf-8", "surrogateescape")
    elif chosen < 0.9:
        key, line = rng.choice(["steps", "model", "x", "base"]), rng.choice(inputs.YAML_TEXTS)
        text = rng.choice([f"{text}\n{line}", f"{key}: {line}", line, f"{text}\n{key}: {line}"])
    else:
        text = inputs.alias_bomb(rng)
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    config = load_config(path, kind)
    if isinstance(config, TrainConfig):
        run_command("info", path, "--train")
    else:
        parse_config(config.tokenizer, str(path))


def damage_file(path: Path, rng: random.Random) -> None:
    if path.suffix == ".json":
        inputs.damage_json(path, rng)
    elif path.suffix == ".npy":
        path.write_bytes(inputs.damage_npy(np.load(path), rng))
    else:
        inputs.damage_weights(path, rng)


def try_model(rng: random.Random, folder: Path, material: Path) -> None:
    """A model directory with one bad file; what loads must sample images."""
    shutil.copytree(material / "run", folder, dirs_exist_ok=True, ignore=lambda *_: ["training"])
    names = ["config.json", "sampling.json", "classes.json", "model.safetensors"]
    damage_file(folder / rng.choice([*names, *(f"tokenizer/{name}" for name in names[::3])]), rng)
    pipeline = Pipeline.from_pretrained(folder, device="cpu")
    (image,) = pipeline.sample([0], seed=1)
    height, width = pipeline.generator.config.grid
    assert image.size == (8 * width, 8 * height)
    assert len(image.getcolors(image.width * image.height) or ()) > 1


def try_codes(rng: random.Random, folder: Path, material: Path) -> None:
    """Packed codes with one bad file; what opens must give codes of the codebook and labels."""
    shutil.copytree(material / "codes" / "val", folder, dirs_exist_ok=True)
    path = folder / rng.choice(["manifest.json", "codes-00000.npy", "labels-00000.npy"])
    if rng.random() < 0.2 and path.suffix == ".npy":
        array = np.load(path)
        array.flat[rng.randrange(array.size)] = rng.choice([17, 9999, np.iinfo(array.dtype).max])
        np.save(path, array)
    else:
        damage_file(path, rng)
    packed = PackedCodes(folder)
    codes, labels, _ = Batches(packed, 8).batch(rng.randrange(100))
    assert codes.shape == (8, packed.grid[0] * packed.grid[1])
    assert codes.max() < packed.codebook_size and codes.min() >= 0
    assert labels.max() < len(packed.class_names) and labels.min() >= 0


def try_set(rng: random.Random, folder: Path, material: Path) -> None:
    """A sample set, a reference or its results."""
    path, chosen = folder / "set.npz", rng.random()
    if chosen < 0.15:
        inputs.damage_json(folder / "results.json", rng, inputs.RESULTS)
        assert results_table([read_results(folder / "results.json")])
        return
    if chosen < 0.4:
        path = folder / "images"
        shutil.copytree(material / "images", path)
        (path / "a" / rng.choice(["0.png", "9.png"])).write_bytes(inputs.draw_image(rng))
    elif chosen < 0.7:
        path.write_bytes(inputs.damage((material / "set.npz").read_bytes(), rng))
    else:
        arrays = dict(np.load(material / "set.npz")) | {"mu": np.zeros(3), "sigma": np.eye(3)}
        np.savez(path, **{key: arrays[key] for key in rng.sample(list(arrays), 3)})
    images = open_set(path)
    assert 0 <= scan_image_set(images)[1] < images.count
    assert images.labels is None or (
        len(images.labels) == images.count and images.labels.min() >= 0
    )
    extractor = Extractor("means", "0" * 64, _means, CPU)
    reference = open_reference(str(path), images.size, extractor)
    assert np.isfinite(reference.statistics["fid"][0]).all()


def _means(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"fid": pixels.float().mean((2, 3))}


def try_image(rng: random.Random, folder: Path, material: Path) -> None:
    """One image by itself, or in a folder of classes that is encoded."""
    raw, images = inputs.draw_image(rng), folder / "images"
    if rng.random() < 0.7:
        image = read_image(io.BytesIO(raw), "image")
        assert image.mode == "RGB" and 0 < image.width * image.height <= MAX_PIXELS
        size, crops = rng.choice([8, 64, 256]), rng.choice(["center", "flip", "ten"])
        views = crop_views(image, size, crops, (1.0, rng.choice([1.05, 2.0])))
        assert {view.size for view in views} == {(size, size)}
        return
    shutil.copytree(material / "images", images)
    path = images / rng.choice(
        ["a/9.png", "b/0.jpg", "a/9.tif", "c/1.png", "a/.9.png", "train/1.png"]
    )
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(raw)
    assert {"a", "b"} <= set(open_images(images, "train").class_names)
    out = ["--out", folder / "out", "--size", 16, "--device", "cpu"]
    run_command("encode", images, "--tokenizer", material / "run", *out)
    packed = PackedCodes(folder / "out" / "train")
    assert len(packed) + len(packed.manifest.skipped) >= 4


def try_options(rng: random.Random, folder: Path, material: Path) -> None:
    """A command line of which one or two words are bad."""
    settings = yaml.safe_load((material / "run.yaml").read_text()) | {"out": str(folder / "out")}
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    paths = {"RUN": material / "run", "IMAGES": material / "images", "OUT": folder / "out",
             "CODES": material / "codes/val", "SET": material / "set.npz", "CONFIG": config,
             "PNG": folder / "r.png", "JSON": folder / "b.json",
             "NET": BUNDLED / "digits/extractor.safetensors"}  # fmt: skip
    words = [paths.get(word, word) for word in rng.choice(inputs.COMMANDS).split()]
    for _ in range(rng.choice([1, 1, 2])):
        position, value = (
            rng.randrange(1, len(words)),
            rng.choice((*inputs.VALUES, folder, paths["SET"])),
        )
        match rng.randrange(6):
            case 0:
                words.insert(position, value)
            case 1:
                del words[position]
            case _:
                words[position] = value
    run_command(*words)


def try_checkpoint(rng: random.Random, folder: Path, material: Path) -> None:
    """A run whose files are damaged or forged; then continued."""
    shutil.copytree(material / "run", folder / "run")
    path = next((folder / "run/training/checkpoints").glob("step-*"))
    file = path / rng.choice(["checkpoint.json", ".metadata", ".metadata", "extra.pt", "extra.pt",
                              "__0_0.distcp", "../../config.yaml", "../../data.json"])  # fmt: skip
    if file.name == "checkpoint.json" and rng.random() < 0.8:
        file.write_text(json.dumps(inputs.mutate(json.loads(file.read_text()), rng)))
    elif file.suffix == ".json":
        inputs.damage_json(file, rng)
    elif file.suffix == ".yaml":
        file.write_text(yaml.safe_dump(inputs.mutate(yaml.safe_load(file.read_text()), rng)))
    else:
        file.write_bytes(inputs.damage(file.read_bytes(), rng))
    config = load_config(material / "run.yaml", TrainConfig)
    result = train_generator(config.model_copy(update={"out": folder / "run"}), CPU)
    assert math.isfinite(result["loss"])


KINDS: dict[str, Callable[[random.Random, Path, Path], None]] = {
    "configs": try_config, "models": try_model, "codes": try_codes, "sample sets": try_set,
    "images": try_image, "options": try_options, "checkpoints": try_checkpoint,
}  # fmt: skip
