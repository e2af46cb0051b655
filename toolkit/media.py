"""Images and recordings that come with a question, through OpenAI-compatible endpoints.

A file is sent as what its header says it is, within limits on bytes, pixels and seconds that are
checked before. Each endpoint has an address, a model and a key of its own; a key is sent to its own
host only and no redirect is followed:

    VISION_URL, VISION_MODEL, VISION_API_KEY    chat completions with an image, for describe_image
    SPEECH_URL, SPEECH_MODEL, SPEECH_API_KEY    audio/transcriptions, for transcribe_audio
"""

import base64
import io
import itertools
import os
import shutil
import struct
import time
import wave
from collections.abc import Iterator

from urllib3.filepost import encode_multipart_formdata

from toolkit.files import opened, read, running
from toolkit.sandbox import ToolError, ToolFault
from toolkit.web import api

MOST_IMAGE_BYTES, MOST_PIXELS = 20 << 20, 50_000_000
MOST_AUDIO_BYTES, MOST_AUDIO_SECONDS = 100 << 20, 7200
PIECE_BYTES, PIECE_SECONDS = 24 << 20, 600  # of a recording in one request


# --------------------------------------------------------------------------------------------------
# what headers say


def image_size(body: bytes) -> tuple[str, int, int]:
    """(type, width, height) of a png, jpeg, gif or webp image by its header, which is all that is
    looked at; ToolError.
    """
    try:
        if body[:8] == b"\x89PNG\r\n\x1a\n" and body[12:16] == b"IHDR":
            return "png", *struct.unpack(">II", body[16:24])
        if body[:6] in (b"GIF87a", b"GIF89a"):
            return "gif", *struct.unpack("<HH", body[6:10])
        if body[:3] == b"\xff\xd8\xff":
            return "jpeg", *_jpeg_size(body)
        if body[:4] == b"RIFF" and body[8:12] == b"WEBP":
            return "webp", *_webp_size(body)
    except (struct.error, IndexError) as error:
        raise ToolError("The image is damaged: its header is cut off.") from error
    raise ToolError("The file is not a png, jpeg, gif or webp image.")


def _jpeg_size(body: bytes) -> tuple[int, int]:
    at = 2
    while at < len(body):
        if body[at] != 0xFF:
            at += 1
            continue
        marker = body[at + 1]
        if marker in (
            0xFF,
            0x00,
            0x01,
            *range(0xD0, 0xD9),
        ):  # fill bytes and markers without a length
            at += 1 if marker == 0xFF else 2
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", body[at + 5 : at + 9])
            return width, height
        at += 2 + max(2, struct.unpack(">H", body[at + 2 : at + 4])[0])
    raise IndexError


def _webp_size(body: bytes) -> tuple[int, int]:
    if body[12:16] == b"VP8X":
        return 1 + int.from_bytes(body[24:27], "little"), 1 + int.from_bytes(body[27:30], "little")
    if body[12:16] == b"VP8L":
        bits = struct.unpack("<I", body[21:25])[0]
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack("<HH", body[26:30])
    return width & 0x3FFF, height & 0x3FFF


def audio_length(body: bytes) -> tuple[str, float | None]:
    """(type, seconds) of a wav, mp3, flac, ogg or m4a recording; None seconds if its header does
    not say; ToolError.
    """
    kinds = {b"fLaC": ("flac", _flac_seconds), b"OggS": ("ogg", _ogg_seconds)}
    if body[:4] == b"RIFF" and body[8:12] == b"WAVE":
        kind, measure = "wav", _wav_seconds
    elif body[4:8] == b"ftyp":
        kind, measure = "m4a", _m4a_seconds
    elif body[:3] == b"ID3" or (body[:1] == b"\xff" and len(body) > 4 and body[1] & 0xE6 == 0xE2):
        kind, measure = "mp3", _mp3_seconds
    elif body[:4] in kinds:
        kind, measure = kinds[body[:4]]
    else:
        raise ToolError("The file is not a wav, mp3, flac, ogg or m4a recording.")
    try:
        return kind, measure(body)
    except (struct.error, IndexError, ZeroDivisionError):
        return kind, None


def _wav_seconds(body: bytes) -> float | None:
    at, rate = 12, 0
    while at + 8 <= len(body):
        name, size = body[at : at + 4], struct.unpack("<I", body[at + 4 : at + 8])[0]
        if name == b"fmt ":
            rate = struct.unpack("<I", body[at + 16 : at + 20])[0]
        elif name == b"data":  # a stream may not know its size
            return min(size, len(body) - at - 8) / rate
        at += 8 + size + size % 2
    return None


