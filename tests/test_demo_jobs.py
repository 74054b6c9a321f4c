"""The demo without a server: its requests, its rows of images, its models, its uploads."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from moveimg import Pipeline
from moveimg.checkpoint import BUNDLED
from moveimg.demo import html, jobs, page
from moveimg.demo.requests import MAX_UPLOAD, Edit, Generate, parse_call


@pytest.fixture(scope="module")
def models():
    return jobs.Models(["digits"])


def row_of(models, class_name, num=1, **values):
    return jobs.make_row(models, Generate(class_name=class_name, num=num, **values))


def draw(rows, models):
    """The images of all rows, as bytes."""
    *_, (share, images) = jobs.draw(rows, models, lambda: False)
    assert share == 1
    return [[image.tobytes() for image in row] for row in images]


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"num": 0}, "num"), ({"num": 17}, "num"), ({"num": 2.5}, "num"), ({"num": "x"}, "num"),
        ({"num": float("nan")}, "num"), ({"seed": -1}, "seed"), ({"seed": 2**32}, "seed"),
        ({"seed": "x" * 50}, "seed"), ({"seed": [1]}, "seed"), ({"cfg_scale": 1e9}, "cfg_scale"),
        ({"temperature": float("nan")}, "temperature"), ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"), ({"top_k": -1}, "top_k"), ({"cfg_schedule": "cubic"}, "cfg_sch"),
        ({"class_name": {"a": 1}}, "class_name"), ({"class_name": "x" * 10**7}, "class_name"),
        ({"bank": "perhaps"}, "bank"), ({"colour": 1}, "colour"),
        ([], "generate"), ("text", "generate"), (None, "generate"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_bad_values_are_refused_in_one_line(values, name):
    with pytest.raises(ValueError, match=name) as caught:
        parse_call("generate", values)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_images_grow_and_are_those_of_the_library(models):
    row = row_of(models, "seven", 3, seed=11, cfg_scale=3.0)
    frames = [(share, images[0]) for share, images in jobs.draw([row], models, lambda: False)]
    shares = [share for share, _ in frames]
    assert len(shares) >= 2 and shares == sorted(set(shares)) and 0 < shares[0] < shares[-1] == 1
    _, images = next(jobs.draw([row], models, lambda: False))
    first = np.asarray(images[0][0])
    assert (first[-2:] == 128).all() and (first[:2] != 128).any()  # codes to come are grey
    expected = Pipeline.from_pretrained("digits").sample([7, 7, 7], cfg_scale=3.0, seed=11)
    assert draw([row], models) == [[image.tobytes() for image in expected]]


def test_a_job_ends_after_the_next_code_or_block(models):
    image = jobs.image_uri(models.get().sample("two", seed=1)[0], {})
    edit = Edit(class_name="two", image=image, hole="top", passes=20)
    for row, most in ((row_of(models, 7), 64), (jobs.make_row(models, edit), 64 + 20 * 8)):
        calls = []
        with pytest.raises(ValueError, match="stopped"):
            list(jobs.draw([row], models, lambda: calls.append(1) or len(calls) == most - 1))  # noqa: B023
        assert len(calls) == most - 1
    with pytest.raises(ValueError, match="stopped"):
        list(jobs.score(image, "", models, lambda: True))


def test_rows_share_seeds_where_they_are_compared(models):
    row = row_of(models, "3", 6, seed=40)
    strips = jobs.vary_guidance(row)
    assert [s.settings.cfg_scale for s in strips] == [1.0, 1.75, 2.5, 4.0]  # the model's is 2.5
    assert {(s.seed, s.labels) for s in strips} == {(40, (3,) * 4)}
    on, off = draw(jobs.turn_bank_off(row), models)
    assert on == draw([row], models)[0][:4] and not set(on) & set(off)
    assert len({row_of(models, "", 16).labels for _ in range(4)}) > 1  # no class: random ones


def test_models_are_named_without_paths_and_few_are_in_memory(tmp_path):
    shutil.copytree(BUNDLED / "digits", tmp_path / "other")
    models = jobs.Models(["digits", str(tmp_path / "other"), str(tmp_path / "other")], keep=1)
    assert list(models.infos) == ["digits", "other", "other (2)"]
    models.get("digits"), models.get("other")
    assert list(models.pipelines) == ["other"]
    (tmp_path / "other" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="other") as caught:
        jobs.Models([str(tmp_path / "other")]).get("other")
    assert str(tmp_path) not in str(caught.value)
    for name, damage in (("classes", '["one"]'), ("sampling", "[]"), ("config", "{}")):
        (tmp_path / "other" / f"{name}.json").write_text(damage)
        with pytest.raises(ValueError, match=f"{name}.json"):
            jobs.Models([str(tmp_path / "other")])
        shutil.copy(BUNDLED / "digits" / f"{name}.json", tmp_path / "other")
    config = json.loads((BUNDLED / "digits" / "config.json").read_text())
    config["model"]["memory"] = {"kind": "none"}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="other"):  # it has no bank to turn off
        jobs.Models([str(tmp_path / "other")]).get("other", bank=False)


def test_class_names_cannot_write_html(tmp_path):
    folder = tmp_path / "bad"
    shutil.copytree(BUNDLED / "digits", folder)
    names = ["<img src=x onerror=alert(1)>", '"{{this}}', "${alert(1)}", *"3456789"]
    (folder / "classes.json").write_text(json.dumps(names))
    models = jobs.Models([str(folder)])
    rows = [row_of(models, str(i)) for i in range(3)]
    shown = html.gallery(rows, [[Image.new("RGB", (32, 32))]] * 3, models, True)
    shown += html.status("<b>")
    assert not any(bad in shown for bad in ("<img src=x", "{{", "${", "<b>"))


def test_the_queue_is_bounded_for_a_tab_and_an_address():
    def visitor(host):
        return SimpleNamespace(client=SimpleNamespace(host=host))

    async def push(body, request, username):
        name = f"{len(queue.event_ids_to_events)}"
        queue.event_ids_to_events[name] = SimpleNamespace(
            concurrency_id="job", session_hash=body.session_hash, request=request, username=username
        )
        return True, name, "success"

    kinds = {0: SimpleNamespace(concurrency_id="job"), 1: SimpleNamespace(concurrency_id="other")}
    queue = SimpleNamespace(
        push=push, max_size=6, event_ids_to_events={}, blocks=SimpleNamespace(fns=kinds)
    )
    page.limit_visitors(queue, per_visitor=2)

    def ask(tab, host, kind=0, username=None):
        body = SimpleNamespace(session_hash=tab, fn_index=kind)
        return asyncio.run(queue.push(body, visitor(host), username))[0]

    assert [ask("a", "10.0.0.1") for _ in range(3)] == [True, True, False]
    assert [ask(tab, "10.0.0.1") for tab in "bc"] == [True, False]  # half of 6
    assert ask("d", "10.0.0.2") and ask("a", "10.0.0.1", kind=1)
    assert ask("e", "10.0.0.1", username="me")


def as_upload(image, kind="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


@pytest.mark.parametrize(
    ("data", "value"),
    [
        ("", "PNG"),
        ("data:text/plain;base64,aGVsbG8=", "PNG"),
        ("not base64!", "PNG"),
        ("A" * (MAX_UPLOAD * 4 // 3 + 100), "8 MB"),
        (as_upload(Image.new("1", (8000, 6000))), "8000 x 6000"),
        (as_upload(Image.new("RGB", (64, 64)))[:-80], "PNG"),
        ("data:image/svg+xml;base64," + base64.b64encode(b"<svg/>").decode(), "PNG"),
    ],
    ids=range(7),
)
def test_a_bad_upload_is_refused_in_words(data, value):
    with pytest.raises(ValueError, match=value):
        jobs.read_upload(data)
