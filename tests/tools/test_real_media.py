"""image2text and audio2text against the server that docs/media.md shows, with real models behind
it: a picture is drawn, a sentence is spoken. Skipped where the models or programs are missing:
pip install rapidocr-onnxruntime pocketsphinx, apt-get install espeak-ng ffmpeg.
"""

import asyncio
import importlib.util
import shutil
import socket
import subprocess
import sys
import time

import pytest

from tests.helpers.tiny import ROOT
from tools import Toolbox

NEEDS = [
    name for name in ("rapidocr_onnxruntime", "pocketsphinx") if not importlib.util.find_spec(name)
]
NEEDS += [name for name in ("espeak-ng", "ffmpeg") if not shutil.which(name)]
pytestmark = pytest.mark.skipif(bool(NEEDS), reason=f"not here: {', '.join(NEEDS)}")


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """Where the server of the page listens."""
    page = (ROOT / "docs/media.md").read_text().partition("```python\n")[2].partition("```")[0]
    script = tmp_path_factory.mktemp("server") / "media_server.py"
    script.write_text(page)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, script, str(port)])
    try:
        until = time.monotonic() + 120
        while time.monotonic() < until and server.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.2)
        yield port
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def call(port, tmp_path, monkeypatch):
    for name in ("VISION", "SPEECH"):
        monkeypatch.setenv(f"{name}_URL", f"http://127.0.0.1:{port}/v1")
        monkeypatch.setenv(f"{name}_MODEL", "local")
    box = Toolbox(["image2text", "audio2text"], files_dir=str(tmp_path), seconds_per_call=60.0)
    yield lambda name, given: asyncio.run(box.call(name, given, files=[*given.values()][:1]))
    box.close()


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_the_words_of_a_drawn_picture_are_read(call, tmp_path, kind):
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", (700, 160), "white")
    font = ImageFont.load_default(size=48)
    ImageDraw.Draw(picture).text((30, 40), "Invoice total 4817", "black", font=font)
    picture.save(tmp_path / f"bill.{kind}")
    seen = call("image2text", {"image_path": f"bill.{kind}", "query": "What is the total?"})
    assert seen.status == "ok" and "4817" in seen.text and "nvoice" in seen.text, seen


@pytest.mark.parametrize("kind", ["wav", "mp3"])
def test_the_words_of_a_spoken_sentence_are_heard(call, tmp_path, kind):
    said = ["espeak-ng", "-v", "en-us+f3", "-s", "150", "-w", tmp_path / "note.wav"]
    subprocess.run([*said, "one two three four five"], check=True)
    if kind == "mp3":
        change = ["ffmpeg", "-v", "error", "-i", tmp_path / "note.wav", tmp_path / "note.mp3"]
        subprocess.run(change, check=True)
    heard = call("audio2text", {"audio_path": f"note.{kind}"})
    words = heard.text.lower().split()
    assert heard.status == "ok" and {"two", "three", "four", "five"} <= set(words), heard
