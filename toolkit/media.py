"""Images and recordings that come with a question, through OpenAI-compatible endpoints.

A file is sent as what its header says it is, within limits on bytes, pixels and seconds that are
checked before. Each endpoint has an address, a model and a key of its own; a key is sent to its own
host only and no redirect is followed:

    VISION_URL, VISION_MODEL, VISION_API_KEY    chat completions with an image, for describe_image
    SPEECH_URL, SPEECH_MODEL, SPEECH_API_KEY    audio/transcriptions, for transcribe_audio
"""

import base64
import io
import os
import re
import shutil
import struct
import time
import wave
from collections.abc import Iterator
from functools import partial

from urllib3.filepost import encode_multipart_formdata

from toolkit.files import opened, read, running
from toolkit.sandbox import ToolError, ToolFault
from toolkit.web import api, bearer

MOST_IMAGE_BYTES, MOST_PIXELS = 20 << 20, 50_000_000
MOST_AUDIO_BYTES, MOST_AUDIO_SECONDS = 100 << 20, 7200
PIECE_BYTES, PIECE_SECONDS = 24 << 20, 600  # of a recording in one request
AUDIO_TYPES = {"mp3": "audio/mpeg", "m4a": "audio/mp4"}  # others are audio/KIND
MP3_FRAME = re.compile(rb"\xff[\xe2\xe3\xea\xeb\xf2\xf3\xfa\xfb]")  # the start of one of layer III
MPEG1_KBITS = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
MPEG2_KBITS = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)


# --------------------------------------------------------------------------------------------------
# what headers say


def image_size(body: bytes) -> tuple[str, int, int]:
    """(type, width, height) of a png, jpeg, gif or webp image, which stays packed; ToolError."""
    from PIL import Image, UnidentifiedImageError

    Image.MAX_IMAGE_PIXELS = None  # whoever asks for a size has a limit of their own
    try:
        image = Image.open(io.BytesIO(body), formats=("PNG", "JPEG", "GIF", "WEBP"))
    except UnidentifiedImageError as error:
        raise ToolError("The file is no png, jpeg, gif or webp image, or is damaged.") from error
    except Exception as error:  # a damaged header fails in any way
        raise ToolError(f"The image is damaged: {error}") from error
    kind = image.format.lower()
    return ("jpeg" if kind == "mpo" else kind), *image.size


def audio_length(body: bytes) -> tuple[str, float | None]:
    """(type, seconds or None if it does not say) of a wav, mp3, flac, ogg or m4a; ToolError."""
    if body[:4] == b"RIFF" and body[8:12] == b"WAVE":
        kind, measure = "wav", _wav_seconds
    elif body[4:8] == b"ftyp":
        kind, measure = "m4a", _m4a_seconds
    elif body[:3] == b"ID3" or MP3_FRAME.match(body):
        kind, measure = "mp3", _mp3_seconds
    elif body[:4] == b"fLaC":
        kind, measure = "flac", _flac_seconds
    elif body[:4] == b"OggS":
        kind, measure = "ogg", _ogg_seconds
    else:
        raise ToolError("The file is not a wav, mp3, flac, ogg or m4a recording.")
    try:
        return kind, measure(body)
    except (struct.error, IndexError, ZeroDivisionError):
        return kind, None


def _wav_seconds(body: bytes) -> float | None:
    at, rate = 12, 0
    while at + 8 <= len(body):
        name, size = struct.unpack_from("<4sI", body, at)
        if name == b"fmt ":
            rate = struct.unpack_from("<I", body, at + 16)[0]
        elif name == b"data":  # a stream may not know its size
            return min(size, len(body) - at - 8) / rate
        at += 8 + size + size % 2
    return None


def _flac_seconds(body: bytes) -> float | None:
    # 20 bits of rate, 3 of channels, 5 of depth, 36 of samples
    packed = int.from_bytes(body[18:26], "big")
    return (packed & (1 << 36) - 1) / (packed >> 44) or None


def _ogg_seconds(body: bytes) -> float | None:
    last = body.rfind(b"OggS")
    samples = struct.unpack_from("<q", body, last + 6)[0]
    at = body.find(b"\x01vorbis", 0, 512)
    rate = struct.unpack_from("<I", body, at + 12)[0] if at >= 0 else 48_000  # Opus: always that
    return samples / rate


