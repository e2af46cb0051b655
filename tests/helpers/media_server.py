"""A server on the loopback that speaks the OpenAI formats for images and recordings, and remembers
what it received.
"""

import base64
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def multipart(content_type: str, body: bytes):
    """(name, (head, content)) of every part."""
    boundary = (
        b"--" + re.fullmatch(r"multipart/form-data; boundary=(\S+)", content_type)[1].encode()
    )
    first, *parts, last = (b"\r\n" + body).split(b"\r\n" + boundary)
    if first or last != b"--\r\n":
        raise ValueError("not a whole multipart body")
    for part in parts:
        head, _, content = part.partition(b"\r\n\r\n")
        yield re.search(rb'name="([^"]*)"', head)[1].decode(), (head.decode(), content)


class MediaServer:
    """`plays`: answers to give first, (status, headers, body) each, or "hang", "drip" or "drip
    head"; then it answers properly: with the type and size of the image and the question, or with
    the number and size of the recording.

    `seen`: {"path", "headers", "model", "question", "mime", "file", "name"} of every request.
    """

    def __init__(self, *plays):
        self.plays, self.seen = list(plays), []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.seen.append({"path": self.path, "headers": dict(self.headers.items())})
                self.reply(200, {}, b"{}")

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                seen = {
                    "path": self.path,
                    "headers": {k.lower(): v for k, v in self.headers.items()},
                }
                try:
                    answer = outer.understood(seen, body)
                except (
                    KeyError,
                    ValueError,
                    TypeError,
                ) as error:  # not the format: what a real server would say
                    return self.reply(
                        400,
                        {},
                        json.dumps({"error": {"message": f"malformed: {error!r}"}}).encode(),
                    )
                outer.seen.append(seen)
                play = outer.plays.pop(0) if outer.plays else (200, {}, json.dumps(answer).encode())
                if play == "hang":
                    time.sleep(20)
                elif play == "drip":
                    self.drip(b" ")
                elif play == "drip head":
                    self.drip(b"X-A: b\r\n", ended=False)
                else:
                    self.reply(*play)

            def reply(self, status, headers, body):
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def drip(self, piece, ended=True):
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                if ended:
                    self.end_headers()
                else:
                    self.flush_headers()
                for _ in range(80):
                    self.wfile.write(piece)
                    self.wfile.flush()
                    time.sleep(0.1)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *args: None  # callers that hang up are part of the tests
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def understood(self, seen: dict, body: bytes) -> dict:
        """Fills `seen` from a request and returns the proper answer; KeyError, ValueError or
        TypeError if it is malformed.
        """
        if seen["path"] == "/v1/chat/completions":
            request = json.loads(body)
            (message,) = request["messages"]
            text, image = message["content"]
            match = re.fullmatch(
                r"data:([\w/]+);base64,([A-Za-z0-9+/=]+)", image["image_url"]["url"]
            )
            if (
                message["role"] != "user"
                or (text["type"], image["type"]) != ("text", "image_url")
                or not match
            ):
                raise ValueError("not a question and an image")
            file = base64.b64decode(match[2], validate=True)
            seen |= {
                "model": request["model"],
                "question": text["text"],
                "mime": match[1],
                "file": file,
            }
            content = f"{match[1]} of {len(file)} bytes: {text['text']}"
            choice = {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": content},
            }
            return {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": request["model"],
                "choices": [choice],
            }
        if seen["path"] == "/v1/audio/transcriptions":
            parts = dict(multipart(seen["headers"]["content-type"], body))
            (head, file), (_, model), (_, form) = (
                parts["file"],
                parts["model"],
                parts["response_format"],
            )
            if form != b"json":
                raise ValueError("response_format")
            name, mime = (
                re.search(r'filename="([^"]*)"', head)[1],
                re.search(r"content-type: (\S+)", head, re.I)[1],
            )
            seen |= {"model": model.decode(), "mime": mime, "file": file, "name": name}
            return {"text": f"words {len(self.seen)}"}
        raise KeyError(seen["path"])

    def close(self):
        self.server.shutdown()
        self.server.server_close()
