"""Samples of a model drawn, stopped and gone on with; scored; references and extractors made."""

from __future__ import annotations

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image

from moveimg.checkpoint import ModelParts
from moveimg.config import SamplingSettings
from moveimg.dist import World
from moveimg.evaluation import run as evaluate
from moveimg.evaluation import sample as sample_sets
from moveimg.evaluation.sample import make_plan, sample_set
from moveimg.pipeline import Pipeline
from tests.conftest import lively, tiny_config
from tests.test_cli import refused, run
from tests.test_pipeline import tiny_tokenizer


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOVEIMG_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def pipeline():
    """Images of 3 x 3 codes: what is tested here is who draws which of them when."""
    generator = lively(tiny_config(grid=[3, 3]), dtype=torch.float32)
    parts = ModelParts(generator, tiny_tokenizer(), list("abcde"), SamplingSettings(top_k=9))
    return Pipeline(parts, torch.device("cpu"))


def plan_for(pipeline, **changes):
    with pytest.MonkeyPatch.context() as patch:  # the model is in no directory
        patch.setattr(sample_sets, "model_digest", lambda _: "model")
        patch.setattr(sample_sets, "resolve", lambda _: None)
        return make_plan(pipeline, **{"num": 11, "seed": 3, "batch_size": 3} | changes)


@pytest.fixture(scope="module")
def whole(pipeline, tmp_path_factory):
    """The bytes of an uninterrupted set."""
    path = sample_set(pipeline, plan_for(pipeline), tmp_path_factory.mktemp("whole"))
    return path.read_bytes()


def test_a_set_that_was_stopped_goes_on_to_the_same_bytes(pipeline, tmp_path, whole, monkeypatch):
    drawn = []
    draw = sample_sets._draw

    def stopped(pipeline, plan, start):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(start)
        return draw(pipeline, plan, start)

    monkeypatch.setattr(sample_sets, "_draw", stopped)
    with pytest.raises(KeyboardInterrupt):
        sample_set(pipeline, plan_for(pipeline), tmp_path / "set")
    assert not (tmp_path / "set" / "samples.npz").exists()
    again = []
    monkeypatch.setattr(
        sample_sets, "_draw", lambda *given: (again.append(given[2]), draw(*given))[1]
    )
    path = sample_set(pipeline, plan_for(pipeline), tmp_path / "set")
    assert drawn == [0, 3] and again == [6, 9]
    assert path.read_bytes() == whole
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == ["plan.json", "samples.npz"]
    assert sample_set(pipeline, plan_for(pipeline), tmp_path / "set") == path and len(again) == 2


def test_three_processes_make_the_same_bytes(pipeline, tmp_path, whole, monkeypatch):
    """One after another here, the first one last: it joins what all have drawn."""

    class Rank(World):
        def wait(self):
            pass

        def run_first(self, action):
            return action() if self.rank == 0 else None

    for rank in (2, 1, 0):
        (tmp_path / "set").mkdir(exist_ok=True)
        alone = Rank(rank, 3)
        monkeypatch.setattr(sample_sets, "all_ranks", lambda alone=alone: nullcontext(alone))
        path = sample_set(pipeline, plan_for(pipeline), tmp_path / "set")
        assert (path is None) == (rank > 0)
    assert path.read_bytes() == whole


def test_image_i_is_drawn_with_its_own_seed_and_class(pipeline, tmp_path):
    path = sample_set(pipeline, plan_for(pipeline, num=2, batch_size=1), tmp_path / "set")
    with np.load(path) as stored:
        for i in range(2):
            alone = pipeline.sample([int(stored["arr_1"][i])], seed=3 + i)[0]
            assert stored["arr_0"][i].tobytes() == alone.tobytes()


