"""The demo's page in Debian's chromium; skipped where it is not installed."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from moveimg import Pipeline
from tests.test_demo_server import image_of, pixels_of, wait_until

CHROMIUM = shutil.which("chromium")
DARK_PHONE = {
    "viewport": {"width": 375, "height": 740}, "is_mobile": True, "has_touch": True,
    "color_scheme": "dark",
}  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium here (Debian: apt-get install chromium)")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, server, request):
    """The page; it must load nothing from elsewhere, and nothing may fail."""
    options = getattr(request, "param", {"viewport": {"width": 1280, "height": 900}})
    context = browser.new_context(accept_downloads=True, **options)
    context.set_default_timeout(120_000)
    page, problems = context.new_page(), []
    known = (server.url, "data:", "blob:")
    page.on("request", lambda r: r.url.startswith(known) or problems.append(r.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("response", lambda r: r.status >= 400 and problems.append(f"{r.status} {r.url}"))
    page.goto(server.url)
    page.wait_for_selector("#generate")
    yield page
    assert problems == []
    context.close()


def choose(page, typed, where="#klass"):
    page.click(f"{where} input")
    page.keyboard.type(typed)
    for _ in range(100):  # a test types faster than the page narrows its list, a person does not
        page.wait_for_timeout(100)
        page.keyboard.press("Enter")
        page.wait_for_timeout(100)
        if page.input_value(f"{where} input") != typed:
            return


def saved(page, count, where="#gallery"):
    """The finished images, once there are `count`, and their settings."""
    page.wait_for_function(f"document.querySelectorAll('{where} .save').length === {count}")
    found = page.eval_on_selector_all(f"{where} .tile img", "images => images.map(i => i.src)")
    return zip(*map(image_of, found), strict=True)


@pytest.fixture
def drawn(page):
    """The page with two threes on it, seeds 21 and 22."""
    page.click("#advanced > button")
    page.fill("#num input[type=number]", "2")
    page.fill("#seed input", "21")
    choose(page, "thr")
    assert page.input_value("#klass input") == "3 · three"
    page.keyboard.press("Enter")  # the first one chose, this one draws
    page.wait_for_function("document.querySelector('#status').innerText.includes('2 images')")
    return page


def test_images_are_drawn_saved_varied_and_drawn_without_the_bank(drawn):
    images, abouts = saved(drawn, 2)
    expected = Pipeline.from_pretrained("digits").sample([3, 3], seed=21)
    assert pixels_of(images) == pixels_of(expected)
    with drawn.expect_download() as one:
        drawn.click("#gallery .save >> nth=1")
    assert one.value.suggested_filename == "0003-seed22.png"
    with Image.open(one.value.path()) as image:
        assert json.loads(image.info["moveimg"]) == abouts[1]
    drawn.click("#vary")
    _, abouts = saved(drawn, 8)
    assert [a["seed"] for a in abouts] == [21, 22] * 4
    assert [a["cfg_scale"] for a in abouts[::2]] == [1, 1.75, 2.5, 4]
    drawn.click("#bank-off")
    pair, abouts = saved(drawn, 4)
    assert pixels_of(pair[:2]) == pixels_of(expected)
    assert [a["bank"] for a in abouts] == [1.0, 1.0, 0.0, 0.0]


def test_another_model_brings_its_classes_with_their_synonyms(page):
    starts = "start => document.querySelector('#klass input').value.startsWith(start)"
    choose(page, "gall", "#model")
    page.wait_for_function(starts, arg="0 · goldfish")
    choose(page, "carass")
    assert page.input_value("#klass input") == "0 · goldfish, Carassius auratus"
    page.click("#generate")
    page.wait_for_selector("#gallery .save")


def test_work_stops_when_its_visitor_stops_it_or_leaves(page, server, slow_model):
    for way in ("stop", "leave"):
        slow_model.clear()
        page.click("#generate")
        page.wait_for_selector("#gallery img")
        if way == "stop":
            page.click("#generate-stop")
            page.wait_for_function("document.querySelector('#status').innerText === 'Stopped.'")
        else:
            wait_until(lambda: slow_model)
            page.goto("about:blank")
        wait_until(lambda: not server.jobs)
        assert 0 < len(slow_model) < 50  # of 64


def test_an_edit_draws_what_is_painted_over_and_an_image_is_scored(drawn, tmp_path):
    original, other = next(saved(drawn, 2))
    pipeline = Pipeline.from_pretrained("digits")
    drawn.get_by_role("tab", name="Edit").click()
    drawn.click("#edit")
    drawn.wait_for_selector("#edit-status .failed")
    drawn.click("#painter .drawn button >> nth=0")
    drawn.wait_for_function("document.querySelector('#edit-class input').value === '3 · three'")
    drawn.locator("#painter canvas").scroll_into_view_if_needed()
    box = drawn.locator("#painter canvas").bounding_box()
    low = box["y"] + 0.9 * box["height"]
    drawn.mouse.move(box["x"] + 0.1 * box["width"], low)
    drawn.mouse.down()
    drawn.mouse.move(box["x"] + 0.9 * box["width"], low, steps=5)
    drawn.mouse.up()
    drawn.fill("#edit-num input[type=number]", "1")
    drawn.fill("#edit-seed input", "7")
    drawn.keyboard.press("Enter")
    old, new = np.asarray(original), np.asarray(next(saved(drawn, 1, "#versions"))[0])
    assert np.array_equal(new[:20], old[:20]) and not np.array_equal(new[24:], old[24:])
    drawn.click("#painter [data-keep=left]")
    drawn.fill("#edit-num input[type=number]", "2")
    drawn.click("#edit")
    found = next(saved(drawn, 2, "#versions"))
    assert pixels_of(found) == pixels_of(pipeline.edit(original, 3, hole="right", num=2, seed=7))
    drawn.get_by_role("tab", name="Likelihood").click()
    (tmp_path / "bad.png").write_text("no image")
    drawn.set_input_files("#score-upload input", tmp_path / "bad.png")
    drawn.wait_for_selector("#score-status .failed")
    drawn.click("#score-upload .drawn button >> nth=1")
    ((name, _), *_) = pipeline.classify([other])[0]
    drawn.wait_for_function(
        "name => document.querySelector('#score-status').innerText.includes(name)", arg=name
    )
    assert name in drawn.inner_text("#score-result")


@pytest.mark.parametrize("page", [DARK_PHONE], indirect=True)
def test_a_phone_needs_no_sideways_scrolling(page):
    wide = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    for tab in ("Edit", "Likelihood", "Generate"):
        page.get_by_role("tab", name=tab).tap()
        page.wait_for_timeout(200)
        assert page.evaluate(wide), tab
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(int(v) for v in re.findall(r"\d+", background)[:3]) < 380
