"""The demo as its visitors meet it: in a real browser, by the gradio client, by plain HTTP.

One server for all tests here (they are one group, so one worker runs them); the tests of the page
are skipped where Debian's chromium is not installed.
"""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest
from PIL import Image

from apps import demo
from apps.demo_parts import texts
from apps.demo_parts.models import Models
from apps.demo_parts.turns import Turns, Visitor
from moveimg import Pipeline
from moveimg.pipeline import BUNDLED

pytestmark = pytest.mark.xdist_group("demo")
CHROMIUM = shutil.which("chromium")
PATIENCE = 120_000


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A running demo with two models, the second a copy with class names of ImageNet's kind."""
    other = tmp_path_factory.mktemp("models") / "gallery"
    shutil.copytree(BUNDLED / "digits", other)
    names = ["goldfish, Carassius auratus", "golden retriever", *(f"thing {i}" for i in range(8))]
    (other / "classes.json").write_text(json.dumps(names))
    temporary = demo.quiet_gradio()
    models, turns = Models(["digits", str(other)], keep=2), Turns()
    page = demo.serve(models, turns)
    models.get(None)
    yield SimpleNamespace(url=page.local_url.rstrip("/"), models=models, turns=turns, page=page,
                          temporary=temporary)  # fmt: skip
    page.close(verbose=False)


def picture_of(uri):
    """The picture in a data URI, and the settings in it."""
    image = Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))
    return image, json.loads(image.info["moveimg"])


# --- by name ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(server):
    from gradio_client import Client

    return Client(server.url, verbose=False)


def test_endpoints_answer_as_the_library_does(server, client):
    answer = client.predict(class_name="seven", num=2, seed=3, cfg_scale=2.0, api_name="/generate")
    expected = Pipeline.from_pretrained("digits").sample(["seven"] * 2, seed=3, cfg_scale=2.0)
    pictures = [picture_of(image["png"]) for image in answer["images"]]
    assert [p.tobytes() for p, _ in pictures] == [p.tobytes() for p in expected]
    assert [about["seed"] for _, about in pictures] == [3, 4]
    assert pictures[0][1]["cfg_scale"] == answer["settings"]["cfg_scale"] == 2.0
    bare = client.predict(class_name="7", seed=3, cfg_scale=2.0, bank=False, api_name="/generate")
    assert picture_of(bare["images"][0]["png"])[0].tobytes() != expected[0].tobytes()

    strips = client.predict(class_name="2", scales=[1, 3], num=1, seed=1, api_name="/vary_guidance")
    assert [row["settings"]["cfg_scale"] for row in strips["rows"]] == [1, 3]
    assert [row["images"][0]["seed"] for row in strips["rows"]] == [1, 1]
    memory = client.predict(class_name="two", seed=1, api_name="/memory")
    assert len(memory["layers"]) == 6 and memory["layers"][0]["share"][7][7] is None
    answer = client.predict(image=memory["image"]["png"], api_name="/reconstruct")
    assert 0 < answer["mse"] < 1 and len(answer["codes"]) == 8
    assert picture_of(answer["image"])[0].size == (32, 32)
    found = client.predict(search="gold", model="gallery", api_name="/classes")
    assert [c["index"] for c in found] == [0, 1]
    assert [m["name"] for m in client.predict(api_name="/models")] == ["digits", "gallery"]


def test_errors_are_messages_without_traces_or_paths(server, client):
    from gradio_client.exceptions import AppError

    for arguments, part in (
        ({"class_name": "ten"}, "unknown class 'ten'"),
        ({"class_name": "gold", "model": "gallery"}, "fits 2 classes"),
        ({"class_name": "1", "num": 1000}, "1..16"),
        ({"class_name": "1", "model": "/etc"}, "expected one of digits, gallery"),
        ({"class_name": "1", "temperature": -1}, "temperature"),
    ):
        with pytest.raises(AppError, match=re.escape(part)) as caught:
            client.predict(**arguments, api_name="/generate")
        assert "Traceback" not in str(caught.value) and str(BUNDLED.parent) not in str(caught.value)
    with pytest.raises(AppError, match="different classes"):
        client.predict(class_name="1", models=["digits", "gallery"], api_name="/compare")
    with pytest.raises(AppError, match="not an image"):
        client.predict(image="data:image/png;base64,aGVsbG8=", api_name="/reconstruct")


def test_the_examples_on_the_page_work(server, tmp_path):
    code = texts.API_PYTHON.replace("http://127.0.0.1:7860", server.url)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    expected = Pipeline.from_pretrained("digits").sample(["seven"] * 2, seed=0)[0]
    with Image.open(tmp_path / "seed0.png") as picture:
        assert picture.tobytes() == expected.tobytes()
    # what the shell example does, without needing curl
    body = json.loads(re.search(r"-d '(.*?)'", texts.API_SHELL)[1])
    event = httpx.post(f"{server.url}/gradio_api/call/v2/generate", json=body).json()["event_id"]
    reply = httpx.get(f"{server.url}/gradio_api/call/generate/{event}", timeout=120).text
    assert "event: complete" in reply
    answer = json.loads(reply.split("data: ")[-1])[0]
    assert picture_of(answer["images"][0]["png"])[0].tobytes() == expected.tobytes()


