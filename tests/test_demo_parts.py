"""The demo without a browser: its drawing, its pictures, its maps, its uploads."""

from __future__ import annotations

import base64
import io
import json
import shutil
import threading
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from apps.demo_parts import drawing, gallery, looking, show
from apps.demo_parts.models import Models
from moveimg import Pipeline
from moveimg.checkpoint import BUNDLED
from moveimg.inspect import bank_maps, gather_gates, without_bank
from tests.conftest import MEMORIES, lively, random_inputs, tiny_config


@pytest.fixture(scope="module")
def models():
    return Models(["digits"])


def finished(rows, models):
    """The last frame of a drawing nobody stops."""
    *_, frame = drawing.draw(rows, models, threading.Event())
    assert frame.ended == "done"
    return frame


# --- drawing ---------------------------------------------------------------------------------


def test_pictures_grow_and_are_those_of_the_library(models):
    about = models.describe(None)
    row = drawing.row_of(about, "seven", 3, 11, cfg_scale=3.0)
    frames = [f for f in drawing.draw([row], models, threading.Event()) if f is not None]
    assert len(frames) >= 2 and 0 < frames[0].done < frames[0].total == 3 * 64
    assert [f.ended for f in frames] == [""] * (len(frames) - 1) + ["done"]
    top, bottom = (
        np.asarray(frames[0].pictures[0][0])[:2],
        np.asarray(frames[0].pictures[0][0])[-2:],
    )
    assert (bottom == 128).all() and (top != 128).any()  # codes to come are grey
    expected = Pipeline.from_pretrained("digits").sample([7, 7, 7], cfg_scale=3.0, seed=11)
    assert [p.tobytes() for p in frames[-1].pictures[0]] == [p.tobytes() for p in expected]
    again = [models.get(None).decode(frames[-1].rows[0].codes)[i].tobytes() for i in range(3)]
    assert again == [p.tobytes() for p in expected]


def test_drawing_stops_after_the_next_code(models):
    stop = threading.Event()
    work = drawing.draw([drawing.row_of(models.describe(None), 7, 2, 0)], models, stop)
    for _ in range(5):
        next(work)
    stop.set()
    frame = next(work)
    assert frame.ended == "stopped" and frame.done == 2 * 6
    assert frame.rows[0].codes is None and next(work, "over") == "over"


def test_rows_share_seeds_where_they_are_to_be_compared(models):
    about = models.describe(None)
    row = drawing.row_of(about, "3", 6, 40)
    strips = drawing.vary_guidance(row)
    assert [s.settings.cfg_scale for s in strips] == [1.0, 1.75, 2.5, 4.0]  # the model's is 2.5
    assert {(s.seed, s.labels) for s in strips} == {(40, (3,) * 4)}
    pair = drawing.with_and_without_bank(row, about)
    frame = finished(pair, models)
    assert pair[0].seed == pair[1].seed and pair[0].labels == pair[1].labels
    assert not torch.equal(frame.rows[0].codes, frame.rows[1].codes)
    assert torch.equal(frame.rows[0].codes, finished([row], models).rows[0].codes[:4])
    fresh = drawing.another_seed([row])
    assert fresh[0].labels == row.labels and fresh[0].seed != row.seed


def test_two_models_draw_the_same_classes_and_seeds(tmp_path):
    shutil.copytree(BUNDLED / "digits", tmp_path / "other")
    settings = json.loads((tmp_path / "other" / "sampling.json").read_text())
    (tmp_path / "other" / "sampling.json").write_text(json.dumps(settings | {"temperature": 0.5}))
    models = Models(["digits", str(tmp_path / "other"), str(tmp_path / "other")], keep=1)
    assert models.names == ["digits", "other", "other (2)"]
    row = drawing.row_of(models.describe("digits"), "one", 2, 5)
    frame = finished(drawing.beside(row, models.describe("other"), models), models)
    assert [r.settings.temperature for r in frame.rows] == [0.8, 0.5]  # each its own
    assert models.loaded() == ["other"]  # one at a time
    changed = drawing.row_of(models.describe("digits"), "one", 2, 5, temperature=0.6)
    rows = drawing.beside(changed, models.describe("other"), models)
    assert [r.settings.temperature for r in rows] == [0.6, 0.6]  # what the visitor asked for
    with pytest.raises(ValueError, match="by digits already: choose another model"):
        drawing.beside(row, models.describe("digits"), models)
    with pytest.raises(ValueError, match="'elsewhere': expected one of digits, other"):
        models.describe("elsewhere")
    (tmp_path / "other" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="'other' cannot be loaded") as caught:
        Models([str(tmp_path / "other")]).get("other")
    assert str(tmp_path) not in str(caught.value)  # a visitor is told no path


