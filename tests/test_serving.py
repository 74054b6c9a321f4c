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

from moveimg.pipeline import Pipeline
from tests.test_cli import refused
from tools.load_serving import CLIENT, list_processes, service

IMAGES = "/v1/images/generations"


@pytest.fixture(scope="module")
def running():
    if find_spec("ray") is None:
        pytest.skip("Ray Serve is not installed: pip install 'moveimg[serve]'")
    # float64: codes are equal to the bit in any batch
    options = ("--replicas", 2, "--threads", 1, "--batch-size", 4, "--max-queued", 12)
    with service("digits", *options, "--dtype", "float64", "--window", 0.05) as process:
        yield process


def ask(**body):
    return CLIENT.post(IMAGES, json=body)


def ask_together(bodies) -> list:
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda body: ask(**body), bodies))


def pixels(item) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))))


def events_of(reply) -> list[dict]:
    blocks = [block.split("\n") for block in reply.text.strip().split("\n\n")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in blocks]
    assert [name.removeprefix("event: ") for name, _ in blocks] == [e["type"] for e in events]
    return events


def test_images_are_those_of_the_pipeline_alone_and_with_others(running):
    pipeline = Pipeline.from_pretrained("digits", device="cpu", dtype="float64")
    settings = [{"cfg_scale": scale} for scale in (0.0, 1.0, 4.0)] + [{"top_k": 5}] * 2
    bodies = [{"prompt": str(i), "seed": i, **changes} for i, changes in enumerate(settings)]
    alone = ask(**{"class": 7, "n": 2, "seed": 5, "temperature": 0.8, "size": "auto"})
    drawn = [item for reply in (*ask_together(bodies), alone) for item in reply.json()["data"]]
    cases = [(body | {"prompt": i}) for i, body in enumerate(bodies)]
    cases += [{"prompt": 7, "seed": seed, "temperature": 0.8} for seed in (5, 6)]
    for item, case in zip(drawn, cases, strict=True):
        expected = pipeline.sample(case.pop("prompt"), **case)[0]
        assert item["seed"] == case["seed"]
        assert np.array_equal(pixels(item), np.asarray(expected))
    random = ask_together([{"class": 3}] * 2)
    assert len({reply.json()["data"][0]["seed"] for reply in random}) == 2


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
        (b"{", 400, "EOF"),
    ],
)
def test_bad_requests_get_one_line(running, body, status, value):
    reply = CLIENT.post(IMAGES, content=body if isinstance(body, bytes) else json.dumps(body))
    assert reply.status_code == status
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert value in error["message"] and "\n" not in error["message"]


def test_other_paths(running):
    assert "# TYPE ray_" in CLIENT.get("/metrics").text
    assert CLIENT.get("/health").json() == {"replicas": {"RUNNING": 2}}
    assert CLIENT.get("/v1/models").status_code == 404


def test_too_many_requests_are_refused_and_the_others_answered(running):
    replies = ask_together([{"class": 1, "seed": seed} for seed in range(64)])
    assert {reply.status_code for reply in replies} == {200, 503}
    assert all(reply.json()["data"] for reply in replies if reply.status_code == 200)
    for reply in replies:
        if reply.status_code == 503:
            assert int(reply.headers["retry-after"]) > 0
            assert reply.json()["error"]["type"] == "server_error"


def test_requests_of_a_killed_replica_are_drawn_by_another(running):
    def visit(seed):
        reply = ask(**{"class": 4, "n": 4, "seed": seed, "stream": seed % 2 == 0})
        events = events_of(reply) if seed % 2 == 0 else reply.json()["data"]
        return [event["b64_json"] for event in events]

    expected = [visit(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        replies = [pool.submit(visit, seed) for seed in range(6)]
        time.sleep(0.3)
        os.kill(int(list_processes("ray::ServeRepli")[0].name), signal.SIGKILL)
        assert [reply.result() for reply in replies] == expected


def test_sigterm_ends_every_process(running):
    assert len(list_processes()) > 4
    running.terminate()
    assert running.wait(60) == 0
    deadline = time.monotonic() + 30
    while list_processes():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_command_names_what_it_cannot_serve(monkeypatch):
    assert "--quantize" in refused("serve", "--quantize", "int8")
    monkeypatch.setattr("moveimg.commands.serve.find_spec", lambda name: None)
    assert "moveimg[serve]" in refused("serve")
