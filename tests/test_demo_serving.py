"""How the demo serves many: its line, its command, what it lets through."""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import aclosing
from types import SimpleNamespace

import pytest

from apps import demo
from apps.demo_parts.guard import Guard
from apps.demo_parts.turns import Busy, Turns, Visitor, Waiting, in_turn
from moveimg import device

ANN, BOB = Visitor("ann", "10.0.0.1"), Visitor("bob", "10.0.0.2")


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
    for option, value, wanted in (
        ("--port", "99999", "'99999': expected a whole number in 1..65535"),
        ("--port", "http", "'http': expected a whole number in 1..65535"),
        ("--dtype", "int8", "bfloat16"),
    ):
        with pytest.raises(SystemExit, match="2"):
            demo.arguments([option, value])
        assert wanted in capsys.readouterr().err
    assert set(demo.DTYPES) == set(device.DTYPES)
    assert demo.arguments([]).host == "127.0.0.1"


def test_a_port_in_use_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "quiet_gradio", lambda: tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert demo.main(["--port", str(port)]) == 2
    assert capsys.readouterr().err == f"error: port {port} at 127.0.0.1: cannot be used\n"


def test_a_first_model_that_cannot_be_loaded_ends_the_server(caplog, monkeypatch, tmp_path):
    def leave(code):
        raise SystemExit(code)

    page = SimpleNamespace(local_url="", close=lambda verbose: None)
    monkeypatch.setattr(demo, "quiet_gradio", lambda: tmp_path / "temporary")
    monkeypatch.setattr(demo, "serve", lambda *args, **options: page)
    monkeypatch.setattr(demo.signal, "signal", lambda *args: None)
    monkeypatch.setattr(demo.os, "_exit", leave)
    with pytest.raises(SystemExit, match="2"):
        demo.main(["--device", "abacus"])
    assert "digits: device 'abacus' cannot be used here" in caplog.text


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
