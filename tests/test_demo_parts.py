"""The demo without a browser: its line, its drawing, its pictures, what it lets through."""

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

from apps import demo
from apps.demo_parts import drawing, gallery, looking, show
from apps.demo_parts.guard import Guard
from apps.demo_parts.models import Models
from apps.demo_parts.turns import Busy, Turns, Visitor, Waiting, in_turn
from moveimg import Pipeline
from moveimg.inspection.gates import gather_gates
from moveimg.inspection.maps import bank_maps, without_bank
from moveimg.pipeline import BUNDLED
from tests.conftest import MEMORIES, lively, random_inputs, tiny_config

ANN, BOB = Visitor("ann", "10.0.0.1"), Visitor("bob", "10.0.0.2")


@pytest.fixture(scope="module")
def models():
    return Models(["digits"])


def finished(rows, models):
    """The last frame of a drawing nobody stops."""
    *_, frame = drawing.draw(rows, models, threading.Event())
    assert frame.ended == "done"
    return frame


# --- the line --------------------------------------------------------------------------------


def test_a_second_job_of_one_visitor_stands_behind_every_first_job():
    turns = Turns()
    first, second, other = turns.enter(ANN), turns.enter(ANN), turns.enter(BOB)
    assert [turns.ahead(t) for t in (first, other, second)] == [0, 1, 2]
    turns.leave(first)
    assert turns.ahead(second) == 0  # now its visitor's first, and earlier than Bob's
    assert turns.ahead(other) == 1
    third = turns.enter(ANN)
    turns.leave(second)
    assert turns.ahead(other) == 0 and turns.ahead(third) == 1


def test_who_has_the_turn_keeps_it():
    turns = Turns()
    mine = [turns.enter(ANN), turns.enter(ANN)]
    assert turns.ahead(mine[0]) == 0
    turns.leave(mine[0])
    assert turns.ahead(mine[1]) == 0  # runs, as Ann's only job
    late = turns.enter(BOB)
    assert (turns.ahead(late), turns.ahead(mine[1])) == (1, 0)


def test_the_line_is_bounded_for_a_visitor_an_address_and_all():
    turns = Turns(length=3, per_visitor=2, per_address=3)
    for _ in range(2):
        turns.enter(ANN)
    with pytest.raises(Busy, match="you already have 2 jobs"):
        turns.enter(ANN)
    turns.enter(Visitor("ann's other tab", ANN.address))
    with pytest.raises(Busy, match="from your network"):
        turns.enter(Visitor("a third tab", ANN.address))
    with pytest.raises(Busy, match="3 jobs are waiting"):
        turns.enter(BOB)


def test_jobs_run_one_at_a_time_and_the_turn_comes_back_after_errors():
    turns, running, most = Turns(), 0, 0

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
            async for item in in_turn(turns, Visitor(name, name), job):
                items.append(item)
        return items

    async def all_at_once():
        return await asyncio.gather(*(visit(str(i)) for i in range(4)))

    seen = asyncio.run(all_at_once())
    assert most == 1 and turns.jobs() == 0
    assert all(items[-1] == "step" for items in seen)
    assert any(isinstance(item, Waiting) for items in seen for item in items)


def test_a_job_ends_when_its_reader_leaves_or_its_visitor_stops_it():
    turns, steps, ended = Turns(), 0, []

    def job(stop):
        nonlocal steps
        try:
            while not stop.is_set():
                steps += 1
                yield steps
        finally:
            ended.append(True)

    async def leave():
        async with aclosing(in_turn(turns, ANN, job)) as items:
            async for item in items:
                if item == 3:
                    break

    async def stopped():
        async for item in in_turn(turns, ANN, job):
            if item >= 3:
                assert turns.stop("ann") == 1 and turns.stop("bob") == 0

    asyncio.run(leave())
    assert turns.jobs() == 0 and steps == 3
    steps = 0
    asyncio.run(stopped())
    assert turns.jobs() == 0 and steps <= 4 and len(ended) == 2


def test_cancelling_keeps_the_turn_until_the_thread_is_done():
    turns, begun, release = Turns(), threading.Event(), threading.Event()

    def job(stop):
        begun.set()
        release.wait(10)
        yield stop.is_set()

    async def cancel():
        async def read():
            async for _ in in_turn(turns, ANN, job):
                pass

        task = asyncio.create_task(read())
        await asyncio.to_thread(begun.wait, 10)
        task.cancel()
        await asyncio.sleep(0.05)
        assert turns.jobs() == 1  # a thread computes: nobody else may
        release.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert turns.jobs() == 0


# --- drawing ---------------------------------------------------------------------------------


