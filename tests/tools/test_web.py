"""The web of the tools against real servers on loopback. Numbers are those of the list of attacks
on the tools.
"""

import contextlib
import gzip
import itertools
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from tests.helpers.search_server import KEY, SPOKEN, answer, environ_of, web_server
from tests.helpers.tiny import ROOT
from toolkit import http, web
from toolkit.sandbox import ToolError, ToolFault
from toolkit.web import Page, Web, checked, fetch, is_public, text_of

HITS = [
    ("Lima", "https://a.org/lima", "Lima is the capital."),
    ("Peru", "https://b.org/peru", "A <strong>country</strong>."),
]
ARTICLE = "".join(
    f"<p>Paragraph {i} tells of the harbour and of its ships, at some length.</p>"
    for i in range(12)
)
HTML = (
    "<html><head><title>The "
    f"harbour</title></head><body><article><h1>Ships</h1>{ARTICLE}</article></body></html>"
)


def says(*addresses):
    """A resolver that knows one answer, and counts how often it is asked."""

    def resolve(host, port, type):
        resolve.asked.append(host)
        kinds = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in addresses]
        return [(kind, type, 6, "", (address, port)) for kind, address in zip(kinds, addresses)]

    resolve.asked = []
    return resolve


def opened(server, path="/", seconds=5.0, **options):
    return fetch(server.url + path, seconds=seconds, allow={server.host}, **options)


def read(server, path="/"):
    return text_of(opened(server, path), 20.0)


# --------------------------------------------------------------------------------------------------
# 60-63, 71: addresses

LOOPBACK = (
    "127.0.0.1 localhost 127.1 2130706433 0x7f000001 0177.0.0.1 0 [::1] [::ffff:127.0.0.1] "
    "①②⑦.⓪.⓪.① LOCALHOST "
)
LOOPBACK += "localhost. 127.000.000.001 [0:0:0:0:0:0:0:1]"


@pytest.mark.parametrize("host", LOOPBACK.split())
def test_060_every_spelling_of_loopback_is_refused(host):
    with pytest.raises(ToolError, match="not on the public web"):
        checked(f"http://{host}/")


@pytest.mark.parametrize(
    "address",
    "169.254.169.254 fd00:ec2::254 100.64.0.1 198.18.0.1 10.1.2.3 172.16.0.1 192.168.1.1 0.0.0.0 "
    "224.0.0.1 239.1.1.1 "
    "255.255.255.255 240.0.0.1 192.0.0.192 192.88.99.1 168.63.129.16 100.100.100.200 "
    "64:ff9b::7f00:1 64:ff9b::a00:1 "
    "2002:7f00:1:: 2001:0:7f00:1:: ::ffff:10.0.0.1 ::ffff:0:7f00:1 ::127.0.0.1 fe80::1 "
    "fe80::1%eth0 fec0::1 ff02::1 :: "
    "::1 100::1 2001:db8::1 fc00::1".split(),
)
def test_061_addresses_that_are_not_of_the_public_web_are_refused(address):
    assert not is_public(address)
    with pytest.raises(ToolError, match="not on the public web"):
        checked("http://metadata.google.internal/", resolve=says(address))


@pytest.mark.parametrize(
    "address",
    "1.1.1.1 8.8.8.8 93.184.216.34 192.0.2.1 2606:4700::1111 2a00:1450::1 ::ffff:8.8.8.8".split(),
)
def test_061_public_addresses_are_open(address):
    assert is_public(address) == (address != "192.0.2.1")  # that one is for documentation


@pytest.mark.parametrize(
    "url",
    "file:///etc/passwd ftp://a.org/x gopher://a.org data:text/html,x javascript:alert(1) "
    "jar:http://a.org!/x "
    "unix:/run/x //a.org/x a.org/x http: http:// http:///x https:a.org about:blank".split()
    + ["", "  ", "http://a b.org/"],
)
def test_062_other_schemes_are_refused(url):
    scheme_or_host = "an address begins with http|the host must be a plain name"
    with pytest.raises(ToolError, match=scheme_or_host):
        checked(url, resolve=says("1.1.1.1"))


@pytest.mark.parametrize(
    "url, host",
    [
        ("http://good.com@127.0.0.1/", None),
        ("http://127.0.0.1#@good.com", "127.0.0.1"),
        ("http://127.0.0.1\\@good.com", None),
        ("http://good.com\t@127.0.0.1/", None),
        ("http://good.com%2f@127.0.0.1/", None),
        ("http://good.com:80:80/", None),
        ("http://good.com:-1/", None),
        ("http://good.com:99999/", None),
        ("http://127.0.0.1%00.good.com/", None),
        ("http://[::1]good.com/", None),
        ("http://good.com?@127.0.0.1", "good.com"),
        ("http://" + "a" * 300 + ".com/", None),
        ("http://a.com/" + "a" * 9000, None),
    ],
)
def test_063_a_url_is_judged_on_its_real_host(url, host):
    resolve = says("1.1.1.1")
    if host is None:
        with pytest.raises(ToolError, match="plain name|not a web address|no address has"):
            checked(url, resolve=resolve)
        assert resolve.asked == []
    else:
        assert checked(url, resolve=resolve).host == host and resolve.asked == [host]


