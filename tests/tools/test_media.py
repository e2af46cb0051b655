"""media.py: what an endpoint receives of images and recordings, and what never reaches it. Numbers
are those of the attacks.
"""

import io
import math
import os
import shutil
import struct
import subprocess
import time
import wave
import zlib
from pathlib import Path

import pytest

from tests.helpers.media_server import MediaServer
from tests.tools.test_files import SECRET
from toolkit import media
from toolkit.media import describe_image, image_size, transcribe_audio
from toolkit.readers import audio_length
from toolkit.sandbox import ToolError, ToolFault

# images


def image(kind, size=(31, 17)) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.effect_noise(size, 50).convert("RGB").save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp"])
def test_the_size_of_an_image_is_what_pillow_reads(kind):
    for size in ((31, 17), (1, 1), (640, 1200)):
        assert image_size(image(kind, size)) == (kind, *size)


def test_the_size_of_other_webp_and_jpeg_forms():
    from PIL import Image

    for options in (
        {"format": "webp", "lossless": True},
        {"format": "jpeg", "progressive": True, "exif": b"Exif\0\0" + bytes(300)},
    ):
        out = io.BytesIO()
        Image.new("RGB", (33, 44)).save(out, **options)
        assert image_size(out.getvalue())[1:] == (33, 44)
    out = io.BytesIO()
    frames = [Image.new("RGBA", (21, 12), colour) for colour in ("red", "blue")]
    frames[0].save(out, "webp", save_all=True, append_images=frames[1:])
    assert image_size(out.getvalue()) == ("webp", 21, 12)


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp"])
def test_no_cut_of_an_image_is_anything_but_a_size_or_a_clean_error(kind):
    body = image(kind)
    for cut in range(0, min(len(body), 700)):
        try:
            assert image_size(body[:cut]) == (kind, 31, 17)
        except ToolError:
            pass


@pytest.fixture
def server(monkeypatch):
    server = MediaServer()
    for name in ("VISION", "SPEECH"):
        monkeypatch.setenv(f"{name}_URL", server.url)
        monkeypatch.setenv(f"{name}_MODEL", f"{name.lower()}-model")
        monkeypatch.setenv(f"{name}_API_KEY", f"{name.lower()}-key")
    yield server
    server.close()


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp"])
def test_an_image_arrives_whole_with_its_true_type_and_the_question(folder, server, kind):
    body = image(kind)
    (folder / "wrong.bmp").write_bytes(body)
    answer = describe_image(str(folder), "wrong.bmp", "How many?", seconds=10)
    assert answer == f"image/{kind} of {len(body)} bytes: How many?"
    (seen,) = server.seen
    assert (seen["model"], seen["mime"], seen["file"], seen["question"]) == (
        "vision-model",
        f"image/{kind}",
        body,
        "How many?",
    )
    assert seen["headers"]["authorization"] == "Bearer vision-key"


IMAGES = {
    "bomb.png": "30,000 x 30,000 pixels",
    "none.png": "no png, jpeg, gif or webp",
    "big.png": "5,368,709,120 bytes",
    "a.svg": "no png, jpeg, gif or webp",
    "a.tif": "no png, jpeg, gif or webp",
    "link.png": "is a link",
    "../secret.txt": "not inside the folder",
    "a.zip::b.png": "inside archives",
}
RECORDINGS = {
    "long.flac": "lasts 7,201 s",
    "big.wav": "105,906,176 bytes",
    "a.txt": "not a wav, mp3, flac",
    "../secret.txt": "not inside the folder",
}


