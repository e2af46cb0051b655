"""HTTP, once for the whole project: endpoints that a run is set to ask, and pages of the web. A
request has a connection of its own and a deadline for all of it, whether the other side is silent,
drips or never ends. What is read is capped. No redirect is followed, so a key reaches its own host
alone. Proxies of the environment count only where ENDPOINT_PROXIES=1 asks for them, and never for
pages. It fails in two ways: `Unavailable` may be tried again, `Refused` never works."""

import asyncio
import contextlib
import json
import math
import os
import re
import socket
import ssl
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Awaitable
from dataclasses import dataclass
from functools import lru_cache

import h11

from toolkit.text import clean

MOST_BYTES = 10 << 20  # of a reply
MOST_HEADER = 64 << 10  # bytes of a reply's head
WORDS = 300  # characters of a server's own words in our errors
REST_S = 10.0  # an endpoint that failed is asked last for so long
MOST_PAUSE_S = 15.0  # between tries of one request
SHARE = 0.75  # of the time that is left, for one try where a deadline holds them all
AGAIN = (408, 409, 425, 429)  # of 4xx, those that pass
HOPELESS = (401, 402, 403, 404, 405, 410)  # the key, the account or the address: no request works
CONNECT_S = 5.0  # for one of several addresses of a host
OPTIONAL = ("max_tokens", "seed", "temperature", "top_p")  # keys that some models do not take
_tls = lru_cache(ssl.create_default_context)
_UNKNOWN = re.compile("support|permitted|allowed|recognized|unknown|unexpected|extra", re.I)


class Unavailable(Exception):
    """No usable answer, now: the request may be tried again. `late`: it was only too slow."""

    def __init__(self, text: str, status: int = 0, *, late: bool = False, wait_s: float = 0.0):
        super().__init__(text)
        self.status, self.late, self.wait_s = status, late, wait_s


class Refused(Exception):
    """This request never will work there. `status` is the server's (0: it was not sent)."""

    def __init__(self, text: str, status: int = 0):
        super().__init__(text)
        # hopeless: every other request would be refused too
        self.status, self.hopeless = status, status == 0 or status in HOPELESS


# ------------------------------------------------------------------------------------ one exchange

ANY_FAILURE = (OSError, EOFError, UnicodeError, h11.RemoteProtocolError, asyncio.LimitOverrunError)


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes  # packed, if `content-encoding` says so


async def exchange(
    method, url: str, headers: dict, body=None, *, seconds, most_bytes=MOST_BYTES, addresses=()
) -> Reply:
    """One request, its reply whole within `seconds`. Unavailable | Refused. `addresses`: those of
    the host that were checked, none other is connected to."""
    parts = _split(url)
    sent = {"Host": parts.netloc, "Accept-Encoding": "identity", "Connection": "close"} | headers
    if body is not None:
        sent["Content-Length"] = str(len(body))
    try:
        async with asyncio.timeout(max(0.0, seconds)):
            proxy = None if addresses else _proxy(parts)
            reader, writer = await _connected(parts, proxy, addresses)
            try:
                target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                if proxy and parts.scheme == "https":
                    await _tunnel(parts, reader, writer)
                elif proxy:
                    target = f"http://{parts.netloc}{target}"
                request = h11.Request(method=method, target=target, headers=[*sent.items()])
                return await _exchanged(reader, writer, request, body or b"", most_bytes)
            finally:
                writer.transport.abort()  # a farewell would wait for the other side
    except TimeoutError as error:
        raise Unavailable(f"{parts.hostname} took too long to answer", late=True) from error
    except (ssl.SSLCertVerificationError, h11.LocalProtocolError) as error:
        raise Refused(f"{parts.hostname}: {error!r:.200}") from error
    except ANY_FAILURE as error:
        raise Unavailable(f"{parts.hostname} cannot be read: {error!r:.200}") from error


def _split(url: str) -> urllib.parse.SplitResult:
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        if good and "@" not in parts.netloc and re.fullmatch("[!-~]+", url):
            return parts
    raise Refused(f"{url[:200]!r} is not an address http(s)://host[:port]/…")


async def _connected(parts, proxy: str | None, addresses: tuple[str, ...]):
    """(reader, writer) of a line to the host or, where one is asked for, to the proxy."""
    at = urllib.parse.urlsplit(proxy) if proxy else parts
    port = at.port or {"http": 80, "https": 443}.get(at.scheme, 80)
    greeting = parts.scheme == "https" and not proxy
    tls = dict(ssl=_tls(), server_hostname=parts.hostname) if greeting else {}
    if not addresses:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(at.hostname, port, type=socket.SOCK_STREAM)
        addresses = tuple(dict.fromkeys(each[4][0] for each in found))
    for number, address in enumerate(addresses, 1):
        last = number == len(addresses)
        with contextlib.suppress(*([] if last else [OSError])):  # the next one may answer
            async with asyncio.timeout(None if last else CONNECT_S):
                return await asyncio.open_connection(address, port, **tls)