@pytest.mark.parametrize("port", [22, 25, 6379, 8000, 8443])
def test_071_other_ports_are_closed_unless_allowed(port):
    with pytest.raises(ToolError, match=f"Port {port}"):
        checked(f"http://a.org:{port}/", resolve=says("1.1.1.1"))
    assert checked(f"http://a.org:{port}/", {f"a.org:{port}"}, says("10.0.0.1")).port == port


def test_an_allowed_pair_opens_nothing_else():
    refused = {
        "http://127.0.0.1:80/": "not on the public web",
        "http://127.0.0.2:8080/": "Port 8080",
    }
    for other, problem in refused.items():
        with pytest.raises(ToolError, match=problem):
            checked(other, web.allowed_hosts("127.0.0.1:8080"))


@pytest.mark.parametrize("text", ["host", "host:", "http://a.org:80", "a b:80", "a:x"])
def test_an_allow_list_that_cannot_be_read_is_an_error_at_the_start(text):
    with pytest.raises(SystemExit, match="host:port"):
        web.allowed_hosts(text)


# --------------------------------------------------------------------------------------------------
# 64-73: what a server may do


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("http://169.254.169.254/x", "169.254.169.254 is not on the public web"),
        ("file:///etc/passwd", "an address begins with http"),
        ("http://10.0.0.1/", "10.0.0.1 is not on the public web"),
        ("//127.0.0.1:22/", "Port 22 is not open"),
        ("/a b", "answers 404"),  # it was asked for
    ],
)
def test_064_redirects_are_checked_like_the_first_address(target, problem):
    with web_server({"/": (302, {"Location": target}, "")}) as server:
        with pytest.raises(ToolError, match=problem):
            opened(server)
    assert len(server.seen) == (2 if target == "/a b" else 1)


def test_064_five_redirects_are_followed_and_a_loop_ends():
    routes = {f"/{i}": (301 + i % 2, {"Location": f"/{i + 1}"}, "") for i in range(10)}
    with web_server(routes | {"/6": "end", "/loop": (302, {"Location": "/loop"}, "")}) as server:
        assert (
            opened(server, "/1").hops[-1] == server.url + "/6"
            and len(opened(server, "/1").hops) == 6
        )
        for path in ("/0", "/loop"):
            with pytest.raises(ToolError, match="redirects more than 5"):
                opened(server, path)


def test_065_the_checked_address_is_the_one_connected_to():
    """The name exists for this resolver alone: a second look-up could not find the server."""
    with web_server({"/": HTML}) as server:
        port, resolve = server.host.split(":")[1], says("127.0.0.1")
        page = fetch(
            f"http://good.example:{port}/",
            seconds=5,
            allow={f"good.example:{port}"},
            resolve=resolve,
        )
    assert page.body == HTML.encode() and resolve.asked == ["good.example"]
    assert server.seen[0][2]["host"] == f"good.example:{port}"


def test_065_a_name_that_changes_its_address_is_judged_on_each_hop():
    answers = iter(["127.0.0.1", "10.0.0.1"])

    def resolve(host, port, type):
        return says(next(answers))(host, port, type)

    with web_server({"/": (302, {"Location": "http://good.example/"}, "")}) as server:
        port = server.host.split(":")[1]
        with pytest.raises(ToolError, match="not on the public web"):
            fetch(
                f"http://good.example:{port}/",
                seconds=5,
                allow={f"good.example:{port}"},
                resolve=resolve,
            )


@pytest.mark.parametrize(
    "addresses", [("1.1.1.1", "10.0.0.1"), ("10.0.0.1", "1.1.1.1"), ("1.1.1.1", "::1")]
)
def test_066_one_private_address_among_several_is_enough_to_refuse(addresses):
    with pytest.raises(ToolError, match="not on the public web"):
        checked("http://a.org/", resolve=says(*addresses))


def endless(request):
    request.send_response(200)
    request.send_header("Transfer-Encoding", "chunked")
    request.end_headers()
    while True:
        request.wfile.write(b"10000\r\n" + b"a" * 0x10000 + b"\r\n")


def drip(start):
    def page(request):
        request.wfile.write(start)
        for _ in range(100):
            time.sleep(0.1)
            request.wfile.write(b"a")

    return page


