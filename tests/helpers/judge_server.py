"""A real HTTP server on loopback that speaks the chat completions format and plays a reward
model.
"""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def hashed_judgment(text: str) -> str:
    """A judgment whose score depends on the text alone: repeatable, and different for different
    trajectories.
    """
    score = hashlib.sha256(text.encode()).digest()[0] / 255
    return (
        "<think>Read.</think><critique>Look at the tool results "
        f"again.</critique><score>{score:.3f}</score>"
    )


@contextmanager
def serving(handler, port=0):
    """The handler's requests are answered while this holds; yields the base URL."""
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def judge_server(reply=hashed_judgment, whole=False):
    """Serves; yields (base URL, list of user texts, or of whole requests). `reply(text)` ->
    content, a message, an int: that HTTP error, or bytes: that body."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send(
                {
                    "object": "list",
                    "data": [{"id": "judge", "object": "model", "created": 0, "owned_by": "test"}],
                }
            )

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = request["messages"][-1]["content"]
            seen.append(request if whole else text)
            content = reply(text)
            if isinstance(content, int):
                return self.send({"error": {"message": "no"}}, content)
            if isinstance(content, bytes):
                return self.send(content)
            message = content if isinstance(content, dict) else {"content": content}
            choice = {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", **message},
            }
            self.send(
                {
                    "id": "1",
                    "object": "chat.completion",
                    "created": 0,
                    "model": "judge",
                    "choices": [choice],
                }
            )

        def send(self, body, status=200):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            """Quiet."""

    with serving(Handler) as url:
        yield url, seen