def test_visitors_at_once_do_not_disturb_each_others_seeds(server):
    from gradio_client import Client

    def visit(seed):
        client = Client(server.url, verbose=False)
        answer = client.predict(class_name="five", num=2, seed=seed, api_name="/generate")
        return [picture_of(image["png"])[0].tobytes() for image in answer["images"]]

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(visit, (5, 50, 5)))
    pipeline = Pipeline.from_pretrained("digits")
    assert results[0] == results[2] == [p.tobytes() for p in pipeline.sample([5, 5], seed=5)]
    assert results[1] == [p.tobytes() for p in pipeline.sample([5, 5], seed=50)]


def test_a_full_line_is_a_message(server, client):
    from gradio_client.exceptions import AppError

    tickets = [server.turns.enter(Visitor(f"tab {i}", f"10.0.0.{i}")) for i in range(64)]
    try:
        with pytest.raises(AppError, match="64 jobs are waiting already"):
            client.predict(class_name="1", api_name="/generate")
    finally:
        for ticket in tickets:
            server.turns.leave(ticket)


def test_nothing_of_the_servers_disk_can_be_read_or_written(server):
    for path in ("/gradio_api/file=/etc/passwd", "/gradio_api/file=pyproject.toml",
                 "/file=/etc/passwd", "/static/../../pyproject.toml", "/static/%2e%2e/%2e%2e/x",
                 "/assets/%2e%2e/%2e%2e/%2e%2e/package.json", "/monitoring/summary"):  # fmt: skip
        answer = httpx.get(server.url + path)
        assert answer.status_code in (403, 404), path
    files = {"files": ("a.png", b"x")}
    assert httpx.post(f"{server.url}/gradio_api/upload", files=files).status_code == 404
    assert httpx.post(f"{server.url}/gradio_api/run/generate", json={}).status_code == 404
    big = httpx.post(f"{server.url}/gradio_api/queue/join", content=b"x" * (demo.MAX_BODY + 1))
    assert big.status_code == 413
    config = httpx.get(f"{server.url}/config").text
    assert str(BUNDLED.parents[1]) not in config and str(server.temporary) not in config


def test_a_password_is_asked_for_where_one_is_set(server):
    page = demo.serve(server.models, Turns(), auth=[("me", "secret")])
    try:
        url = page.local_url.rstrip("/")
        with httpx.Client(base_url=url) as visitor:
            assert visitor.get("/config").status_code == 401
            assert visitor.post("/gradio_api/call/v2/models", json={}).status_code == 401
            wrong = {"username": "me", "password": "guess"}
            assert visitor.post("/login", data=wrong).status_code == 400
            right = {"username": "me", "password": "secret"}
            assert visitor.post("/login", data=right).status_code == 200
            assert visitor.get("/config").status_code == 200
    finally:
        page.close(verbose=False)


# --- in the browser --------------------------------------------------------------------------


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
    desktop.wait_for_function("document.querySelector('#status').innerText.includes('2 pictures')")
    return desktop


def test_the_page_loads_from_this_server_alone(desktop):
    assert desktop.title() == "moveimg"
    assert desktop.is_visible("#klass") and not desktop.is_visible("#stop")
    assert desktop.outside == [] and desktop.problems == []


def test_a_class_is_found_by_typing_and_enter_draws_it(drawn):
    desktop = drawn
    assert desktop.inner_text("#gallery .tile .name").strip() == "three"
    seeds = desktop.eval_on_selector_all("#gallery .seed", "all => all.map(e => e.textContent)")
    assert seeds == ["seed 21", "seed 22"]
    first = sources(desktop)
    expected = Pipeline.from_pretrained("digits").sample([3, 3], seed=21)
    assert [picture_of(s)[0].tobytes() for s in first] == [p.tobytes() for p in expected]
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
    assert sources(desktop) == first  # the same seed, the same pictures


def test_pictures_are_saved_with_their_settings(drawn):
    desktop = drawn
    with desktop.expect_download() as one:
        desktop.click("#gallery .save >> nth=1")
    assert one.value.suggested_filename == "0003-three-seed22.png"
    with Image.open(one.value.path()) as picture:
        assert json.loads(picture.info["moveimg"])["seed"] == 22
    with desktop.expect_download() as everything:
        desktop.click("#save-all")
    with zipfile.ZipFile(everything.value.path()) as archive:
        assert archive.namelist() == ["0003-three-seed21.png", "0003-three-seed22.png"]


