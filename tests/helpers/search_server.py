"""A real HTTP server on loopback: web pages, good and hostile, and the wire formats of search
providers.
"""

import json
import threading
import urllib.parse
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Server:
    host: str  # host:port
    seen: list = field(
        default_factory=list
    )  # (method, path with query, headers in lower case, body)

    @property
    def url(self) -> str:
        return f"http://{self.host}"


@contextmanager
def web_server(routes, tls=None):
    """Serves `routes`: {path: page}, a page being a text or bytes (200, HTML), (status, headers,
    body) or a function of the handler that writes to its `wfile` or returns one of these. The path
    "*" stands for all others."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.body = body
            server.seen.append(
                (self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body)
            )
            self.close_connection = True
            page = routes.get(
                urllib.parse.urlsplit(self.path).path, routes.get("*", (404, {}, "no such page"))
            )
            try:
                page = page(self) if callable(page) else page
                if page is not None:
                    self.send(page)
            except OSError:  # the client has had enough
                pass

        do_GET = do_POST = answer

        def send(self, page):
            status, headers, body = (
                page if isinstance(page, tuple) else (200, {"Content-Type": "text/html"}, page)
            )
            body = body.encode() if isinstance(body, str) else body
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            """Quiet."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if tls:
        http.socket = tls.wrap_socket(http.socket, server_side=True)
    http.handle_error = lambda *_: None  # a client that hangs up is what some tests are about
    server = Server(f"127.0.0.1:{http.server_port}")
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()


def answer(body, status=200):
    return status, {"Content-Type": "application/json"}, json.dumps(body)


KEY = "the-secret-key"


def serper(hits):
    """POST /search {"q", "num"} with X-API-KEY -> {"organic": [{"title", "link", "snippet",
    "position"}]}
    """

    def page(request):
        if request.command != "POST" or request.headers.get("X-API-KEY") != KEY:
            return answer({"message": "Unauthorized.", "statusCode": 403}, 403)
        asked = json.loads(request.body)
        found = [
            {"title": t, "link": u, "snippet": s, "position": i}
            for i, (t, u, s) in enumerate(hits, 1)
        ]
        return answer(
            {
                "searchParameters": {"q": asked["q"], "type": "search"},
                "organic": found[: asked["num"]],
            }
        )

    return {"/search": page}


def brave(hits):
    """GET …/web/search?q&count, X-Subscription-Token -> {"web": {"results": [{"title", "url",
    "description"}]}}
    """

    def page(request):
        if request.command != "GET" or request.headers.get("X-Subscription-Token") != KEY:
            problem = {
                "code": "SUBSCRIPTION_TOKEN_INVALID",
                "detail": "The provided subscription token is invalid.",
            }
            return answer({"type": "ErrorResponse", "error": {"status": 422, **problem}}, 422)
        asked = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(request.path).query))
        if len(asked["q"]) > 400 or not 1 <= int(asked["count"]) <= 20:
            return answer(
                {"type": "ErrorResponse", "error": {"status": 422, "code": "VALIDATION"}}, 422
            )
        found = [
            {"title": t, "url": u, "description": s, "type": "search_result"} for t, u, s in hits
        ]
        return answer(
            {"type": "search", "web": {"type": "search", "results": found[: int(asked["count"])]}}
        )

    return {"/res/v1/web/search": page}


def tavily(hits):
    """POST /search {"query", "max_results"} with a bearer key -> {"results": [{"title", "url",
    "content", "score"}]}
    """

    def page(request):
        if request.command != "POST" or request.headers.get("Authorization") != f"Bearer {KEY}":
            return answer({"detail": {"error": "Unauthorized: missing or invalid API key."}}, 401)
        asked = json.loads(request.body)
        found = [{"title": t, "url": u, "content": s, "score": 0.9} for t, u, s in hits][
            : asked["max_results"]
        ]
        return answer({"query": asked["query"], "results": found, "response_time": 0.5})

    return {"/search": page}


def searxng(hits):
    """GET /search?q&format=json -> {"results": [{"title", "url", "content"}]}; 403 for another
    format
    """

    def page(request):
        asked = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(request.path).query))
        if asked.get("format") != "json":
            return 403, {}, "Forbidden"
        found = [{"title": t, "url": u, "content": s, "engine": "duckduckgo"} for t, u, s in hits]
        return answer(
            {
                "query": asked["q"],
                "number_of_results": 0,
                "results": found,
                "unresponsive_engines": [],
            }
        )

    return {"/search": page}


SPOKEN = {"serper": serper, "brave": brave, "tavily": tavily, "searxng": searxng}


def environ_of(name: str, server: Server) -> dict:
    """What a user sets for a provider, with this server in its place."""
    if name == "searxng":
        return {"SEARXNG_URL": server.url}
    return {f"{name.upper()}_API_KEY": KEY, f"{name.upper()}_URL": server.url}