def _flac_seconds(body: bytes) -> float | None:
    packed = int.from_bytes(
        body[18:26], "big"
    )  # 20 bits of rate, 3 of channels, 5 of depth, 36 of samples
    return (packed & (1 << 36) - 1) / (packed >> 44) or None


def _ogg_seconds(body: bytes) -> float | None:
    last = body.rfind(b"OggS")
    samples = struct.unpack("<q", body[last + 6 : last + 14])[0]
    at = body.find(b"\x01vorbis", 0, 512)
    return samples / (
        struct.unpack("<I", body[at + 12 : at + 16])[0] if at >= 0 else 48000
    )  # Opus: always 48 kHz


def _m4a_seconds(body: bytes) -> float | None:
    start, end = 0, len(body)
    while start + 8 <= end:
        size, name = struct.unpack(">I4s", body[start : start + 8])
        head = 16 if size == 1 else 8
        size = (
            struct.unpack(">Q", body[start + 8 : start + 16])[0]
            if size == 1
            else size or end - start
        )
        if name == b"mvhd":
            wide = body[start + 8] == 1
            at = start + (28 if wide else 20)
            rate, length = struct.unpack(
                ">IQ" if wide else ">II", body[at : at + (12 if wide else 8)]
            )
            return length / rate
        if name == b"moov":
            end = min(end, start + size)
            start += head
        else:
            start += max(size, 8)
    return None