async def _tunnel(parts, reader, writer) -> None:
    """Has a proxy open the line to a host, then greets that host by TLS."""
    home = f"{parts.hostname}:{parts.port or 443}"
    writer.write(f"CONNECT {home} HTTP/1.1\r\nHost: {home}\r\n\r\n".encode())
    opened = await reader.readuntil(b"\r\n\r\n")
    if opened.split(maxsplit=2)[1:2] != [b"200"]:
        raise ConnectionError(f"the proxy does not open {home}: {opened[:WORDS]!r}")
    await writer.start_tls(_tls(), server_hostname=parts.hostname)


def _proxy(parts) -> str | None:
    if os.environ.get("ENDPOINT_PROXIES") != "1" or urllib.request.proxy_bypass(parts.hostname):
        return None
    return urllib.request.getproxies().get(parts.scheme)


async def _exchanged(reader, writer, request: h11.Request, body: bytes, most: int) -> Reply:
    wire = h11.Connection(h11.CLIENT, max_incomplete_event_size=MOST_HEADER)
    # nothing waits for the request to be taken: a server may refuse it before it has read it all
    for part in (request, h11.Data(body), h11.EndOfMessage()):
        writer.write(wire.send(part) or b"")
    status, headers, data = 0, {}, bytearray()
    while not isinstance(event := wire.next_event(), (h11.EndOfMessage, h11.ConnectionClosed)):
        if event is h11.NEED_DATA:
            wire.receive_data(await reader.read(1 << 16))
        elif isinstance(event, h11.Response):
            status = event.status_code
            headers = {name.decode(): value.decode("latin-1") for name, value in event.headers}
        elif isinstance(event, h11.Data):
            data += event.data
        if max(len(data), int(headers.get("content-length", 0))) > most:
            raise Unavailable(f"the reply is larger than {most / (1 << 20):.3g} MiB")
    return Reply(status, headers, bytes(data))


def now(coroutine: Awaitable):
    """What the coroutine returns, for callers in threads without a loop."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(coroutine)
    finally:
        loop.run_until_complete(asyncio.sleep(0))  # aborted lines are closed in the next turn
        loop.close()  # asyncio.run would wait here for a look-up of a name that hangs


# ----------------------------------------------------------------------- endpoints that speak JSON


async def ask(method: str, url: str, *, headers: dict, body: dict | bytes | None = None, seconds):
    """The JSON of a reply with status 2xx; a body that is no JSON goes as it is. Unavailable: no
    answer, 3xx, 408, 409, 425, 429, 5xx, a reply that is no JSON; Refused: 4xx. Both tell the
    server's words, without what stands in our headers."""
    sent = {"Accept": "application/json", "Content-Type": "application/json"}
    sent |= {"User-Agent": "Reagent"} | headers
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    try:
        reply = await exchange(method, url, sent, data, seconds=seconds)
        packed, wait = (reply.headers.get(x, "") for x in ("content-encoding", "retry-after"))
        told = " ".join(clean(reply.body[: 10 * WORDS].decode("utf-8", "replace")).split())
        if packed.strip().lower() not in ("", "identity"):
            told = f"packed as {packed[:40]}, which was not asked for"
        elif 200 <= reply.status < 300:
            with contextlib.suppress(ValueError, RecursionError):
                return json.loads(reply.body)
            told = f"without JSON: {told or 'nothing'}"
        wait_s = float(wait) if wait.isdecimal() and len(wait) < 6 else 0.0
        raise Unavailable(f"{reply.status} {told}", reply.status, wait_s=wait_s)
    except Unavailable as problem:
        text = str(problem)  # the model reads it, and an endpoint may tell the key that it refuses
        values = [value for name, value in headers.items() if name != "Content-Type"]
        for secret in {word for value in values for word in (value, *value.split())} - {"Bearer"}:
            text = text.replace(secret, "[key]")
        problem.args = (text[:WORDS],)
        if 400 <= problem.status < 500 and problem.status not in AGAIN:
            raise Refused(str(problem), problem.status) from None
        raise


