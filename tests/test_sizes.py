"""Images that are not square, from a folder to samples, by the commands alone."""

import json

import numpy as np
import yaml
from PIL import Image

from moveimg.data import PackedCodes
from moveimg.pipeline import Pipeline
from tests.test_cli import run
from tests.test_tokenizer_training import TINY, smooth_images


def test_images_of_24_by_16_pixels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    smooth_images(tmp_path / "photos")
    every = {"log_every": 2, "validate_every": 2, "preview_every": 2, "checkpoint_every": 2}
    shared = {"steps": 2, "batch_size": 4, "ema": 0.9, **every}
    tokenizer = shared | {"out": "vq", "images": {"source": "photos", "size": [24, 16]}}
    (tmp_path / "vq.yaml").write_text(yaml.safe_dump(tokenizer | {"tokenizer": TINY}))
    run("train-tokenizer", "vq.yaml", "--device", "cpu")
    run("encode", "photos", "--tokenizer", "vq", "--out", "codes", "--size", "24x16")
    assert PackedCodes(tmp_path / "codes/train").grid == (6, 4)
    generator = shared | {"out": "gpt", "data": {"codes": "codes", "tokenizer": "vq"}}
    generator["model"] = {"n_layer": 1, "n_head": 2, "width": 16}
    (tmp_path / "gpt.yaml").write_text(yaml.safe_dump(generator))
    run("train", "gpt.yaml", "--device", "cpu")
    run("sample", "--model", "gpt", "--num", 1)
    assert {Image.open(p).size for p in (tmp_path / "samples").glob("0*.png")} == {(16, 24)}
    pipeline = Pipeline.from_pretrained("gpt", device="cpu")
    whole = pipeline.complete(Image.new("RGB", (90, 70), "red"), 0, keep="left")[0]
    assert whole.size == (16, 24) and pipeline.code_mask("left").sum() == 12
    options = ("--tokenizer", "vq", "--size", "24x16", "--no-rfid")
    figures = json.loads(run("reconstruct", "photos", *options).stdout)
    assert figures["images"] == 2 and np.isfinite(figures["mse"])
