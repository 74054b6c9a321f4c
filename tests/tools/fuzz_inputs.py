"""Damaged and hostile values, files and images, each drawn by a seeded generator."""

from __future__ import annotations

import io
import json
import math
import pickle
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

NUMBERS = (0, 1, -1, 7, 2**16, 2**31, 2**64, 10**30, 0.5, 1e-300, 1e308, math.inf, math.nan)
JUNK: tuple[Any, ...] = (
    None, True, *NUMBERS, "", "x", "7", "null", "\0", "é\ud7ff", "x" * 5000, "../..", [], {}, [[]],
    [0, 0], [1] * 300, {"kind": "x"}, {"": ""}, {"x": {"x": [None]}},
)  # fmt: skip
YAML_TEXTS = (
    '!!int ""', "!!bool maybe", "!!timestamp x", "!!float x", "!!binary =", "!!set {a, b}",
    "!!omap []", "!!python/object/apply:os.mkdir [x]", "!x y", "&a [*a]", "*a", "{<<: 3}",
    "? [a]\n: b", "? {a: b}\n: c", "%YAML 9.9\n---\na", "---\n---\n", "\t", "@", "2001-99-99",
    "1:99:99", "0x", "=", "<<", "1" * 5000, "[" * 100_000, "{a: " * 2000, "- " * 5000, "\ufeff",
)  # fmt: skip
JSON_TEXTS = (
    "[" * 100_000, '{"a":' * 100_000, "1" * 5000, "[" + "0," * 10**6 + "0]", "NaN", '"\\ud800"',
    "\ufeff{}", "[1e999]", '"{}"',
)  # fmt: skip
FILES = (b"", b"<!DOCTYPE html>", b"PK\3\4", b"\x80\2.", b"{}", b"\0" * 100, b"\xff\xfe",
         b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")  # fmt: skip
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16")
FORMATS = ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "JPEG2000", "AVIF", "EPS")
COMMANDS = (
    "sample 1 --model RUN --num 1 --seed 0 --cfg-scale 1.5 --top-k 3 --top-p 0.5 --temperature 1 "
    "--cfg-schedule linear --batch-size 2 --out OUT --dtype float32",
    "info RUN --json",
    "info CONFIG --train --gpus 1 --gpu H100 --set steps=3",
    "encode IMAGES --tokenizer RUN --out OUT --size 16 --crops ten --range 1.1 --val-fraction 0.5 "
    "--batch-size 2 --dtype float32",
    "inspect RUN --codes CODES --num 2 --batch-size 2 --seed 0 --out OUT",
    "reconstruct IMAGES --tokenizer RUN --size 16 --split train --out PNG --no-rfid",
    "train CONFIG --set steps=1 --set batch_size=2 --set ema=0.5",
    "convert upcycle RUN --out OUT --slots 2",
    "convert upcycle RUN --out OUT --memory {kind:move}",
    "evaluate RUN --reference IMAGES --num-samples 4 --out OUT --set cfg_scale=1.0 --batch-size 2 "
    "--resize 8 --extractor NET",
    "evaluate --samples SET --reference IMAGES --extractor NET",
    "evaluate --show JSON",
    "bench sample RUN --batch-size 1 --repeats 1 --cfg-scale 1.0 --json JSON",
    "compare CONFIG none.yaml --out OUT --seeds 0 --jobs 1 --vary out",
)
VALUES = (
    "", "x", "-1", "0", "1e9", "nan", "inf", "1" * 30, "9" * 5000, "é", "\0", "a\nb", "\udcff", "[",
    "x" * 5000, "=", "{a: b}", "a=b", "a.b.c=1", "steps=[", "model.x=1", "steps=1" + "0" * 30, ".",
    "/dev/null", "/proc/self/mem", "9223372036854775808", "-0.0", "1:2", "1:0:0", "1:1e9:1e-9",
    "0,0", "0,1,,", "meta", "cuda:99", "-h", "--", "--set", "--num", "!!int ''", "seed=-1", "ema=2",
    "data.codes=/nope", "model.memory.kind=lave",
)  # fmt: skip
RESULTS = {
    "format": 1, "name": "x", "metrics": {"fid": 1.0}, "samples": {"count": 4},
    "reference": {"name": "r", "sha256": "0"}, "extractor": {"space": "s", "sha256": "0"},
    "plan": {"sampling": {"cfg_scale": 2.0}}, "warnings": [],
}  # fmt: skip


def mutate(data: Any, rng: random.Random) -> Any:
    """Plain data with a few values replaced, removed, renamed, moved or wrapped."""
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        data = json.loads(json.dumps(data))
        places = [(data, key) for key in _keys(data)]
        for parent, key in places:
            places += [(parent[key], inner) for inner in _keys(parent[key])]
        if not places or rng.random() < 0.02:
            return rng.choice(JUNK)
        (parent, key), (other, other_key) = rng.choice(places), rng.choice(places)
        value = parent[key]
        match rng.randrange(7):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[rng.choice(["x", "kind", f"{key}s", "", "x" * 5000])] = parent.pop(key)
            case 2:
                parent[key] = other[other_key]
            case 3:
                parent[key] = rng.choice([[value], {"x": value}, str(value), [value] * 100])
            case 4 | 5 if isinstance(value, int | float):
                parent[key] = rng.choice([value + 1, -value, *NUMBERS])
            case _:
                parent[key] = rng.choice(JUNK)
    return data


def _keys(data: Any) -> list[Any]:
    if isinstance(data, list):
        return list(range(len(data)))
    return list(data) if isinstance(data, dict) else []


