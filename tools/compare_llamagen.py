"""Time moveimg and LlamaGen's own code in turn, each in a process of its own, on the CPU.

    git clone https://github.com/FoundationVision/LlamaGen
    python tools/compare_llamagen.py LlamaGen sample --dtype bfloat16 --batch-size 8

The work: `sample` (codes of GPT-B at 256 pixels, guidance 2), `train` (a step in float32), `encode`
(ten crops of JPEG files by VQ-16, to disk), `decode` (codes -> pixels). Weights are random.
"""

from __future__ import annotations

import importlib
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import typer
from PIL import Image
from sklearn.datasets import load_sample_image
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

import tokenizer as vq
from moveimg.config import ModelConfig, OptimizerConfig, SamplingSettings
from moveimg.data import encode_images, open_images
from moveimg.model import Transformer, decoding_model
from moveimg.sampling import image_rngs, sample_codes
from moveimg.training.optimizer import make_optimizers

CODES, CLASSES, GRID = 16384, 1000, (16, 16)
MEMORIES: dict[str, dict[str, Any]] = {
    "dense": {"kind": "none"},
    "MoVE x1": {"kind": "move", "slots": 6},
    "MoVE x4": {"kind": "move", "slots": 24},
}
LLAMAGEN = "LlamaGen"
SUBJECTS = {"sample": ["dense", "MoVE x1"], "train": list(MEMORIES)}


def import_theirs(checkout: Path, module: str) -> Any:
    """Import a module of LlamaGen's, whose package `tokenizer` has the name of one of ours."""
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name[:9] == "tokenizer"}
    sys.path.insert(0, str(checkout))
    for name in ("tokenizer", "dataset"):  # folders without __init__.py, which would lose to ours
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(checkout / name)]
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(checkout))
        for name in [n for n in sys.modules if n.split(".")[0] in ("tokenizer", "dataset")]:
            del sys.modules[name]
        sys.modules.update(ours)


def make_generator(name: str, checkout: Path, dropout: float = 0.0) -> Any:
    """Build GPT-B; its head, which starts at zero, is drawn as other matrices are."""
    if name == LLAMAGEN:
        names = ("resid_dropout_p", "ffn_dropout_p", "token_dropout_p", "class_dropout_prob")
        model: Any = import_theirs(checkout, "autoregressive.models.gpt").GPT_models["GPT-B"](
            vocab_size=CODES, block_size=256, num_classes=CLASSES, cls_token_num=1,
            model_type="c2i", **dict.fromkeys(names, dropout),
        )  # fmt: skip
        torch.nn.init.normal_(model.output.weight, std=0.02)
        return model
    rates = dict.fromkeys(("token_dropout", "resid_dropout", "ffn_dropout"), dropout)
    values = {"size": "B", "codebook_size": CODES, "n_classes": CLASSES, "grid": GRID}
    model = Transformer(ModelConfig.model_validate(values | rates | {"memory": MEMORIES[name]}))
    torch.nn.init.normal_(model.head.weight, std=0.02)
    return model


def prepare_sample(name: str, options: Any) -> Callable[[], object]:
    model = make_generator(name, options.checkout).eval().to(getattr(torch, options.dtype))
    labels = torch.zeros(options.batch_size, dtype=torch.long)
    if name == LLAMAGEN:
        generate = import_theirs(options.checkout, "autoregressive.models.generate").generate
        return lambda: generate(model, labels, 256, cfg_scale=2.0, top_k=0, top_p=1.0)
    settings, fast = SamplingSettings(cfg_scale=2.0), decoding_model(model, options.quantize)
    return lambda: sample_codes(fast, labels, settings, image_rngs(range(options.batch_size)))


def prepare_train(name: str, options: Any) -> Callable[[], object]:
    model = make_generator(name, options.checkout, dropout=0.1).train()
    codes = torch.randint(CODES, (options.batch_size, 256))
    labels = torch.randint(CLASSES, (options.batch_size,))
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    optimizers = [adamw] if name == LLAMAGEN else make_optimizers(model, OptimizerConfig())

    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        if name == LLAMAGEN:
            loss = model(idx=codes[:, :-1], cond_idx=labels, targets=codes)[1]
        else:
            dropped = labels.masked_fill(torch.rand(len(labels)) < 0.1, CLASSES)
            loss = model(codes, dropped, loss=True)[0]
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    return step


