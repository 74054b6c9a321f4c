"""Times of ours beside LlamaGen's own code, in turn, each in a process of its own; random weights.

    git clone https://github.com/FoundationVision/LlamaGen
    python apps/beside_llamagen.py LlamaGen sample --dtype bfloat16 --batch-size 8
    python apps/beside_llamagen.py LlamaGen sample --quantize int8
    python apps/beside_llamagen.py LlamaGen train --batch-size 2
    python apps/beside_llamagen.py LlamaGen encode --batch-size 2
    python apps/beside_llamagen.py LlamaGen paint --batch-size 4

GPT-B at 256 pixels on the CPU; encoding is ten crops of each of `--batch-size` images by VQ-16,
painting the way back from one's codes to its pixels.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

import tokenizer as vq
from moveimg.config import OptimizerConfig, SamplingSettings
from moveimg.config.model import ModelConfig
from moveimg.data import default_batch_size, encode_images, open_images
from moveimg.device import pick_device
from moveimg.model import Transformer, decoding_model
from moveimg.sampling import image_rngs, sample_codes
from moveimg.training.optimizer import make_optimizers

CODES, CLASSES, GRID, SIZE = 16384, 1000, (16, 16), 256
MEMORIES: dict[str, dict[str, Any]] = {
    "dense": {"kind": "none"},
    "MoVE x1": {"kind": "move", "slots": 6},
    "MoVE x4": {"kind": "move", "slots": 24},
}
LLAMAGEN = "LlamaGen"
Run = Callable[[], object]


def theirs(checkout: Path, module: str) -> Any:
    """A module of LlamaGen's, whose package `tokenizer` has the name of one of ours."""

    def forget() -> dict[str, Any]:
        names = [name for name in sys.modules if name.split(".")[0] in ("tokenizer", "dataset")]
        return {name: sys.modules.pop(name) for name in names}

    ours = forget()
    sys.path.insert(0, str(checkout))
    for name in ("tokenizer", "dataset"):  # folders without __init__.py, which would lose to ours
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(checkout / name)]
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(checkout))
        forget()
        sys.modules.update(ours)


def their_generator(checkout: Path, **dropout: float) -> Any:
    """LlamaGen's GPT-B; its head, which starts at zero, is drawn as other matrices are."""
    make = theirs(checkout, "autoregressive.models.gpt").GPT_models["GPT-B"]
    model = make(
        vocab_size=CODES, block_size=GRID[0] * GRID[1], num_classes=CLASSES, cls_token_num=1,
        model_type="c2i", **dropout,
    )  # fmt: skip
    torch.nn.init.normal_(model.output.weight, std=0.02)
    return model


def our_generator(memory: str, **dropout: float) -> Transformer:
    given = {"size": "B", "codebook_size": CODES, "n_classes": CLASSES, "grid": GRID}
    model = Transformer(ModelConfig.model_validate(given | {"memory": MEMORIES[memory]} | dropout))
    torch.nn.init.normal_(model.head.weight, std=0.02)
    return model


