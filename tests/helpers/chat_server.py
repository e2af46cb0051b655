"""A real HTTP server on loopback that plays a served model: /v1/models, /v1/completions with token
ids, and /v1/chat/completions."""

import json
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler

from tests.helpers.judge_server import serving


@contextmanager
def chat_server(
    reply,
    tokenizer=None,
    *,
    completions=True,
    gives_ids=True,
    max_model_len=4096,
    port=0,
    model="tiny",
):
    """Serves; yields (base URL, list of request bodies).

    reply(prompt text, request) -> text | (text, finish_reason) | an int: that HTTP status | None:
    the connection is cut | bytes: that body, whatever it is. The text of a chat is its last
    message.
    """
    seen, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            card = {"object": "model", "created": 0, "owned_by": "test"}
            card["max_model_len"] = max_model_len
            names = [model] if isinstance(model, str) else model
            self.send({"object": "list", "data": [{"id": name, **card} for name in names]})

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            chat = self.path.endswith("/chat/completions")
            if not chat and not completions:
                return self.send({"error": {"message": "Not Found"}}, 404)
            if not chat and request["prompt"] == [1]:  # the probe of what the server can do
                return self.send(self.completion(request, "a", "length"))
            with lock:
                seen.append(request)
            ids = request.get("prompt", [])
            text = tokenizer.decode(ids) if tokenizer else str(ids)
            said = reply(request["messages"][-1]["content"] if chat else text, request)
            if said is None:
                self.close_connection = True
                return self.connection.shutdown(socket.SHUT_RDWR)
            if isinstance(said, bytes):
                return self.send(said)
            if isinstance(said, int):
                return self.send({"error": {"message": "no"}}, said)
            text, reason = said if isinstance(said, tuple) else (said, "stop")
            if not chat:
                return self.send(self.completion(request, text, reason))
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "finish_reason": reason, "message": message}
            self.send(
                {
                    "id": "1",
                    "object": "chat.completion",
                    "created": 0,
                    "model": model,
                    "choices": [choice],
                }
            )

        def completion(self, request, text, reason):
            ids = tokenizer.encode(text, add_special_tokens=False)
            if reason == "stop":
                ids.append(request["stop_token_ids"][0])
            if len(ids) > request["max_tokens"]:
                ids, reason = ids[: request["max_tokens"]], "length"
            choice = {
                "index": 0,
                "text": tokenizer.decode(ids[:-1] if reason == "stop" else ids),
                "finish_reason": reason,
            }
            choice["logprobs"] = {
                "token_logprobs": [-0.5] * len(ids),
                "tokens": [],
                "text_offset": [],
                "top_logprobs": None,
            }
            if gives_ids and request.get("return_token_ids"):
                choice["token_ids"] = ids
            return {
                "id": "1",
                "object": "text_completion",
                "created": 0,
                "model": model,
                "choices": [choice],
            }

        def send(self, body, status=200):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header(
                "Content-Type", "text/html" if isinstance(body, bytes) else "application/json"
            )
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            """Quiet."""

    with serving(Handler, port) as url:
        yield url, seen
