"""Completing, editing and scoring images: what is kept, what is drawn, and exact likelihoods."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from moveimg.config import SamplingSettings
from moveimg.data import open_images
from moveimg.data.sources import DIGITS
from moveimg.editing import composite, resample
from moveimg.model.inference import StaticTransformer
from moveimg.pipeline import Pipeline
from moveimg.sampling import UNKNOWN, code_log_probs, guidance_scales, image_rngs, sample_codes
from tests.conftest import (
    CPU,
    VARIED,
    random_inputs,
    random_model,
    tiny_config,
    tiny_model,
    tiny_parts,
)
from tests.test_cli import run
from tests.test_pipeline import pixels
from tests.test_sampling import recompute

GUIDED = SamplingSettings(cfg_scale=1.5, temperature=0.8, top_k=9)
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8))
EDIT = {"image": IMAGE, "classes": 0, "hole": "top", "passes": 1}


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline(tiny_parts(cfg_scale=1.5, temperature=0.8, top_k=9), CPU)


@torch.inference_mode()
@pytest.mark.parametrize("name", VARIED)
def test_a_prefix_gives_the_logits_and_cache_of_single_steps(name):
    model = tiny_model(name)
    codes, labels = random_inputs(model.config, 2)
    wanted = model(codes, labels)
    for decoder in (model, StaticTransformer(model)):
        for length in (0, 1, 5):
            cache = decoder.make_cache(2)
            logits = decoder.prefill(labels, cache, codes[:, :length])
            torch.testing.assert_close(logits, wanted[:, length])
            logits = decoder.step(codes[:, length], cache)
            torch.testing.assert_close(logits, wanted[:, length + 1])


@pytest.mark.parametrize("positions", [[], [0, 1, 2], [4, 9], [11], range(12)])
def test_known_codes_are_kept_and_the_others_drawn_given_them(positions):
    model = random_model(tiny_config())
    labels, known = torch.tensor([1, 0]), torch.full((2, 12), UNKNOWN)
    known[:, list(positions)] = random_inputs(model.config, 2)[0][:, list(positions)]
    known[0, :6] = 3  # images may differ in what is known
    codes = sample_codes(model, labels, GUIDED, image_rngs([3, 4]), known)
    for i, label in enumerate(labels.tolist()):
        assert torch.equal(codes[i], recompute(model, label, GUIDED, 3 + i, known[i]))


def test_known_codes_of_each_image_follow_it_into_its_batch(pipeline):
    known = torch.full((3, 12), UNKNOWN)
    known[:, :2] = torch.arange(6).view(3, 2)
    codes = [
        pipeline.sample_codes([0, 1, 2], pipeline.settings(), known=known, batch_size=size)
        for size in (2, 3)
    ]
    assert torch.equal(*codes) and torch.equal(codes[0][:, :2], known[:, :2])


def test_a_completion_is_between_reconstruction_and_sample(pipeline):
    wanted = pixels(pipeline.decode(pipeline.encode([IMAGE])))
    assert pixels(pipeline.complete(IMAGE, 1, keep=3)) == wanted
    wanted = pixels(pipeline.sample([1, 2], num=2, seed=7))
    assert pixels(pipeline.complete(IMAGE, [1, 2], keep=0, num=2, seed=7)) == wanted
    several = pixels(pipeline.complete(IMAGE, 0, num=3, seed=5))
    assert several[2] == pixels(pipeline.complete(IMAGE, 0, seed=7))[0]  # by its seed alone


def test_the_areas(pipeline):
    top, mask = torch.arange(12) < 4, np.zeros((12, 16))  # 3 x 4 codes of 4 x 4 pixels
    mask[:4] = 1
    image = Image.fromarray((255 * mask).astype(np.uint8))
    for area in ("top", 1, (0, 0, 16, 4), mask, image):
        assert torch.equal(pipeline.code_mask(area), top), area
        assert torch.equal(pipeline.code_mask(area, invert=True), ~top), area
    assert pipeline.code_mask((1, 1, 2, 2)).nonzero().tolist() == [[0]]  # its code
    # a code is kept where all its pixels are
    assert pipeline.code_mask((1, 1, 16, 12), invert=True).sum() == 3 + 4 - 1
    assert torch.equal(pipeline.code_mask("left"), ~pipeline.code_mask("right"))


def test_an_edit_grows_into_what_edit_returns_with_the_pixels_outside_the_hole(pipeline):
    hole = pipeline.code_mask("bottom")
    known = pipeline.encode([IMAGE])[0].masked_fill(hole, UNKNOWN)
    steps = pipeline.iter_codes([2, 2], pipeline.settings(), seed=4, known=known, passes=2)
    *_, (done, codes) = steps
    assert done == len(hole) + 2 * int(hole.sum())
    edited = pipeline.edit(IMAGE, 2, hole="bottom", num=2, seed=4, passes=2)
    assert pixels(pipeline.decode_partial(codes, done, hole, IMAGE)) == pixels(edited)
    kept = IMAGE.height // 2 - pipeline.tokenizer.downsample
    for version in map(np.asarray, edited):
        assert np.array_equal(version[:kept], np.asarray(IMAGE)[:kept])
        assert not np.array_equal(version[kept:], np.asarray(IMAGE)[kept:])


def test_the_seam_is_blended():
    original, decoded = torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)
    hole = torch.tensor([[False, False], [False, True]])
    row = composite(original, decoded, hole, 8)[0, 0, 12]
    assert row[:5].eq(0).all() and row[-3:].eq(1).all()
    assert row.diff().ge(0).all() and row.unique().numel() > 3


def test_filters_narrow_the_drawn_codes_and_not_the_kept_ones():
    """Two holes and top-2 of 3 codes, against the distribution by enumeration."""
    config = tiny_config(codebook_size=3, grid=(1, 4))
    model, label, n = random_model(config, seed=13), torch.tensor([1]), 1000
    settings = SamplingSettings(top_k=2)
    hole = torch.tensor([True, False, True, False])
    fixed = torch.tensor([[0, 2, 0, 1]])

    def narrow(logits):
        least = logits == logits.amin(-1, keepdim=True)
        return logits.masked_fill(least & hole[:, None], -math.inf)

    every = fixed.repeat(9, 1)
    every[:, hole] = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    target = code_log_probs(model, every, label.expand(9), filter_logits=narrow).sum(1).softmax(0)
    known = fixed.masked_fill(hole, UNKNOWN).expand(n, -1)
    rngs = image_rngs(range(n))
    codes = sample_codes(model, label.expand(n), settings, rngs, known)
    for _ in range(6):
        *_, (_, codes) = resample(model, label.expand(n), codes, hole, settings, rngs)
    counts = (codes[:, 0] * 3 + codes[:, 2]).bincount(minlength=9) / n
    assert (counts - target).abs().sum() / 2 < 0.05
    assert (target == 0).any()  # the filter excludes something


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_likelihoods_are_of_the_distribution_that_sampling_draws_from(scale):
    model, settings = random_model(tiny_config()), SamplingSettings(cfg_scale=scale)
    codes, labels = random_inputs(model.config)
    with torch.inference_mode():
        with_class, without = model(codes, labels), model(codes, 0 * labels + model.null_label)
        logits = without + (with_class - without) * scale
        wanted = F.cross_entropy((logits / 0.7).mT, codes, reduction="none")
    found = code_log_probs(model, codes, labels, guidance_scales(settings, 12), 0.7)
    torch.testing.assert_close(-found, wanted)


def test_classes_follow_bayes_rule(pipeline):
    found = pipeline.log_likelihood([IMAGE] * 5, range(5))
    shares = found.total.softmax(0)
    (((name, share), *_),) = pipeline.classify([IMAGE], batch_size=2)
    assert name == pipeline.class_names[shares.argmax()]
    assert share == pytest.approx(shares.max().item(), rel=1e-4)
    torch.testing.assert_close(found.total, -found.nats_per_code * found.log_probs.shape[1])
    bits = found.bits_per_code * found.log_probs.shape[1]
    torch.testing.assert_close(found.bits_per_pixel * math.prod(pipeline.image_size), bits)


@pytest.mark.parametrize(
    ("method", "options", "value"),
    [
        ("code_mask", {"area": "middle"}, "middle"),
        ("code_mask", {"area": 99}, "99"),
        ("code_mask", {"area": -1}, "-1"),
        ("code_mask", {"area": (0, 0, 3)}, "0, 0, 3"),
        ("code_mask", {"area": (4, 0, 2, 2)}, "4, 0, 2, 2"),
        ("code_mask", {"area": np.zeros((2, 2, 3))}, "2, 2, 3"),
        ("code_mask", {"area": np.array([[np.nan, 1.0]])}, "mask"),
        ("code_mask", {"area": 3.5}, "3.5"),
        ("edit", EDIT | {"temperature": 0.0}, "temperature 0"),
        ("classify", {"images": IMAGE, "batch_size": 0}, "batches of 0"),
        ("log_likelihood", {"images": IMAGE, "classes": [0, 1]}, "2 classes for 1"),
    ],
)
def test_bad_arguments_are_named(pipeline, method, options, value):
    with pytest.raises(ValueError, match=value):
        getattr(pipeline, method)(**options)


def test_score_writes_the_least_likely_image_first(tmp_path):
    for row in range(6):
        image, label = open_images("digits", "val")[row]
        folder = tmp_path / "images" / DIGITS[label]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{row}.png")
    out = tmp_path / "scores.csv"
    done = run("score", tmp_path / "images", "--model", "digits", "--classify", "--out", out)
    with out.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    nats = [float(row["nats_per_code"]) for row in rows]
    assert len(rows) == 6 and nats == sorted(nats, reverse=True)
    right = sum(row["class"] == row["likeliest"] for row in rows) / 6
    assert f"{right:.2%}" in done.output
    assert Image.open(tmp_path / "scores.png").width > 100