def test_067_an_endless_page_ends_at_the_byte_cap():
    with web_server({"/": endless, "/long": (200, {"Content-Length": str(10**10)}, "")}) as server:
        for path in ("/", "/long"):
            with pytest.raises(ToolError, match="larger than 1 MiB"):
                opened(server, path, most_bytes=1 << 20)


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 200 OK\r\nX: ",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n",
    ],
    ids=["status", "headers", "header", "body", "length"],
)
def test_067_a_server_that_drips_ends_at_the_deadline(start):
    with web_server({"/": drip(start)}) as server:
        began = time.monotonic()
        with pytest.raises(ToolError, match="too long"):
            opened(server, seconds=0.5)
        assert time.monotonic() - began < 1.5


def test_067_a_host_that_does_not_answer_ends_at_the_deadline():
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        host = f"127.0.0.1:{listener.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(ToolError, match="too long"):
            fetch(f"http://{host}/", seconds=0.5, allow={host})
        assert time.monotonic() - began < 1.5


def test_068_a_packed_page_is_capped_after_unpacking():
    bomb = gzip.compress(b"a" * (50 << 20))
    packed = {"Content-Encoding": "gzip"}
    routes = {
        "/bomb": (200, packed, bomb),
        "/ok": (200, packed, gzip.compress(b"ab") + gzip.compress(b"cd")),
        "/br": (200, {"Content-Encoding": "br"}, b"x"),
        "/lie": (200, packed, b"plain"),
        "/cut": (200, packed, gzip.compress(HTML.encode())[:-20]),
    }
    with web_server(routes) as server:
        assert read(server, "/ok") == ("", "abcd") and len(bomb) < 100_000
        for path, told in (
            ("/bomb", "larger than 10 MiB"),
            ("/br", "packed as br"),
            ("/lie", "not packed as it says"),
            ("/cut", "ended before the end"),
        ):
            with pytest.raises(ToolError, match=told):
                read(server, path)


def test_068_a_page_that_ends_early_is_not_taken_for_whole():
    with (
        web_server({"/": (200, {"Content-Length": "5000"}, "short")}) as server,
        pytest.raises(ToolError, match="without sending complete message body"),
    ):
        opened(server)


@pytest.mark.parametrize(
    "header",
    [
        "X: " + "a" * (1 << 20),
        "\r\n".join(f"X-{i}: 1" for i in range(10_000)),
        "Content-Length: many",
        "X: \r\n\r\n",
    ],
    ids=["1 MB", "10,000", "length", "split"],
)
def test_070_headers_beyond_reason_are_an_error_or_harmless(header):
    reply = f"HTTP/1.1 200 OK\r\n{header}\r\n\r\nbody"
    with web_server({"/": lambda request: request.wfile.write(reply.encode()) and None}) as server:
        try:
            assert opened(server).body.strip().endswith(b"body")
        except ToolError as error:
            assert len(str(error)) < 500