def test_a_chosen_picture_shows_its_memory_and_the_bank_can_be_turned_off(drawn):
    desktop = drawn
    desktop.click("#gallery [data-pick='1']")
    desktop.wait_for_selector("#maps .map >> nth=6")
    assert "three, seed 22" in desktop.inner_text("#maps .what")
    desktop.click("#bank-off input")
    desktop.wait_for_function("document.querySelectorAll('#pair .save').length === 2")
    idle(desktop)
    with_bank, without = sources(desktop, "#pair")
    assert with_bank == sources(desktop)[1] and without != with_bank
    assert picture_of(without)[1]["bank"] is False and picture_of(without)[1]["seed"] == 22


def test_guidance_varies_on_the_same_seeds(drawn):
    desktop = drawn
    desktop.click("#vary")
    desktop.wait_for_function("document.querySelectorAll('#gallery .strip .save').length === 8")
    idle(desktop)
    titles = desktop.eval_on_selector_all("#gallery h3", "all => all.map(e => e.textContent)")
    assert titles == ["guidance 1", "guidance 1.75", "guidance 2.5", "guidance 4"]
    abouts = [picture_of(uri)[1] for uri in sources(desktop)]
    assert [a["seed"] for a in abouts] == [21, 22] * 4
    assert desktop.locator("#maps img").count() == 0  # they were of another picture


def test_another_model_brings_its_classes_with_their_synonyms(desktop):
    starts = "start => document.querySelector('#klass input').value.startsWith(start)"
    choose(desktop, "gall", "#model")
    desktop.wait_for_function(starts, arg="7 · thing")
    choose(desktop, "carass")
    assert desktop.input_value("#klass input") == "0 · goldfish, Carassius auratus"
    choose(desktop, "dig", "#model")
    desktop.wait_for_function(starts, arg="7 · seven")


def test_two_models_stand_side_by_side_or_say_why_not(drawn):
    desktop = drawn
    desktop.click("#compare")  # the other one knows other classes
    desktop.wait_for_selector("#status .failed")
    assert "different classes" in desktop.inner_text("#status")


def test_stop_stops_the_work(drawn, server, monkeypatch):
    desktop = drawn
    model = server.models.get("digits").generator
    decode = type(model).decode

    def slowly(self, codes, cache):
        time.sleep(0.1)
        return decode(self, codes, cache)

    monkeypatch.setattr(type(model), "decode", slowly)
    desktop.click("#generate")
    desktop.wait_for_selector("#stop", state="visible")
    desktop.wait_for_function("document.querySelector('#status progress')?.value > 0")
    desktop.click("#stop")
    desktop.wait_for_function("document.querySelector('#status').innerText.includes('Stopped')")
    stopped = server.turns.steps
    done = int(re.search(r"(\d+) of 128", desktop.inner_text("#status"))[1])
    assert 0 < done < 128 and server.turns.jobs() == 0
    time.sleep(0.5)
    assert server.turns.steps == stopped  # nothing computes any more
    assert desktop.is_visible("#generate") and not desktop.is_visible("#stop")


def test_work_stops_when_its_visitor_leaves(browser, server, monkeypatch):
    model = server.models.get("digits").generator
    decode = type(model).decode

    def slowly(self, codes, cache):
        time.sleep(0.05)
        return decode(self, codes, cache)

    monkeypatch.setattr(type(model), "decode", slowly)
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.url)
    page.click("#generate", timeout=PATIENCE)
    page.wait_for_selector("#gallery img", timeout=PATIENCE)
    begun = server.turns.steps
    context.close()
    for _ in range(600):
        if server.turns.jobs() == 0:
            break
        time.sleep(0.05)
    assert server.turns.jobs() == 0 and server.turns.steps - begun < 60


def test_a_bad_upload_gives_a_message_and_a_good_one_a_reconstruction(desktop, tmp_path):
    (tmp_path / "bad.png").write_text("no picture")
    Image.new("RGB", (70, 50), "teal").save(tmp_path / "good.png")
    desktop.get_by_role("tab", name="Reconstruct").click()
    desktop.set_input_files("#upload input", tmp_path / "bad.png")
    desktop.wait_for_selector("#reconstruct-status .failed")
    assert "not an image that can be read" in desktop.inner_text("#reconstruct-status")
    desktop.set_input_files("#upload input", tmp_path / "good.png")
    desktop.wait_for_selector("#reconstruction .tile >> nth=2")
    assert "PSNR" in desktop.inner_text("#reconstruction")
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
    page.tap("#surprise")
    page.wait_for_selector("#gallery [data-pick='7']")
    idle(page)
    if scheme == "light":
        page.tap("#gallery [data-pick='0']")
        page.wait_for_selector("#maps .map")
        assert page.evaluate(wide)
        for tab in ("Reconstruct", "API"):
            page.get_by_role("tab", name=tab).tap()
            page.wait_for_timeout(200)
            assert page.evaluate(wide), tab
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(int(v) for v in re.findall(r"\d+", background)[:3]) > 380
    assert light == (scheme == "light")
    context.close()