def test_another_plan_in_the_same_folder_is_refused(pipeline, tmp_path):
    sample_set(pipeline, plan_for(pipeline, num=1), tmp_path / "set")
    with pytest.raises(ValueError, match=r"another plan .*'seed': 3"):
        sample_set(pipeline, plan_for(pipeline, num=1, seed=4), tmp_path / "set")
    (tmp_path / "set" / "plan.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"plan.json"):
        sample_set(pipeline, plan_for(pipeline, num=1), tmp_path / "set")
    with pytest.raises(ValueError, match="seed 4294967295"):
        plan_for(pipeline, seed=2**32 - 1)


def test_resized_sets_are_scored_at_their_new_size(pipeline, tmp_path):
    path = sample_set(pipeline, plan_for(pipeline, num=2, resize=24), tmp_path / "set")
    with np.load(path) as arrays:
        drawn, labels = arrays["arr_0"], arrays["arr_1"].tolist()
    assert drawn.shape == (2, 24, 24, 3)
    # LlamaGen's order: resized, then clipped and rounded
    tokenizer, codes = pipeline.tokenizer, pipeline.sample_codes(labels, pipeline.sampling, seed=3)
    with torch.no_grad():
        vectors = tokenizer.quantize.embed(codes).mT.unflatten(2, (3, 3))
        images = tokenizer.decoder(tokenizer.post_quant_conv(vectors))
    assert images.abs().max() > 1.01
    resized = torch.nn.functional.interpolate(images, (24, 24), mode="bicubic")
    wanted = (127.5 * resized + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert (drawn != wanted).mean() < 0.01  # ties of rounding at the most


def test_a_bundled_model_is_scored_without_any_download(tmp_path):
    options = ["--num-samples", 20, "--batch-size", 10, "--out", tmp_path / "out"]
    shown = run("evaluate", "digits", *options)
    assert "comparable only with itself" in shown.output
    assert "20 images for 64 features" in shown.stderr
    data = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(data["metrics"]) >= {"fid", "precision", "recall", "kid", "accuracy", "distinct"}
    assert data["metrics"]["accuracy"] > 0.8 and data["metrics"]["fid"] > 0
    assert data["reference"]["name"] == "digits (train)" and len(data["reference"]["sha256"]) == 64
    assert data["plan"]["seed"] == 0 and len(data["plan"]["model"]) == 64
    assert data["plan"]["sampling"]["cfg_scale"] == 2.5  # the model's own
    assert data["samples"]["count"] == 20 and "numpy" in data["versions"]
    table = run("evaluate", "--show", tmp_path / "out/results.json", tmp_path / "out/results.json")
    assert table.output.count("| digits | 20 |") == 2


def test_an_extractor_of_ones_own_and_samples_of_another_program(tmp_path, monkeypatch):
    monkeypatch.setattr("moveimg.evaluation.extractors.STEPS", 2)
    made = run("evaluate", "digits", "--make-extractor", tmp_path / "e.safetensors", "--size", 16)
    assert "held-out real images recognised" in made.output
    pixels = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), np.uint8)
    for name, part in (("samples", pixels[:6]), ("same", pixels[:6]), ("other", pixels[3:])):
        np.savez(tmp_path / f"{name}.npz", arr_0=part, arr_1=np.arange(6))
    own = ["--extractor", tmp_path / "e.safetensors", "--out", tmp_path / "out"]
    samples = ["evaluate", "--samples", tmp_path / "samples.npz", *own]
    metrics = []
    for name in ("same", "other"):
        shown = run(*samples, "--reference", tmp_path / f"{name}.npz")
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        metrics.append(results["metrics"])
    assert "comparable only with itself" in shown.output and "singular" in shown.stderr
    assert abs(metrics[0]["fid"]) < 1e-6 < metrics[1]["fid"] and metrics[0]["precision"] == 1
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((tmp_path / "e.safetensors").read_bytes()[:1000])
    assert "damaged extractor" in refused(*samples[:3], "--reference", "digits", "--extractor", cut)
    figures = json.loads(run("reconstruct", "digits", "--tokenizer", "digits", "--size", 32).stdout)
    assert 0 < figures["rfid"] < 0.1 and figures["rfid_reference"] == "digits (val)"
    assert 30 < figures["psnr"] < 34 and 0.9 < figures["ssim"] < 1 and figures["usage"] > 0.9


def test_rfid_against_a_reference_that_was_named_is_not_left_out(tmp_path, monkeypatch):
    def offline(*_):
        raise FileNotFoundError("no Inception weights here")

    monkeypatch.setattr(evaluate, "open_extractor", offline)
    for i in range(6):
        (tmp_path / "images" / "a").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (i, 9, 9)).save(tmp_path / "images" / "a" / f"{i}.png")
    command = ["reconstruct", tmp_path / "images", "--tokenizer", "digits", "--size", "32"]
    assert json.loads(run(*command).stdout)["rfid"] is None
    assert "no Inception weights" in refused(*command, "--reference", "nowhere.npz")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["digits", "--reference", "imagenet77"], ["imagenet77", "imagenet256"]),
        (["somewhere"], ["--reference"]),
        (["--samples", "nowhere.npz", "--reference", "digits"], ["nowhere.npz"]),
        (["--samples", "x.npz"], ["--reference"]),
        (["--set", "cfg_scale=much"], ["cfg_scale"]),
        (["--set", "cfg"], ["--set cfg", "KEY=VALUE"]),
        (["--show"], ["results.json"]),
        (["--extractor", "nowhere"], ["nowhere: no such file"]),
    ],
)
def test_bad_input_gets_one_line(arguments, parts, tmp_path):
    line = refused("evaluate", *arguments)
    assert all(part in line for part in parts), line
    assert not (tmp_path / "evaluation").exists()