@pytest.mark.parametrize(
    ("wanted", "count", "seed", "given", "part"),
    [
        ("ten", 1, 0, {}, "unknown class 'ten'"),
        (10, 1, 0, {}, "class 10: expected 0..9"),
        ("seven", 0, 0, {}, "0 pictures: expected a whole number in 1..16"),
        ("seven", 17, 0, {}, "1..16"),
        ("seven", 2.5, 0, {}, "2.5 pictures"),
        ("seven", float("nan"), 0, {}, "nan pictures"),
        ("seven", True, 0, {}, "True pictures"),
        ("seven", "1e999", 0, {}, "1e999 pictures"),
        ("seven", 2, 2**32 - 1, {}, "seed 4294967295"),
        ("seven", 1, -1, {}, "seed -1"),
        ("seven", 1, "x" * 50, {}, "seed xxx"),
        ("seven", 1, 0, {"cfg_scale": 1e9}, "cfg_scale"),
        ("seven", 1, 0, {"temperature": float("nan")}, "temperature"),
        ("seven", 1, 0, {"top_p": 0}, "top_p"),
        ("seven", 1, 0, {"top_k": -1}, "top_k"),
        ("seven", 1, 0, {"cfg_schedule": "cubic"}, "cfg_schedule"),
        ([], 1, 0, {}, "0 classes"),
        (["one", ""], 2, 0, {}, "none of them empty"),
    ],
)
def test_numbers_out_of_bounds_are_refused(models, wanted, count, seed, given, part):
    with pytest.raises(ValueError, match=part.replace(".", r"\.")):
        drawing.row_of(models.describe(None), wanted, count, seed, **given)


def test_nothing_chosen_means_random_classes_and_no_seed_a_fresh_one(models):
    rows = [drawing.row_of(models.describe(None), None, 16, "") for _ in range(4)]
    assert len({row.labels for row in rows}) > 1 and len({row.seed for row in rows}) > 1
    assert drawing.row_of(models.describe(None), "seven", 1, " 12 ").seed == 12


# --- pictures as HTML, PNG and zip -----------------------------------------------------------


def test_saved_pictures_carry_what_makes_them_again(models):
    row = drawing.row_of(models.describe(None), "four", 2, 9, temperature=0.7)
    frame = finished(drawing.with_and_without_bank(row, models.describe(None)), models)
    data = gallery.zip_of(frame.rows, frame.pictures, models)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        assert names[0] == "1-with-the-bank/0004-four-seed9.png" and len(names) == 4
        picture = Image.open(io.BytesIO(archive.read(names[1])))
        bare = Image.open(io.BytesIO(archive.read(names[3])))
    about = json.loads(picture.info["moveimg"])
    again = Pipeline.from_pretrained(about["model"]).sample(
        about["class"], seed=about["seed"], temperature=about["temperature"],
        cfg_scale=about["cfg_scale"], top_k=about["top_k"], top_p=about["top_p"],
    )[0]  # fmt: skip
    assert about["seed"] == 10 and again.tobytes() == picture.tobytes()
    assert json.loads(bare.info["moveimg"])["bank"] is False
    page = gallery.tiles(frame, models, "look")
    assert page.count("data-pick") == 4 and page.count("download=") == 4
    inside = page.split('src="data:image/png;base64,')[2].split('"')[0]
    shown = Image.open(io.BytesIO(base64.b64decode(inside)))
    assert json.loads(shown.info["moveimg"]) == about