class Endpoint:
    """A server that a run is set to ask, its key, at most `most` requests at a time (0: all)."""

    def __init__(self, url: str, key: str = "", most: int = 64):
        _split(url)
        self.url, self.slots = url.rstrip("/"), asyncio.Semaphore(most or 1 << 20)
        self.headers = {"Authorization": f"Bearer {key.strip()}"} if key.strip() else {}
        self.asking = 0  # requests in flight and those that wait for their turn
        self.rests_until = 0.0  # time.monotonic(): it failed, others are asked before it
        self.answered = -1.0  # time.monotonic() of its last answer; -1: none yet
        self.told = False  # was "waiting for" printed?
        self.keys: dict[str, str] = {}  # {key of a request: its name there, "": it takes none}

    async def ask(self, path: str, body: dict | None = None, *, seconds: float):
        """The JSON at the URL plus `path`; a body is posted. Unavailable | Refused."""
        method = "GET" if body is None else "POST"
        return await ask(method, self.url + path, headers=self.headers, body=body, seconds=seconds)

    def failed(self, problem: Unavailable) -> None:
        if not problem.late:  # one that is slow is busy, not down
            self.rests_until = time.monotonic() + REST_S
        if not self.told:
            print(f"waiting for {self.url}: {problem}", file=sys.stderr)
        self.told = True

    def succeeded(self) -> None:
        if self.told:
            print(f"{self.url} answers again", file=sys.stderr)
        self.answered, self.rests_until, self.told = time.monotonic(), 0.0, False


async def insist(endpoints: list[Endpoint], once, *, seconds=None, request_s=1800, patience_s=600):
    """What `once(endpoint, seconds=…)` returns, of the least busy endpoint, until one answers.
    Unavailable after `patience_s` of failures, or when `seconds` (None: no end) for turns, tries
    and pauses are over; Refused at once, and for what fails while others are answered."""
    began, failing_since, pause = time.monotonic(), math.inf, 0.25
    end = math.inf if seconds is None else began + seconds
    problem = Unavailable("no request came to its turn", late=True)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while (clock := time.monotonic()) < failing_since + patience_s:
                endpoint = min(endpoints, key=lambda each: (each.rests_until > clock, each.asking))
                try:
                    endpoint.asking += 1
                    async with endpoint.slots:
                        left = SHARE * (end - time.monotonic())
                        reply = await once(endpoint, seconds=min(request_s, left))
                    endpoint.succeeded()
                    return reply
                except Unavailable as error:
                    problem = problem if error.late and not problem.late else error
                    endpoint.failed(error)
                finally:
                    endpoint.asking -= 1
                failing_since = min(failing_since, clock := time.monotonic())
                # of equals the one that failed comes last
                endpoints = [x for x in endpoints if x is not endpoint] + [endpoint]
                if all(each is endpoint or each.rests_until > clock for each in endpoints):
                    left = min(failing_since + patience_s - clock, (end - clock) / 2)
                    wait = min(max(pause, problem.wait_s), MOST_PAUSE_S, max(0.05, left))
                    await asyncio.sleep(wait)
                    pause *= 2
    if any(each.answered > began for each in endpoints):
        raise Refused(str(problem), problem.status or 500)
    urls, waited = ", ".join(each.url for each in endpoints), time.monotonic() - began
    raise Unavailable(f"no answer from {urls} for {waited:.0f} s ({problem})", problem.status)


async def models_of(endpoint: Endpoint, *, seconds: float) -> dict[str, dict]:
    """The cards of the models that a server lists, by name; Unavailable where it lists none."""
    reply = await endpoint.ask("/models", seconds=seconds)
    cards = reply.get("data") if isinstance(reply, dict) else None
    cards = cards if isinstance(cards, list) else []
    named = {str(c["id"]): c for c in cards if isinstance(c, dict) and c.get("id")}
    if not named:
        raise Unavailable("it lists no model")
    return named


async def complete(endpoint: Endpoint, body: dict, most_tokens: int, *, seconds: float) -> dict:
    """The first choice of a chat completion; Unavailable where the reply is something else.
    A server that refuses `max_tokens` by name is asked with `max_completion_tokens`, one that does
    not support a seed, a temperature or top_p without it, then and later; stderr tells."""
    body, until = body | {"max_tokens": most_tokens}, time.monotonic() + seconds
    while True:
        sent = {name: body[key] for key in body if (name := endpoint.keys.get(key, key))}
        try:
            left = until - time.monotonic()
            choice = choice_of(await endpoint.ask("/chat/completions", sent, seconds=left))
            break
        except Refused as refused:
            key = next((key for key in OPTIONAL if key in sent and key in str(refused)), "")
            if refused.status not in (400, 422) or not key or not _UNKNOWN.search(str(refused)):
                raise
            name = "max_completion_tokens" if key == "max_tokens" else ""
            if key not in endpoint.keys:
                how = f"with {name}" if name else "without it"
                print(f"{endpoint.url} takes no {key}, asked {how}: {refused}", file=sys.stderr)
            endpoint.keys[key] = name
    message = choice.get("message")
    said = message.get("content") if isinstance(message, dict) else 0
    if not isinstance(said, (str, list, type(None))):
        raise Unavailable(f"a completion without a message: {str(choice)[:WORDS]}", 200)
    return choice


def choice_of(reply) -> dict:
    """The first choice of a completion; Unavailable where the server sent something else."""
    choices = reply.get("choices") if isinstance(reply, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        raise Unavailable(f"not a completion: {str(reply)[:WORDS]}", 200)
    return choice
