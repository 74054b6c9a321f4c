"""Completing, editing and scoring images: what is kept, what is drawn, and exact likelihoods."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from moveimg.checkpoint import ModelParts
from moveimg.config import SamplingSettings
from moveimg.data import open_images
from moveimg.data.images import DIGITS
from moveimg.editing import blend, cut_blocks, resample
from moveimg.model.inference import StaticDecoder
from moveimg.pipeline import Pipeline
from moveimg.sampling import (
    UNKNOWN,
    class_log_likelihoods,
    code_log_probs,
    draw,
    guidance_scales,
    guide,
    image_rngs,
    keep_top,
    sample_codes,
)
from tests.conftest import decode_all, lively, random_inputs, tiny_config
from tests.test_cli import run
from tests.test_pipeline import CPU, NAMES, pixels, tiny_tokenizer

GUIDED = SamplingSettings(cfg_scale=1.5, temperature=0.8, top_k=9)


@pytest.fixture(scope="module")
def pipeline():
    generator = lively(tiny_config(memory={"kind": "move", "slots": 2}), dtype=torch.float32)
    return Pipeline(ModelParts(generator, tiny_tokenizer(), NAMES, GUIDED), CPU)


@pytest.fixture
def image(pipeline):
    height, width = pipeline.image_size
    colours = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(colours)


def test_a_prefix_gives_the_logits_and_cache_of_single_steps(variant):
    model = lively(variant)
    codes, labels = random_inputs(variant, 2)
    with torch.inference_mode():
        wanted = model(codes, labels)
        for decoder in (model, StaticDecoder(model)):
            for length in (0, 1, 5):
                cache = decoder.make_cache(2)
                logits = decoder.start(labels, cache, codes[:, :length])
                torch.testing.assert_close(logits, wanted[:, length])
                logits = decoder.decode(codes[:, length], cache)
                torch.testing.assert_close(logits, wanted[:, length + 1])


@torch.inference_mode()
def draw_step_by_step(model, labels, known, settings, seeds):
    """The same codes by decoding every position, one code per step."""
    config = model.config
    doubled = torch.cat([labels, torch.full_like(labels, model.null_label)])
    draws = torch.stack([torch.rand(config.seq_len, generator=g) for g in image_rngs(seeds)])
    cache, codes, scale = model.make_cache(len(doubled)), [], torch.tensor(settings.cfg_scale)
    logits = model.start(doubled, cache)
    for position in range(config.seq_len):
        new = draw(guide(*logits.chunk(2), scale), draws[:, position], settings)
        codes.append(torch.where(known[:, position] == UNKNOWN, new, known[:, position]))
        if position < config.seq_len - 1:
            logits = model.decode(codes[-1].repeat(2), cache)
    return torch.stack(codes, dim=1)


@pytest.mark.parametrize("positions", [[], [0, 1, 2], [4, 9], [11], range(12)])
def test_known_codes_are_kept_and_the_others_drawn_given_them(positions):
    model = lively(tiny_config())
    labels, known = torch.tensor([1, 0]), torch.full((2, 12), UNKNOWN)
    known[:, list(positions)] = random_inputs(model.config, 2)[0][:, list(positions)]
    known[0, :6] = 3  # images may differ in what is known
    codes = sample_codes(model, labels, GUIDED, image_rngs([3, 4]), known)
    assert torch.equal(codes, draw_step_by_step(model, labels, known, GUIDED, [3, 4]))


def test_a_completion_is_between_reconstruction_and_sample(pipeline, image):
    rows = pipeline.generator.config.grid[0]
    wanted = pixels(pipeline.decode(pipeline.encode([image])))
    assert pixels(pipeline.complete(image, 1, keep=rows)) == wanted
    wanted = pixels(pipeline.sample([1, 2], num=2, seed=7))
    assert pixels(pipeline.complete(image, [1, 2], keep=0, num=2, seed=7)) == wanted
    several = pixels(pipeline.complete(image, 0, num=3, seed=5))
    assert several[2] == pixels(pipeline.complete(image, 0, seed=7))[0]  # by its seed alone


def test_the_areas(pipeline):
    height, width = pipeline.image_size
    rows, columns = pipeline.generator.config.grid
    top = torch.zeros(rows, columns, dtype=torch.bool)
    top[: rows // 2] = True
    mask = np.zeros((height, width))
    mask[: rows // 2 * pipeline.tokenizer.downsample] = 1
    image = Image.fromarray((255 * mask).astype(np.uint8))
    for area in ("top", rows // 2, (0, 0, width, int(mask[:, 0].sum())), mask, image):
        assert torch.equal(pipeline.hole(area), top.flatten()), area
        assert torch.equal(pipeline.hole(area, kept=True), ~top.flatten()), area
    assert pipeline.hole((1, 1, 2, 2)).nonzero().tolist() == [[0]]  # a pixel takes its whole code
    # a code is kept where all its pixels are
    assert pipeline.hole((1, 1, width, height), kept=True).sum() == rows + columns - 1
    assert torch.equal(pipeline.hole("left"), ~pipeline.hole("right"))


@pytest.mark.parametrize(
    ("area", "value"),
    [
        ("middle", "middle"),
        (99, "99"),
        (-1, "-1"),
        ((0, 0, 3), "0, 0, 3"),
        ((4, 0, 2, 2), "4, 0, 2, 2"),
        (np.zeros((2, 2, 3)), "2, 2, 3"),
        (np.array([[np.nan, 1.0]]), "mask"),
        (3.5, "3.5"),
    ],
)
def test_an_area_that_is_none_is_refused(pipeline, area, value):
    with pytest.raises(ValueError, match=value):
        pipeline.hole(area)


def test_an_edit_grows_into_what_edit_returns_with_the_pixels_outside_the_hole(pipeline, image):
    hole = pipeline.hole("bottom")
    known = pipeline.encode([image])[0].masked_fill(hole, UNKNOWN)
    steps = pipeline.iter_codes([2, 2], pipeline.settings(), seed=4, known=known, passes=2)
    *_, (done, codes) = steps
    assert done == len(hole) + 2 * int(hole.sum())
    edited = pipeline.edit(image, 2, hole="bottom", num=2, seed=4, passes=2)
    assert pixels(pipeline.decode_partial(codes, done, hole, image)) == pixels(edited)
    kept = image.height // 2 - pipeline.tokenizer.downsample
    for version in map(np.asarray, edited):
        assert np.array_equal(version[:kept], np.asarray(image)[:kept])
        assert not np.array_equal(version[kept:], np.asarray(image)[kept:])


def test_the_seam_is_blended():
    original, decoded = torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)
    hole = torch.tensor([[False, False], [False, True]])
    row = blend(original, decoded, hole, 8)[0, 0, 12]
    assert row[:5].eq(0).all() and row[-3:].eq(1).all()
    assert row.diff().ge(0).all() and row.unique().numel() > 3


def test_blocks_cover_the_hole_and_stay_in_a_row():
    hole = torch.zeros(24, dtype=torch.bool)
    hole[[1, 2, 5, 6, 7]] = True
    hole[12:22] = True
    blocks = [(b.start, b.stop) for b in cut_blocks(hole, 6)]
    assert blocks == [(1, 3), (5, 6), (6, 8), (12, 16), (16, 18), (18, 22)]


def test_filters_narrow_the_drawn_codes_and_not_the_kept_ones():
    """Two holes and top-2 of 3 codes, against the distribution by enumeration."""
    config = tiny_config(codebook_size=3, grid=(1, 4))
    model, label, n = lively(config, seed=13), torch.tensor([1]), 1500
    settings = SamplingSettings(top_k=2)
    hole = torch.tensor([True, False, True, False])
    fixed = torch.tensor([[0, 2, 0, 1]])

    def narrow(logits):
        filtered = keep_top(logits.flatten(0, 1), 2, 1.0).view_as(logits)
        return torch.where(hole[:, None], filtered, logits)

    every = fixed.repeat(9, 1)
    every[:, hole] = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    target = code_log_probs(model, every, label.expand(9), narrow=narrow).sum(1).softmax(0)
    known = fixed.masked_fill(hole, UNKNOWN).expand(n, -1)
    rngs = image_rngs(range(n))
    codes = sample_codes(model, label.expand(n), settings, rngs, known)
    for _ in range(10):
        *_, (_, codes) = resample(model, label.expand(n), codes, hole, settings, rngs)
    counts = (codes[:, 0] * 3 + codes[:, 2]).bincount(minlength=9) / n
    assert (counts - target).abs().sum() / 2 < 0.05
    assert (target == 0).any()  # the filter excludes something


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_likelihoods_are_of_the_distribution_that_sampling_draws_from(scale):
    model, settings = lively(tiny_config()), SamplingSettings(cfg_scale=scale)
    codes, labels = random_inputs(model.config)
    with torch.inference_mode():
        nulls = torch.full_like(labels, model.null_label)
        pair = decode_all(model, codes, labels), decode_all(model, codes, nulls)
        logits = pair[1] + (pair[0] - pair[1]) * scale
        wanted = F.cross_entropy((logits / 0.7).mT, codes, reduction="none")
    found = code_log_probs(model, codes, labels, guidance_scales(settings, 12), 0.7)
    torch.testing.assert_close(-found, wanted)


def test_classes_follow_bayes_rule(pipeline, image):
    likelihoods = class_log_likelihoods(pipeline.generator, pipeline.encode([image]), batch_size=2)
    shares = likelihoods.softmax(1)[0]
    (((name, share), *_),) = pipeline.classify([image])
    assert name == pipeline.class_names[shares.argmax()]
    assert share == pytest.approx(shares.max().item(), rel=1e-4)
    found = pipeline.log_likelihood([image] * 5, range(5))
    assert likelihoods[0].tolist() == pytest.approx(found.total.tolist(), rel=1e-5)
    torch.testing.assert_close(found.total, -found.nats_per_code * found.log_probs.shape[1])
    bits = found.bits_per_code * found.log_probs.shape[1]
    torch.testing.assert_close(found.bits_per_pixel * math.prod(pipeline.image_size), bits)


@pytest.mark.parametrize(
    ("method", "arguments", "options", "value"),
    [
        ("edit", (0,), {"hole": "top", "passes": 1, "temperature": 0.0}, "temperature 0"),
        ("classify", (), {"batch_size": 0}, "batches of 0"),
        ("log_likelihood", ([0, 1],), {}, "2 classes for 1"),
    ],
)
def test_bad_arguments_are_named(pipeline, image, method, arguments, options, value):
    with pytest.raises(ValueError, match=value):
        getattr(pipeline, method)(image, *arguments, **options)


def test_edit_writes_images_beside_the_original(tmp_path):
    digit, options = open_images("digits", "val")[0][0], ("--model", "digits", "--num")
    digit.save(tmp_path / "digit.png")
    Image.new("L", digit.size, 255).save(tmp_path / "mask.png")
    for out, more, written in (("a", [2], 3), ("b", [1, "--hole", tmp_path / "mask.png"], 3)):
        classes = [] if out == "a" else ["zero", "one"]
        run("edit", tmp_path / "digit.png", *classes, *options, *more, "--out", tmp_path / out)
        assert len(list((tmp_path / out).iterdir())) == written
        assert (tmp_path / out / "grid.png").is_file()


def test_score_writes_the_strangest_image_first(tmp_path):
    for row in range(12):
        image, label = open_images("digits", "val")[row]
        folder = tmp_path / "images" / DIGITS[label]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{row}.png")
    out = tmp_path / "scores.csv"
    done = run("score", tmp_path / "images", "--model", "digits", "--classify", "--out", out)
    with out.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    nats = [float(row["nats_per_code"]) for row in rows]
    assert len(rows) == 12 and nats == sorted(nats, reverse=True)
    right = sum(row["class"] == row["likeliest"] for row in rows) / 12
    assert f"{right:.2%}" in done.output
    assert Image.open(tmp_path / "scores.png").width > 100