def _mp3_seconds(body: bytes) -> float | None:
    at = 0
    if body[:3] == b"ID3":
        at = 10 + sum(
            (byte & 0x7F) << shift for byte, shift in zip(body[6:10], (21, 14, 7, 0), strict=True)
        )
    while body[at] != 0xFF or body[at + 1] & 0xE6 != 0xE2:  # the first frame of layer III
        at = (
            body.index(b"\xff", at + 1, at + 65536)
            if b"\xff" in body[at + 1 : at + 65536]
            else len(body)
        )
    first = body[at + 1] >> 3 & 3 == 3  # MPEG 1; else 2 or 2.5
    rates = (44100, 48000, 32000)
    rate = rates[body[at + 2] >> 2 & 3] / {3: 1, 2: 2, 0: 4}.get(body[at + 1] >> 3 & 3, 0)
    kbits = (
        (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
        if first
        else (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
    )[body[at + 2] >> 4]
    for mark in (b"Xing", b"Info"):  # a header that counts the frames
        found = body.find(mark, at, at + 64)
        if found >= 0 and body[found + 7] & 1:
            return (
                struct.unpack(">I", body[found + 8 : found + 12])[0]
                * (1152 if first else 576)
                / rate
            )
    return (len(body) - at) / (kbits * 125)


# --------------------------------------------------------------------------------------------------
# endpoints


def describe_image(files_dir: str, path: str, question: str, *, seconds: float) -> str:
    """What the vision endpoint answers to `question` about a png, jpeg, gif or webp image in
    `files_dir`.

    The image goes as it is, in a data URI of its true type. ToolError for a file that is no such
    image, that has more than 20 MB or 50 million pixels, or that the endpoint does not take;
    ToolFault if the endpoint fails or is not set.
    """
    deadline = time.monotonic() + seconds
    body = _whole(files_dir, path, MOST_IMAGE_BYTES)
    kind, width, height = image_size(body)
    if not 0 < width * height <= MOST_PIXELS:
        raise ToolError(
            f"The image has {width:,} x {height:,} pixels; up to {MOST_PIXELS:,} can be looked at."
        )
    url = f"data:image/{kind};base64,{base64.b64encode(body).decode()}"
    content = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": url}}]
    messages = [{"role": "user", "content": content}]
    reply = asked(
        "VISION", "/chat/completions", {"messages": messages}, deadline, "the vision endpoint"
    )
    try:
        text = reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise ToolFault(
            f"the vision endpoint answers without a message: {str(reply)[:200]}"
        ) from error
    if not isinstance(text, str) or not text.strip():
        raise ToolFault("the vision endpoint gives an empty answer")
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
            raise ToolError(
                f"The recording lasts {length:,.0f} s; up to {MOST_AUDIO_SECONDS:,} can be "
                "listened to."
            )
        if len(body) <= PIECE_BYTES and (length or 0) <= PIECE_SECONDS:
            pieces = iter([(kind, body)])
        elif kind == "wav" and (sliced := _wav_pieces(body)):
            pieces = sliced
        else:
            pieces = _ffmpeg_pieces(fd, kind, deadline)
        texts = []
        for kind, piece in pieces:  # noqa: PLW2901 - of a piece, the type that it has
            # the name on our disk is nobody's business; the endpoint goes by its ending
            file = (
                f"recording.{kind}",
                piece,
                {"mp3": "audio/mpeg", "m4a": "audio/mp4"}.get(kind, f"audio/{kind}"),
            )
            form = {"file": file, "response_format": "json"}
            reply = asked("SPEECH", "/audio/transcriptions", form, deadline, "the speech endpoint")
            if not isinstance(reply, dict) or not isinstance(reply.get("text"), str):
                raise ToolFault(f"the speech endpoint answers without a text: {str(reply)[:200]}")
            texts.append(reply["text"].strip())
    return "\n".join(texts).strip() or "(no words were heard)"


def _no_member(path: str) -> str:
    if "::" in path:
        raise ToolError("Images and recordings inside archives cannot be read.")
    return path


def _whole(files_dir: str, path: str, most_bytes: int) -> bytes:
    with os.fdopen(opened(files_dir, _no_member(path), most_bytes), "rb") as stream:
        return stream.read(most_bytes)


def _wav_pieces(body: bytes) -> Iterator[tuple[str, bytes]] | None:
    """Cuts plain PCM; None for what the wave module does not read."""
    try:
        whole = wave.open(io.BytesIO(body))
    except (wave.Error, EOFError):
        return None
    rate = whole.getframerate() * whole.getnchannels() * whole.getsampwidth()
    frames = int(min(PIECE_SECONDS, PIECE_BYTES / rate) * whole.getframerate())
    return (
        ("wav", _as_wav(data, *whole.getparams()[:3]))
        for data in iter(lambda: whole.readframes(frames), b"")
    )


def _as_wav(data: bytes, channels: int, width: int, rate: int) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as piece:
        piece.setnchannels(channels)
        piece.setsampwidth(width)
        piece.setframerate(rate)
        piece.writeframes(data)
    return out.getvalue()


def _ffmpeg_pieces(fd: int, kind: str, deadline: float) -> Iterator[tuple[str, bytes]]:
    """Pieces as 16 kHz mono wav, from a child that runs ffmpeg; its demuxer is set, so no playlist
    can name other files.
    """
    ffmpeg = shutil.which("ffmpeg")
    if not ffmpeg:
        raise ToolFault(
            "a recording this long is sent in pieces, which needs ffmpeg: apt-get install ffmpeg"
        )
    command = [
        ffmpeg,
        "-nostdin",
        "-v",
        "error",
        "-protocol_whitelist",
        "file",
        "-f",
        "mov" if kind == "m4a" else kind,
        "-i",
        "/proc/self/fd/0",
        "-t",
        str(MOST_AUDIO_SECONDS),
        "-vn",
        "-ac",
        "1",
        "-ar",
        "16000",
        "-f",
        "s16le",
        "-protocol_whitelist",
        "pipe",
        "pipe:1",
    ]
    with running(fd, {"do": "ffmpeg", "command": command}, deadline) as pipe:
        for number in itertools.count():
            data = read(pipe, PIECE_SECONDS * 32_000, deadline)
            if not data and number == 0:
                raise ToolError("The recording is damaged: ffmpeg finds no sound in it.")
            if not data:
                return
            yield "wav", _as_wav(data, 1, 2, 16_000)


def asked(name: str, path: str, given: dict, deadline: float, what: str):
    """The JSON that the endpoint of NAME_URL, NAME_MODEL and NAME_API_KEY answers; ToolFault if
    they are not set.

    `given` goes as JSON, or as a form if it has a "file" (name, bytes, type).
    """
    url, model, key = (os.environ.get(f"{name}_{part}", "") for part in ("URL", "MODEL", "API_KEY"))
    if not url.startswith(("http://", "https://")) or not model:
        raise ToolFault(
            f"no endpoint for this tool: set {name}_URL and {name}_MODEL (and {name}_API_KEY)"
        )
    body, headers = given | {"model": model}, {"Authorization": f"Bearer {key}"} if key else {}
    if "file" in body:
        body, headers["Content-Type"] = encode_multipart_formdata(body)
    left = deadline - time.monotonic()
    return api(
        "POST",
        url.rstrip("/") + path,
        headers=headers,
        body=body,
        seconds=left,
        what=what,
        share=1.0,
    )