def make_tokenizers(checkout: Path, folder: Path) -> tuple[Any, Any]:
    """Build LlamaGen's VQ-16, and ours with its weights."""
    make = import_theirs(checkout, "tokenizer.tokenizer_image.vq_model").VQ_models["VQ-16"]
    model = make(codebook_size=CODES, codebook_embed_dim=8).eval()
    torch.save({"model": model.state_dict()}, folder / "vq.pt")
    return model, vq.fast_tokenizer(vq.load_llamagen_vq(folder / "vq.pt"))


@torch.no_grad()
def prepare_decode(name: str, options: Any) -> Callable[[], object]:
    theirs, ours = make_tokenizers(options.checkout, Path(tempfile.mkdtemp()))
    codes, shape = torch.randint(CODES, (options.batch_size, 256)), (options.batch_size, 8, *GRID)
    decode = torch.no_grad()(lambda: theirs.decode_code(codes, shape))
    return decode if name == LLAMAGEN else lambda: ours.decode(codes)


def prepare_encode(name: str, options: Any) -> Callable[[], object]:
    folder = Path(tempfile.mkdtemp())
    for number in range(max(2, options.batch_size)):
        kind = ("china", "flower")[number % 2]
        (folder / "images" / kind).mkdir(parents=True, exist_ok=True)
        window = Image.fromarray(load_sample_image(f"{kind}.jpg")).crop(
            (number, 0, number + 400, 400)
        )
        window.save(folder / "images" / kind / f"{number:03d}.jpg", quality=90)
    theirs, ours = make_tokenizers(options.checkout, folder)
    crop = import_theirs(options.checkout, "dataset.augmentation").center_crop_arr
    view = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])
    views = transforms.Compose([
        lambda image: crop(image, 281), transforms.TenCrop(256),
        lambda crops: torch.stack([view(crop) for crop in crops]),
    ])  # fmt: skip

    @torch.no_grad()
    def encode_theirs() -> None:
        loader = DataLoader(datasets.ImageFolder(str(folder / "images"), views), batch_size=1)
        for number, (crops, label) in enumerate(loader):
            codes = theirs.encode(crops.flatten(0, 1))[2][2]
            np.save(folder / f"{number}.npy", codes.reshape(1, 10, -1).numpy())
            np.save(folder / f"{number}-label.npy", label.numpy())

    def encode_ours() -> None:
        source, out = open_images(folder / "images", "train", 0), Path(tempfile.mkdtemp(dir=folder))
        encode_images(source, ours, out / "codes", size=256, crops="ten", ranges=(1.1,), workers=0)

    return encode_theirs if name == LLAMAGEN else encode_ours


def serve(name: str, options: Any, connection: Any) -> None:
    """Run the work once per request, in a process of its own, and send the seconds."""
    torch.manual_seed(0)
    run = globals()[f"prepare_{options.work}"](name, options)
    while connection.recv():
        begin = time.perf_counter()
        run()
        connection.send(time.perf_counter() - begin)


def main(
    checkout: Path,
    work: str,
    batch_size: int = 1,
    dtype: str = "float32",
    quantize: str = typer.Option(None, help="int8, of ours alone"),
    rounds: int = typer.Option(3, help="after one that is not counted"),
) -> None:
    options = SimpleNamespace(
        checkout=checkout, work=work, batch_size=batch_size, dtype=dtype, quantize=quantize
    )
    context, pipes = multiprocessing.get_context("spawn"), {}
    for name in (LLAMAGEN, *SUBJECTS.get(work, ["moveimg"])):
        pipes[name], theirs = context.Pipe()
        context.Process(target=serve, args=(name, options, theirs), daemon=True).start()
        theirs.close()  # here: when the process dies, nothing waits for it
    times: dict[str, list[float]] = {name: [] for name in pipes}
    for number in range(rounds + 1):
        for name in times if number % 2 else reversed(times):
            pipes[name].send(True)
            seconds = pipes[name].recv()
            if number:
                times[name].append(seconds)
    for pipe in pipes.values():
        pipe.send(False)
    for name, seconds in times.items():
        ratio = statistics.median(a / b for a, b in zip(times[LLAMAGEN], seconds, strict=True))
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        print(
            f"{name:<9} {statistics.median(seconds):7.2f} s ({spread}), {ratio:.2f} times as fast"
        )


if __name__ == "__main__":
    typer.run(main)
