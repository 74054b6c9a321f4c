"""Times of ours beside LlamaGen's own code, in turn and in one process, with random weights.

    git clone https://github.com/FoundationVision/LlamaGen
    python apps/beside_llamagen.py LlamaGen sample --dtype bfloat16 --batch-size 8
    python apps/beside_llamagen.py LlamaGen sample --quantize int8
    python apps/beside_llamagen.py LlamaGen train --batch-size 2
    python apps/beside_llamagen.py LlamaGen encode --batch-size 2

GPT-B at 256 pixels on the CPU; encoding is ten crops of each of `--batch-size` images by VQ-16.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
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
from moveimg.config_model import ModelConfig
from moveimg.data.encode import encode_images, views_a_call
from moveimg.data.images import open_images
from moveimg.model import Transformer
from moveimg.model.decoding import decoding_model
from moveimg.sampling import image_rngs, sample_codes
from moveimg.training.optimizer import make_optimizers

CODES, CLASSES, GRID, SIZE = 16384, 1000, (16, 16), 256
MEMORIES: dict[str, dict[str, Any]] = {
    "dense": {"kind": "none"},
    "MoVE x1": {"kind": "move", "slots": 6},
    "MoVE x4": {"kind": "move", "slots": 24},
}
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


def sampling(checkout: Path, given: argparse.Namespace) -> dict[str, Run]:
    """All codes of the images, guidance 2, no filters; LlamaGen's always without 8 bits."""
    dtype, labels = getattr(torch, given.dtype), torch.zeros(given.batch_size, dtype=torch.long)
    generate = theirs(checkout, "autoregressive.models.generate").generate
    model = their_generator(checkout).eval().to(dtype)
    settings = SamplingSettings(cfg_scale=2.0)

    def draw(fast: Transformer) -> object:
        return sample_codes(fast, labels, settings, image_rngs(range(given.batch_size)))

    options = {"cfg_scale": 2.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    runs: dict[str, Run] = {"LlamaGen": lambda: generate(model, labels, 256, **options)}
    for name in ("dense", "MoVE x1"):
        fast = decoding_model(our_generator(name).eval().to(dtype), given.quantize)
        runs[name] = lambda fast=fast: draw(fast)  # type: ignore[misc]
    return runs


def training(checkout: Path, given: argparse.Namespace) -> dict[str, Run]:
    """Steps in float32: forward, backward, AdamW; dropout 0.1 everywhere."""
    codes = torch.randint(CODES, (given.batch_size, GRID[0] * GRID[1]))
    labels = torch.randint(CLASSES, (given.batch_size,))
    names = ("resid_dropout_p", "ffn_dropout_p", "token_dropout_p", "class_dropout_prob")
    model = their_generator(checkout, **dict.fromkeys(names, 0.1)).train()
    settings = OptimizerConfig()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)

    def their_step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(idx=codes[:, :-1], cond_idx=labels, targets=codes)[1].backward()
        optimizer.step()

    def our_step(mine: Transformer, optimizers: Any) -> None:
        for each in optimizers:
            each.zero_grad(set_to_none=True)
        dropped = labels.masked_fill(torch.rand(len(labels)) < 0.1, CLASSES)
        mine(codes, dropped, loss=True)[0].backward()
        for each in optimizers:
            each.step()

    runs: dict[str, Run] = {"LlamaGen": their_step}
    for name in MEMORIES:
        mine = our_generator(name, token_dropout=0.1, resid_dropout=0.1, ffn_dropout=0.1).train()
        both = (mine, make_optimizers(mine, settings))
        runs[name] = lambda both=both: our_step(*both)  # type: ignore[misc]
    return runs


def encoding(checkout: Path, given: argparse.Namespace) -> dict[str, Run]:
    """JPEG files -> codes on disk."""
    folder = Path(tempfile.mkdtemp())
    for number in range(max(2, given.batch_size)):
        name = ("china", "flower")[number % 2]
        photograph = Image.fromarray(load_sample_image(f"{name}.jpg"))
        (folder / "images" / name).mkdir(parents=True, exist_ok=True)
        window = photograph.crop((10 * number, 0, 10 * number + 400, 400))
        window.save(folder / "images" / name / f"{number:03d}.jpg", quality=90)
    make = theirs(checkout, "tokenizer.tokenizer_image.vq_model").VQ_models["VQ-16"]
    model = make(codebook_size=CODES, codebook_embed_dim=8).eval()
    torch.save({"model": model.state_dict()}, folder / "vq.pt")
    fast = vq.fast_encoder(vq.load_llamagen_vq(folder / "vq.pt"))
    crop = theirs(checkout, "dataset.augmentation").center_crop_arr
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
            batch_size=views_a_call(SIZE, torch.device("cpu")),
        )  # fmt: skip

    return {"LlamaGen": extract, "moveimg": pack}


def main() -> None:
    """Print medians, ranges and how many times as fast as LlamaGen each run is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="a clone of LlamaGen's repository")
    parser.add_argument("what", choices=("sample", "train", "encode"))
    parser.add_argument("--batch-size", type=int, default=1, help="images")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--quantize", choices=("int8",), help="ours alone")
    parser.add_argument("--rounds", type=int, default=3, help="after one that is not counted")
    given = parser.parse_args()
    torch.manual_seed(0)
    make = {"sample": sampling, "train": training, "encode": encoding}[given.what]
    runs = make(given.checkout, given)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(given.rounds + 1):
        for name, run in runs.items() if number % 2 else reversed(runs.items()):
            begun = time.perf_counter()
            run()
            if number:
                times[name].append(time.perf_counter() - begun)
    for name, seconds in times.items():
        ratios = [theirs / mine for theirs, mine in zip(times["LlamaGen"], seconds, strict=True)]
        print(
            f"{name:<9} {statistics.median(seconds):8.2f} s ({min(seconds):.2f} to "
            f"{max(seconds):.2f}), {statistics.median(ratios):.2f} times as fast "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