def test_072_proxies_of_the_environment_are_not_used(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/")
    with web_server({"/": "direct"}) as server:
        assert opened(server).body == b"direct"


def test_073_a_page_sees_no_key_no_cookie_and_no_referrer(monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", KEY)
    routes = {"/": (302, {"Location": "/b", "Set-Cookie": "a=b"}, ""), "/b": HTML}
    with web_server(routes) as server:
        Web({"SERPER_API_KEY": KEY}, allow=server.host).page(server.url + "/", 20)
    for _, path, headers, _ in server.seen:
        assert KEY not in path + str(headers) and not {"cookie", "referer", "authorization"} & set(
            headers
        )


@pytest.mark.parametrize("name", ["serper", "brave", "tavily"])
def test_073_a_key_does_not_follow_a_redirect(name):
    with (
        web_server({"*": "caught"}) as thief,
        web_server({"*": (307, {"Location": thief.url}, "")}) as server,
    ):
        with pytest.raises(ToolFault):
            Web(environ_of(name, server)).search("lima", 5, 5)
    assert len(server.seen) == 1 and thief.seen == []


@pytest.mark.parametrize(
    "name, trusted, opens",
    [("good.example", True, True), ("good.example", False, False), ("evil.example", True, False)],
)
def test_a_certificate_is_checked_against_the_name_in_the_url(
    certificate, monkeypatch, name, trusted, opens
):
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert"))
    http._tls.cache_clear()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate / "cert", certificate / "key")
    with web_server({"/": "secret"}, tls) as server:
        port = server.host.split(":")[1]

        def ask():
            return fetch(
                f"https://{name}:{port}/",
                seconds=5,
                allow={f"{name}:{port}"},
                resolve=says("127.0.0.1"),
            )

        if opens:
            assert ask().body == b"secret"
        else:
            with pytest.raises(ToolError, match="(?i)certificate"):
                ask()
    http._tls.cache_clear()


def test_a_look_up_that_hangs_is_killed(tmp_path, monkeypatch):
    (tmp_path / "getent").write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    (tmp_path / "getent").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    began = time.monotonic()
    with pytest.raises(ToolError, match="took too long to look up"):
        checked("http://a.org/", resolve=partial(web.look_up, seconds=0.5))
    assert time.monotonic() - began < 5
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


@pytest.mark.parametrize(
    "name", ["localhost", "127.1", "2130706433", "::1", "no.such.invalid", "-x"]
)
def test_a_look_up_finds_what_the_library_finds(name):
    def addresses(resolve):
        try:
            return {found[4][0] for found in resolve(name, 80, type=socket.SOCK_STREAM)}
        except OSError:
            return set()

    assert addresses(web.look_up) == addresses(socket.getaddrinfo)


def test_no_name_resolution_at_all_is_a_fault_and_one_unknown_name_an_error():
    def offline(host, port, type):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    def online(host, port, type):
        return (
            says("1.1.1.1")(host, port, type)
            if host == "example.com"
            else offline(host, port, type)
        )

    with pytest.raises(ToolFault, match="no name resolution"):
        checked("http://a.org/", resolve=offline)
    with pytest.raises(ToolError, match="no host 'a.org'"):
        checked("http://a.org/", resolve=online)


@pytest.mark.parametrize("status", [404, 403, 500, 429])
def test_a_page_that_is_not_there_is_an_error_that_names_the_status(status):
    with (
        web_server({"/": (status, {}, "no")}) as server,
        pytest.raises(ToolError, match=f"answers {status}"),
    ):
        opened(server)


# --------------------------------------------------------------------------------------------------
# 69: pages as text


def test_069_an_article_comes_without_its_scripts_and_with_its_links():
    page = HTML.replace(
        "<article>",
        "<script>var tracking = 1</script><nav><a href='/fleet'>The  fleet</a></nav><article>",
    )
    with web_server({"/": page}) as server:
        title, text = read(server)
    assert title == "The harbour" and "Paragraph 11 tells" in text and "tracking" not in text
    assert f"- The fleet: {server.url}/fleet" in text


def test_069_a_page_without_an_article_still_gives_its_words():
    page = (
        "<html><title>a &amp; b</title><style>p {}</style><nav><div>Lima</div><div>Cusco "
        "&lt;3</div></nav></html>"
    )
    with web_server({"/": page}) as server:
        title, text = read(server)
    assert title == "a & b" and text.endswith("Lima\nCusco <3")


@pytest.mark.parametrize(
    "kind, body, told",
    [
        ("application/pdf", HTML.encode(), "Paragraph 3 tells"),  # it lies
        ("image/png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "an image"),
        ("text/html", b"\x7fELF\x02\x01\x01\0\0\0\0", "binary data"),
        ("text/plain", "naïve ☃".encode(), "naïve ☃"),
        ("text/plain", "naïve ☃".encode("utf-16"), "naïve ☃"),
        ("text/plain; charset=gb2312", "你好，世界".encode("gbk"), "你好，世界"),
        ("text/plain; charset=nonsense", "naïve".encode(), "naïve"),
        (
            "text/html",
            b'<html><meta charset="windows-1251"><p>' + "Привет, мир".encode("cp1251"),
            "Привет, мир",
        ),
        ("text/html", b"<p>caf\xe9 au lait " + b"\xff\xfe\xfd" * 20, "caf"),  # invalid in UTF-8
        ("application/json", b'{"population": 12}', '{"population": 12}'),
        ("text/javascript", b"var a=1;" * 25_000, "var a=1;"),
        ("text/html", b"", "(an empty page)"),
        ("", b"no type at all", "no type at all"),
        ("text/html", b"<html>" + b"<div>" * 20_000 + b"deep", ""),
        ("text/html", b"<html>" + b"<script" * 20_000, "without text"),
        ("application/pdf", b"%PDF-1.7 broken", "PDF is damaged"),
    ],
)
def test_069_what_a_page_is_counts_and_not_what_it_claims(kind, body, told):
    with web_server({"/": (200, {"Content-Type": kind}, body)}) as server:
        try:
            text = read(server)[1]
        except ToolError as error:
            text = str(error)
    assert told in text and json.loads(json.dumps(text)) == text


@pytest.mark.parametrize(
    "kind", ["text/html; charset=windows-1251", "text/plain;charset='windows-1251'"]
)
def test_069_the_charset_of_the_header_goes_before_that_of_the_page(kind):
    body = ("<meta charset=koi8-r><p>" if "html" in kind else "") + "Привет, мир"
    with web_server({"/": (200, {"Content-Type": kind}, body.encode("cp1251"))}) as server:
        assert "Привет, мир" in read(server)[1]


@pytest.mark.parametrize("where", ["text/plain; charset=%s", "<html><meta charset=%s><p>"])
@pytest.mark.parametrize("charset", ["punycode", "idna", "unicode_escape", "utf-7", "hex", "zip"])
def test_a_charset_that_costs_more_than_reading_is_not_used(charset, where):
    body = b"plain words " * 20_000
    page = Page("http://a.b/", "", where.encode() % charset.encode() + body, ())
    if "plain" in where:
        page = Page("http://a.b/", where % charset, body, ())
    began = time.monotonic()
    assert "plain words" in text_of(page, 5)[1] and time.monotonic() - began < 4


@pytest.mark.parametrize("size", [1, 4, 10])
def test_a_body_of_empty_packed_members_costs_no_more_than_reading(size):
    empty = gzip.compress(b"", mtime=0)
    body = empty * ((size << 20) // len(empty))
    began = time.monotonic()
    with contextlib.suppress(ToolError):  # of a large one at its deadline
        assert text_of(Page("http://a.b/", "", body, (), "gzip"), 2)[1] == "(an empty page)"
    assert time.monotonic() - began < 3


def test_members_that_span_pieces_are_unpacked_whole():
    text = "".join(f"line {i} of many\n" for i in range(20_000))
    parts = [gzip.compress(text[i : i + 7001].encode()) for i in range(0, len(text), 7001)]
    assert text_of(Page("http://a.b/", "", b"".join(parts), (), "gzip"), 10) == ("", text)


def test_a_pdf_gives_its_text():
    stream = b"BT /F1 24 Tf 72 700 Td (The tide is at noon) Tj ET"
    parts = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 4 0 R"
        b"/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<</Length %d>>stream\n%s\nendstream" % (len(stream), stream),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    body = b"%PDF-1.4\n" + b"".join(
        b"%d 0 obj%sendobj\n" % (i, part) for i, part in enumerate(parts, 1)
    )
    with web_server({"/": (200, {}, body + b"trailer<</Root 1 0 R/Size 6>>")}) as server:
        assert "The tide is at noon" in read(server)[1]


def test_a_page_that_takes_too_long_to_read_is_given_up():
    hard = b"<html><p " + b" ".join(b"a%d" % i for i in range(300_000)) + b">x"
    with web_server({"/": hard}) as server:
        page = opened(server)
        began = time.monotonic()
        with pytest.raises(ToolError, match="too long to read"):
            text_of(page, 0.3)
        assert time.monotonic() - began < 1.3


# --------------------------------------------------------------------------------------------------
# 75: search providers


@pytest.mark.parametrize("name", SPOKEN)
def test_the_wire_format_of_each_provider(name):
    with web_server(SPOKEN[name](HITS)) as server:
        found = Web(environ_of(name, server)).search("capital of Peru?", 2, 5)
        assert Web(environ_of(name, server)).search("one", 1, 5) == found[:1]
    assert found == [
        ("Lima", "Lima is the capital.", "https://a.org/lima"),
        ("Peru", "A country.", "https://b.org/peru"),
    ]


@pytest.mark.parametrize("name", SPOKEN)
def test_075_a_provider_without_hits_gives_none(name):
    with (
        web_server(SPOKEN[name]([])) as server,
        web_server({"*": answer({"results": None, "organic": 7, "web": []})}) as odd,
    ):
        assert (
            Web(environ_of(name, server)).search("x", 5, 5)
            == []
            == Web(environ_of(name, odd)).search("x", 5, 5)
        )


@pytest.mark.parametrize("name", ["serper", "brave", "tavily"])
def test_075_a_wrong_key_is_a_fault_at_once(name):
    with web_server(SPOKEN[name](HITS)) as server:
        environ = environ_of(name, server) | {f"{name.upper()}_API_KEY": "wrong"}
        with pytest.raises(ToolFault, match=name):
            Web(environ).search("x", 5, 5)
    assert len(server.seen) == 1


QUOTA = {"message": "Not enough credits", "statusCode": 400}
FAILURES = {
    "429": answer({"message": "slow down"}, 429),
    "500": (500, {}, "oops"),
    "html": "<html>maintenance</html>",
    "list": (200, {}, "[" * 100_000),
    "empty": (200, {}, ""),
    "gone": lambda request: None,
}


@pytest.mark.parametrize("failure", FAILURES)
def test_075_a_failing_provider_is_asked_again_a_few_times_then_a_fault(failure):
    with web_server({"/search": FAILURES[failure]}) as server:
        began = time.monotonic()
        with pytest.raises(ToolFault, match="searxng failed"):
            Web(environ_of("searxng", server)).search("x", 5, 1.5)
        assert time.monotonic() - began < 2
    assert 2 <= len(server.seen) <= 4


def test_075_a_slow_provider_is_a_fault_at_the_deadline():
    with web_server({"/search": drip(b"HTTP/1.1 200 OK\r\n\r\n{")}) as server:
        began = time.monotonic()
        with pytest.raises(ToolFault):
            Web(environ_of("searxng", server)).search("x", 5, 2)
        assert time.monotonic() - began < 3
    assert len(server.seen) >= 2


def test_075_a_provider_that_recovers_is_used_after_the_time_it_asks_for():
    replies = itertools.chain(
        [(429, {"Retry-After": "1"}, "")], itertools.repeat(answer({"results": []}))
    )
    with web_server({"/search": lambda request: next(replies)}) as server:
        began = time.monotonic()
        assert Web(environ_of("searxng", server)).search("x", 5, 8) == []
        assert 1 <= time.monotonic() - began < 3


def test_075_a_wait_beyond_the_deadline_is_not_begun():
    with web_server({"/search": (429, {"Retry-After": "600"}, "")}) as server:
        began = time.monotonic()
        with pytest.raises(ToolFault, match="429"):
            Web(environ_of("searxng", server)).search("x", 5, 8)
        assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "reply, error",
    [
        (answer(QUOTA, 400), ToolFault),
        (answer({"detail": "no such thing"}, 400), ToolError),
        (answer({"detail": "plan"}, 432), ToolFault),
        ((403, {}, ""), ToolFault),
    ],
)
def test_075_a_quota_is_our_fault_and_a_bad_request_the_models(reply, error):
    with web_server({"/search": reply}) as server, pytest.raises(error):
        Web(environ_of("searxng", server)).search("x", 5, 5)
    assert len(server.seen) == 1


def test_075_a_long_query_is_cut_to_what_providers_take():
    with web_server(SPOKEN["brave"](HITS)) as server:
        assert len(Web(environ_of("brave", server)).search("word " * 2000, 2, 5)) == 2


def test_without_a_provider_a_search_is_a_fault_that_says_what_to_set():
    with pytest.raises(ToolFault, match="SERPER_API_KEY"):
        Web({}).search("x", 5, 5)


@pytest.mark.parametrize(
    "environ, told",
    [
        ({"SEARCH_PROVIDER": "google"}, "no such provider"),
        ({"SEARCH_PROVIDER": "brave", "SERPER_API_KEY": "x"}, "key is not set"),
        ({"SUMMARY_URL": "http://a.org"}, "SUMMARY_MODEL"),
    ],
)
def test_settings_that_cannot_work_are_an_error_at_the_start(environ, told):
    with pytest.raises(SystemExit, match=told):
        Web(environ)


def test_of_several_providers_the_named_one_is_asked():
    with web_server(SPOKEN["tavily"](HITS)) as server, web_server({}) as other:
        environ = (
            environ_of("serper", other)
            | environ_of("tavily", server)
            | {"SEARCH_PROVIDER": "tavily"}
        )
        assert len(Web(environ).search("x", 5, 5)) == 2 and other.seen == []


# --------------------------------------------------------------------------------------------------
# endpoints that read pages


def test_the_reader_service_gets_the_address_and_only_it_the_key():
    def page(request):
        assert (
            request.headers["Accept"] == "application/json"
            and request.headers["Authorization"] == f"Bearer {KEY}"
        )
        data = {
            "title": "Lima",
            "url": request.path[1:],
            "content": "Read by a service.",
            "description": "",
        }
        return answer({"code": 200, "status": 20000, "data": data})

    with web_server({"*": page}) as server, web_server({"/": HTML}) as intranet:
        mine = Web({"JINA_API_KEY": KEY, "JINA_URL": server.url}, allow=intranet.host)
        assert mine.page("http://1.1.1.1/lima?a=b", 5) == ("Lima", "Read by a service.")
        assert server.seen[0][1] == "/http://1.1.1.1/lima?a=b"
        with pytest.raises(ToolError, match="not on the public web"):
            mine.page("http://10.0.0.1/", 5)
        assert mine.page(intranet.url + "/", 20)[0] == "The harbour" and len(server.seen) == 1


@pytest.mark.parametrize("status", [400, 401])
def test_073_an_endpoint_that_repeats_the_key_does_not_tell_it_to_the_model(status):
    with web_server(
        {"*": lambda request: answer({"detail": f"{'x' * 150} no to {KEY}, Bearer {KEY}"}, status)}
    ) as server:
        with pytest.raises((ToolError, ToolFault)) as told:
            Web({"JINA_API_KEY": KEY, "JINA_URL": server.url}).page("http://1.1.1.1/", 5)
    assert "no to [key]" in str(told.value) and not any(
        KEY[:n] in str(told.value) for n in range(4, len(KEY) + 1)
    )


def chat(content):
    def page(request):
        body = json.loads(request.body)
        assert request.headers["Authorization"] == f"Bearer {KEY}" and body["model"] == "small"
        return answer(
            {
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": content(body["messages"])},
                    }
                ]
            }
        )

    return {"/v1/chat/completions": page}


