"""How long things may take, on clocks of our own: exact, however busy the machine is."""

import asyncio
import os
import socket
import time

import pytest

import tools
from toolkit import files, http, sandbox, web
from tools import TOOLS, Toolbox


class Clock:
    """In place of time.monotonic: goes on by a step whenever it is looked at."""

    def __init__(self, monkeypatch, step):
        self.now, self.step = 1000.0, step
        monkeypatch.setattr(time, "monotonic", self)

    def __call__(self):
        self.now += self.step
        return self.now


def test_code_is_stopped_when_its_seconds_are_over(monkeypatch):
    server = object.__new__(sandbox._Server)
    ours, theirs = socket.socketpair()
    out, end = os.pipe()
    server.channel, server.out, server.total, server.keep = ours, out, 0, 1000
    server.overgrown = lambda: ""
    clock = Clock(monkeypatch, 0.01)
    assert server._watch(2.0) == "the code ran longer than 2 s"
    assert clock.now - 1000.0 == pytest.approx(2.0, abs=0.1)
    theirs.send(b"{}")
    assert server._watch(2.0) == ""
    for handle in (ours, theirs):
        handle.close()
    os.close(out), os.close(end)


def test_a_tool_knows_the_seconds_that_are_left(monkeypatch):
    def search(context, queries: list[str], top_k: int = 5) -> str:
        """Tells the time.

        queries: what to look for
        top_k: how many
        """
        return f"{context.left():.1f}"

    monkeypatch.setitem(TOOLS, "search", search)
    seen = asyncio.run(Toolbox(["search"], seconds_per_call=20).call("search", {"queries": ["a"]}))
    assert 15.0 <= float(seen.text) <= 20.0


def test_code_has_the_seconds_of_a_call(monkeypatch):
    made = []
    monkeypatch.setattr(tools, "Sandbox", lambda **options: made.append(options))
    Toolbox(["python"], seconds_per_call=7.0, output_chars=90)
    assert made == [dict(seconds=7.0, output_chars=90, unsafe=False)]


def test_a_request_has_the_seconds_that_it_was_given(monkeypatch):
    told, plain = [], asyncio.timeout
    monkeypatch.setattr(asyncio, "timeout", lambda s: told.append(s) or plain(s))
    with pytest.raises(http.Unavailable):
        http.now(http.exchange("GET", "http://127.0.0.1:9/", {}, seconds=3.0))
    assert told[0] == 3.0 and all(seconds is None or seconds <= 5.0 for seconds in told[1:])


def test_pages_on_the_way_share_the_seconds_of_a_page(monkeypatch):
    told, clock = [], Clock(monkeypatch, 0.0)

    async def exchange(method, url, headers, *, seconds, **_):
        told.append(seconds)
        if seconds < 0:
            raise http.Unavailable("it is too late")
        clock.now += 4.0
        return http.Reply(302, {"location": "/next"}, b"")

    monkeypatch.setattr(web.http, "exchange", exchange)
    nowhere = [(0, 0, 0, "", ("93.184.216.34", 80))]
    with pytest.raises(web.ToolError, match="too late"):
        web.fetch("http://a.org/", seconds=9.0, resolve=lambda *_, **__: nowhere)
    assert told == [9.0, 5.0, 1.0, -3.0]


def test_a_reader_of_files_has_the_seconds_of_its_call(monkeypatch, tmp_path):
    (tmp_path / "a.txt").write_text("x")
    told = []

    def running(fd, given, deadline):
        told.append(deadline - time.monotonic())
        raise files.ToolFault("seen")

    monkeypatch.setattr(files, "running", running)
    with pytest.raises(files.ToolFault, match="seen"):
        files.file_to_text(str(tmp_path), "a.txt", seconds=12.0)
    assert told == [pytest.approx(12.0, abs=1.0)]
