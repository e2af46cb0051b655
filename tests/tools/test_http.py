"""The one HTTP client against real servers on loopback: deadlines, caps, keys, proxies, tries."""

import asyncio
import gzip
import json
import socket
import ssl
import threading
import time
from types import SimpleNamespace

import pytest

from tests.helpers.search_server import KEY, answer, web_server
from toolkit import http
from toolkit.http import Endpoint, Refused, Unavailable, complete

COMPLETION = {"choices": [{"index": 0, "finish_reason": "stop", "message": {"content": "yes"}}]}


def asked(server, path="/x", seconds=10.0, body=None, key=KEY):
    endpoint = Endpoint(server.url, key)
    return http.now(endpoint.ask(path, body, seconds=seconds))


def trickle(start, piece=b"a", pause=0.1, times=100):
    """Writes `start`, then `piece` again and again."""

    def page(request):
        request.wfile.write(start)
        for _ in range(times):
            time.sleep(pause)
            request.wfile.write(piece)

    return page


HEAD = b"HTTP/1.1 200 OK\r\n"
SLOW = {
    "silent": lambda request: time.sleep(3) or "",
    "status": trickle(b""),
    "headers": trickle(HEAD, b"X: 1\r\n"),
    "one header": trickle(HEAD + b"X: "),
    "body": trickle(HEAD + b"\r\n", b" "),
    "chunks": trickle(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "greetings": trickle(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
}


@pytest.mark.parametrize("kind", SLOW)
def test_the_deadline_holds_whatever_the_server_does(kind):
    with web_server({"*": SLOW[kind]}) as server:
        began = time.monotonic()
        with pytest.raises(Unavailable) as told:
            asked(server, seconds=0.4)
        assert time.monotonic() - began < 1.2
    assert told.value.late and told.value.status == 0


def test_a_greeting_that_never_comes_and_a_name_that_hangs_end_at_the_deadline(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as mute:  # takes the line, never speaks TLS
        began = time.monotonic()
        with pytest.raises(Unavailable, match="too long"):
            port = mute.getsockname()[1]
            http.now(Endpoint(f"https://127.0.0.1:{port}").ask("/", seconds=0.4))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **more: time.sleep(2))
    with pytest.raises(Unavailable, match="too long"):
        http.now(Endpoint("http://endpoint.example").ask("/", seconds=0.4))
    assert time.monotonic() - began < 1.6


ENDLESS = {
    "long": (200, {"Content-Length": str(10**12)}, ""),
    "100 MB": (200, {}, b" " * (100 << 20)),
    "stream": trickle(HEAD + b"\r\n", b" " * (1 << 20), 0),
    "chunks": trickle(
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"100000\r\n" + b" " * (1 << 20) + b"\r\n", 0
    ),
    "bomb": (200, {"Content-Encoding": "gzip"}, gzip.compress(b" " * (100 << 20))),
    "headers": trickle(HEAD, b"X: 1\r\n" * 1000, 0),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_what_is_read_is_capped(kind):
    with web_server({"*": ENDLESS[kind]}) as server:
        began = time.monotonic()
        with pytest.raises(Unavailable) as told:
            asked(server, seconds=20)
        assert time.monotonic() - began < 10 and not told.value.late
    told_of = {"headers": "too long", "bomb": "packed as gzip"}.get(kind, "larger than 10 MiB")
    assert told_of in str(told.value)


ODD = {
    "html": "<html>busy</html>",
    "half": (200, {}, b'{"choices": [{"mess'),
    "binary": (200, {}, b"\xff\xfe\0"),
    "deep": (200, {}, b"[" * 100_000),
    "empty": (204, {}, ""),
    "events": (200, {"Content-Type": "text/event-stream"}, b"data: {}\n\ndata: [DONE]\n\n"),
    "cut": lambda request: request.wfile.write(HEAD + b"Content-Length: 99\r\n\r\n{}") and None,
    "gone": lambda request: None,
    "no HTTP": lambda request: request.wfile.write(b"SSH-2.0-OpenSSH\r\n\r\n") and None,
    "lies": (200, {"Content-Encoding": "gzip"}, "{}"),
    "br": (200, {"Content-Encoding": "br"}, "{}"),
    "redirect": (307, {"Location": "/y"}, "{}"),
    **{str(status): (status, {}, "no") for status in (408, 409, 425, 429, 500, 503)},
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_answer_may_be_tried_again(kind):
    with web_server({"*": ODD[kind]}) as server:
        with pytest.raises(Unavailable) as told:
            asked(server)
    assert len(server.seen) == 1 and len(str(told.value)) <= http.WORDS and not told.value.late


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_what_is_refused_comes_with_status_and_words_and_without_the_key(status):
    with web_server({"*": answer({"error": {"message": f"no {KEY} here"}}, status)}) as server:
        with pytest.raises(Refused, match=r"no \[key\] here") as told:
            asked(server)
    assert told.value.status == status and told.value.hopeless == (status in (401, 403, 404))


def test_a_key_stays_with_its_host():
    with web_server({"*": "caught"}) as thief:
        with web_server({"*": (302, {"Location": thief.url}, "")}) as server:
            with pytest.raises(Unavailable, match="302"):
                asked(server)
    assert thief.seen == [] and server.seen[0][2]["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("key, sent", [("", None), (f" {KEY}\n", f"Bearer {KEY}")])
def test_a_key_goes_without_its_line_end_and_none_without_a_header(key, sent):
    with web_server({"*": answer({})}) as server:
        asked(server, key=key)
    assert server.seen[0][2].get("authorization") == sent


@pytest.mark.parametrize(
    "url",
    ["", "localhost:80", "ftp://a/", "http://", "http://a b/", "http://u:p@a/", "http://a:x/"],
)
def test_what_is_no_address_is_refused_at_once(url):
    with pytest.raises(Refused, match="not an address") as told:
        Endpoint(url)
    assert told.value.hopeless


def test_proxies_of_the_environment_count_only_when_asked_for(monkeypatch):
    with web_server({"*": answer({"from": "proxy"})}) as proxy:
        with web_server({"*": answer({"from": "server"})}) as server:
            for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "https_proxy"):
                monkeypatch.setenv(name, proxy.url)
            assert asked(server) == {"from": "server"} and proxy.seen == []
            monkeypatch.setenv("ENDPOINT_PROXIES", "1")
            assert asked(server) == {"from": "proxy"}
            assert proxy.seen[0][1] == f"{server.url}/x"
            monkeypatch.setenv("NO_PROXY", "127.0.0.1")
            assert asked(server) == {"from": "server"}


@pytest.fixture
def tunnel():
    """A proxy that opens one tunnel, whatever the name asked for, to the port it is told."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        given = {"url": f"http://127.0.0.1:{listener.getsockname()[1]}"}

        def pump(a, b):
            while piece := a.recv(1 << 16):
                b.sendall(piece)
            b.shutdown(socket.SHUT_WR)

        def serve():
            line, _ = listener.accept()
            given["head"] = line.recv(1 << 16)
            line.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            server = socket.create_connection(("127.0.0.1", given["port"]))
            threading.Thread(target=pump, args=(server, line), daemon=True).start()
            pump(line, server)

        threading.Thread(target=serve, daemon=True).start()
        yield given


def test_tls_through_a_proxy_is_checked_against_the_endpoints_name(
    certificate, monkeypatch, tunnel
):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert"))
    monkeypatch.setenv("https_proxy", tunnel["url"])
    monkeypatch.setenv("ENDPOINT_PROXIES", "1")
    http._tls.cache_clear()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate / "cert", certificate / "key")
    with web_server({"*": answer({"ok": 1})}, tls) as server:
        tunnel["port"] = int(server.host.split(":")[1])
        endpoint = Endpoint("https://good.example/v1", KEY)
        assert http.now(endpoint.ask("/x", {"a": 1}, seconds=5)) == {"ok": 1}
    assert (
        tunnel["head"].startswith(b"CONNECT good.example:443 ")
        and KEY.encode() not in tunnel["head"]
    )
    http._tls.cache_clear()


def test_a_body_refused_before_it_is_read_gives_the_servers_words():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            line, _ = listener.accept()
            line.recv(1000)
            line.sendall(b"HTTP/1.1 413 X\r\nContent-Length: 7\r\n\r\ntoo big")
            time.sleep(1)
            line.close()

        threading.Thread(target=serve, daemon=True).start()
        endpoint = Endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(Refused, match="413 too big"):
            http.now(endpoint.ask("/x", {"a": "b" * (30 << 20)}, seconds=5))


def test_a_host_is_asked_at_its_next_address_where_the_first_is_closed(monkeypatch):
    def found(host, port, *_, **__):
        kinds = ("127.0.0.2", "127.0.0.1")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (kind, port)) for kind in kinds]

    with web_server({"*": answer({"ok": 1})}) as server:
        monkeypatch.setattr(socket, "getaddrinfo", found)
        endpoint = Endpoint(f"http://endpoint.example:{server.host.split(':')[1]}")
        assert http.now(endpoint.ask("/x", seconds=5)) == {"ok": 1}


# --------------------------------------------------------------------------------------------------
# insisting


def insist(servers, times=1, most=64, **options):
    """(answers or exceptions, endpoints) of `times` requests at a time."""
    endpoints = [Endpoint(server.url, most=most) for server in servers]

    async def once(endpoint, seconds):
        return await endpoint.ask("/x", {"a": 1}, seconds=seconds)

    async def all_of():
        each = (http.insist(endpoints, once, **options) for _ in range(times))
        async with asyncio.timeout(20):  # what never ends fails, and holds nobody up
            return await asyncio.gather(*each, return_exceptions=True)

    return http.now(all_of()), endpoints


def test_a_request_is_made_again_until_it_is_answered():
    replies = iter([(500, {}, ""), "<html>", (429, {}, ""), answer({"ok": 1})])
    with web_server({"*": lambda request: next(replies)}) as server:
        assert insist([server], patience_s=10)[0] == [{"ok": 1}]
    assert len(server.seen) == 4


def test_a_server_that_is_away_is_given_up_after_patience_and_a_refusal_at_once():
    with web_server({"*": (503, {}, "later")}) as server:
        began = time.monotonic()
        ((error,), _) = insist([server], patience_s=0.8)
        assert (
            isinstance(error, Unavailable)
            and "503 later" in str(error)
            and server.url in str(error)
        )
        assert 0.7 < time.monotonic() - began < 2.5 and len(server.seen) > 1
    with web_server({"*": (400, {}, "bad")}) as server:
        assert isinstance(insist([server])[0][0], Refused) and len(server.seen) == 1


def test_a_request_that_fails_where_others_are_answered_is_refused():
    def page(request):
        return answer({"ok": 1}) if json.loads(request.body).get("fine") else (500, {}, "poison")

    with web_server({"*": page}) as server:
        endpoint = Endpoint(server.url)

        async def both():
            async def once(endpoint, seconds):
                return await endpoint.ask("/x", {"a": 1}, seconds=seconds)

            async def fine(endpoint, seconds):
                return await endpoint.ask("/x", {"fine": 1}, seconds=seconds)

            waiting = asyncio.ensure_future(http.insist([endpoint], once, patience_s=1.0))
            await asyncio.sleep(0.3)
            await http.insist([endpoint], fine)
            return await waiting

        with pytest.raises(Refused, match="poison"):
            http.now(both())


def test_seconds_hold_turns_tries_and_pauses_and_the_first_odd_reply_is_told():
    replies = iter(["<html>busy</html>"])

    def page(request):
        time.sleep(0.5)
        return next(replies, None) or time.sleep(3) or ""

    with web_server({"*": page}) as server:
        began = time.monotonic()
        answers, _ = insist([server], times=6, most=2, seconds=1.5)
        assert 1.2 < time.monotonic() - began < 2.5
    assert all(isinstance(error, Unavailable) for error in answers)
    assert any("busy</html>" in str(error) for error in answers)


def test_the_least_busy_server_is_asked_and_one_that_fails_is_left_alone():
    with web_server({"*": answer({})}) as a, web_server({"*": answer({})}) as b:
        answers, _ = insist([a, b], times=8)
        assert len(a.seen) == len(b.seen) == 4 and answers == [{}] * 8
    with web_server({"*": (500, {}, "")}) as bad, web_server({"*": answer({})}) as good:
        answers, _ = insist([bad, good], times=8)
        assert answers == [{}] * 8 and len(bad.seen) <= 4 and len(good.seen) == 8


@pytest.fixture
def clock(monkeypatch):
    """A time that only pauses and tries let pass; the pauses."""
    pauses, real = [], asyncio.sleep
    clock = SimpleNamespace(now=1000.0, pauses=pauses)

    async def sleep(seconds):
        clock.now += seconds
        pauses.extend([seconds] * (seconds > 0))
        await real(0)

    monkeypatch.setattr(http, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(asyncio, "sleep", sleep)
    return clock


def tried(clock, urls=("http://a",), fails=lambda tries: Unavailable("no", 503), **options):
    """(url, seconds given, clock) of each try, what came of it; a try takes 1 s and fails with
    `fails(tries)`, or is answered where that is no exception."""
    tries, began = [], clock.now

    async def once(endpoint, seconds):
        tries.append((endpoint.url, seconds, clock.now - began))
        assert len(tries) < 100, "it never ends"
        clock.now += 1.0
        reply = fails(tries)
        if isinstance(reply, Exception):
            raise reply
        return reply

    try:
        return tries, http.now(http.insist([Endpoint(url) for url in urls], once, **options))
    except (Unavailable, Refused) as error:
        return tries, error


def test_patience_is_counted_from_the_first_failure_and_pauses_grow_to_their_most(clock):
    tries, error = tried(clock, patience_s=100, request_s=7)
    assert isinstance(error, Unavailable) and "for 101 s (no)" in str(error)
    assert clock.now == pytest.approx(1101, abs=1.1)  # the first try, then the patience
    assert clock.pauses[:7] == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, http.MOST_PAUSE_S]
    assert max(clock.pauses) == http.MOST_PAUSE_S and {given for _, given, _ in tries} == {7}


def test_no_try_takes_all_of_the_time_that_holds_them_all(clock):
    tries, _ = tried(clock, seconds=40.0, request_s=25, patience_s=30)
    assert tries[0][1] == 25
    assert all(given <= max(http.SHARE * (40 - at), 0) for _, given, at in tries)
    later = [(given, at) for _, given, at in tries if http.SHARE * (40 - at) < 25]
    assert later and all(given == http.SHARE * (40 - at) for given, at in later)


def test_a_pause_is_as_long_as_the_server_asks_but_not_longer_than_the_most(clock):
    fails = [Unavailable("", 429, wait_s=9.0), Unavailable("", 429, wait_s=3600.0), "yes"]
    tries, reply = tried(clock, fails=lambda tries: fails[len(tries) - 1])
    assert reply == "yes" and clock.pauses == [9.0, http.MOST_PAUSE_S]


def test_another_server_is_asked_without_a_pause_and_the_one_that_failed_after_its_rest(clock):
    fails = {"http://a": Unavailable("", 500), "http://b": "yes"}
    tries, reply = tried(clock, ["http://a", "http://b"], lambda tries: fails[tries[-1][0]])
    assert [url for url, *_ in tries] == ["http://a", "http://b"] and clock.pauses == []
    tries, _ = tried(clock, ["http://a", "http://b"], patience_s=9)
    assert [url for url, *_ in tries[:2]] == ["http://a", "http://b"] and clock.pauses[0] == 0.25


@pytest.mark.parametrize("urls", [["http://a"], ["http://a", "http://b"], ["http://a"] * 3])
def test_a_request_that_was_too_slow_goes_to_another_at_once_or_back_after_a_pause(clock, urls):
    fails = [Unavailable("", late=True)] * len(urls) + ["yes"]
    tries, reply = tried(clock, urls, lambda tries: fails[len(tries) - 1])
    assert reply == "yes" and [url for url, *_ in tries] == [*urls, urls[0]]
    assert clock.pauses == [0.25] * (len(urls) == 1)


def test_one_that_is_slow_is_not_left_alone():
    with web_server({"*": SLOW["silent"]}) as slow:
        answers, (endpoint,) = insist([slow], seconds=0.5)
    assert isinstance(answers[0], Unavailable) and endpoint.rests_until == 0.0


def test_no_more_requests_are_in_flight_than_the_endpoint_takes():
    live, most = [], []

    def page(request):
        live.append(1)
        most.append(len(live))
        time.sleep(0.05)
        live.pop()
        return answer({})

    with web_server({"*": page}) as server:
        assert insist([server], times=12, most=3)[0] == [{}] * 12
    assert max(most) <= 3


def test_the_event_loop_goes_on_while_a_server_is_silent():
    async def beats():
        endpoint, count = Endpoint(server.url), 0
        waiting = asyncio.ensure_future(endpoint.ask("/", seconds=0.5))
        while not waiting.done():
            await asyncio.sleep(0.01)
            count += 1
        return count, waiting.exception()

    with web_server({"*": SLOW["silent"]}) as server:
        count, error = http.now(beats())
    assert count > 15 and error.late


def test_a_request_that_is_cancelled_leaves_no_thread_and_no_line():
    closed = threading.Event()

    def page(request):
        request.connection.settimeout(5)
        if request.connection.recv(1) == b"":
            closed.set()
        return ""

    async def cancelled():
        waiting = asyncio.ensure_future(Endpoint(server.url).ask("/", seconds=60))
        await asyncio.sleep(0.2)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    before = threading.active_count()
    with web_server({"*": page}) as server:
        http.now(cancelled())
        assert closed.wait(2)
    assert threading.active_count() <= before + 1  # the server's own may still be ending


# --------------------------------------------------------------------------------------------------
# completions


@pytest.mark.parametrize(
    "reply",
    [None, 42, [], {}, {"choices": None}, {"choices": []}, {"choices": [None]}]
    + [{"choices": [{"message": None}]}, {"object": "error", "message": "out of memory"}],
)
def test_what_is_no_completion_may_be_tried_again(reply):
    with web_server({"*": answer(reply)}) as server:
        with pytest.raises(Unavailable):
            http.now(http.complete(Endpoint(server.url), {"messages": []}, 5, seconds=2))


def test_max_tokens_gives_way_to_max_completion_tokens_once_for_all():
    words = "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens'."

    def page(request):
        known = "max_completion_tokens" in json.loads(request.body)
        return answer(COMPLETION) if known else answer({"error": {"message": words}}, 400)

    async def twice():
        endpoint = Endpoint(server.url)
        return [await http.complete(endpoint, {"m": 1}, 5, seconds=2) for _ in range(2)]

    with web_server({"*": page}) as server:
        assert [c["message"]["content"] for c in http.now(twice())] == ["yes", "yes"]
    sent = [json.loads(body) for *_, body in server.seen]
    assert sent == [{"m": 1, "max_tokens": 5}] + [{"m": 1, "max_completion_tokens": 5}] * 2


def test_another_400_is_not_asked_twice():
    with web_server({"*": answer({"error": "context too long"}, 400)}) as server:
        with pytest.raises(Refused):
            http.now(http.complete(Endpoint(server.url), {}, 5, seconds=2))
    assert len(server.seen) == 1


def test_a_completion_has_one_deadline_however_often_a_key_is_refused():
    """Each try takes a twentieth of a second."""
    given = []

    class Picky(Endpoint):
        async def ask(self, path, body, *, seconds):
            given.append(seconds)
            await asyncio.sleep(0.05)
            if key := next((key for key in ("seed", "temperature") if key in body), ""):
                raise Refused(f"{key} is not supported", 400)
            return {"choices": [{"message": {"content": "x"}}]}

    body = {"seed": 1, "temperature": 0.5}
    asyncio.run(complete(Picky("http://a/v1"), body, 9, seconds=3.0))
    assert len(given) == 3 and 1.0 < given[0] <= 3.0
    assert all(before - after >= 0.049 for before, after in zip(given, given[1:]))