def _m4a_seconds(body: bytes) -> float | None:
    start, end = 0, len(body)
    while start + 8 <= end:
        size, name = struct.unpack_from(">I4s", body, start)
        head = 16 if size == 1 else 8
        if size == 1:
            size = struct.unpack_from(">Q", body, start + 8)[0]
        size = size or end - start
        if name == b"mvhd":
            wide = body[start + 8] == 1
            at = start + (28 if wide else 20)
            rate, length = struct.unpack_from(">IQ" if wide else ">II", body, at)
            return length / rate
        if name == b"moov":
            end, start = min(end, start + size), start + head
        else:
            start += max(size, 8)
    return None


def _mp3_seconds(body: bytes) -> float | None:
    tag = 0
    if body[:3] == b"ID3":
        for byte in body[6:10]:
            tag = tag << 7 | byte & 0x7F
        tag += 10
    if not (frame := MP3_FRAME.search(body, tag)):
        return None
    at = frame.start()
    version, second = body[at + 1] >> 3 & 3, body[at + 2]  # 3: MPEG 1, 2: MPEG 2, 0: MPEG 2.5
    rate = (44100, 48000, 32000)[second >> 2 & 3] / {3: 1, 2: 2, 0: 4}.get(version, 0)
    for mark in (b"Xing", b"Info"):  # a header that counts the frames
        found = body.find(mark, at, at + 64)
        if found >= 0 and body[found + 7] & 1:
            frames = struct.unpack_from(">I", body, found + 8)[0]
            return frames * (1152 if version == 3 else 576) / rate
    kbits = (MPEG1_KBITS if version == 3 else MPEG2_KBITS)[second >> 4]
    return (len(body) - at) / (kbits * 125)


# --------------------------------------------------------------------------------------------------
# endpoints


def describe_image(files_dir: str, path: str, question: str, *, seconds: float) -> str:
    """The vision endpoint's answer to `question` about a png, jpeg, gif or webp in `files_dir`.

    The image goes as it is, in a data URI of its true type. ToolError for a file that is no such
    image, that has more than 20 MB or 50 million pixels, or that the endpoint does not take;
    ToolFault if the endpoint fails or is not set.
    """
    deadline = time.monotonic() + seconds
    with os.fdopen(opened(files_dir, _no_member(path), MOST_IMAGE_BYTES), "rb") as stream:
        body = stream.read(MOST_IMAGE_BYTES)
    kind, width, height = image_size(body)
    if not 0 < width * height <= MOST_PIXELS:
        size = f"{width:,} x {height:,} pixels"
        raise ToolError(f"The image has {size}; up to {MOST_PIXELS:,} can be looked at.")
    url = f"data:image/{kind};base64,{base64.b64encode(body).decode()}"
    content = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": url}}]
    messages = [{"role": "user", "content": content}]
    reply = asked("VISION", "/chat/completions", {"messages": messages}, deadline)
    try:
        text = reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        text = None
    if not isinstance(text, str) or not text.strip():
        raise ToolFault(f"the vision endpoint answers without a text: {str(reply)[:200]}")
    return text