def test_pictures_grow_and_are_those_of_the_library(models):
    about = models.describe(None)
    row = drawing.row_of(about, "seven", 3, 11, cfg_scale=3.0)
    frames = [f for f in drawing.draw([row], models, threading.Event()) if f is not None]
    assert len(frames) >= 2 and 0 < frames[0].done < frames[0].total == 3 * 64
    assert [f.ended for f in frames] == [""] * (len(frames) - 1) + ["done"]
    top, bottom = (
        np.asarray(frames[0].pictures[0][0])[:2],
        np.asarray(frames[0].pictures[0][0])[-2:],
    )
    assert (bottom == 128).all() and (top != 128).any()  # codes to come are grey
    expected = Pipeline.from_pretrained("digits").sample([7, 7, 7], cfg_scale=3.0, seed=11)
    assert [p.tobytes() for p in frames[-1].pictures[0]] == [p.tobytes() for p in expected]
    again = [models.get(None).decode(frames[-1].rows[0].codes)[i].tobytes() for i in range(3)]
    assert again == [p.tobytes() for p in expected]


def test_drawing_stops_after_the_next_code(models):
    stop = threading.Event()
    work = drawing.draw([drawing.row_of(models.describe(None), 7, 2, 0)], models, stop)
    for _ in range(5):
        next(work)
    stop.set()
    frame = next(work)
    assert frame.ended == "stopped" and frame.done == 2 * 6
    assert frame.rows[0].codes is None and next(work, "over") == "over"


def test_rows_share_seeds_where_they_are_to_be_compared(models):
    about = models.describe(None)
    row = drawing.row_of(about, "3", 6, 40)
    strips = drawing.vary_guidance(row)
    assert [s.settings.cfg_scale for s in strips] == [1.0, 1.75, 2.5, 4.0]  # the model's is 2.5
    assert {(s.seed, s.labels) for s in strips} == {(40, (3,) * 4)}
    pair = drawing.with_and_without_bank(row, about)
    frame = finished(pair, models)
    assert pair[0].seed == pair[1].seed and pair[0].labels == pair[1].labels
    assert not torch.equal(frame.rows[0].codes, frame.rows[1].codes)
    assert torch.equal(frame.rows[0].codes, finished([row], models).rows[0].codes[:4])
    fresh = drawing.another_seed([row])
    assert fresh[0].labels == row.labels and fresh[0].seed != row.seed


def test_two_models_draw_the_same_classes_and_seeds(tmp_path):
    shutil.copytree(BUNDLED / "digits", tmp_path / "other")
    settings = json.loads((tmp_path / "other" / "sampling.json").read_text())
    (tmp_path / "other" / "sampling.json").write_text(json.dumps(settings | {"temperature": 0.5}))
    models = Models(["digits", str(tmp_path / "other"), str(tmp_path / "other")], keep=1)
    assert models.names == ["digits", "other", "other (2)"]
    row = drawing.row_of(models.describe("digits"), "one", 2, 5)
    frame = finished(drawing.beside(row, models.describe("other"), models), models)
    assert [r.settings.temperature for r in frame.rows] == [0.8, 0.5]  # each its own
    assert models.loaded() == ["other"]  # one at a time
    changed = drawing.row_of(models.describe("digits"), "one", 2, 5, temperature=0.6)
    rows = drawing.beside(changed, models.describe("other"), models)
    assert [r.settings.temperature for r in rows] == [0.6, 0.6]  # what the visitor asked for
    with pytest.raises(ValueError, match="'elsewhere': expected one of digits, other"):
        models.describe("elsewhere")
    (tmp_path / "other" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="'other' cannot be loaded") as caught:
        Models([str(tmp_path / "other")]).get("other")
    assert str(tmp_path) not in str(caught.value)  # a visitor is told no path


@pytest.mark.parametrize(
    ("wanted", "count", "seed", "given", "part"),
    [
        ("ten", 1, 0, {}, "unknown class 'ten'"),
        (10, 1, 0, {}, "class 10: expected 0..9"),
        ("seven", 0, 0, {}, "0 pictures: expected a whole number in 1..16"),
        ("seven", 17, 0, {}, "1..16"),
        ("seven", 2.5, 0, {}, "2.5 pictures"),
        ("seven", float("nan"), 0, {}, "nan pictures"),
        ("seven", True, 0, {}, "True pictures"),
        ("seven", "1e999", 0, {}, "1e999 pictures"),
        ("seven", 2, 2**32 - 1, {}, "seed 4294967295"),
        ("seven", 1, -1, {}, "seed -1"),
        ("seven", 1, "x" * 50, {}, "seed xxx"),
        ("seven", 1, 0, {"cfg_scale": 1e9}, "cfg_scale"),
        ("seven", 1, 0, {"temperature": float("nan")}, "temperature"),
        ("seven", 1, 0, {"top_p": 0}, "top_p"),
        ("seven", 1, 0, {"top_k": -1}, "top_k"),
        ("seven", 1, 0, {"cfg_schedule": "cubic"}, "cfg_schedule"),
        ([], 1, 0, {}, "0 classes"),
        (["one", ""], 2, 0, {}, "none of them empty"),
    ],
)
def test_numbers_out_of_bounds_are_refused(models, wanted, count, seed, given, part):
    with pytest.raises(ValueError, match=part.replace(".", r"\.")):
        drawing.row_of(models.describe(None), wanted, count, seed, **given)