def test_55_57_images_too_large_are_refused_before_they_are_sent(folder, server):
    for name, size in (("bomb.png", (30_000, 30_000)), ("none.png", (0, 5))):
        head = b"IHDR" + struct.pack(">II5B", *size, 8, 2, 0, 0, 0)
        chunk = b"\0\0\0\r" + head + struct.pack(">I", zlib.crc32(head))
        (folder / name).write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT" + bytes(99))
    with pytest.raises(ToolError, match="30,000 x 30,000"):
        describe_image(str(folder), "bomb.png", "?", seconds=10)
    with open(folder / "big.png", "wb") as file:
        file.truncate(5 << 30)
    (folder / "a.svg").write_text(
        "<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>"
    )
    (folder / "a.tif").write_bytes(b"II*\0" + bytes(50))
    (folder / "link.png").symlink_to("bomb.png")
    for path, problem in IMAGES.items():
        with pytest.raises(ToolError, match=problem):
            describe_image(str(folder), path, "?", seconds=10)
    assert server.seen == []


def test_only_the_key_of_the_endpoint_is_sent(folder, server, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"X-Mine: {SECRET}\nAuthorization: Bearer {SECRET}")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    (folder / "a.png").write_bytes(image("png"))
    describe_image(str(folder), "a.png", "?", seconds=10)
    monkeypatch.delenv("VISION_API_KEY")
    describe_image(str(folder), "a.png", "?", seconds=10)
    assert SECRET not in str(server.seen)
    assert not any(set(seen["headers"]) & {"openai-organization", "x-mine"} for seen in server.seen)
    assert [seen["headers"].get("authorization") for seen in server.seen] == [
        "Bearer vision-key",
        None,
    ]


def test_a_redirect_is_not_followed(folder, server):
    other = MediaServer()
    server.plays += [
        (307, {"Location": other.url + "/chat/completions"}, b"{}"),
        (302, {"Location": other.url}, b"{}"),
    ]
    (folder / "a.png").write_bytes(image("png"))
    for _ in range(2):
        with pytest.raises(ToolFault, match="30[27]"):
            describe_image(str(folder), "a.png", "?", seconds=10)
    assert other.seen == []
    other.close()


def test_busy_and_broken_answers_are_tried_again(folder, server):
    (folder / "a.png").write_bytes(image("png"))
    server.plays += [
        (429, {"Retry-After": "0"}, b"{}"),
        (500, {}, b"oops"),
        (200, {}, b"<html>not json"),
    ]
    assert describe_image(str(folder), "a.png", "Q", seconds=10).endswith("bytes: Q")
    assert len(server.seen) == 4


def test_an_endpoint_that_stays_broken_is_a_fault(folder, server):
    (folder / "a.png").write_bytes(image("png"))
    server.plays += [(503, {}, b"{}")] * 10
    with pytest.raises(ToolFault, match="503"):
        describe_image(str(folder), "a.png", "Q", seconds=10)
    assert len(server.seen) == 4
    server.plays[:] = [(429, {"Retry-After": "3600"}, b"{}")]
    with pytest.raises(ToolFault, match="429"):
        describe_image(str(folder), "a.png", "Q", seconds=10)


@pytest.mark.parametrize(
    "play, kind",
    [
        ((400, {}, b'{"error": {"message": "cannot decode image"}}'), ToolError),
        ((401, {}, b"{}"), ToolFault),
        ((404, {}, b"{}"), ToolFault),
        ((200, {}, b"{}"), ToolFault),
        ((200, {}, b'{"choices": [{"message": {"content": null}}]}'), ToolFault),
        ((200, {}, b"[1]"), ToolFault),
        ((200, {}, b'{"choices": []}'), ToolFault),
    ],
)
def test_whose_fault_a_refusal_is(folder, server, play, kind):
    (folder / "a.png").write_bytes(image("png"))
    server.plays.append(play)
    with pytest.raises(kind):
        describe_image(str(folder), "a.png", "Q", seconds=10)
    assert len(server.seen) == 1


@pytest.mark.parametrize("play", ["hang", "drip", "drip head"])
def test_a_slow_endpoint_is_given_up_in_time(folder, server, play):
    (folder / "a.png").write_bytes(image("png"))
    server.plays += [play] * 5
    began = time.monotonic()
    with pytest.raises(ToolFault):
        describe_image(str(folder), "a.png", "Q", seconds=1)
    assert time.monotonic() - began < 2.5


