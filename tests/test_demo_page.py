"""The demo as its visitors meet it, in a real browser.

The tests are skipped where Debian's chromium is not installed.
"""

from __future__ import annotations

import json
import re
import shutil
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

from moveimg import Pipeline
from moveimg.demo import analysis
from tests.test_demo_server import image_of, wait_until

CHROMIUM = shutil.which("chromium")
PATIENCE = 120_000


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
def desktop(browser, server):
    """The page in a desktop's window; `outside` collects requests to elsewhere."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    page.outside, page.problems = [], []

    def seen(request):
        if not request.url.startswith((server.url, "data:", "blob:")):
            page.outside.append(request.url)

    page.on("request", seen)
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("response", lambda r: r.status >= 400 and page.problems.append(f"{r.status} {r.url}"))
    page.goto(server.url)
    page.wait_for_selector("#generate")
    yield page
    context.close()


def idle(page):
    page.wait_for_function("!document.querySelector('.status.busy, .status.brief')")


def choose(page, typed, where="#klass"):
    page.click(f"{where} input")
    page.keyboard.type(typed)
    for _ in range(100):  # a test types faster than the page narrows its list, a person does not
        page.wait_for_timeout(100)
        page.keyboard.press("Enter")
        page.wait_for_timeout(100)
        if page.input_value(f"{where} input") != typed:
            return


def sources(page, where="#gallery"):
    return page.eval_on_selector_all(f"{where} .tile img", "images => images.map(i => i.src)")


def open_panel(page):
    if not page.is_visible("#seed"):
        page.click("#advanced > button")
        page.wait_for_selector("#seed", state="visible")


@pytest.fixture
def drawn(desktop):
    """The page with two threes on it, seeds 21 and 22."""
    open_panel(desktop)
    desktop.fill("#num input[type=number]", "2")
    desktop.fill("#seed input, #seed textarea", "21")
    choose(desktop, "thr")
    assert desktop.input_value("#klass input") == "3 · three"
    desktop.keyboard.press("Enter")  # the first one chose, this one draws
    desktop.wait_for_selector("#gallery [data-pick='1']")
    desktop.wait_for_function("document.querySelector('#status').innerText.includes('2 images')")
    return desktop


def test_the_page_loads_from_this_server_alone_and_keeps_its_width(desktop):
    assert desktop.title() == "moveimg"
    assert desktop.is_visible("#klass") and not desktop.is_visible("#stop")
    width = "document.querySelector('.gradio-container main').getBoundingClientRect().width"
    widths = [desktop.evaluate(width)]
    for tab in ("Edit", "Likelihood", "Reconstruct", "API", "Generate"):
        desktop.get_by_role("tab", name=tab).click()
        desktop.wait_for_timeout(200)
        widths.append(desktop.evaluate(width))
    open_panel(desktop)
    desktop.click("#surprise")
    desktop.wait_for_selector("#gallery [data-pick='7']")
    widths.append(desktop.evaluate(width))
    assert max(widths) - min(widths) <= 20 and min(widths) > 1000  # a scroll bar may come
    assert desktop.outside == [] and desktop.problems == []


def test_a_press_shows_something_before_the_server_answers(desktop, server):
    desktop.route("**/queue/join*", lambda route: None)  # never answered
    shown = "getComputedStyle(document.querySelector('#status'), '::before').content"
    for _ in range(40):  # on a busy machine the page's script may not listen yet
        desktop.click("#generate")
        if "Sending" in desktop.evaluate(shown):
            return
        desktop.wait_for_timeout(250)
    pytest.fail(f"a press shows {desktop.evaluate(shown)}")


def test_no_class_draws_nothing_and_an_open_list_covers_nothing(desktop):
    desktop.click("#klass input")
    desktop.wait_for_selector("#klass .options")
    below = "document.querySelector('%s').getBoundingClientRect()"
    bottom = desktop.evaluate(f"{below % '#klass .options'}.bottom")
    assert bottom <= desktop.evaluate(f"{below % '#num'}.top") + 1
    desktop.keyboard.press("Backspace")
    desktop.keyboard.press("Enter")
    desktop.wait_for_selector("#status .failed")
    assert "class" in desktop.inner_text("#status")
    assert desktop.locator("#gallery img").count() == 0


def test_a_reload_keeps_images_and_settings(drawn):
    before = sources(drawn)
    drawn.reload()
    drawn.wait_for_selector("#gallery [data-pick='1']")
    assert sources(drawn) == before
    assert drawn.input_value("#klass input") == "3 · three"
    assert drawn.input_value("#num input[type=number]") == "2"
    idle(drawn)
    drawn.click("#vary")  # and they can be worked with
    drawn.wait_for_function("document.querySelectorAll('#gallery .strip .save').length === 8")


def test_a_class_is_found_by_typing_and_enter_draws_it(drawn):
    desktop = drawn
    assert desktop.inner_text("#gallery .tile .name").strip() == "three"
    seeds = desktop.eval_on_selector_all("#gallery .seed", "all => all.map(e => e.textContent)")
    assert seeds == ["seed 21", "seed 22"]
    first = sources(desktop)
    expected = Pipeline.from_pretrained("digits").sample([3, 3], seed=21)
    assert [image_of(s)[0].tobytes() for s in first] == [p.tobytes() for p in expected]
    desktop.click("#again")
    desktop.wait_for_function(
        "!document.querySelector('#gallery .seed').textContent.endsWith(' 21')"
    )
    desktop.wait_for_selector("#gallery [data-pick='1']")
    idle(desktop)
    assert sources(desktop) != first
    desktop.click("#generate")
    desktop.wait_for_function(
        "document.querySelector('#gallery .seed').textContent.endsWith(' 21')"
    )
    desktop.wait_for_selector("#gallery [data-pick='1']")
    idle(desktop)
    assert sources(desktop) == first  # the same seed, the same images


def test_drawn_images_are_saved_looked_into_varied_and_compared(drawn, server, monkeypatch):
    """On one page: loading it and drawing take longer than all of this."""
    each_is_saved_with_its_settings(drawn)
    the_memory_of_one_is_shown_and_the_bank_turned_off(drawn)
    guidance_varies_on_the_same_seeds(drawn)
    a_look_at_the_old_images_ends_where_new_ones_begin(drawn, server, monkeypatch)
    another_model_draws_the_same_seeds(drawn)


def each_is_saved_with_its_settings(desktop):
    with desktop.expect_download() as one:
        desktop.click("#gallery .save >> nth=1")
    assert one.value.suggested_filename == "0003-three-seed22.png"
    with Image.open(one.value.path()) as image:
        assert json.loads(image.info["moveimg"])["seed"] == 22
    with desktop.expect_download() as everything:
        desktop.click("#save-all")
    with zipfile.ZipFile(everything.value.path()) as archive:
        assert archive.namelist() == ["0003-three-seed21.png", "0003-three-seed22.png"]


def the_memory_of_one_is_shown_and_the_bank_turned_off(desktop):
    desktop.click("#gallery [data-pick='1']")
    desktop.wait_for_selector("#maps .map >> nth=6")
    assert "three, seed 22" in desktop.inner_text("#maps .what")
    desktop.click("#bank-off input")
    desktop.wait_for_function("document.querySelectorAll('#pair .save').length === 2")
    idle(desktop)
    with_bank, without = sources(desktop, "#pair")
    assert with_bank == sources(desktop)[1] and without != with_bank
    assert image_of(without)[1]["bank"] is False and image_of(without)[1]["seed"] == 22


def guidance_varies_on_the_same_seeds(desktop):
    desktop.click("#vary")
    desktop.wait_for_selector("#maps img", state="detached")  # they were of another image
    desktop.wait_for_selector("#bank-off input:not(:checked)")
    desktop.wait_for_function("document.querySelectorAll('#gallery .strip .save').length === 8")
    idle(desktop)
    titles = desktop.eval_on_selector_all("#gallery h3", "all => all.map(e => e.textContent)")
    assert titles == ["guidance 1", "guidance 1.75", "guidance 2.5", "guidance 4"]
    abouts = [image_of(uri)[1] for uri in sources(desktop)]
    assert [a["seed"] for a in abouts] == [21, 22] * 4


def a_look_at_the_old_images_ends_where_new_ones_begin(desktop, server, monkeypatch):
    map_bank = analysis.map_bank

    def slowly(row, models):
        time.sleep(1)
        yield from map_bank(row, models)

    monkeypatch.setattr(analysis, "map_bank", slowly)
    desktop.click("#gallery [data-pick='3']")
    desktop.wait_for_selector("#memory-status .brief")
    desktop.click("#again")
    desktop.wait_for_function(
        "!document.querySelector('#gallery .seed').textContent.endsWith(' 21')"
    )
    idle(desktop)
    wait_until(lambda: len(server.queue) == 0)
    assert desktop.locator("#maps img").count() == 0


def another_model_draws_the_same_seeds(desktop):
    assert desktop.input_value("#other input") == "twin"
    desktop.click("#compare")
    desktop.wait_for_function("document.querySelectorAll('#gallery .strip .save').length === 4")
    idle(desktop)
    titles = desktop.eval_on_selector_all("#gallery h3", "all => all.map(e => e.textContent)")
    assert titles == ["digits", "twin"]
    mine, twins = sources(desktop)[:2], sources(desktop)[2:]
    assert [image_of(s)[0].tobytes() for s in mine] == [image_of(s)[0].tobytes() for s in twins]
    choose(desktop, "gall", "#model")
    desktop.wait_for_selector("#beside", state="hidden")  # nobody else knows these classes
    choose(desktop, "dig", "#model")
    desktop.wait_for_selector("#beside", state="visible")


def test_another_model_brings_its_classes_with_their_synonyms(desktop):
    starts = "start => document.querySelector('#klass input').value.startsWith(start)"
    choose(desktop, "gall", "#model")
    desktop.wait_for_function(starts, arg="0 · goldfish")
    choose(desktop, "carass")
    assert desktop.input_value("#klass input") == "0 · goldfish, Carassius auratus"
    choose(desktop, "dig", "#model")
    desktop.wait_for_function(starts, arg="0 · zero")


def test_stop_stops_the_work(drawn, server, slow_model):
    desktop = drawn
    desktop.click("#generate")
    desktop.wait_for_selector("#stop", state="visible")
    desktop.wait_for_function("document.querySelector('#status progress')?.value > 0")
    desktop.click("#stop")
    desktop.wait_for_function("document.querySelector('#status').innerText.includes('Stopped')")
    done = int(re.search(r"(\d+) of 128", desktop.inner_text("#status"))[1])
    assert 0 < done < 128
    wait_until(lambda: len(server.queue) == 0)
    stopped = server.queue.steps
    time.sleep(0.5)
    assert server.queue.steps == stopped  # nothing computes any more
    assert desktop.is_visible("#generate") and not desktop.is_visible("#stop")


def test_work_stops_when_its_visitor_leaves(browser, server, slow_model):
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.url)
    page.click("#generate", timeout=PATIENCE)
    page.wait_for_selector("#gallery img", timeout=PATIENCE)
    begun = server.queue.steps
    context.close()
    wait_until(lambda: len(server.queue) == 0)
    assert server.queue.steps - begun < 100  # of 128


def test_a_bad_upload_gives_a_message_and_a_good_one_a_reconstruction(desktop, tmp_path):
    (tmp_path / "bad.png").write_text("no image")
    Image.new("RGB", (70, 50), "teal").save(tmp_path / "good.png")
    desktop.get_by_role("tab", name="Reconstruct").click()
    desktop.set_input_files("#reconstruct-upload input", tmp_path / "bad.png")
    desktop.wait_for_selector("#reconstruct-status .failed")
    assert "not an image that can be read" in desktop.inner_text("#reconstruct-status")
    desktop.set_input_files("#reconstruct-upload input", tmp_path / "good.png")
    desktop.wait_for_selector("#reconstruct-result .tile >> nth=2")
    assert "PSNR" in desktop.inner_text("#reconstruct-result")
    assert desktop.problems == [] and desktop.outside == []


def paint(page, start, end):
    """Draw a stroke over the image; points are shares of its width and height."""
    page.locator("#painter canvas").scroll_into_view_if_needed()
    box = page.locator("#painter canvas").bounding_box()
    (x, y), *rest = [
        (box["x"] + share * box["width"], box["y"] + down * box["height"])
        for share, down in (start, end)
    ]
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(*rest[0], steps=5)
    page.mouse.up()


def test_a_drawn_image_is_painted_over_and_drawn_anew(drawn, server):
    desktop, pipeline = drawn, Pipeline.from_pretrained("digits")
    original = np.asarray(image_of(sources(desktop)[0])[0])
    desktop.get_by_role("tab", name="Edit").click()
    desktop.click("#edit")
    desktop.wait_for_selector("#edit-status .failed")
    assert "image" in desktop.inner_text("#edit-status")
    desktop.click("#painter .drawn button >> nth=0")
    desktop.wait_for_function("document.querySelector('#edit-class input').value === '3 · three'")
    desktop.click("#edit")
    desktop.wait_for_function("document.querySelector('#edit-status').innerText.includes('masked')")
    paint(desktop, (0.1, 0.9), (0.9, 0.9))  # the lowest rows of codes
    desktop.fill("#edit-num input[type=number]", "2")
    desktop.click("#edit-advanced > button")
    desktop.fill("#edit-seed input, #edit-seed textarea", "7")
    desktop.keyboard.press("Enter")
    desktop.wait_for_function("document.querySelectorAll('#versions .save').length === 2")
    versions = [np.asarray(image_of(uri)[0]) for uri in sources(desktop, "#versions")]
    for version in versions:
        assert np.array_equal(version[:20], original[:20])
        assert not np.array_equal(version[24:], original[24:])
    assert not np.array_equal(*versions)
    desktop.click("#painter [data-keep=left]")
    before = sources(desktop, "#versions")[0]
    desktop.click("#edit")
    desktop.wait_for_function(
        "old => document.querySelectorAll('#versions .save').length === 2"
        " && document.querySelector('#versions img').src !== old",
        arg=before,
    )
    wanted = pipeline.edit(Image.fromarray(original), 3, hole="right", num=2, seed=7)
    found = [image_of(uri)[0].tobytes() for uri in sources(desktop, "#versions")]
    assert found == [version.tobytes() for version in wanted]
    assert desktop.problems == [] and desktop.outside == []


def test_an_edit_grows_and_is_stopped(drawn, server, slow_model):
    desktop = drawn
    desktop.get_by_role("tab", name="Edit").click()
    desktop.click("#painter .drawn button >> nth=0")
    desktop.click("#painter [data-keep=top]")
    desktop.click("#edit")
    desktop.wait_for_selector("#versions img")
    desktop.keyboard.press("Escape")
    desktop.wait_for_function("document.querySelector('#edit-status').innerText.includes('Stop')")
    wait_until(lambda: len(server.queue) == 0)
    assert desktop.locator("#versions .save").count() == 0


def test_an_image_is_scored_by_class_and_by_code(drawn, tmp_path):
    desktop = drawn
    desktop.get_by_role("tab", name="Likelihood").click()
    (tmp_path / "bad.png").write_text("no image")
    desktop.set_input_files("#score-upload input", tmp_path / "bad.png")
    desktop.wait_for_selector("#score-status .failed")
    desktop.click("#score-upload .drawn button >> nth=1")
    desktop.wait_for_selector("#score-result .tile >> nth=1")
    rows = desktop.locator("#score-result tbody tr")
    assert rows.count() == 10
    image = Pipeline.from_pretrained("digits").sample(3, seed=22)[0]
    name = Pipeline.from_pretrained("digits").classify([image])[0][0][0]
    assert rows.first.inner_text().startswith(name)
    heat = desktop.get_attribute("#score-result img.codes", "src")
    assert image_of(heat)[0].size == (8, 8)
    assert "nats" in desktop.inner_text("#score-result .legend")
    assert desktop.problems == [] and desktop.outside == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(browser, server, scheme):
    context = browser.new_context(
        viewport={"width": 375, "height": 740}, color_scheme=scheme, is_mobile=True, has_touch=True
    )
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    page.goto(server.url)
    page.wait_for_selector("#generate")
    wide = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    assert page.evaluate(wide)
    if scheme == "light":
        page.tap("#surprise")
        page.wait_for_selector("#gallery [data-pick='7']")
        idle(page)
        page.tap("#gallery [data-pick='0']")
        page.wait_for_selector("#maps .map")
        page.wait_for_function(  # the maps come into view
            "document.querySelector('#maps').getBoundingClientRect().top < innerHeight / 2"
        )
        assert page.evaluate(wide)
        for tab in ("Edit", "Likelihood", "Reconstruct", "API"):
            page.get_by_role("tab", name=tab).tap()
            page.wait_for_timeout(200)
            assert page.evaluate(wide), tab
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(int(v) for v in re.findall(r"\d+", background)[:3]) > 380
    assert light == (scheme == "light")
    context.close()
