"""Sample sets: interrupted, resumed, divided among processes and scored; new extractors."""

from __future__ import annotations

import json
from contextlib import nullcontext
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from moveimg.checkpoint import ModelParts, save_model
from moveimg.config import SamplingSettings
from moveimg.dist import World
from moveimg.evaluation import run as evaluation
from moveimg.evaluation.run import make_plan, sample_set
from moveimg.pipeline import Pipeline
from tests.conftest import random_model, tiny_config
from tests.test_cli import refused, run
from tests.test_pipeline import tiny_tokenizer


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOVEIMG_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A model of 3 x 3 codes: these tests are about which process draws which image."""
    generator = random_model(tiny_config(grid=[3, 3]), dtype=torch.float32)
    parts = ModelParts(generator, tiny_tokenizer(), list("abcde"), SamplingSettings(top_k=9))
    save_model(directory := tmp_path_factory.mktemp("model"), parts)
    return Pipeline.from_pretrained(directory, device="cpu")


def sample(pipeline, folder, num=11, seed=3, batch_size=3, resize=None):
    return sample_set(pipeline, make_plan(pipeline, num, seed, batch_size, resize), folder)


def metrics_path(folder):
    return json.loads((folder / "results.json").read_text())["metrics"]


class Rank(World):
    """A process of a job whose other processes have ended."""

    def wait(self):
        pass

    def run_on_rank0(self, action):
        return action() if self.rank == 0 else None


def test_stopped_sets_and_three_processes_give_the_same_bytes(pipeline, tmp_path, monkeypatch):
    whole = sample(pipeline, tmp_path / "whole").read_bytes()
    drawn, draw = [], evaluation._draw

    def stop_at_6(pipeline, plan, start):
        drawn.append(start)
        if drawn == [0, 3, 6]:
            raise KeyboardInterrupt
        return draw(pipeline, plan, start)

    monkeypatch.setattr(evaluation, "_draw", stop_at_6)
    with pytest.raises(KeyboardInterrupt):
        sample(pipeline, tmp_path / "set")
    for _ in range(2):
        path = sample(pipeline, tmp_path / "set")
        assert drawn == [0, 3, 6, 6, 9] and path.read_bytes() == whole
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == ["plan.json", "samples.npz"]
    for rank in (2, 1, 0):  # rank 0 last: it joins the parts of all ranks
        monkeypatch.setattr(evaluation, "all_ranks", lambda r=rank: nullcontext(Rank(r, 3)))
        path = sample(pipeline, tmp_path / "shared")
        assert (path is None) == (rank > 0)
    assert path.read_bytes() == whole


def test_image_i_is_drawn_with_its_own_seed_and_class(pipeline, tmp_path):
    with np.load(sample(pipeline, tmp_path / "set", num=2, batch_size=1)) as stored:
        for i in range(2):
            alone = pipeline.sample([int(stored["arr_1"][i])], seed=3 + i)[0]
            assert stored["arr_0"][i].tobytes() == alone.tobytes()
    with pytest.raises(ValueError, match=r"plan.json"):  # another plan in the same folder
        sample(pipeline, tmp_path / "set", num=2, batch_size=1, seed=4)
    with pytest.raises(ValueError, match="4294967295"):
        sample(pipeline, tmp_path / "other", seed=2**32 - 1)


def test_resized_sets_are_scored_at_their_new_size(pipeline, tmp_path):
    with np.load(sample(pipeline, tmp_path / "set", num=2, resize=24)) as arrays:
        drawn, labels = arrays["arr_0"], arrays["arr_1"].tolist()
    # LlamaGen's order: resized, then clipped and rounded
    tokenizer, codes = pipeline.tokenizer, pipeline.sample_codes(labels, pipeline.sampling, seed=3)
    images = tokenizer.decode(codes, (3, 3), clip=False)
    assert images.abs().max() > 1.01
    resized = torch.nn.functional.interpolate(images, (24, 24), mode="bicubic")
    expected = (127.5 * resized + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert (drawn != expected).mean() < 0.01  # ties of rounding at the most


def test_a_bundled_model_is_scored_without_any_download(tmp_path):
    shown = run("evaluate", "digits", "--num-samples", 20, "--batch-size", 10, "--out", "out")
    assert "20 images" in shown.stderr
    data = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(data["metrics"]) >= {"fid", "precision", "recall", "kid", "accuracy", "distinct"}
    assert data["metrics"]["accuracy"] > 0.8 and data["metrics"]["fid"] > 0
    assert data["reference"]["name"] == "digits (train)"
    assert data["plan"]["sampling"]["cfg_scale"] == 2.5  # the model's own
    table = run("evaluate", "--show", "out/results.json", "out/results.json")
    assert table.output.count("| digits | 20 |") == 2
    # the same samples as those of any program, whose labels are the model's classes
    run("evaluate", "digits", "--samples", "out/samples.npz", "--reference", "digits", "--out", "o")
    assert metrics_path(tmp_path / "o") == data["metrics"]


def test_a_new_extractor_and_samples_of_another_program(tmp_path, monkeypatch):
    monkeypatch.setattr("moveimg.evaluation.extractors.STEPS", 2)
    run("evaluate", "digits", "--make-extractor", "e.safetensors", "--size", 16)
    pixels = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), np.uint8)
    for name, part in (("samples", pixels[:6]), ("same", pixels[:6]), ("other", pixels[3:])):
        np.savez(f"{name}.npz", arr_0=part, arr_1=np.arange(6))
    samples, metrics = ["evaluate", "--samples", "samples.npz", "--out", "out", "--extractor"], []
    for name in ("same", "other"):
        run(*samples, "e.safetensors", "--reference", f"{name}.npz")
        metrics.append(metrics_path(tmp_path / "out"))
    assert abs(metrics[0]["fid"]) < 1e-6 < metrics[1]["fid"] and metrics[0]["precision"] == 1
    (tmp_path / "cut").write_bytes((tmp_path / "e.safetensors").read_bytes()[:1000])
    assert "cut" in refused(*samples, "cut", "--reference", "digits")


def test_reconstructions_are_scored(tmp_path, monkeypatch):
    figures = json.loads(run("reconstruct", "digits", "--tokenizer", "digits", "--size", 32).stdout)
    assert 0 < figures["rfid"] < 0.1 and figures["rfid_reference"] == "digits (val)"
    assert 30 < figures["psnr"] < 34 and 0.9 < figures["ssim"] < 1 and figures["usage"] > 0.9
    # without weights rFID is left out, but not against a reference that was named
    offline = FileNotFoundError("no Inception weights here")
    monkeypatch.setattr(evaluation, "open_extractor", Mock(side_effect=offline))
    (tmp_path / "images/a").mkdir(parents=True)
    for i in range(6):
        Image.new("RGB", (32, 32), (i, 9, 9)).save(tmp_path / f"images/a/{i}.png")
    command = ["reconstruct", "images", "--tokenizer", "digits", "--size", "32"]
    assert json.loads(run(*command).stdout)["rfid"] is None
    assert "no Inception weights" in refused(*command, "--reference", "nowhere.npz")


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["digits", "--reference", "imagenet77"], "imagenet77"),
        (["somewhere"], "--reference"),
        (["--samples", "nowhere.npz", "--reference", "digits"], "nowhere.npz"),
        (["--set", "cfg_scale=much"], "cfg_scale"),
        (["--set", "cfg"], "--set cfg"),
        (["--sweep", "cfg_scale"], "--sweep cfg_scale"),
        (["--extractor", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_gets_one_line(arguments, value, tmp_path):
    assert value in refused("evaluate", *arguments)
    assert not (tmp_path / "evaluation").exists()