def test_without_an_endpoint_the_fault_names_what_to_set(folder, monkeypatch):
    for name in ("VISION_URL", "SPEECH_URL"):
        monkeypatch.delenv(name, raising=False)
    (folder / "a.png").write_bytes(image("png"))
    (folder / "a.wav").write_bytes(sound(1))
    with pytest.raises(ToolFault, match="VISION_URL"):
        describe_image(str(folder), "a.png", "Q", seconds=5)
    with pytest.raises(ToolFault, match="SPEECH_URL"):
        transcribe_audio(str(folder), "a.wav", seconds=5)


# recordings


needs_ffmpeg = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")
FRAME = b"\xff\xfb\x90\0" + bytes(413)  # of an mp3 with 128 kbit/s and 44.1 kHz: 26 ms


def length(body: bytes) -> tuple[str, float | None]:
    return tuple(audio_length(io.BytesIO(body), {}).values())


def sound(seconds, rate=8000, width=2, channels=1) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes(bytes(int(seconds * rate) * width * channels))
    return out.getvalue()


def test_a_recording_arrives_whole_with_its_type_and_a_neutral_name(folder, server):
    body = sound(2)
    (folder / "private name.dat").write_bytes(body)
    assert transcribe_audio(str(folder), "private name.dat", seconds=10) == "words 0"
    (seen,) = server.seen
    assert (seen["model"], seen["mime"], seen["name"], seen["file"]) == (
        "speech-model",
        "audio/wav",
        "recording.wav",
        body,
    )
    assert seen["headers"]["authorization"] == "Bearer speech-key" and "private" not in str(
        seen["headers"]
    )


@needs_ffmpeg
def test_a_long_wav_is_sent_in_pieces_that_join_to_the_whole(folder, server):
    (folder / "a.wav").write_bytes(sound(1500))
    assert transcribe_audio(str(folder), "a.wav", seconds=20) == "words 0\nwords 1\nwords 2"
    lengths = [length(seen["file"])[1] for seen in server.seen]
    assert lengths == [600, 600, 300]


def test_recordings_too_long_or_too_large_or_of_another_kind_are_refused(folder, server):
    flac = (
        b"fLaC\0\0\0\x22" + bytes(10) + (44100 << 44 | 44100 * 7201).to_bytes(8, "big") + bytes(500)
    )
    (folder / "long.flac").write_bytes(flac)
    with open(folder / "big.wav", "wb") as file:
        file.truncate(101 << 20)
    (folder / "a.txt").write_text("#EXTM3U\nfile:///etc/passwd\n")
    for path, problem in RECORDINGS.items():
        with pytest.raises(ToolError, match=problem):
            transcribe_audio(str(folder), path, seconds=10)
    assert server.seen == []


@pytest.mark.parametrize(
    "body, kind, seconds",
    [
        (sound(1.5), "wav", 1.5),
        (
            sound(1)[:40] + b"\xff\xff\xff\xff" + bytes(16000),
            "wav",
            1.0,
        ),  # a stream that did not know its size
        (
            b"fLaC\0\0\0\x22"
            + bytes(10)
            + (44100 << 44 | 44100 * 90).to_bytes(8, "big")
            + bytes(8),
            "flac",
            90.0,
        ),
        (
            b"OggS"
            + bytes(22)
            + b"\1\x13OpusHead"
            + bytes(11)
            + b"OggS\0\4"
            + struct.pack("<q", 48000 * 7)
            + bytes(20),
            "ogg",
            7.0,
        ),
        (
            b"\0\0\0\x10ftypM4A \0\0\0\0"
            + b"\0\0\0\x28moov\0\0\0\x20mvhd"
            + bytes(12)
            + struct.pack(">II", 1000, 4500),
            "m4a",
            4.5,
        ),
        (FRAME * 383, "mp3", 10.0),  # 128 kbit/s without a count of frames
        (b"fLaC", "flac", None),
        (b"ID3\4\0\0\x7f\x7f\x7f\x7f", "mp3", None),
    ],
)
def test_the_length_of_a_recording_is_read_from_its_header(body, kind, seconds):
    assert length(body) == (kind, seconds and pytest.approx(seconds, abs=0.01))