def test_the_summariser_is_given_page_and_query_and_its_thoughts_are_left_out():
    def content(messages):
        assert (
            "Looked for: tide" in messages[-1]["content"] and "at noon" in messages[-1]["content"]
        )
        return "<think>hm</think>At noon.<think>or is it"

    with web_server(chat(content)) as server:
        mine = Web(
            {"SUMMARY_URL": server.url + "/v1", "SUMMARY_MODEL": "small", "SUMMARY_API_KEY": KEY}
        )
        assert mine.answer("http://a.org", "The tide is at noon", "tide", 5) == "At noon."


@pytest.mark.parametrize(
    "reply",
    [
        answer({"error": "context too long"}, 400),
        answer({"choices": []}),
        answer([]),
        (500, {}, ""),
    ],
)
def test_a_failing_summariser_is_a_fault_never_the_models_error(reply):
    with web_server({"*": reply}) as server, pytest.raises(ToolFault, match="summary endpoint"):
        Web({"SUMMARY_URL": server.url, "SUMMARY_MODEL": "small"}).answer(
            "http://a.org", "text", "query", 1
        )


# --------------------------------------------------------------------------------------------------
# 74: the block list


def blocked(tmp_path, *lines):
    path = tmp_path / "block.txt"
    path.write_text("\n".join(["# mirrors", "", *lines]))
    return str(path)


