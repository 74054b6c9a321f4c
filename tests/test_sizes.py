"""Images that are not square, from a folder to an evaluation, by the commands alone."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image

from moveimg.config import parse_size
from moveimg.data import PackedCodes
from moveimg.pipeline import Pipeline
from tests.test_cli import refused, run
from tests.test_tokenizer_training import TINY, smooth_images

EVERY = {"log_every": 2, "validate_every": 4, "preview_every": 4, "checkpoint_every": 4}


def test_images_of_24_by_16_pixels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOVEIMG_CACHE", str(tmp_path / "cache"))
    smooth_images(tmp_path / "photos")
    shared = {"steps": 4, "batch_size": 4, "ema": 0.9, **EVERY}
    tokenizer = shared | {"out": "vq", "images": {"source": "photos", "size": [24, 16]}}
    (tmp_path / "vq.yaml").write_text(yaml.safe_dump(tokenizer | {"tokenizer": TINY}))
    run("train-tokenizer", "vq.yaml", "--device", "cpu")
    run("encode", "photos", "--tokenizer", "vq", "--out", "codes", "--size", "24x16")
    assert PackedCodes(tmp_path / "codes/train").grid == (6, 4)
    model = {"n_layer": 1, "n_head": 2, "width": 16}
    generator = shared | {"out": "gpt", "data": {"codes": "codes", "tokenizer": "vq"}}
    (tmp_path / "gpt.yaml").write_text(yaml.safe_dump(generator | {"model": model}))
    run("train", "gpt.yaml", "--device", "cpu")
    run("sample", "--model", "gpt", "--num", 1)
    sizes = {Image.open(path).size for path in (tmp_path / "samples").glob("0*.png")}
    assert sizes == {(16, 24)}
    pipeline = Pipeline.from_pretrained("gpt", device="cpu")
    whole = pipeline.complete(Image.new("RGB", (90, 70), "red"), 0, keep="left")[0]
    assert whole.size == (16, 24) and pipeline.hole("left").sum() == 12
    figures = json.loads(
        run("reconstruct", "photos", "--tokenizer", "vq", "--size", "24x16", "--no-rfid").stdout
    )
    assert figures["images"] == 2 and np.isfinite(figures["mse"])


@pytest.mark.parametrize("text", ["0", "16x", "x16", "8x8x8", "-4", "4.5", "99999"])
def test_a_size_that_is_none_is_refused(text, tmp_path):
    with pytest.raises(ValueError, match=text.replace(".", r"\.")):
        parse_size(text)
    line = refused("encode", tmp_path, "--tokenizer", "digits", "--out", "x", "--size", text)
    assert text in line