def test_nothing_chosen_means_random_classes_and_no_seed_a_fresh_one(models):
    rows = [drawing.row_of(models.describe(None), None, 16, "") for _ in range(4)]
    assert len({row.labels for row in rows}) > 1 and len({row.seed for row in rows}) > 1
    assert drawing.row_of(models.describe(None), "seven", 1, " 12 ").seed == 12


# --- pictures as HTML, PNG and zip -----------------------------------------------------------


def test_saved_pictures_carry_what_makes_them_again(models):
    row = drawing.row_of(models.describe(None), "four", 2, 9, temperature=0.7)
    frame = finished(drawing.with_and_without_bank(row, models.describe(None)), models)
    data = gallery.zip_of(frame.rows, frame.pictures, models)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        assert names[0] == "1-with-the-bank/0004-four-seed9.png" and len(names) == 4
        picture = Image.open(io.BytesIO(archive.read(names[1])))
        bare = Image.open(io.BytesIO(archive.read(names[3])))
    about = json.loads(picture.info["moveimg"])
    again = Pipeline.from_pretrained(about["model"]).sample(
        about["class"], seed=about["seed"], temperature=about["temperature"],
        cfg_scale=about["cfg_scale"], top_k=about["top_k"], top_p=about["top_p"],
    )[0]  # fmt: skip
    assert about["seed"] == 10 and again.tobytes() == picture.tobytes()
    assert json.loads(bare.info["moveimg"])["bank"] is False
    page = gallery.tiles(frame, models, "look")
    assert page.count("data-pick") == 4 and page.count("download=") == 4
    inside = page.split('src="data:image/png;base64,')[2].split('"')[0]
    shown = Image.open(io.BytesIO(base64.b64decode(inside)))
    assert json.loads(shown.info["moveimg"]) == about


def test_class_names_cannot_write_html_or_templates(tmp_path):
    shutil.copytree(BUNDLED / "digits", tmp_path / "bad")
    names = ["<img src=x onerror=alert(1)>", '"{{this}}', "${alert(1)}", *"3456789"]
    (tmp_path / "bad" / "classes.json").write_text(json.dumps(names))
    models = Models([str(tmp_path / "bad")])
    row = drawing.row_of(models.describe(None), ["0", "1", "2"], 3, 0)
    page = gallery.tiles(drawing.Frame([row], [[]], 0, 1, 0.0), models)
    assert "<img" not in page and "{{" not in page and "${" not in page and '="{' not in page
    assert "<b>" not in show.failed("<b>") and "<i>" not in show.note("<i>")


# --- looking ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lave-x1", "move-3-class-rows"])
def test_bank_maps_agree_with_the_statistics_of_the_gates(kind):
    config = tiny_config(memory=MEMORIES[kind])
    model = lively(config)
    codes, labels = random_inputs(config, batch=1)
    maps, gates = bank_maps(model, codes, labels), gather_gates(model, [(codes, labels)])
    assert maps.keys() == gates.keys() and len(maps) > 0
    for layer, found in maps.items():
        known = gates[layer].as_dict()
        assert found.share.shape == (1, config.seq_len - 1)
        means = torch.tensor(known["mean"]).mean(0)  # [gates]
        start = 1 if gates[layer].gated else 0
        assert found.slots.mean().item() == pytest.approx(means[start:].mean().item(), rel=1e-5)
        if gates[layer].gated:
            assert found.g_0.mean().item() == pytest.approx(means[0].item(), rel=1e-5)
        assert found.share.min() > 0 and found.share.max() < 1
    with pytest.raises(ValueError, match="no value memory"):
        bank_maps(lively(tiny_config(memory={"kind": "none"})), codes, labels)


def test_a_model_without_its_bank_is_one_whose_tables_are_zero():
    for kind in ("lave-x1", "move-3-class-rows"):
        config = tiny_config(memory=MEMORIES[kind])
        model, zeroed = lively(config), lively(config)
        with torch.no_grad():
            for name, weight in zeroed.memory.named_parameters():
                assert "bank" in name
                weight.zero_()
        codes, labels = random_inputs(config)
        before = model(codes, labels)
        assert torch.equal(without_bank(model)(codes, labels), zeroed(codes, labels))
        assert torch.equal(model(codes, labels), before)  # the model itself is as it was
        assert not torch.equal(before, zeroed(codes, labels))