def sampling(name: str, given: argparse.Namespace) -> Run:
    """All codes of the images, guidance 2, no filters; LlamaGen's always without 8 bits."""
    dtype, labels = getattr(torch, given.dtype), torch.zeros(given.batch_size, dtype=torch.long)
    if name == LLAMAGEN:
        generate = theirs(given.checkout, "autoregressive.models.generate").generate
        model = their_generator(given.checkout).eval().to(dtype)
        options = {"cfg_scale": 2.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        return lambda: generate(model, labels, 256, **options)
    settings = SamplingSettings(cfg_scale=2.0)
    fast = decoding_model(our_generator(name).eval().to(dtype), given.quantize)
    return lambda: sample_codes(fast, labels, settings, image_rngs(range(given.batch_size)))


def training(name: str, given: argparse.Namespace) -> Run:
    """Steps in float32: forward, backward, AdamW; dropout 0.1 everywhere."""
    codes = torch.randint(CODES, (given.batch_size, GRID[0] * GRID[1]))
    labels = torch.randint(CLASSES, (given.batch_size,))
    if name == LLAMAGEN:
        names = ("resid_dropout_p", "ffn_dropout_p", "token_dropout_p", "class_dropout_prob")
        model = their_generator(given.checkout, **dict.fromkeys(names, 0.1)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)

        def their_step() -> None:
            optimizer.zero_grad(set_to_none=True)
            model(idx=codes[:, :-1], cond_idx=labels, targets=codes)[1].backward()
            optimizer.step()

        return their_step
    mine = our_generator(name, token_dropout=0.1, resid_dropout=0.1, ffn_dropout=0.1).train()
    optimizers = make_optimizers(mine, OptimizerConfig())

    def our_step() -> None:
        for each in optimizers:
            each.zero_grad(set_to_none=True)
        dropped = labels.masked_fill(torch.rand(len(labels)) < 0.1, CLASSES)
        mine(codes, dropped, loss=True)[0].backward()
        for each in optimizers:
            each.step()

    return our_step


def tokenizers(checkout: Path, folder: Path) -> tuple[Any, vq.AutoencoderTokenizer]:
    """LlamaGen's VQ-16 and ours with its weights, which go by a file in `folder`."""
    make = theirs(checkout, "tokenizer.tokenizer_image.vq_model").VQ_models["VQ-16"]
    model = make(codebook_size=CODES, codebook_embed_dim=8).eval()
    torch.save({"model": model.state_dict()}, folder / "vq.pt")
    return model, vq.fast_tokenizer(vq.load_llamagen_vq(folder / "vq.pt"))


def painting(name: str, given: argparse.Namespace) -> Run:
    """Codes -> pixels, both in float32 as LlamaGen's sampling does it."""
    model, fast = tokenizers(given.checkout, Path(tempfile.mkdtemp()))
    codes, shape = torch.randint(CODES, (given.batch_size, 256)), (given.batch_size, 8, *GRID)
    if name == LLAMAGEN:
        return torch.no_grad()(lambda: model.decode_code(codes, shape))
    return lambda: fast.decode(codes)


def encoding(name: str, given: argparse.Namespace) -> Run:
    """JPEG files -> codes on disk."""
    folder = Path(tempfile.mkdtemp())
    for number in range(max(2, given.batch_size)):
        kind = ("china", "flower")[number % 2]
        photograph = Image.fromarray(load_sample_image(f"{kind}.jpg"))
        (folder / "images" / kind).mkdir(parents=True, exist_ok=True)
        window = photograph.crop((10 * number, 0, 10 * number + 400, 400))
        window.save(folder / "images" / kind / f"{number:03d}.jpg", quality=90)
    model, fast = tokenizers(given.checkout, folder)
    crop = theirs(given.checkout, "dataset.augmentation").center_crop_arr
    view = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])
    views = transforms.Compose(
        [
            transforms.Lambda(lambda image: crop(image, int(SIZE * 1.1))),
            transforms.TenCrop(SIZE),
            transforms.Lambda(lambda crops: torch.stack([view(crop) for crop in crops])),
        ]
    )
    made = 0

    @torch.no_grad()
    def extract() -> None:
        loader = DataLoader(datasets.ImageFolder(str(folder / "images"), views), batch_size=1)
        for number, (crops, label) in enumerate(loader):
            codes = model.encode(crops.flatten(0, 1))[2][2]
            np.save(folder / f"{number}.npy", codes.reshape(1, 10, -1).numpy())
            np.save(folder / f"{number}-label.npy", label.numpy())

    def pack() -> None:
        nonlocal made
        made += 1
        encode_images(
            open_images(folder / "images", "train", 0), fast, folder / f"packed-{made}", size=SIZE,
            crops="ten", ranges=(1.1,), workers=0,
            batch_size=default_batch_size(SIZE, torch.device("cpu")),
        )  # fmt: skip

    return extract if name == LLAMAGEN else pack


WORK: dict[str, tuple[Callable[[str, argparse.Namespace], Run], list[str]]] = {
    "sample": (sampling, ["dense", "MoVE x1"]),
    "train": (training, list(MEMORIES)),
    "encode": (encoding, ["moveimg"]),
    "paint": (painting, ["moveimg"]),
}


def serve(name: str, given: argparse.Namespace, connection: Connection) -> None:
    """In a process of its own: run once whenever asked, and tell the seconds."""
    if name != LLAMAGEN:
        pick_device("cpu")  # as every command of ours does
    torch.manual_seed(0)
    run = WORK[given.what][0](name, given)
    while connection.recv():
        begun = time.perf_counter()
        run()
        connection.send(time.perf_counter() - begun)


def main() -> None:
    """Print medians, ranges and how many times as fast as LlamaGen each run is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="a clone of LlamaGen's repository")
    parser.add_argument("what", choices=list(WORK))
    parser.add_argument("--batch-size", type=int, default=1, help="images")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--quantize", choices=("int8",), help="ours alone")
    parser.add_argument("--rounds", type=int, default=3, help="after one that is not counted")
    given = parser.parse_args()
    if not (given.checkout / "autoregressive").is_dir():
        parser.error(f"{given.checkout}: expected a clone of LlamaGen's repository")
    context, asked = multiprocessing.get_context("spawn"), {}
    for name in (LLAMAGEN, *WORK[given.what][1]):
        asked[name], theirs_end = context.Pipe()
        context.Process(target=serve, args=(name, given, theirs_end), daemon=True).start()
        theirs_end.close()  # here; when the process dies, nothing is waited for
    times: dict[str, list[float]] = {name: [] for name in asked}
    for number in range(given.rounds + 1):
        for name in times if number % 2 else reversed(times):
            asked[name].send(True)
            seconds = asked[name].recv()
            if number:
                times[name].append(seconds)
    for pipe in asked.values():
        pipe.send(False)
    for name, taken in times.items():
        ratios = [theirs / mine for theirs, mine in zip(times[LLAMAGEN], taken, strict=True)]
        print(
            f"{name:<9} {statistics.median(taken):8.2f} s ({min(taken):.2f} to "
            f"{max(taken):.2f}), {statistics.median(ratios):.2f} times as fast "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