@pytest.mark.parametrize(
    "url, hidden",
    [
        ("https://huggingface.co/datasets/gaia-benchmark/GAIA", True),
        ("https://HuggingFace.co//datasets%2Fgaia-benchmark/", True),
        ("https://huggingface.co/datasets/gaia-benchmark-2", True),
        ("https://web.archive.org/web/2024/https://huggingface.co/datasets/gaia-benchmark", True),
        ("https://huggingface.co/papers/1", False),
        ("http://mirror.org/x", True),
        ("http://www.mirror.org:8080/", True),
        ("https://r.jina.ai/http://mirror.org/x", True),
        ("https://cache.net/?u=http%253A%252F%252Fmirror.org", True),
        ("http://notmirror.org/", False),
        ("http://mirror.org.uk/", False),
        ("http://my-mirror.org/", False),
    ],
)
def test_074_a_blocked_address_is_known_in_every_spelling(tmp_path, url, hidden):
    listed = web.Blocklist(
        blocked(tmp_path, "huggingface.co/datasets/gaia-benchmark", "https://mirror.org")
    )
    assert listed.blocks(url) == hidden and listed.count == hidden


def test_074_comments_and_empty_lines_of_a_block_list_block_nothing(tmp_path):
    listed = web.Blocklist(blocked(tmp_path, "# a.org", "#c.org/x", "", "  ", " https://B.org/ "))
    for url, hidden in (("http://a.org/", False), ("https://c.org/x", False), ("c.com", False)):
        assert listed.blocks(url) is hidden
    assert listed.blocks("http://x.org/", "http://b.org/") and listed.count == 1


