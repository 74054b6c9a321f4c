"""The demo as programs meet it: its command, its guard, the gradio client and plain HTTP."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from PIL import Image
from typer.testing import CliRunner

from moveimg import Pipeline
from moveimg.checkpoint import BUNDLED
from moveimg.commands import app
from moveimg.demo.jobs import image_uri
from moveimg.demo.server import MAX_BODY
from tests.conftest import serving

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


def test_endpoints_answer_as_the_library_does(client):
    pipeline = Pipeline.from_pretrained("digits")
    values = {"class_name": "seven", "seed": 3, "cfg_scale": 2.0, "api_name": "/generate"}
    images = client.predict(**values, num=2)["images"]
    expected = pipeline.sample(["seven"] * 2, seed=3, cfg_scale=2.0)
    assert pixels_of(images) == pixels_of(expected)
    assert [image["seed"] for image in images] == [3, 4]
    assert image_of(images[0]["png"])[1]["cfg_scale"] == images[0]["cfg_scale"] == 2.0
    bare = client.predict(**values, bank=False)["images"]
    assert pixels_of(bare) != pixels_of(expected[:1])
    answer = client.predict(image=images[0]["png"], api_name="/reconstruct")
    assert 0 < answer["mse"] < 1 and len(answer["codes"]) == 8
    assert pixels_of([answer]) == pixels_of(pipeline.decode(pipeline.encode(expected[:1])))
    listed = client.predict(api_name="/models")
    assert [m["name"] for m in listed] == ["digits", "gallery"]
    assert listed[0]["classes"] == pipeline.class_names
    assert listed[1]["settings"]["cfg_scale"] == 1.0  # its sampling.json is {}


def test_edit_and_score_answer_as_the_library_does(client):
    pipeline = Pipeline.from_pretrained("digits")
    image = pipeline.sample("seven", seed=3)[0]
    mask = Image.new("L", image.size)
    mask.paste(255, (8, 8, 24, 24))
    uri, hole = image_uri(image, {}), image_uri(mask, {})
    for area, given in (("left", "left"), (hole, mask)):
        values = {"class_name": "one", "num": 2, "seed": 5, "passes": 1, "temperature": 0.9}
        images = client.predict(image=uri, hole=area, **values, api_name="/edit")["images"]
        wanted = pipeline.edit(image, "one", hole=given, num=2, seed=5, passes=1, temperature=0.9)
        assert pixels_of(images) == pixels_of(wanted)
        assert images[1]["hole"] == ("left" if area == "left" else "mask")
    answer = client.predict(image=uri, api_name="/score")
    ((name, share), *_) = pipeline.classify([image])[0]
    likelihood = pipeline.log_likelihood([image], name)
    assert len(answer["classes"]) == 10 and answer["classes"][0]["name"] == name
    assert answer["classes"][0]["probability"] == pytest.approx(share)
    assert answer["bits_per_pixel"] == pytest.approx(likelihood.bits_per_pixel.item(), rel=1e-4)
    nats = [value for line in answer["nats"] for value in line]
    assert nats == pytest.approx((-likelihood.log_probs[0]).tolist(), abs=1e-3)


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
        (f"{CALL}/generate", {"num": "many"}, 422),
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


def test_the_examples_of_the_api_work(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = (ROOT / "docs" / "demo.md").read_text().partition("## The API")[2]
    for code in re.findall(r"```python\n(.*?)```", texts, re.DOTALL):
        names = {"__name__": "__main__"}
        exec(code.replace("http://127.0.0.1:7860", server.url), names)
    assert len(names["edited"]["images"]) == 2 and names["scored"]["nats"][7][7] >= 0
    expected = Pipeline.from_pretrained("digits").sample(["seven"] * 2, seed=0)[0]
    with Image.open(tmp_path / "seed0.png") as image:
        assert image.tobytes() == expected.tobytes()
    # what the shell example does, without needing curl
    body = json.loads(re.search(r"-d '(.*?)'", texts)[1])
    event = httpx.post(f"{server.url}{CALL}/generate", json=body).json()["event_id"]
    reply = httpx.get(f"{server.url}/gradio_api/call/generate/{event}", timeout=120).text
    assert "event: complete" in reply
    answer = json.loads(reply.split("data: ")[-1])[0]
    assert image_of(answer["images"][0]["png"])[0].tobytes() == expected.tobytes()


def test_a_job_ends_when_its_listener_hangs_up(server, slow_model):
    body = {"class_name": "7", "num": 1}
    event = httpx.post(f"{server.url}{CALL}/generate", json=body).json()["event_id"]
    wait_until(lambda: slow_model)
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(f"{server.url}/gradio_api/call/generate/{event}", timeout=0.4)
    wait_until(lambda: not server.jobs)
    assert len(slow_model) < 50  # of 64


def test_nothing_of_the_servers_disk_can_be_read(server):
    for path in ("/gradio_api/file=/etc/passwd", "/gradio_api/file=pyproject.toml",
                 "/file=/etc/passwd", "/static/../../pyproject.toml", "/static/%2e%2e/%2e%2e/x",
                 "/assets/%2e%2e/%2e%2e/%2e%2e/package.json", "/monitoring/summary"):  # fmt: skip
        assert httpx.get(server.url + path).status_code in (403, 404), path
    for content in (b"x" * (MAX_BODY + 1), iter([b"x" * (MAX_BODY // 2 + 1)] * 2)):
        answer = httpx.post(f"{server.url}/gradio_api/queue/join", content=content)
        assert answer.status_code == 413
    assert str(BUNDLED.parents[1]) not in httpx.get(f"{server.url}/config").text


def test_a_password_is_asked_for_and_unknown_hosts_are_refused(server):
    options = {"auth": [("me", "secret")], "allow_hosts": ["demo.example"], "trust_proxy": True}
    with (
        serving(server.models, **options) as guarded,
        httpx.Client(base_url=guarded.url) as visitor,
    ):
        assert visitor.get("/config").status_code == 401
        assert visitor.post(f"{CALL}/models", json={}).status_code == 401

        def login(password, address):
            form = {"username": "me", "password": password}
            headers = {"x-forwarded-for": f"1.2.3.4, {address}"}
            return visitor.post("/login", data=form, headers=headers).status_code

        assert [login("guess", "9.9.9.9"), login("secret", "9.9.9.9")] == [400, 429]
        assert login("secret", "8.8.8.8") == 200  # another address need not wait
        assert visitor.get("/config").status_code == 200
        for host, status in (
            ("evil.example", 400), ("demo.example", 200), ("localhost:1", 200), ("", 400),
            ("[::1]:80", 200), ("127.0.0.1.evil.example", 400), ("10.0.0.1", 400),
        ):  # fmt: skip
            assert visitor.get("/config", headers={"host": host}).status_code == status, host


def test_the_command_serves_behind_a_proxy_setting_and_ends_at_sigterm():
    process = subprocess.Popen(
        [sys.executable, "apps/demo.py", "--port", "0"], text=True,
        env=os.environ | {"http_proxy": "http://127.0.0.1:9"}, stdout=subprocess.PIPE,
    )  # fmt: skip
    url = process.stdout.readline().split()[-1]
    assert httpx.get(url, trust_env=False, timeout=60).status_code == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


@pytest.mark.parametrize("reason", ["model", "weights", "port", "dtype", "auth"])
def test_the_command_names_what_it_cannot_serve(reason, tmp_path, monkeypatch):
    shutil.copytree(BUNDLED / "digits", tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"damaged")
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        options, value = {
            "model": (["--model", str(tmp_path)], "config.json"),
            "weights": (["--port", "0", "--model", str(tmp_path / "damaged")], "damaged"),
            "port": (["--port", port], port),
            "dtype": (["--dtype", "int8"], "int8"),
            "auth": (["--auth", "me:"], "USER:PASSWORD"),
        }[reason]
        result = CliRunner().invoke(app, ["demo", *options])
    assert result.exit_code == 2 and value in result.stderr and "Traceback" not in result.stderr
