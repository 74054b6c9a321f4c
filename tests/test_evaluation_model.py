"""Samples of a model drawn, stopped and gone on with; scored; references and extractors made."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from moveimg.checkpoint import BUNDLED, ModelParts
from moveimg.config import SamplingSettings
from moveimg.data.encode import default_batch_size
from moveimg.data.images import ImageSource
from moveimg.dist import World
from moveimg.evaluation import run as evaluate
from moveimg.evaluation import sample as sample_sets
from moveimg.evaluation.reconstruct import reconstruct
from moveimg.evaluation.reference import open_reference
from moveimg.evaluation.sample import make_plan, sample_set
from moveimg.evaluation.scoring import Guards
from moveimg.pipeline import Pipeline
from tests.conftest import lively, tiny_config
from tests.test_cli import refused, run
from tests.test_pipeline import tiny_tokenizer


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOVEIMG_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True, scope="module")
def digest():
    """The models of these tests are in no directory."""
    with pytest.MonkeyPatch.context() as patch:
        digest = sample_sets.model_digest
        known = lambda path: "model" if not path.name else digest(path)  # noqa: E731
        patch.setattr(sample_sets, "model_digest", known)
        resolve = sample_sets.resolve
        patch.setattr(sample_sets, "resolve", lambda name: resolve(name) if name else Path())
        yield


@pytest.fixture(scope="module")
def pipeline():
    """Pictures of 3 x 3 codes: what is tested here is who draws which of them when."""
    generator = lively(tiny_config(grid=[3, 3]), dtype=torch.float32)
    names = ["a", "b", "c", "d", "e"]
    parts = ModelParts(generator, tiny_tokenizer(), names, SamplingSettings(top_k=9))
    return Pipeline(parts, torch.device("cpu"))


def plan_for(pipeline, **changes):
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
        monkeypatch.setattr(sample_sets, "all_ranks", lambda alone=alone: _entered(alone))
        path = sample_set(pipeline, plan_for(pipeline), tmp_path / "set")
        assert (path is None) == (rank > 0)
    assert path.read_bytes() == whole


class _entered:
    def __init__(self, value):
        self.value = value

    def __enter__(self):
        return self.value

    def __exit__(self, *_):
        return None


def test_image_i_is_drawn_with_its_own_seed_and_class(pipeline, tmp_path):
    path = sample_set(pipeline, plan_for(pipeline, num=2, batch_size=1), tmp_path / "set")
    with np.load(path) as stored:
        for i in range(2):
            alone = pipeline.sample([int(stored["arr_1"][i])], seed=3 + i)[0]
            assert stored["arr_0"][i].tobytes() == alone.tobytes()


def test_another_plan_in_the_same_folder_is_refused(pipeline, tmp_path):
    sample_set(pipeline, plan_for(pipeline, num=1), tmp_path / "set")
    with pytest.raises(ValueError, match=r"another plan \(seed: 3, now 4\)"):
        sample_set(pipeline, plan_for(pipeline, num=1, seed=4), tmp_path / "set")
    (tmp_path / "set" / "plan.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"plan.json: .*\[1\]"):
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


def test_images_that_are_not_square_are_resized_where_one_side_fits(tmp_path):
    generator = lively(tiny_config(grid=[2, 3]), dtype=torch.float32)
    parts = ModelParts(generator, tiny_tokenizer(), list("abcde"), SamplingSettings())
    side = 3 * parts.tokenizer.downsample
    oblong = Pipeline(parts, torch.device("cpu"))
    path = sample_set(oblong, plan_for(oblong, num=1, resize=side), tmp_path / "set")
    with np.load(path) as arrays:
        assert arrays["arr_0"].shape == (1, side, side, 3)


def test_a_bundled_model_is_scored_without_any_download(tmp_path):
    options = ["--num-samples", 20, "--batch-size", 10, "--out", tmp_path / "out"]
    shown = run("evaluate", "digits", *options)
    assert "compares with nothing but itself" in shown.output
    assert "warning: too-few-samples" in shown.stderr
    data = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(data["metrics"]) >= {"fid", "precision", "recall", "kid", "accuracy", "distinct"}
    assert data["metrics"]["accuracy"] > 0.8 and data["metrics"]["fid"] > 0
    assert len(data["metrics"]["accuracy_by_class"]) == 10
    assert data["reference"]["split"] == "train" and len(data["reference"]["sha256"]) == 64
    assert data["plan"]["seed"] == 0 and len(data["plan"]["model"]) == 64
    assert data["plan"]["sampling"]["cfg_scale"] == 2.5  # the model's own
    assert data["samples"]["count"] == 20 and "torch" in data["versions"]
    table = run("evaluate", "--show", tmp_path / "out/results.json", tmp_path / "out/results.json")
    assert table.output.count("| digits | 20 |") == 2 and "published" not in table.output


def test_a_sweep_draws_a_set_once(tmp_path, monkeypatch):
    command = ["evaluate", "digits", "--num-samples", 5, "--sweep", "cfg_scale=1:2:1",
               "--out", tmp_path / "sweep"]  # fmt: skip
    monkeypatch.setattr(matplotlib, "use", None)  # the backend is the user's
    first = run(*command).output
    assert "| cfg_scale 1 | 5 |" in first and "| cfg_scale 2 | 5 |" in first
    with Image.open(tmp_path / "sweep" / "sweep.png") as plot:
        assert plot.size[0] > 300
    assert (tmp_path / "sweep" / "sweep.md").read_text().count("\n| cfg_scale") == 2
    drawn, draw = [], sample_sets._draw
    monkeypatch.setattr(
        sample_sets, "_draw", lambda _, plan, start: drawn.append(plan) or draw(_, plan, start)
    )
    command[-3] = "cfg_scale=1:3:1"
    assert "| cfg_scale 3 | 5 |" in run(*command).output
    assert [plan.sampling["cfg_scale"] for plan in drawn] == [3]


def test_a_sweep_scores_with_the_reference_of_now(tmp_path):
    common = ["digits", "--num-samples", 4, "--reference", "r.npz", "--out", tmp_path / "sweep",
              "--extractor", BUNDLED / "digits/extractor.safetensors", "--sweep",
              "cfg_scale=1:1:1"]  # fmt: skip
    pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    seen = []
    for part in (pixels[:5], pixels[3:], pixels[3:]):  # the file is replaced by another
        np.savez("r.npz", arr_0=part)
        run("evaluate", *common)
        path = tmp_path / "sweep/cfg_scale-1/results.json"
        result = json.loads(path.read_text())
        seen.append((result["reference"]["sha256"], result["metrics"]))
    assert seen[0][0] != seen[1][0] and seen[0][1] != seen[1][1] and seen[1] == seen[2]


def test_references_and_extractors_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr("moveimg.evaluation.classifier.STEPS", 2)
    made = run("evaluate", "digits", "--make-extractor", tmp_path / "e.safetensors", "--size", 16)
    assert "held-out real images recognised" in made.output
    common = ["--extractor", tmp_path / "e.safetensors"]
    for split in ("train", "val"):
        run("evaluate", "digits", "--make-reference", tmp_path / f"{split}.npz", "--split", split,
            "--size", 32, *common)  # fmt: skip
    reference = ["--reference", tmp_path / "val.npz"]
    samples = ["evaluate", "--samples", tmp_path / "val.npz"]
    run("evaluate", "digits", "--make-reference", tmp_path / "small.npz", "--split", "val",
        "--size", 24, *common)  # fmt: skip

    found = run(*samples, "--reference", tmp_path / "train.npz", *common)
    assert "| val.npz | 360 |" in found.output and "missing-labels" in found.stderr
    assert "validation-reference" in refused(*samples, *reference, *common)
    allowed = run(*samples, *reference, *common, "--allow", "validation-reference")
    assert "| 0.000 | 1.000 | 1.000 |" in allowed.output.replace("-0.000", "0.000")
    # the bundled extractor sees otherwise than the one that made the statistics
    bundled = ["--extractor", BUNDLED / "digits/extractor.safetensors"]
    assert "other-extractor" in refused(*samples, "--reference", tmp_path / "train.npz", *bundled)
    small = ["evaluate", "--samples", tmp_path / "small.npz", "--reference"]
    line = refused(*small, tmp_path / "train.npz", *common)
    assert "wrong-size" in line and "24x24" in line and "32x32" in line

    rfid = ["reconstruct", "digits", "--tokenizer", "digits", "--size", "32"]
    assert "training-reference" in refused(*rfid, "--reference", tmp_path / "train.npz", *common)
    figures = json.loads(run(*rfid).stdout)
    assert 0 < figures["rfid"] < 0.1 and figures["rfid_reference"] == "digits (val)"
    assert 30 < figures["psnr"] < 34 and 0.9 < figures["ssim"] < 1 and figures["usage"] > 0.9
    cut = ["--extractor", _cut(tmp_path / "e.safetensors")]
    assert "damaged extractor" in refused(*samples, *reference, *cut)


def test_large_images_are_reconstructed_few_at_a_time(monkeypatch):
    """A hundred images of 256 pixels at once would take tens of gigabytes on a CPU."""
    photographs = [
        Image.fromarray(rows) for rows in np.arange(13 * 192, dtype=np.uint8).reshape(13, 8, 24)
    ]
    source = ImageSource(
        "gradients", ["a"], [str(i) for i in range(13)], np.zeros(13, np.int32),
        lambda row: photographs[row].resize((300, 300)).convert("RGB"), lambda row: 0,
    )  # fmt: skip
    tokenizer, encoded = tiny_tokenizer(), []
    encode = tokenizer.encode
    monkeypatch.setattr(
        tokenizer, "encode", lambda images: encoded.append(len(images)) or encode(images)
    )
    few, shown = reconstruct(source, tokenizer, (256, 256), None, None, Guards())
    assert sum(encoded) == 13 and max(encoded) == default_batch_size(256, torch.device("cpu")) < 10
    monkeypatch.setattr("moveimg.evaluation.reconstruct.default_batch_size", lambda *_: 13)
    whole, same = reconstruct(source, tokenizer, (256, 256), None, None, Guards())
    assert few["mse"] == pytest.approx(whole["mse"], rel=1e-5) and few["usage"] == whole["usage"]
    assert shown.size == same.size  # the first ten images, however they were cut


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


def _cut(path):
    shorter = path.with_name("cut.safetensors")
    shorter.write_bytes(path.read_bytes()[:1000])
    return shorter


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["digits", "--reference", "imagenet77"], ["imagenet77", "imagenet256"]),
        (["somewhere"], ["--reference"]),
        (["--samples", "nowhere.npz", "--reference", "digits"], ["nowhere.npz"]),
        (["--samples", "x.npz"], ["--reference"]),
        (["--set", "cfg_scale=much"], ["cfg_scale"]),
        (["--set", "cfg"], ["--set cfg", "KEY=VALUE"]),
        (["--sweep", "cfg_scale=1:2"], ["FIRST:LAST:STEP"]),
        (["--sweep", "cfg_scale=2:1:1"], ["LAST beyond FIRST"]),
        (["--sweep", "cfg=1:2:1"], ["--sweep cfg", "cfg_scale"]),
        (["--allow", "everything"], ["everything", "wrong-size"]),
        (["--show"], ["results.json"]),
        (["--extractor", "nowhere"], ["nowhere: no such extractor"]),
    ],
)
def test_bad_input_gets_one_line(arguments, parts, tmp_path):
    line = refused("evaluate", *arguments)
    assert all(part in line for part in parts), line
    assert not (tmp_path / "evaluation").exists()


def test_a_reference_of_statistics_alone_gives_fid_alone(tmp_path):
    extractor = evaluate.open_extractor("digits", None, None, torch.device("cpu"))
    about = json.dumps({"extractor": extractor.fingerprint, "count": 9, "split": "train"})

    def opened(name, **arrays):
        np.savez(tmp_path / name, **arrays)
        return open_reference(str(tmp_path / name), (32, 32), extractor, tmp_path)

    statistics = {"mu": np.zeros(64), "sigma": np.eye(64)}
    reference = opened("s.npz", **statistics, about=about)
    assert reference.features is None and reference.count == 9 and reference.size is None
    # ADM's own files are known by their names, whatever was left out of them
    known = json.dumps({"extractor": extractor.fingerprint})
    adms = opened("VIRTUAL_imagenet128_labeled.npz", **statistics, about=known)
    assert adms.split == "train"
    for arrays, part in (
        ({"mu": np.zeros(64), "sigma": np.eye(9), "about": about}, r"expected real .*\[D, D\]"),
        ({"mu": np.zeros(64), "about": about}, "sigma"),
        ({"mu": np.array(["a"]), "sigma": np.eye(1), "about": about}, "real numbers"),
        (statistics | {"about": "{"}, "about: not valid JSON"),
        (statistics | {"about": '{"size": 3}'}, "about: size"),
        (statistics, "other-extractor"),
    ):
        with pytest.raises(ValueError, match=part):
            opened("bad.npz", **arrays)
