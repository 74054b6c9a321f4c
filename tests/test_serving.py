"""The service of `moveimg serve`, over HTTP: one service of two replicas for all tests."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from moveimg.commands import app
from moveimg.pipeline import Pipeline
from tools.load_serving import CLIENT, list_processes, service

needs_ray = pytest.mark.skipif(
    find_spec("ray") is None, reason="Ray Serve is not installed: pip install 'moveimg[serve]'"
)
IMAGES = "/v1/images/generations"


@pytest.fixture(scope="module")
def running():
    # float64: codes are equal to the bit in any batch
    options = ("--replicas", 2, "--threads", 1, "--batch-size", 4, "--max-queued", 12)
    with service("digits", *options, "--dtype", "float64", "--window", 0.05) as process:
        yield process


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.from_pretrained("digits", device="cpu", dtype="float64")


def ask(**body):
    return CLIENT.post(IMAGES, json=body)


def pixels(item) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))))


def events_of(reply) -> list[dict]:
    blocks = [block.split("\n") for block in reply.text.strip().split("\n\n")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in blocks]
    assert [name.removeprefix("event: ") for name, _ in blocks] == [e["type"] for e in events]
    return events


@needs_ray
def test_images_are_those_of_the_pipeline(running, pipeline):
    reply = ask(prompt="3", n=3, seed=5, cfg_scale=3.0, temperature=0.8, size="auto")
    assert reply.status_code == 200
    data = reply.json()["data"]
    assert [item["seed"] for item in data] == [5, 6, 7]
    for item in data:
        image = pipeline.sample(3, seed=item["seed"], cfg_scale=3.0, temperature=0.8)[0]
        assert np.array_equal(pixels(item), np.asarray(image))


@needs_ray
def test_an_image_is_the_same_alone_and_with_others(running):
    settings = [{"cfg_scale": scale} for scale in (0.0, 1.0, 1.5, 4.0)] + [{"top_k": 5}] * 3
    bodies = [{"class": i, "seed": i, **changes} for i, changes in enumerate(settings)]
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = [reply.json() for reply in pool.map(lambda body: ask(**body), bodies)]
    alone = [ask(**body).json() for body in bodies]
    assert [r["data"] for r in together] == [r["data"] for r in alone]
    assert len({r["data"][0]["b64_json"] for r in alone}) == len(bodies)


@needs_ray
def test_without_a_seed_images_differ(running):
    first, second = (ask(**{"class": 3}).json()["data"][0] for _ in range(2))
    assert first["seed"] != second["seed"]


@needs_ray
def test_a_stream_shows_partial_images_and_ends_with_the_whole(running):
    body = {"class": 7, "n": 2, "seed": 1}
    events = events_of(ask(**body, stream=True, partial_images=3))
    for i, whole in enumerate(ask(**body).json()["data"]):
        *partial, last = [event for event in events if event["index"] == i]
        assert last == whole
        assert [e["partial_image_index"] for e in partial] == [0, 1, 2]
        assert len({e["b64_json"] for e in [*partial, last]}) == 4
        top = pixels(partial[-1])[: len(pixels(last)) // 2 - 4]
        assert np.abs(top.astype(int) - pixels(last)[: len(top)]).mean() < 8


@needs_ray
@pytest.mark.parametrize(
    ("body", "status", "value"),
    [
        ({}, 400, "class"),
        ({"class": 3, "prompt": "3"}, 400, "class"),
        ({"class": "unicorn"}, 400, "unicorn"),
        ({"class": 3, "n": 0}, 400, "0"),
        ({"class": 3, "n": 5}, 400, "5"),
        ({"class": 3, "seed": 2**32}, 400, str(2**32)),
        ({"class": 3, "size": "1024x1024"}, 400, "1024x1024"),
        ({"class": 3, "response_format": "url"}, 400, "url"),
        ({"class": 3, "cfg_scale": -1}, 400, "-1"),
        ({"class": 3, "temperature": "hot"}, 400, "hot"),
        ({"class": 3, "quantize": "int8"}, 400, "quantize"),
        ({"class": 3, "self": 1}, 400, "self"),
        ({"class": 3, "model": "dall-e-3"}, 404, "dall-e-3"),
        ({"class": 3, "user": "x" * 70_000}, 413, "65536"),
    ],
)
def test_bad_requests_get_one_line(running, body, status, value):
    reply = ask(**body)
    assert reply.status_code == status
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert value in error["message"] and "\n" not in error["message"]


@needs_ray
def test_other_paths_and_other_text_get_one_line(running):
    assert CLIENT.post(IMAGES, content=b"{").status_code == 400
    assert CLIENT.get("/v1/models").status_code == 404


@needs_ray
def test_too_many_requests_are_refused_and_the_others_answered(running):
    with ThreadPoolExecutor(64) as pool:
        replies = list(pool.map(lambda seed: ask(**{"class": 1, "seed": seed}), range(64)))
    refused = [reply for reply in replies if reply.status_code == 503]
    assert all(int(reply.headers["retry-after"]) > 0 for reply in refused)
    assert refused[0].json()["error"]["type"] == "server_error"
    assert all(r.json()["data"] for r in replies if r.status_code == 200)
    assert {reply.status_code for reply in replies} == {200, 503}


@needs_ray
def test_requests_of_a_killed_replica_are_drawn_by_another(running):
    def visit(seed):
        return ask(**{"class": 4, "n": 4, "seed": seed, "stream": seed % 2 == 0})

    expected = [visit(seed).text for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        replies = [pool.submit(visit, seed) for seed in range(8)]
        time.sleep(0.3)
        os.kill(int(list_processes("ray::ServeRepli")[0].name), signal.SIGKILL)
        texts = [reply.result().text for reply in replies]
    assert [images_in(text) for text in texts] == [images_in(text) for text in expected]
    deadline = time.monotonic() + 120
    while CLIENT.get("/health").json() != {"replicas": {"RUNNING": 2}}:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def images_in(text: str) -> list[str]:
    return [part.split('"')[0] for part in text.split('"b64_json": "')[1:]] or [
        item["b64_json"] for item in json.loads(text)["data"]
    ]


@needs_ray
def test_metrics_are_rays(running):
    assert "# TYPE ray_" in CLIENT.get("/metrics").text


@needs_ray
def test_sigterm_ends_every_process(running):
    assert len(list_processes()) > 4
    running.terminate()
    assert running.wait(60) == 0
    deadline = time.monotonic() + 30
    while list_processes():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("options", "value"),
    [(["--quantize", "int8"], "--quantize"), (["--model", "nowhere"], "nowhere")],
)
def test_the_command_refuses_what_it_cannot_serve(options, value):
    result = CliRunner().invoke(app, ["serve", *options])
    assert result.exit_code == 2
    assert value in result.stderr


def test_without_ray_the_command_names_the_extra(monkeypatch):
    monkeypatch.setattr("moveimg.commands.serve.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["serve"])
    assert result.exit_code == 2
    assert "moveimg[serve]" in result.stderr


@needs_ray
def test_a_batch_ends_when_nobody_waits_for_it(pipeline):
    from moveimg.serve import Generator, Order

    replica = object.__new__(Generator.func_or_class)
    replica.pipeline, replica.size = pipeline, "16x16"
    orders = [Order(label, 0, 1, pipeline.settings(), [1, 2]) for label in (3, 4)]
    shown = []
    for step in replica._draw_group(orders, pipeline.settings()):
        shown.append(step)
        for order in step:
            order.done = True
    assert len(shown) == 2
