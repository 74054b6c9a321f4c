"""The demo's command, its guard, and its API by the gradio client and by plain HTTP."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from PIL import Image

from moveimg import Pipeline
from moveimg.checkpoint import BUNDLED
from moveimg.demo.jobs import image_uri
from moveimg.demo.server import MAX_BODY
from tests.conftest import serving
from tests.test_cli import refused

ROOT = Path(__file__).parents[1]
CALL = "/gradio_api/call/v2"
PIXEL = image_uri(Image.new("RGB", (1, 1)), {})


def image_of(uri):
    """The image in a data URI, and the settings in it."""
    image = Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))
    return image, json.loads(image.info["moveimg"])


def pixels_of(images):
    """The pixels of an endpoint's images, or of the library's."""
    found = [image_of(i["png"])[0] if isinstance(i, dict) else i for i in images]
    return [image.tobytes() for image in found]


@pytest.fixture(scope="module")
def client(server):
    from gradio_client import Client

    return Client(server.url, verbose=False)


def wait_until(condition):
    for _ in range(400):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("waited for 20 s")


def test_the_examples_of_the_api_answer_as_the_library_does(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = (ROOT / "docs" / "demo.md").read_text().partition("## The API")[2]
    (code,) = re.findall(r"```python\n(.*?)```", texts, re.DOTALL)
    exec(code.replace("http://127.0.0.1:7860", server.url), names := {"__name__": "__main__"})
    pipeline = Pipeline.from_pretrained("digits")
    images = pipeline.sample(["seven"] * 2, seed=0)
    assert pixels_of(names["result"]["images"]) == pixels_of(images)
    with Image.open(tmp_path / "seed0.png") as image:
        assert image.tobytes() == images[0].tobytes()
    edited, scored = names["edited"]["images"], names["scored"]
    wanted = pipeline.edit(images[0], "seven", hole="bottom", num=2, seed=edited[0]["seed"])
    assert pixels_of(edited) == pixels_of(wanted) and edited[1]["hole"] == "bottom"
    ((name, share), *_) = pipeline.classify(images[:1])[0]
    likelihood = pipeline.log_likelihood(images[:1], name)
    assert len(scored["classes"]) == 10 and scored["classes"][0]["name"] == name
    assert scored["classes"][0]["probability"] == pytest.approx(share)
    assert scored["bits_per_pixel"] == pytest.approx(likelihood.bits_per_pixel.item(), rel=1e-4)
    nats = [value for line in scored["nats"] for value in line]
    assert nats == pytest.approx((-likelihood.log_probs[0]).tolist(), abs=1e-3)
    # what the shell example does, without needing curl
    body = json.loads(re.search(r"-d '(.*?)'", texts)[1])
    event = httpx.post(f"{server.url}{CALL}/generate", json=body).json()["event_id"]
    reply = httpx.get(f"{server.url}/gradio_api/call/generate/{event}", timeout=120).text
    assert "event: complete" in reply
    answer = json.loads(reply.split("data: ")[-1])[0]
    assert pixels_of(answer["images"]) == pixels_of(images)


def test_settings_masks_and_the_other_endpoints(client):
    pipeline = Pipeline.from_pretrained("digits")
    settings = {"seed": 5, "temperature": 0.9}
    (shown,) = client.predict(class_name="one", **settings, api_name="/generate")["images"]
    (image,) = pipeline.sample("one", **settings)
    assert pixels_of([shown]) == pixels_of([image])
    assert image_of(shown["png"])[1]["temperature"] == shown["temperature"] == 0.9
    bare = client.predict(class_name="one", **settings, bank=False, api_name="/generate")
    assert pixels_of(bare["images"]) != pixels_of([image])
    mask = Image.new("L", image.size)
    mask.paste(255, (8, 8, 24, 24))
    settings |= {"num": 2, "passes": 1}
    given = {"image": shown["png"], "hole": image_uri(mask, {}), "class_name": "one"}
    edited = client.predict(**given, **settings, api_name="/edit")["images"]
    wanted = pipeline.edit(image, "one", hole=mask, **settings)
    assert pixels_of(edited) == pixels_of(wanted) and edited[1]["hole"] == "mask"
    answer = client.predict(image=shown["png"], api_name="/reconstruct")
    assert 0 < answer["mse"] < 1 and len(answer["codes"]) == 8
    assert pixels_of([answer]) == pixels_of(pipeline.decode(pipeline.encode([image])))
    listed = client.predict(api_name="/models")
    assert [m["name"] for m in listed] == ["digits", "gallery"]
    assert listed[0]["classes"] == pipeline.class_names
    assert listed[1]["settings"]["cfg_scale"] == 1.0  # its sampling.json is {}


@pytest.mark.parametrize(
    ("endpoint", "values", "part"),
    [
        ("generate", {"class_name": "ten"}, "'ten'"),
        ("generate", {"class_name": "gold", "model": "gallery"}, "'gold' fits 2"),
        ("edit", {"class_name": "1", "image": PIXEL, "temperature": 0, "passes": 1}, "temperature"),
        ("edit", {"class_name": "1", "image": PIXEL, "hole": PIXEL}, "masked"),
        ("score", {"image": "data:image/png;base64,aGVsbG8="}, "upload"),
    ],
)
def test_errors_are_messages_without_traces_or_paths(client, endpoint, values, part):
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError, match=re.escape(part)) as caught:
        client.predict(**values, api_name=f"/{endpoint}")
    assert "Traceback" not in str(caught.value) and str(BUNDLED.parent) not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (f"{CALL}/generate", {"class_name": "x" * 10_000_000}, 422),
        (f"{CALL}/score", {}, 422),
        (f"{CALL}/edit", {"class_name": "1", "image": PIXEL, "hole": "middle"}, 422),
        (f"{CALL}/nothing", {}, 404),
        ("/gradio_api/run/generate", {}, 404),
        ("/gradio_api/upload", {}, 404),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_values_over_http_get_one_line(server, path, body, status):
    answer = httpx.post(server.url + path, json=body, timeout=60)
    assert answer.status_code == status
    assert answer.text.count("\n") <= 1 and len(answer.text) < 400


def test_a_job_ends_when_its_listener_hangs_up(server, slow_model):
    body = {"class_name": "7", "num": 1}
    event = httpx.post(f"{server.url}{CALL}/generate", json=body).json()["event_id"]
    wait_until(lambda: slow_model)
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(f"{server.url}/gradio_api/call/generate/{event}", timeout=0.4)
    wait_until(lambda: not server.jobs)
    assert len(slow_model) < 50  # of 64


def test_nothing_of_the_servers_disk_can_be_read(server):
    for path in (
        "/gradio_api/file=/etc/passwd", "/gradio_api/file=pyproject.toml", "/file=/etc/passwd",
        "/static/../../pyproject.toml", "/static/%2e%2e/%2e%2e/x", "/monitoring/summary",
        "/assets/%2e%2e/%2e%2e/%2e%2e/package.json",
    ):  # fmt: skip
        assert httpx.get(server.url + path).status_code in (403, 404), path
    for content in (b"x" * (MAX_BODY + 1), iter([b"x" * (MAX_BODY // 2 + 1)] * 2)):
        answer = httpx.post(f"{server.url}/gradio_api/queue/join", content=content)
        assert answer.status_code == 413
    assert str(BUNDLED.parents[1]) not in httpx.get(f"{server.url}/config").text


def test_a_password_is_asked_for_and_unknown_hosts_are_refused(server):
    def login(password, address):
        form = {"username": "me", "password": password}
        headers = {"x-forwarded-for": f"1.2.3.4, {address}"}
        return visitor.post("/login", data=form, headers=headers).status_code

    options = {"auth": [("me", "secret")], "allow_hosts": ["demo.example"], "trust_proxy": True}
    with (
        serving(server.models, **options) as guarded,
        httpx.Client(base_url=guarded.url) as visitor,
    ):
        assert visitor.get("/config").status_code == 401
        assert visitor.post(f"{CALL}/models", json={}).status_code == 401
        assert [login("guess", "9.9.9.9"), login("secret", "9.9.9.9")] == [400, 429]
        assert login("secret", "8.8.8.8") == 200  # another address need not wait
        assert visitor.get("/config").status_code == 200
        for host, status in (
            ("evil.example", 400), ("demo.example", 200), ("localhost:1", 200), ("", 400),
            ("[::1]:80", 200), ("127.0.0.1.evil.example", 400), ("10.0.0.1", 400),
        ):  # fmt: skip
            assert visitor.get("/config", headers={"host": host}).status_code == status, host


def test_the_command_serves_behind_a_proxy_setting_and_ends_at_sigterm_under_an_open_page():
    process = subprocess.Popen(
        [sys.executable, "apps/demo.py", "--port", "0"], text=True, cwd=ROOT,
        env=os.environ | {"http_proxy": "http://127.0.0.1:9"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    url = process.stdout.readline().split()[-1]
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as visitor:
        assert visitor.get("/").status_code == 200
        with visitor.stream("GET", "/gradio_api/heartbeat/page"):
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=20)
    assert process.returncode == 0 and "Traceback" not in said


def test_the_command_names_what_it_cannot_serve(tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    assert "config.json" in refused("demo", "--model", tmp_path)
    assert "int8" in refused("demo", "--dtype", "int8")
    assert "USER:PASSWORD" in refused("demo", "--auth", "me:")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert port in refused("demo", "--port", port)