def transcribe_audio(files_dir: str, path: str, *, seconds: float) -> str:
    """The words of a wav, mp3, flac, ogg or m4a recording in `files_dir`, from the speech endpoint.

    A long one is sent in pieces of up to ten minutes: wav by itself, the others through ffmpeg.
    ToolError for a file that is no such recording, that has more than 100 MB or two hours, or that
    the endpoint does not take; ToolFault if the endpoint fails or is not set, or if a long
    recording needs an ffmpeg that is not there.
    """
    deadline = time.monotonic() + seconds
    fd = opened(files_dir, _no_member(path), MOST_AUDIO_BYTES)
    with os.fdopen(fd, "rb") as stream:
        body = stream.read(MOST_AUDIO_BYTES)
        kind, length = audio_length(body)
        if length and length > MOST_AUDIO_SECONDS:
            most = f"up to {MOST_AUDIO_SECONDS:,} can be listened to"
            raise ToolError(f"The recording lasts {length:,.0f} s; {most}.")
        if len(body) <= PIECE_BYTES and (length or 0) <= PIECE_SECONDS:
            pieces = iter([(kind, body)])
        elif kind == "wav" and (sliced := _wav_pieces(body)):
            pieces = sliced
        else:
            pieces = _ffmpeg_pieces(fd, kind, deadline)
        texts = []
        for kind, piece in pieces:
            # the name on our disk is nobody's business; the endpoint goes by its ending
            file = (f"recording.{kind}", piece, AUDIO_TYPES.get(kind, f"audio/{kind}"))
            form = {"file": file, "response_format": "json"}
            reply = asked("SPEECH", "/audio/transcriptions", form, deadline)
            if not isinstance(reply, dict) or not isinstance(reply.get("text"), str):
                raise ToolFault(f"the speech endpoint answers without a text: {str(reply)[:200]}")
            texts.append(reply["text"].strip())
    return "\n".join(texts).strip() or "(no words were heard)"


def _no_member(path: str) -> str:
    if "::" in path:
        raise ToolError("Images and recordings inside archives cannot be read.")
    return path


def _wav_pieces(body: bytes) -> Iterator[tuple[str, bytes]] | None:
    """Cuts plain PCM; None for what the wave module does not read."""
    try:
        whole = wave.open(io.BytesIO(body))
    except (wave.Error, EOFError):
        return None
    rate = whole.getframerate() * whole.getnchannels() * whole.getsampwidth()
    frames = int(min(PIECE_SECONDS, PIECE_BYTES / rate) * whole.getframerate())
    pieces = iter(partial(whole.readframes, frames), b"")
    return (("wav", _as_wav(data, *whole.getparams()[:3])) for data in pieces)


def _as_wav(data: bytes, channels: int, width: int, rate: int) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as piece:
        piece.setparams((channels, width, rate, 0, "NONE", ""))
        piece.writeframes(data)
    return out.getvalue()


def _ffmpeg_pieces(fd: int, kind: str, deadline: float) -> Iterator[tuple[str, bytes]]:
    """16 kHz mono wav pieces by ffmpeg; its demuxer is set, so no playlist can name other files."""
    ffmpeg = shutil.which("ffmpeg")
    if not ffmpeg:
        what = "a recording this long is sent in pieces, which needs ffmpeg"
        raise ToolFault(f"{what}: apt-get install ffmpeg")
    options = "-nostdin -v error -protocol_whitelist file -f {} -i /proc/self/fd/0 -t {} -vn -ac 1 "
    options += "-ar 16000 -f s16le -protocol_whitelist pipe pipe:1"
    options = options.format("mov" if kind == "m4a" else kind, MOST_AUDIO_SECONDS).split()
    with running(fd, {"do": "ffmpeg", "command": [ffmpeg, *options]}, deadline) as pipe:
        data = read(pipe, PIECE_SECONDS * 32_000, deadline)
        if not data:
            raise ToolError("The recording is damaged: ffmpeg finds no sound in it.")
        while data:
            yield "wav", _as_wav(data, 1, 2, 16_000)
            data = read(pipe, PIECE_SECONDS * 32_000, deadline)


def asked(name: str, path: str, given: dict, deadline: float):
    """The JSON that the endpoint of NAME_URL, NAME_MODEL and NAME_API_KEY answers, or ToolFault.

    `given` goes as JSON, or as a form if it has a "file" (name, bytes, type).
    """
    url, model, key = (os.environ.get(f"{name}_{part}", "") for part in ("URL", "MODEL", "API_KEY"))
    if not url.startswith(("http://", "https://")) or not model:
        settings = f"set {name}_URL and {name}_MODEL (and {name}_API_KEY)"
        raise ToolFault(f"no endpoint for this tool: {settings}")
    body, headers = given | {"model": model}, bearer(key)
    if "file" in body:
        body, headers["Content-Type"] = encode_multipart_formdata(body)
    url, what = url.rstrip("/") + path, f"the {name.lower()} endpoint"
    left = deadline - time.monotonic()
    return api("POST", url, headers=headers, body=body, seconds=left, what=what, share=1.0)