def test_074_blocked_results_and_pages_are_left_out_and_counted(tmp_path):
    routes = {"/": HTML, "/short": (302, {"Location": "/gaia/1"}, ""), "/gaia/1": HTML}
    with web_server(SPOKEN["serper"](HITS)) as server, web_server(routes) as pages:
        mine = Web(
            environ_of("serper", server),
            block=blocked(tmp_path, "a.org", "/gaia/"),
            allow=pages.host,
        )
        assert [url for _, _, url in mine.search("x", 5, 5)] == [
            "https://b.org/peru"
        ] and mine.blocklist.count == 1
        for path in ("/gaia/1", "/short"):
            with pytest.raises(ToolError, match="block list"):
                mine.page(pages.url + path, 20)
        assert mine.blocklist.count == 3 and mine.page(pages.url + "/", 20)[0] == "The harbour"


@pytest.mark.parametrize("path", ["/gaia/1", "/moved", "/free"])
def test_074_a_page_is_blocked_by_where_a_reader_found_it_too(path, tmp_path):
    """The reader follows redirects of its own and says where it ended."""
    ended = {"/gaia/1": "/gaia/1", "/moved": "/gaia/2", "/free": "/free"}[path]
    data = {"title": "t", "url": f"http://1.1.1.1{ended}", "content": "Read by a service."}
    with web_server({"*": answer({"data": data})}) as server:
        environ = {"JINA_API_KEY": KEY, "JINA_URL": server.url}
        mine = Web(environ, block=blocked(tmp_path, "/gaia/"))
        if path == "/free":
            assert mine.page(f"http://1.1.1.1{path}", 5) == ("t", "Read by a service.")
        else:
            with pytest.raises(ToolError, match="block list"):
                mine.page(f"http://1.1.1.1{path}", 5)
    assert len(server.seen) == (path != "/gaia/1") and mine.blocklist.count == (path != "/free")


