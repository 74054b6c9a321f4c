"""The demo as programs meet it: by the gradio client, by plain HTTP."""

from __future__ import annotations

import base64
import io
import json
import re
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from PIL import Image

from apps import demo
from apps.demo_parts import texts
from apps.demo_parts.turns import Turns, Visitor
from moveimg import Pipeline
from moveimg.checkpoint import BUNDLED


def picture_of(uri):
    """The picture in a data URI, and the settings in it."""
    image = Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))
    return image, json.loads(image.info["moveimg"])


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
    assert [m["name"] for m in client.predict(api_name="/models")] == ["digits", "gallery", "twin"]


def test_errors_are_messages_without_traces_or_paths(server, client):
    from gradio_client.exceptions import AppError

    for arguments, part in (
        ({"class_name": "ten"}, "unknown class 'ten'"),
        ({"class_name": "gold", "model": "gallery"}, "fits 2 classes"),
        ({"class_name": "1", "num": 1000}, "1..16"),
        ({"class_name": "1", "model": "/etc"}, "expected one of digits, gallery, twin"),
        ({"class_name": "1", "temperature": -1}, "temperature"),
    ):
        with pytest.raises(AppError, match=re.escape(part)) as caught:
            client.predict(**arguments, api_name="/generate")
        assert "Traceback" not in str(caught.value) and str(BUNDLED.parent) not in str(caught.value)
    with pytest.raises(AppError, match="different classes"):
        client.predict(class_name="1", models=["digits", "gallery"], api_name="/compare")
    with pytest.raises(AppError, match="not an image"):
        client.predict(image="data:image/png;base64,aGVsbG8=", api_name="/reconstruct")


def test_the_examples_on_the_page_work(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = texts.API_PYTHON.replace("http://127.0.0.1:7860", server.url)
    exec(compile(code, "the example", "exec"), {"__name__": "__main__"})
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
