"""Images and recordings that come with a question, through OpenAI-compatible endpoints. A file is
sent as what its header says it is, within limits on bytes, pixels and seconds. Each endpoint has an
address, a model and a key of its own, which is sent to its own host only, and never redirected:

    VISION_URL, VISION_MODEL, VISION_API_KEY    chat completions with an image, for describe_image
    SPEECH_URL, SPEECH_MODEL, SPEECH_API_KEY    audio/transcriptions, for transcribe_audio
"""

import base64
import io
import os
import shutil
import time
import wave
from collections.abc import Iterator

from toolkit.files import in_child, opened, read, running
from toolkit.sandbox import ToolError, ToolFault
from toolkit.web import asked

MOST_IMAGE_BYTES, MOST_PIXELS = 20 << 20, 50_000_000
MOST_AUDIO_BYTES, MOST_AUDIO_SECONDS = 100 << 20, 7200
PIECE_BYTES, PIECE_SECONDS = 24 << 20, 600  # of a recording in one request
AUDIO_TYPES = {"mp3": "audio/mpeg", "m4a": "audio/mp4"}  # others are audio/KIND


def image_size(body: bytes) -> tuple[str, int, int]:
    """(type, width, height) of a png, jpeg, gif or webp image, which stays packed; ToolError."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # whoever asks for a size has a limit of their own
    try:
        image = Image.open(io.BytesIO(body), formats=("PNG", "JPEG", "GIF", "WEBP"))
    except Exception as error:  # a damaged header fails in any way
        raise ToolError("The file is no png, jpeg, gif or webp image, or is damaged.") from error
    kind = image.format.lower()
    return ("jpeg" if kind == "mpo" else kind), *image.size


def describe_image(files_dir: str, path: str, question: str, *, seconds: float) -> str:
    """The vision endpoint's answer about a png, jpeg, gif or webp of up to 20 MB and 50 million
    pixels, sent as it is; ToolError for any other file, ToolFault if the endpoint fails."""
    with _open(files_dir, path, MOST_IMAGE_BYTES) as stream:
        body = stream.read(MOST_IMAGE_BYTES)
    kind, width, height = image_size(body)
    if not 0 < width * height <= MOST_PIXELS:
        raise ToolError(f"It has {width:,} x {height:,} pixels; up to {MOST_PIXELS:,} can be seen.")
    url = f"data:image/{kind};base64,{base64.b64encode(body).decode()}"
    content = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": url}}]
    text = asked("vision", {"messages": [{"role": "user", "content": content}]}, seconds)
    if not text:
        raise ToolFault("the vision endpoint answers without a text")
    return text


def transcribe_audio(files_dir: str, path: str, *, seconds: float) -> str:
    """The words of a wav, mp3, flac, ogg or m4a recording in `files_dir`, from the speech endpoint;
    a long one goes in pieces of up to ten minutes, which ffmpeg cuts. Up to 100 MB and two hours,
    else ToolError; ToolFault if the endpoint fails or ffmpeg is missing."""
    deadline = time.monotonic() + seconds
    with _open(files_dir, path, MOST_AUDIO_BYTES) as stream:
        found = in_child(stream.fileno(), {"do": "audio"}, seconds)
        kind, length = found["kind"], found["seconds"] or 0.0
        stream.seek(0)
        body = stream.read(MOST_AUDIO_BYTES)
        if length > MOST_AUDIO_SECONDS:
            raise ToolError(f"It lasts {length:,.0f} s; up to {MOST_AUDIO_SECONDS:,} can be heard.")
        if len(body) <= PIECE_BYTES and length <= PIECE_SECONDS:
            pieces = iter([(kind, body)])
        else:
            pieces = _ffmpeg_pieces(stream.fileno(), kind, deadline)
        texts = []
        for kind, piece in pieces:
            # the name on our disk is nobody's business; the endpoint goes by its ending
            file = (f"recording.{kind}", piece, AUDIO_TYPES.get(kind, f"audio/{kind}"))
            form = {"file": file, "response_format": "json"}
            texts.append(asked("speech", form, deadline - time.monotonic()))
    return "\n".join(texts).strip() or "(no words were heard)"


def _open(files_dir: str, path: str, most_bytes: int):
    if "::" in path:
        raise ToolError("Images and recordings inside archives cannot be read.")
    return os.fdopen(opened(files_dir, path, most_bytes), "rb")


def _as_wav(data: bytes) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as piece:
        piece.setparams((1, 2, 16_000, 0, "NONE", ""))
        piece.writeframes(data)
    return out.getvalue()


def _ffmpeg_pieces(fd: int, kind: str, deadline: float) -> Iterator[tuple[str, bytes]]:
    """16 kHz mono wav pieces by ffmpeg; its demuxer is set, so no playlist can name other files."""
    if not (ffmpeg := shutil.which("ffmpeg")):
        raise ToolFault("a recording this long is cut by ffmpeg: apt-get install ffmpeg")
    options = "-nostdin -v error -protocol_whitelist file -f {} -i /proc/self/fd/0 -t {} -vn -ac 1 "
    options += "-ar 16000 -f s16le -protocol_whitelist pipe pipe:1"
    options = options.format("mov" if kind == "m4a" else kind, MOST_AUDIO_SECONDS).split()
    with running(fd, {"do": "ffmpeg", "command": [ffmpeg, *options]}, deadline) as pipe:
        data = read(pipe, PIECE_SECONDS * 32_000, deadline)
        if not data:
            raise ToolError("The recording is damaged: ffmpeg finds no sound in it.")
        while data:
            yield "wav", _as_wav(data)
            data = read(pipe, PIECE_SECONDS * 32_000, deadline)