def test_a_missing_block_list_is_an_error_at_the_start():
    with pytest.raises(SystemExit, match="no block list"):
        Web({}, block="no/such/file")


# --------------------------------------------------------------------------------------------------
# the cache


def test_a_second_run_is_answered_from_the_cache_and_a_replay_without_keys(tmp_path):
    cache = str(tmp_path / "calls.sqlite")
    with web_server(SPOKEN["serper"](HITS)) as server, web_server({"/": HTML}) as pages:
        first = Web(environ_of("serper", server), cache=cache, allow=pages.host)
        found, page = first.search("x", 5, 5), first.page(pages.url + "/", 20)
        again = Web(environ_of("serper", server), cache=cache, allow=pages.host)
        assert again.search("x", 5, 5) == found and again.page(pages.url + "/", 20) == page
        assert len(server.seen) == len(pages.seen) == 1
    replay = Web({}, cache=cache, replay=True)
    assert replay.search("x", 5, 5) == found and replay.page(pages.url + "/", 20) == page
    with pytest.raises(ToolFault, match='no answer for search .*"other"'):
        replay.search("other", 5, 5)
    with pytest.raises(ToolFault, match='"top_k": 6'):
        replay.search("x", 6, 5)


def test_the_block_list_holds_for_what_the_cache_answers(tmp_path):
    cache = str(tmp_path / "calls.sqlite")
    with web_server(SPOKEN["serper"](HITS)) as server:
        Web(environ_of("serper", server), cache=cache).search("x", 5, 5)
    replay = Web({}, cache=cache, replay=True, block=blocked(tmp_path, "a.org"))
    assert [url for _, _, url in replay.search("x", 5, 5)] == [
        "https://b.org/peru"
    ] and replay.blocklist.count == 1


def test_an_error_is_asked_again_but_replayed_as_it_was_and_a_fault_is_not_kept(tmp_path):
    cache = str(tmp_path / "calls.sqlite")
    routes = {"/page": (404, {}, ""), "/search": (500, {}, "")}
    with web_server(routes) as server:
        mine = Web(environ_of("searxng", server), cache=cache, allow=server.host)
        with pytest.raises(ToolError, match="answers 404"):
            mine.page(server.url + "/page", 5)
        with pytest.raises(ToolFault):
            mine.search("x", 5, 0.5)
        replay = Web({}, cache=cache, replay=True)
        with pytest.raises(ToolError, match="answers 404"):
            replay.page(server.url + "/page", 5)
        with pytest.raises(ToolFault, match="no answer"):
            replay.search("x", 5, 5)
        routes |= {"/page": HTML, **SPOKEN["searxng"](HITS)}
        assert (
            mine.page(server.url + "/page", 20)[0] == "The harbour"
            and len(mine.search("x", 5, 5)) == 2
        )
    assert replay.page(server.url + "/page", 5)[0] == "The harbour"


def test_a_cache_keeps_two_providers_apart_and_replays_the_last(tmp_path):
    cache = str(tmp_path / "calls.sqlite")
    with web_server(SPOKEN["serper"](HITS)) as one, web_server(SPOKEN["brave"](HITS[:1])) as two:
        assert len(Web(environ_of("serper", one), cache=cache).search("x", 5, 5)) == 2
        assert len(Web(environ_of("brave", two), cache=cache).search("x", 5, 5)) == 1
    assert len(Web({}, cache=cache, replay=True).search("x", 5, 5)) == 1


@pytest.mark.parametrize("options", [{"replay": True}, {"replay": True, "cache": "no/such.sqlite"}])
def test_a_replay_of_nothing_is_an_error_at_the_start(options):
    with pytest.raises(SystemExit, match="replay"):
        Web({}, **options)


def test_the_cache_holds_under_threads_and_processes(tmp_path):
    cache, count = str(tmp_path / "calls.sqlite"), 40
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from toolkit.web import Cache; c = "
        f"Cache({cache!r}, {{}}, False)\n"
        f"for i in range({count}): assert c.through('t', {{'i': i}}, lambda: i * i) == i * i"
    )
    others = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    mine = web.Cache(cache, {}, False)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: mine.through("t", {"i": i}, lambda: i * i), range(count)))
    assert [other.wait(30) for other in others] == [0, 0] and found == [i * i for i in range(count)]
    replay = web.Cache(cache, {}, True)
    assert [replay.through("t", {"i": i}, None) for i in range(count)] == found


def test_pages_are_fetched_side_by_side():
    met = threading.Barrier(8, timeout=5)

    def page(request):
        met.wait()
        return "together"

    with web_server({"/": page}) as server, ThreadPoolExecutor(8) as pool:
        assert {page.body for page in pool.map(lambda _: opened(server), range(8))} == {b"together"}
