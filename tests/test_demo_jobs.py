"""The demo without a server: its queue, its rows of images, its maps, its uploads."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import shutil
import threading
import zipfile
from contextlib import aclosing

import numpy as np
import pytest
import torch
from PIL import Image

from moveimg import Pipeline
from moveimg.checkpoint import BUNDLED
from moveimg.demo import analysis, html, jobs, uploads
from moveimg.demo.handlers import Handlers
from moveimg.demo.models import Models
from moveimg.demo.queue import JobQueue, QueueFullError, Visitor, Waiting, run_in_turn
from moveimg.demo.requests import MAX_UPLOAD, Edit, Generate, parse_call

ANN, BOB = Visitor("ann", "10.0.0.1"), Visitor("bob", "10.0.0.2")


@pytest.fixture(scope="module")
def models():
    return Models(["digits"])


def row_of(models, class_name, num=1, **values):
    return jobs.make_row(models, Generate(class_name=class_name, num=num, **values))


def finish(rows, models):
    """The last frame of a drawing that nobody stops."""
    *_, frame = jobs.draw(rows, models, threading.Event())
    assert frame.ended == "done"
    return frame


# --- the queue -------------------------------------------------------------------------------


def test_a_second_job_of_one_visitor_comes_after_every_first_job():
    queue = JobQueue()
    first, second, other = queue.enter(ANN), queue.enter(ANN), queue.enter(BOB)
    assert [queue.ahead(t) for t in (first, other, second)] == [0, 1, 2]
    queue.leave(first)
    assert queue.ahead(second) == 0  # now its visitor's first, and earlier than Bob's
    late = queue.enter(ANN)
    assert (queue.ahead(second), queue.ahead(other), queue.ahead(late)) == (0, 1, 2)


def test_the_queue_is_bounded_for_a_visitor_an_address_and_all():
    queue = JobQueue(length=3, per_visitor=2, per_address=3)
    for visitor in (ANN, ANN, Visitor("ann's other tab", ANN.address)):
        queue.enter(visitor)
    for visitor, limit in ((ANN, "2"), (Visitor("a third tab", ANN.address), "3"), (BOB, "3")):
        with pytest.raises(QueueFullError, match=limit):
            queue.enter(visitor)


def test_only_the_visitor_at_the_same_address_can_stop_a_job():
    queue = JobQueue()
    ticket = queue.enter(ANN)
    assert queue.stop(Visitor("ann", "10.9.9.9")) == 0 and not ticket.stop.is_set()
    assert queue.stop(ANN) == 1 and ticket.stop.is_set()


def test_jobs_run_one_at_a_time_and_the_turn_comes_back_after_errors():
    queue, running, most = JobQueue(), 0, 0

    def job(stop):
        nonlocal running, most
        running += 1
        most = max(most, running)
        yield "step"
        running -= 1
        raise ValueError("bad")

    async def visit(name):
        items = []
        with pytest.raises(ValueError, match="bad"):
            async for item in run_in_turn(queue, Visitor(name, name), job):
                items.append(item)
        return items

    async def all_at_once():
        return await asyncio.gather(*(visit(str(i)) for i in range(4)))

    seen = asyncio.run(all_at_once())
    assert most == 1 and len(queue) == 0
    assert all(items[-1] == "step" for items in seen)
    assert any(isinstance(item, Waiting) for items in seen for item in items)


@pytest.mark.parametrize("reason", ["leaves", "stops", "gone", "cancelled"])
def test_a_job_ends_within_a_step(reason):
    queue, steps = JobQueue(), []

    def job(stop):
        while not stop.is_set():
            steps.append(1)
            yield len(steps)

    async def read():
        async with aclosing(
            run_in_turn(queue, ANN, job, lambda: reason == "gone" and len(steps) >= 3)
        ) as items:
            async for item in items:
                if item == 3 and reason == "leaves":
                    break
                if item == 3 and reason == "stops":
                    queue.stop(ANN)

    async def cancel():
        task = asyncio.create_task(read())
        while len(steps) < 3:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        count = len(steps)
        await asyncio.sleep(0.05)
        assert len(steps) == count

    asyncio.run(cancel() if reason == "cancelled" else read())
    assert len(queue) == 0
    if reason != "cancelled":
        assert len(steps) == 3


def test_cancelling_keeps_the_turn_until_the_thread_is_done():
    queue, begun, release = JobQueue(), threading.Event(), threading.Event()

    def job(stop):
        begun.set()
        release.wait(10)
        yield stop.is_set()

    async def read():
        async for _ in run_in_turn(queue, ANN, job):
            pass

    async def cancel():
        task = asyncio.create_task(read())
        await asyncio.to_thread(begun.wait, 10)
        task.cancel()
        await asyncio.sleep(0.05)
        assert len(queue) == 1  # a thread computes: nobody else may
        release.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert len(queue) == 0


# --- requests and rows -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"num": 0}, "num"), ({"num": 17}, "num"), ({"num": 2.5}, "num"), ({"num": "x"}, "num"),
        ({"num": float("nan")}, "num"), ({"seed": -1}, "seed"), ({"seed": 2**32}, "seed"),
        ({"seed": "x" * 50}, "seed"), ({"seed": [1]}, "seed"), ({"cfg_scale": 1e9}, "cfg_scale"),
        ({"temperature": float("nan")}, "temperature"), ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"), ({"top_k": -1}, "top_k"), ({"cfg_schedule": "cubic"}, "cfg_sch"),
        ({"class_name": {"a": 1}}, "class_name"), ({"class_name": "x" * 10**7}, "class_name"),
        ({"bank": "perhaps"}, "bank"), ({"colour": 1}, "colour"), ({"data": [1] * 50}, "generate"),
        ([], "generate"), ("text", "generate"), (None, "generate"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_bad_values_are_refused_in_one_line(values, name):
    with pytest.raises(ValueError, match=name) as caught:
        parse_call("generate", values)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_rows_that_a_browser_sends_back_are_checked(models):
    row = finish([row_of(models, "five", 2, seed=3)], models).rows[0]
    plain = json.loads(json.dumps([row.model_dump(mode="json")]))
    assert jobs.read_rows(plain, models) == [row]
    codes = plain[0]["codes"]
    for bad in (
        {"model": "elsewhere"}, {"labels": [99, 1]}, {"labels": []}, {"labels": [1] * 40},
        {"codes": codes[:1]}, {"codes": [codes[0][:-1], codes[1]]}, {"seed": -1}, {"more": 1},
        {"codes": [[10**9] * 64] * 2}, {"codes": "x"}, {"settings": {"top_p": 7}},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"."):
            jobs.read_rows([plain[0] | bad], models)
    for bad in (None, [], "rows", plain * 7, [None]):
        with pytest.raises(ValueError, match=r"."):
            jobs.read_rows(bad, models)


def test_images_grow_and_are_those_of_the_library(models):
    row = row_of(models, "seven", 3, seed=11, cfg_scale=3.0)
    frames = [f for f in jobs.draw([row], models, threading.Event()) if f is not None]
    assert len(frames) >= 2 and 0 < frames[0].done < frames[0].total == 3 * 64
    assert [f.ended for f in frames] == [""] * (len(frames) - 1) + ["done"]
    first = np.asarray(frames[0].images[0][0])
    assert (first[-2:] == 128).all() and (first[:2] != 128).any()  # codes to come are grey
    expected = Pipeline.from_pretrained("digits").sample([7, 7, 7], cfg_scale=3.0, seed=11)
    assert [i.tobytes() for i in frames[-1].images[0]] == [i.tobytes() for i in expected]
    (decoded,) = jobs.decode_rows(frames[-1].rows, models)
    assert [i.tobytes() for i in decoded] == [i.tobytes() for i in expected]


def test_an_edit_stops_between_the_blocks_of_a_pass(models):
    image, stop = html.image_uri(models.get().sample("two", seed=1)[0], {}), threading.Event()
    values = {"class_name": "two", "image": image, "hole": "top", "passes": 20, "num": 2}
    work = jobs.draw([jobs.make_edit(models, Edit(**values))], models, stop)
    for frame in work:
        if frame is not None and frame.done > 2 * 64:
            break
    stop.set()
    frame = next(f for f in work if f is not None)
    assert frame.ended == "stopped" and frame.done < frame.total == 2 * (64 + 20 * 32)
    assert frame.rows[0].codes is None


def test_drawing_stops_after_the_next_code_and_keeps_what_is_finished(models):
    stop = threading.Event()
    work = jobs.draw([row_of(models, 7, 2), row_of(models, 8, 2)], models, stop)
    for frame in work:
        if frame is not None and frame.done > 2 * 64:
            break
    stop.set()
    frame = next(f for f in work if f is not None)
    assert frame.ended == "stopped" and next(work, "over") == "over"
    assert [row.codes is not None for row in frame.rows] == [True, False]
    rows = [row.model_dump(mode="json") for row in frame.rows]
    (data,) = Handlers(models, JobQueue()).pack(rows)(stop)
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(data))) as archive:
        assert [name[:10] for name in archive.namelist()] == ["0007-seven"] * 2


def test_rows_share_seeds_where_they_are_compared(models):
    row = row_of(models, "3", 6, seed=40)
    strips = jobs.vary_guidance(row)
    assert [s.settings.cfg_scale for s in strips] == [1.0, 1.75, 2.5, 4.0]  # the model's is 2.5
    assert {(s.seed, s.labels) for s in strips} == {(40, (3,) * 4)}
    pair = jobs.with_and_without_bank(row, models)
    frame = finish(pair, models)
    assert pair[0].seed == pair[1].seed and pair[0].labels == pair[1].labels
    assert frame.rows[0].codes != frame.rows[1].codes
    assert frame.rows[0].codes == finish([row], models).rows[0].codes[:4]
    fresh = jobs.change_seed([row])
    assert fresh[0].labels == row.labels and fresh[0].seed != row.seed
    assert len({row_of(models, "", 16).labels for _ in range(4)}) > 1  # no class: random ones


def test_two_models_draw_the_same_classes_and_seeds(tmp_path):
    shutil.copytree(BUNDLED / "digits", tmp_path / "other")
    (tmp_path / "other" / "sampling.json").write_text('{"temperature": 0.5}')
    models = Models(["digits", str(tmp_path / "other"), str(tmp_path / "other")], keep=1)
    assert models.names == ["digits", "other", "other (2)"]
    row, other = row_of(models, "one", 2, seed=5), models.describe("other")
    frame = finish(jobs.compare_models(row, other, models), models)
    assert [r.settings.temperature for r in frame.rows] == [0.8, 0.5]  # each its own
    assert models.loaded == ["other"]  # one at a time
    changed = row_of(models, "one", 2, temperature=0.6)
    rows = jobs.compare_models(changed, other, models)
    assert [r.settings.temperature for r in rows] == [0.6, 0.6]  # what the visitor asked for
    with pytest.raises(ValueError, match="digits"):
        jobs.compare_models(row, models.describe("digits"), models)
    (tmp_path / "other" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="other") as caught:
        Models([str(tmp_path / "other")]).get("other")
    assert str(tmp_path) not in str(caught.value)  # visitors see no path
    for name, damage in (("classes", '["one"]'), ("sampling", "[]"), ("config", "{}")):
        (tmp_path / "other" / f"{name}.json").write_text(damage)
        with pytest.raises(ValueError, match=f"{name}.json"):
            Models([str(tmp_path / "other")])
        shutil.copy(BUNDLED / "digits" / f"{name}.json", tmp_path / "other")


# --- images as HTML --------------------------------------------------------------------------


def test_saved_images_carry_what_draws_them_again(models):
    frame = finish(jobs.with_and_without_bank(row_of(models, "four", 1, seed=9), models), models)
    data = html.zip_images(frame.rows, frame.images, models)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        inside = archive.read(names[0])
    assert names == [
        "1-with-the-bank/0004-four-seed9.png", "2-slots-at-zero/0004-four-seed9-nobank.png",
    ]  # fmt: skip
    with Image.open(io.BytesIO(inside)) as image:
        meta = json.loads(image.info["moveimg"])
        again = Pipeline.from_pretrained(meta["model"]).sample(
            meta["class"], seed=meta["seed"], temperature=meta["temperature"]
        )
        assert image.tobytes() == again[0].tobytes()


@pytest.mark.parametrize("memory", ["none", "move"])
def test_class_names_cannot_write_html_and_a_bank_shows_only_where_there_is_one(tmp_path, memory):
    folder = tmp_path / "bad"
    shutil.copytree(BUNDLED / "digits", folder)
    config = json.loads((folder / "config.json").read_text())
    if memory == "none":
        config["model"]["memory"] = {"kind": "none"}
    (folder / "config.json").write_text(json.dumps(config))
    names = ["<img src=x onerror=alert(1)>", '"{{this}}', "${alert(1)}", *"3456789"]
    (folder / "classes.json").write_text(json.dumps(names))
    models = Models([str(folder)])
    rows = [row_of(models, str(i)).replace(codes=((0,) * 64,)) for i in range(3)]
    images = [[Image.new("RGB", (32, 32))]] * 3
    page = html.gallery(jobs.Frame(rows, images, 64, 64, 1.0, "done"), models, "look")
    assert "<img src=x" not in page and "{{" not in page and "${" not in page
    assert ("data-pick" in page, "memoryless" in page) == (memory == "move", memory == "none")
    assert "<b>" not in html.status("<b>") and "onerror=alert(1)>" not in html.trained_on(
        models.describe()
    )


# --- maps and reconstruction -----------------------------------------------------------------


def test_the_maps_of_an_image_lie_on_its_grid(models):
    frame = finish([row_of(models, "five", seed=3)], models)
    image, layers = analysis.map_bank(frame.rows[0], models)
    assert image.tobytes() == frame.images[0][0].tobytes()
    assert [m["layer"] for m in layers] == [1, 2, 3, 4, 5, 6]
    for m in layers:
        share = m["share"]
        assert share.shape == (8, 8) and np.isnan(share).sum() == 1 and np.isnan(share[7, 7])
        assert 0 < m["g_0"] < 2 and 0 < m["slots"] < 2
    shown = html.bank_maps(image, layers, frame.rows[0], models.describe(), "gates")
    assert shown.count("layer 6") == 2 and "layer 0" not in shown


def as_upload(image, kind="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def test_an_upload_goes_through_the_tokenizer_with_its_error(models):
    pipeline = models.get()
    image = pipeline.sample("eight", seed=1)[0]
    result = analysis.reconstruct(as_upload(image), "", models)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    codes = pipeline.tokenizer.encode(pixels)
    mse = (pipeline.tokenizer.decode(codes, (8, 8)) - pixels).square().mean().item()
    assert result.codes.flatten().tolist() == codes[0].tolist()
    assert result.mse == pytest.approx(mse, rel=1e-5)
    assert result.psnr == pytest.approx(10 * np.log10(4 / mse), rel=1e-5)
    wide = analysis.reconstruct(as_upload(Image.new("RGB", (300, 90), "red"), "jpeg"), "", models)
    assert wide.before.size == wide.after.size == (32, 32) and wide.colours.size == (8, 8)
    shown = html.reconstruction(wide, models.describe())
    assert "zero, one, two, three, four and 5 more" in shown


def test_an_upload_is_read_as_a_browser_shows_it():
    clear = uploads.read_upload(as_upload(Image.new("RGBA", (8, 8), (0, 0, 0, 0))))
    assert clear.getpixel((0, 0)) == (255, 255, 255)
    turned = Image.Exif()
    turned[0x0112] = 6  # held upright
    assert uploads.read_upload(as_upload(Image.new("RGB", (8, 4)), exif=turned)).size == (4, 8)


@pytest.mark.parametrize(
    ("data", "value"),
    [
        ("", "file"),
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
        uploads.read_upload(data)