def damage(data: bytes, rng: random.Random) -> bytes:
    """The bytes of a file cut, flipped, overwritten, or those of another file."""
    raw, size = bytearray(data), max(1, len(data))
    match rng.randrange(6):
        case 0:
            return bytes(raw[: rng.choice([0, 1, 7, 8, 9, 100, rng.randrange(size), size - 1])])
        case 1:
            return rng.choice(FILES)
        case 2:
            start = rng.randrange(min(size, 200))
            raw[start : start + 8] = struct.pack("<q", rng.choice([0, -1, 2**62, 2**31, 100, size]))
        case 3:
            start = rng.randrange(size)
            del raw[start : start + rng.choice([1, 8, 1000])]
        case _ if raw:
            reach = rng.choice([64, 256, size])  # headers are at the beginning
            for _ in range(rng.choice([1, 2, 10])):
                raw[rng.randrange(min(reach, size))] ^= 1 << rng.randrange(8)
    return bytes(raw)


def damage_json(path: Path, rng: random.Random, default: Any = None) -> None:
    """Overwrite a JSON file by a mutated, damaged or hostile one."""
    text = path.read_text(encoding="utf-8") if path.is_file() else json.dumps(default)
    choice = rng.random()
    if choice < 0.75:
        path.write_text(json.dumps(mutate(json.loads(text), rng)), encoding="utf-8")
    elif choice < 0.9:
        path.write_bytes(damage(text.encode(), rng))
    else:
        path.write_text(rng.choice(JSON_TEXTS), encoding="utf-8")


def alias_bomb(rng: random.Random) -> str:
    """A YAML text of which each line multiplies the one before by its aliases."""
    width, depth = rng.choice([(2, 30), (10, 9), (9, 40), (1, 3000)])
    lines = [f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * width)}]" for i in range(depth)]
    return "\n".join(["a0: &a0 [x]", *lines])


def damage_weights(path: Path, rng: random.Random) -> None:
    """Overwrite a safetensors file: its bytes, the header's types and shapes, or the numbers."""
    raw, chosen = path.read_bytes(), rng.random()
    if chosen < 0.3:
        path.write_bytes(damage(raw, rng))
    elif chosen < 0.65:
        size = struct.unpack("<Q", raw[:8])[0]
        text = json.dumps(mutate(json.loads(raw[8 : 8 + size]), rng)).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])
    else:
        state = load_file(path)
        key = rng.choice(list(state))
        value, bad = state[key], rng.choice([math.nan, math.inf, 1e38])
        kinds = [torch.int64, torch.bool, torch.complex64, torch.float16, torch.float64]
        state[key] = rng.choice([
            value.to(rng.choice(kinds)), torch.full_like(value, bad), value[:0], value.flatten(),
            value[None], torch.cat([value, value]),
        ])  # fmt: skip
        if rng.random() < 0.2:
            state[rng.choice(["x", "layers.99.x", f"module.{key}", "x" * 9999])] = state.pop(key)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)


def damage_npy(array: np.ndarray, rng: random.Random) -> bytes:
    """An .npy file whose header or data are wrong, or an archive or a pickle in its place."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    raw, chosen = buffer.getvalue(), rng.random()
    if chosen < 0.3:
        return damage(raw, rng)
    if chosen < 0.7:
        shapes = [array.shape, array.shape[::-1], (), (2**62,), (2**31, 2**31), (-1,), (0,), "x"]
        kinds = ["<u2", "|u1", ">u2", "<f8", "|O", "<i8", "<c8", "<U9", "x", [("a", "<u2")]]
        header = {"descr": rng.choice(kinds), "fortran_order": False, "shape": rng.choice(shapes)}
        wrong = ["(" * 500, "__import__('os')", repr(header)[:-1], "{}"]
        text = rng.choice([repr(header)] * 5 + wrong).encode() + b"\n"
        return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + raw[128:]
    buffer = io.BytesIO()
    match rng.randrange(4):
        case 0:
            np.savez(buffer, array)
        case 1:
            np.save(buffer, np.array([print, "x"], object))
        case 2:
            pickle.dump(array, buffer)
        case _:
            np.save(buffer, rng.choice([array.ravel()[:-1], array[None], array.astype("O")]))
    return buffer.getvalue()


def draw_image(rng: random.Random) -> bytes:
    """An image of any mode and format, whole or damaged; or a bomb."""
    buffer, chosen = io.BytesIO(), rng.random()
    if chosen < 0.06:
        size = rng.choice([(1, 30_000_000), (60_000, 1), (1, 1), (8100, 8100)])
        Image.new("1", size).save(buffer, "PNG")
        return buffer.getvalue()
    image = Image.effect_noise(rng.choice([(1, 1), (7, 5), (64, 64), (300, 2)]), 80)
    exif = b"Exif\0\0" + rng.choice([b"II*\0", b"MM\0*", b""]) + rng.randbytes(40)
    for kind in rng.sample(FORMATS, len(FORMATS)):
        try:
            image.convert(rng.choice(MODES)).save(buffer, kind, exif=exif)
            break
        except Exception:  # not from grey, or this format has no such mode
            buffer = io.BytesIO()
    raw = bytearray(buffer.getvalue())
    if chosen < 0.25 and raw[:4] == b"\x89PNG":
        raw[16:24] = struct.pack(">II", *rng.choice([(2**31 - 1,) * 2, (60_000, 60_000), (0, 9)]))
    return damage(bytes(raw), rng) if chosen < 0.7 else bytes(raw)
