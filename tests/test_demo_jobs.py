"""The demo without a server: its requests, its rows of images, its models, its uploads."""

from __future__ import annotations

import asyncio
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from moveimg import Pipeline
from moveimg.checkpoint import BUNDLED
from moveimg.demo import api, jobs, page, server


@pytest.fixture(scope="module")
def models():
    return jobs.Models(["digits"])


def row_of(models, class_name, num=1, **values):
    return jobs.make_row(models, api.Generate(class_name=class_name, num=num, **values))


def draw(models, *rows):
    """Every step of the rows: the share done, and the pixels of the images so far."""
    for share, images in jobs.draw(rows, models, lambda: False):
        yield share, [[np.array(jobs.read_upload(i["png"])) for i in row] for row in images]


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"num": 17}, "num"), ({"num": float("nan")}, "num"), ({"seed": 2**32}, "seed"),
        ({"cfg_scale": 1e9}, "cfg_scale"), ({"temperature": 1e-9}, "temperature"),
        ({"cfg_schedule": "cubic"}, "cfg_sch"), ({"class_name": {"a": 1}}, "class_name"),
        ({"class_name": "x" * 10**7}, "class_name"), ({"colour": 1}, "colour"), ([], "generate"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_bad_values_are_refused_in_one_line(values, name):
    with pytest.raises(ValueError, match=name) as caught:
        api.parse("generate", values)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_images_grow_and_are_those_of_the_library(models):
    (share, ((first, *_),)), *_, (end, (drawn,)) = draw(
        models, row_of(models, "seven", 3, seed=11, cfg_scale=3.0)
    )
    assert 0 < share < end == 1
    assert (first[-2:] == 128).all() and (first[:2] != 128).any()  # codes to come are grey
    expected = Pipeline.from_pretrained("digits").sample([7, 7, 7], cfg_scale=3.0, seed=11)
    assert np.array_equal(drawn, [np.array(image) for image in expected])


def test_rows_share_seeds_where_they_are_compared(models):
    row = row_of(models, "3", 6, seed=40)
    strips = jobs.vary_guidance(row)
    assert [s.settings.cfg_scale for s in strips] == [1.0, 1.75, 2.5, 4.0]  # the model's is 2.5
    assert {(s.seed, s.labels) for s in strips} == {(40, (3,) * 4)}
    *_, (_, (on, off, own)) = draw(models, *jobs.vary_bank(row, 0), row)
    assert np.array_equal(on, own[:4]) and all((a != b).any() for a in on for b in off)
    assert len({row_of(models, "", 16).labels for _ in range(4)}) > 1  # no class: random ones


def test_models_are_named_without_paths_and_one_is_in_memory(tmp_path):
    paths = [tmp_path / "other", tmp_path / "other (2)"]
    for path in paths:
        shutil.copytree(BUNDLED / "digits", path)
    models = jobs.Models(["digits", *map(str, paths), str(paths[0])])
    assert list(models.infos) == ["digits", "other", "other (2)", "other (3)"]
    models.get("digits"), models.get("other")
    assert list(models.loaded) == ["other"]
    (paths[1] / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"other \(2\)") as caught:
        models.get("other (2)")
    assert str(tmp_path) not in str(caught.value)
    (paths[1] / "classes.json").write_text('{"one": 1}')
    with pytest.raises(ValueError, match=r"classes.json"):
        jobs.Models([str(paths[1])])


def test_class_names_cannot_write_html(tmp_path):
    shutil.copytree(BUNDLED / "digits", tmp_path / "bad")
    names = ["<img src=x onerror=alert(1)>", '"{{this}}', "${alert(1)}", *"3456789"]
    (tmp_path / "bad" / "classes.json").write_text(json.dumps(names))
    models = jobs.Models([str(tmp_path / "bad")])
    rows = [row_of(models, str(i)) for i in range(3)]
    *_, (_, images) = jobs.draw(rows, models, lambda: False)
    shown = page.show_gallery(rows, images, True) + page.show_status("<b>")
    assert not any(bad in shown for bad in ("<img src=x", "{{", "${", "<b>"))


def test_the_queue_is_bounded_for_a_tab_and_an_address(monkeypatch):
    async def push(body, request, username):
        event = SimpleNamespace(session_hash=body.session_hash, request=request, username=username)
        queue.event_ids_to_events[len(queue.event_ids_to_events)] = event
        return True, "", "success"

    monkeypatch.setattr(server, "QUEUE", 6)
    queue = SimpleNamespace(push=push, event_ids_to_events={})
    server.limit_visitors(queue)

    def ask(tab, host, username=None):
        request = SimpleNamespace(client=SimpleNamespace(host=host))
        return asyncio.run(queue.push(SimpleNamespace(session_hash=tab), request, username))[0]

    assert [ask("a", "10.0.0.1") for _ in range(3)] == [True, True, False]
    assert [ask(tab, "10.0.0.1") for tab in "bc"] == [True, False]  # half of 6
    assert ask("d", "10.0.0.2") and ask("e", "10.0.0.1", username="me")


@pytest.mark.parametrize("data", ["", "data:text/plain;base64,aGVsbG8=", "not base64!", "bomb"])
def test_a_bad_upload_is_refused(data):
    if data == "bomb":
        data = jobs.image_uri(Image.new("1", (9000, 8000)), {})
    assert len(data) < api.MAX_URI
    with pytest.raises(ValueError, match=r"image|base64"):
        jobs.read_upload(data)