def test_the_maps_of_a_drawn_picture_lie_on_its_grid(models):
    drawn = finished([drawing.row_of(models.describe(None), "five", 1, 3)], models)
    ((picture, layers),) = looking.bank_of(drawn.rows[0], models)
    assert picture.tobytes() == drawn.pictures[0][0].tobytes()
    assert [m.layer for m in layers] == [1, 2, 3, 4, 5, 6]
    for m in layers:
        assert m.share.shape == (8, 8) and np.isnan(m.share).sum() == 1 and np.isnan(m.share[7, 7])
        assert 0 < m.g_0 < 2 and 0 < m.slots < 2
    assert "layer 6" in show.bank_maps(
        picture, layers, drawn.rows[0], models.describe(None), "gates"
    )


def as_upload(picture, kind="png"):
    buffer = io.BytesIO()
    picture.save(buffer, format=kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def test_an_upload_goes_through_the_tokenizer_with_its_error(models):
    pipeline = models.get(None)
    picture = pipeline.sample("eight", seed=1)[0]
    image = looking.read_upload(as_upload(picture))
    (result,) = looking.reconstruct(image, None, models)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    codes = pipeline.tokenizer.encode(pixels)
    mse = (pipeline.tokenizer.decode(codes, (8, 8)) - pixels).square().mean().item()
    assert result.codes.flatten().tolist() == codes[0].tolist()
    assert result.mse == pytest.approx(mse, rel=1e-5)
    assert result.psnr == pytest.approx(10 * np.log10(4 / mse), rel=1e-5)
    wide = Image.new("RGB", (300, 90), "red")
    (result,) = looking.reconstruct(looking.read_upload(as_upload(wide, "jpeg")), None, models)
    assert result.before.size == result.after.size == (32, 32)
    assert result.colours.size == (8, 8) and result.distinct >= 1


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ("", "no image"),
        ("data:text/plain;base64,aGVsbG8=", "not an image"),
        ("not base64!", "not an image"),
        ("A" * (looking.MAX_UPLOAD * 4 // 3 + 100), "larger than 8 MB"),
        (as_upload(Image.new("1", (8000, 6000))), "8000 x 6000 pixels"),
        (as_upload(Image.new("RGB", (64, 64)))[:-80], "not an image"),
        ("data:image/svg+xml;base64," + base64.b64encode(b"<svg/>").decode(), "not an image"),
    ],
)
def test_a_bad_upload_is_refused_in_words(data, part):
    with pytest.raises(ValueError, match=part):
        looking.read_upload(data)


# --- the command and the guard ---------------------------------------------------------------


def test_accounts_come_from_the_command_or_a_file(tmp_path):
    assert demo.read_auth(None) is None
    assert demo.read_auth("me:se:cret") == [("me", "se:cret")]
    (tmp_path / "accounts").write_text("a:1\n\nb:2\n")
    assert demo.read_auth(str(tmp_path / "accounts")) == [("a", "1"), ("b", "2")]
    for bad in ("me", "me:", ":x"):
        with pytest.raises(ValueError, match="USER:PASSWORD"):
            demo.read_auth(bad)


def test_the_command_names_what_it_cannot_serve(capsys, tmp_path):
    assert demo.main(["--model", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        demo.arguments(["--queue", "0"])
    assert demo.arguments([]).host == "127.0.0.1"


def through_guard(path, headers=(), chunks=(b"",)):
    """Status of a request through the guard, and the body that reached the app behind it."""
    seen, sent = bytearray(), []

    async def app(scope, receive, send):
        more = True
        while more:
            message = await receive()
            seen.extend(message["body"])
            more = message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    parts = [
        {"type": "http.request", "body": c, "more_body": i < len(chunks) - 1}
        for i, c in enumerate(chunks)
    ]

    async def receive():
        return parts.pop(0)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": path, "headers": list(headers)}
    asyncio.run(Guard(app, max_body=10)(scope, receive, send))
    return sent[0]["status"], bytes(seen)


def test_the_guard_closes_the_disk_and_bounds_bodies():
    assert through_guard("/gradio_api/queue/join", chunks=(b"12345", b"67890")) == (
        200,
        b"1234567890",
    )
    for path in ("/gradio_api/upload", "/gradio_api/file=/etc/passwd", "/monitoring/summary",
                 "/gradio_api/run/generate", "/gradio_api/process_recording"):  # fmt: skip
        assert through_guard(path)[0] == 404
    assert through_guard("/", [(b"content-length", b"11")])[0] == 413
    assert through_guard("/", [(b"content-length", b"-1")])[0] == 413
    assert through_guard("/", chunks=(b"123456", b"789012"))[0] == 413