def test_nothing_is_said_of_a_bank_that_a_model_has_not(tmp_path):
    shutil.copytree(BUNDLED / "digits", tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    config["model"]["memory"] = {"kind": "none"}
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    models = Models([str(tmp_path / "dense"), "digits"])
    for about in models.describe("dense"), models.describe("digits"):
        row = drawing.row_of(about, "four", 1, 9)
        row = replace(row, codes=torch.zeros(1, 64, dtype=torch.int64))
        frame = drawing.Frame([row], [[Image.new("RGB", (32, 32))]], 64, 64, 1.0, "done")
        page = gallery.tiles(frame, models, "look")
        assert ("data-pick" in page, "memoryless" in page) == (about.has_bank, not about.has_bank)


def test_class_names_cannot_write_html_or_templates(tmp_path):
    shutil.copytree(BUNDLED / "digits", tmp_path / "bad")
    names = ["<img src=x onerror=alert(1)>", '"{{this}}', "${alert(1)}", *"3456789"]
    (tmp_path / "bad" / "classes.json").write_text(json.dumps(names))
    models = Models([str(tmp_path / "bad")])
    row = drawing.row_of(models.describe(None), ["0", "1", "2"], 3, 0)
    page = gallery.tiles(drawing.Frame([row], [[]], 0, 1, 0.0), models)
    assert "<img" not in page and "{{" not in page and "${" not in page and '="{' not in page
    assert "<b>" not in show.failed("<b>") and "<i>" not in show.note("<i>")


# --- looking ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lave-x1", "move-3-class-rows"])
def test_bank_maps_agree_with_the_statistics_of_the_gates(kind):
    config = tiny_config(memory=MEMORIES[kind])
    model = lively(config)
    codes, labels = random_inputs(config, batch=1)
    maps, gates = bank_maps(model, codes, labels), gather_gates(model, [(codes, labels)])
    assert maps.keys() == gates.keys() and len(maps) > 0
    for layer, found in maps.items():
        known = gates[layer]
        assert found.share.shape == (1, config.seq_len - 1)
        means = torch.tensor(known["mean"]).mean(0)  # [gates]
        start = 1 if known["gates"][0] == "g_0" else 0
        assert found.slots.mean().item() == pytest.approx(means[start:].mean().item(), rel=1e-5)
        if start:
            assert found.g_0.mean().item() == pytest.approx(means[0].item(), rel=1e-5)
        assert found.share.min() > 0 and found.share.max() < 1
    with pytest.raises(ValueError, match="no value memory"):
        bank_maps(lively(tiny_config(memory={"kind": "none"})), codes, labels)


def test_a_model_without_its_bank_is_one_whose_tables_are_zero():
    for kind in ("lave-x1", "move-3-class-rows"):
        config = tiny_config(memory=MEMORIES[kind])
        model, zeroed = lively(config), lively(config)
        with torch.no_grad():
            for name, weight in zeroed.memory.named_parameters():
                assert "bank" in name
                weight.zero_()
        codes, labels = random_inputs(config)
        before = model(codes, labels)
        assert torch.equal(without_bank(model)(codes, labels), zeroed(codes, labels))
        assert torch.equal(model(codes, labels), before)  # the model itself is as it was
        assert not torch.equal(before, zeroed(codes, labels))


def test_the_maps_of_a_drawn_picture_lie_on_its_grid(models):
    drawn = finished([drawing.row_of(models.describe(None), "five", 1, 3)], models)
    ((picture, layers),) = looking.bank_of(drawn.rows[0], models)
    assert picture.tobytes() == drawn.pictures[0][0].tobytes()
    assert [m.layer for m in layers] == [1, 2, 3, 4, 5, 6]
    for m in layers:
        assert m.share.shape == (8, 8) and np.isnan(m.share).sum() == 1 and np.isnan(m.share[7, 7])
        assert 0 < m.g_0 < 2 and 0 < m.slots < 2
    assert "layer 6" in show.bank_maps(
        picture, layers, drawn.rows[0], models.describe(None), "gates"
    )


def as_upload(picture, kind="png"):
    buffer = io.BytesIO()
    picture.save(buffer, format=kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def test_an_upload_goes_through_the_tokenizer_with_its_error(models):
    pipeline = models.get(None)
    picture = pipeline.sample("eight", seed=1)[0]
    image = looking.read_upload(as_upload(picture))
    (result,) = looking.reconstruct(image, None, models)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    codes = pipeline.tokenizer.encode(pixels)
    mse = (pipeline.tokenizer.decode(codes, (8, 8)) - pixels).square().mean().item()
    assert result.codes.flatten().tolist() == codes[0].tolist()
    assert result.mse == pytest.approx(mse, rel=1e-5)
    assert result.psnr == pytest.approx(10 * np.log10(4 / mse), rel=1e-5)
    wide = Image.new("RGB", (300, 90), "red")
    (result,) = looking.reconstruct(looking.read_upload(as_upload(wide, "jpeg")), None, models)
    assert result.before.size == result.after.size == (32, 32)
    assert result.colours.size == (8, 8) and result.distinct >= 1


def test_an_upload_is_read_as_a_browser_shows_it():
    def corner(picture, **options):
        buffer = io.BytesIO()
        picture.save(buffer, format="png", **options)
        image = looking.read_upload(base64.b64encode(buffer.getvalue()).decode())
        return image.size, image.getpixel((0, 0))

    assert corner(Image.new("RGBA", (8, 8), (0, 0, 0, 0))) == ((8, 8), (255, 255, 255))
    assert corner(Image.new("I;16", (8, 8), 128 << 8)) == ((8, 8), (128, 128, 128))
    turned = Image.Exif()
    turned[0x0112] = 6  # held upright
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    red_is_green = profile.replace(b"rXYZ", b"----").replace(b"gXYZ", b"rXYZ")
    red_is_green = red_is_green.replace(b"----", b"gXYZ")
    red = Image.new("RGB", (8, 4), "red")
    size, (r, g, b) = corner(red, exif=turned, icc_profile=red_is_green)
    assert size == (4, 8) and g > 250 and r < 5 and b < 5
    assert corner(red, icc_profile=b"no profile") == ((8, 4), (255, 0, 0))


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ("", "no image"),
        ("data:text/plain;base64,aGVsbG8=", "not an image"),
        ("not base64!", "not an image"),
        ("A" * (looking.MAX_UPLOAD * 4 // 3 + 100), "larger than 8 MB"),
        (as_upload(Image.new("1", (8000, 6000))), "8000 x 6000 pixels"),
        (as_upload(Image.new("RGB", (64, 64)))[:-80], "not an image"),
        ("data:image/svg+xml;base64," + base64.b64encode(b"<svg/>").decode(), "not an image"),
    ],
)
def test_a_bad_upload_is_refused_in_words(data, part):
    with pytest.raises(ValueError, match=part):
        looking.read_upload(data)