def test_a_long_recording_without_ffmpeg_says_what_is_missing(folder, server, monkeypatch):
    (folder / "a.mp3").write_bytes(FRAME * 27_000)
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(ToolFault, match="apt-get install ffmpeg"):
        transcribe_audio(str(folder), "a.mp3", seconds=10)


def encoded(path, seconds, *options) -> Path:
    source = ["-f", "lavfi", "-i", f"sine=frequency=440:sample_rate=16000:duration={seconds}"]
    subprocess.run(["ffmpeg", "-v", "error", "-y", *source, *options, str(path)], check=True)
    return path


@needs_ffmpeg
@pytest.mark.parametrize(
    "name, options",
    [
        ("a.mp3", []),
        ("b.mp3", ["-write_xing", "0", "-b:a", "64k"]),
        ("c.mp3", ["-ar", "16000"]),
        ("a.flac", []),
        ("a.ogg", ["-c:a", "libopus"]),
        ("b.ogg", ["-c:a", "libvorbis"]),
        ("a.m4a", []),
        ("b.m4a", ["-movflags", "faststart"]),
        ("a.wav", []),
        ("b.wav", ["-c:a", "pcm_s24le"]),
    ],
)
def test_the_length_of_what_ffmpeg_writes(folder, name, options):
    kind, seconds = length(encoded(folder / name, 12.5, *options).read_bytes())
    assert kind == name[2:] and math.isclose(seconds, 12.5, abs_tol=0.2)


@needs_ffmpeg
@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.mp3", "a.m4a", "a.flac", "a.ogg"])
def test_a_long_recording_goes_through_ffmpeg_in_pieces(folder, server, name):
    encoded(folder / name, 625, *(["-c:a", "libopus"] if name == "a.ogg" else []))
    assert transcribe_audio(str(folder), name, seconds=60) == "words 0\nwords 1"
    assert [length(seen["file"])[1] for seen in server.seen] == pytest.approx([600, 25], abs=0.3)


@needs_ffmpeg
def test_a_long_recording_that_is_noise_is_the_models_error(folder, server):
    (folder / "a.flac").write_bytes(
        b"fLaC\0\0\0\x22"
        + bytes(10)
        + (8000 << 44 | 8000 * 900).to_bytes(8, "big")
        + os.urandom(9000)
    )
    with pytest.raises(ToolError, match="damaged"):
        transcribe_audio(str(folder), "a.flac", seconds=20)
    assert server.seen == []


def test_pieces_of_a_recording_share_its_deadline_and_say_what_they_are(folder, monkeypatch):
    (folder / "a.m4a").write_bytes(b"x" * 50)
    asked = []

    def heard(name, form, seconds):
        asked.append((name, form["file"], form["response_format"], seconds))
        time.sleep(0.02)
        return f"words {len(asked)}"

    pieces = iter([("wav", b"one"), ("wav", b"two"), ("wav", b"three")])
    monkeypatch.setattr(media, "asked", heard)
    monkeypatch.setattr(media, "in_child", lambda *_: {"kind": "m4a", "seconds": 1300.0})
    monkeypatch.setattr(media, "_ffmpeg_pieces", lambda *_: pieces)
    told = transcribe_audio(str(folder), "a.m4a", seconds=9)
    assert told == "words 1\nwords 2\nwords 3"
    files = [("recording.wav", body, "audio/wav") for body in (b"one", b"two", b"three")]
    assert [each[:3] for each in asked] == [("speech", file, "json") for file in files]
    left = [seconds for *_, seconds in asked]
    assert 5 < left[0] <= 9 and all(a - b >= 0.019 for a, b in zip(left, left[1:]))
