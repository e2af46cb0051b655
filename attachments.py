"""Files that come with a question: documents, tables and archives as text; images and recordings through endpoints.

Nothing outside `files_dir` is opened and no link is followed. Parsers run in a child process with limits on memory and
time that holds the open file and nothing else. Images and recordings go to OpenAI-compatible endpoints, each with an
address, a model and a key of its own; a key is sent to its own host only and no redirect is followed:

    VISION_URL, VISION_MODEL, VISION_API_KEY    chat completions with an image, for describe_image
    SPEECH_URL, SPEECH_MODEL, SPEECH_API_KEY    audio/transcriptions, for transcribe_audio
"""

import base64
import codecs
import contextlib
import io
import itertools
import json
import os
import re
import resource
import select
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
import wave
import zipfile
from collections.abc import Callable, Iterator

from sandbox import ToolError, ToolFault

MOST_BYTES = 100 << 20  # of a file, or of a member of an archive
MOST_UNPACKED = 200 << 20  # of all members of an office document
MOST_RATIO = 200  # of unpacked to packed bytes, for what is larger than FREE_BYTES
FREE_BYTES = 20 << 20
MOST_MEMBERS = 10_000
MEMORY = 2 << 30  # bytes of address space of a reader
MOST_IMAGE_BYTES, MOST_PIXELS = 20 << 20, 50_000_000
MOST_AUDIO_BYTES, MOST_AUDIO_SECONDS = 100 << 20, 7200
PIECE_BYTES, PIECE_SECONDS = 24 << 20, 600  # of a recording in one request
READABLE = "text, code, json, csv, html, xml, xlsx, docx, pptx, pdf and zip"


# ---------------------------------------------------------------------------------------------------------------------
# opening


def opened(files_dir: str, path: str, most_bytes: int) -> int:
    """A descriptor of the regular file `path` in `files_dir`; ToolError if it is anything else or larger than most_bytes.

    Every component is opened in the one before it, without following links and without any effect on devices and pipes
    (O_PATH); what was looked at is what is then opened for reading, however the folder changes in between.
    """
    shown = repr(path[:200])
    if not path or "\0" in path or len(path) > 4096:
        raise ToolError(f"{shown} is not the name of a file: a path inside the folder of files, up to 4096 characters.")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if path.startswith("/") or ".." in parts or not parts:
        raise ToolError(f"{shown} is not inside the folder of files: give a path relative to it, without '..'.")
    with contextlib.ExitStack() as stack:
        try:
            here = os.open(files_dir, os.O_PATH | os.O_DIRECTORY)
        except OSError as error:
            raise ToolFault(f"the folder of files cannot be opened: {error}") from error
        stack.callback(os.close, here)
        for part in parts:
            try:
                here = os.open(part, os.O_PATH | os.O_NOFOLLOW, dir_fd=here)
            except (OSError, ValueError) as error:  # ValueError: characters that no file name can have
                raise ToolError(f"There is no file {shown}.") from error
            stack.callback(os.close, here)
        found = os.fstat(here)
        if not stat.S_ISREG(found.st_mode):
            kind = {stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link"}.get(stat.S_IFMT(found.st_mode), "a device or a pipe")
            raise ToolError(f"{shown} is {kind}, not a file.")
        if found.st_size > most_bytes:
            raise ToolError(f"{shown} has {found.st_size:,} bytes; up to {most_bytes:,} can be read.")
        try:
            fd = os.open(f"/proc/self/fd/{here}", os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise ToolFault(f"{shown} cannot be opened: {error.strerror}") from error
        again = os.fstat(fd)
        if not stat.S_ISREG(again.st_mode) or (again.st_dev, again.st_ino) != (found.st_dev, found.st_ino):
            os.close(fd)
            raise ToolError(f"{shown} is not a regular file.")
        return fd


def file_to_text(files_dir: str, path: str, *, seconds: float = 30.0, chars: int = 200_000) -> str:
    """The text of a file in `files_dir`, up to `chars` characters and with a note if there is more.

    Read by what the file is, not by its name; a member of an archive is "a.zip::b.csv", an archive alone lists its
    members. XML is shown as written, no entity is ever expanded; a formula is shown where its value is not stored.
    ToolError for what cannot be read, within about `seconds`; ToolFault if the reader does not start.
    """
    outer, *members = path.split("::")
    fd = opened(files_dir, outer, MOST_BYTES)
    try:
        given = {"do": "read", "name": outer, "members": members, "chars": chars}
        # JSON needs at most six bytes for a character
        reply = _in_child(fd, given, seconds, 6 * chars + (1 << 16))
    finally:
        os.close(fd)
    return reply["text"]


def _in_child(fd: int, given: dict, seconds: float, most_bytes: int) -> dict:
    """The child's answer as JSON; ToolError or ToolFault if that is what it says, or if it says nothing."""
    deadline = time.monotonic() + seconds
    with _running(fd, given, deadline) as pipe:
        said = _read(pipe, most_bytes + 1, deadline)
    if len(said) > most_bytes or not said:
        raise ToolError("The file cannot be read: its reader ran out of memory or crashed.")
    reply = json.loads(said)
    if "error" in reply:
        raise ToolError(reply["error"])
    if "fault" in reply:
        raise ToolFault(reply["fault"])
    return reply


@contextlib.contextmanager
def _running(fd: int, given: dict, deadline: float):
    """A child that works on the open file; yields the pipe on which it answers, and kills it in the end."""
    seconds = max(0.0, deadline - time.monotonic())
    given = json.dumps(given | {"seconds": seconds, "memory": MEMORY})
    command = [sys.executable, "-B", "-E", "-s", os.path.abspath(__file__), "--child", given]
    environment = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    try:
        process = subprocess.Popen(command, stdin=fd, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/",
                                   env=environment, start_new_session=True)  # fmt: skip
    except OSError as error:
        raise ToolFault(f"the reader of files does not start: {error}") from error
    pipe = process.stdout.fileno()
    try:
        if _read(pipe, 6, deadline) != b"ready\n":
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
            raise ToolFault(f"the reader of files does not start (exit {process.returncode})")
        yield pipe
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def _read(pipe: int, most_bytes: int, deadline: float) -> bytes:
    """What a pipe says until its end, up to most_bytes; ToolError if that takes until the deadline."""
    said = bytearray()
    while len(said) < most_bytes:
        if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise ToolError("The file could not be read in the time of a call.")
        data = os.read(pipe, min(1 << 16, most_bytes - len(said)))
        if not data:
            break
        said += data
    return bytes(said)


# ---------------------------------------------------------------------------------------------------------------------
# readers: everything from here to the next line runs in the child


def child(given: dict) -> None:
    """Reads the file at descriptor 0 and writes "ready" and one JSON object: text, error (the file's) or fault (ours)."""
    answer = os.dup(1)
    os.dup2(2, 1)  # whatever a parser prints is no part of the answer
    confine(given["seconds"], given["memory"])
    os.write(answer, b"ready\n")
    try:
        if given["do"] == "ffmpeg":
            os.dup2(answer, 1)
            os.execv(given["command"][0], given["command"])
        with os.fdopen(0, "rb", closefd=False) as stream:
            reply = {"text": whole_text(stream, given["name"], given["members"], given["chars"], given["seconds"])}
    except ToolError as error:
        reply = {"error": str(error)}
    except ImportError as error:
        reply = {"fault": f"a reader is not installed: {error}"}
    except MemoryError:
        reply = {"error": f"The file needs more than {given['memory'] >> 20} MB to be read."}
    except Exception as error:  # noqa: BLE001 - parsers raise anything on a damaged file
        reply = {"error": f"The file is damaged, or not what it seems: {type(error).__name__}: {str(error)[:200]}"}
    with os.fdopen(answer, "wb") as out:
        out.write(json.dumps(reply).encode())


def confine(seconds: float, memory: int) -> None:
    """Limits of this process: address space in bytes, processor time, no new files, no core."""
    limits = {resource.RLIMIT_AS: memory, resource.RLIMIT_CPU: int(seconds) + 2, resource.RLIMIT_FSIZE: 0,
              resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: 64}  # fmt: skip
    for name, value in limits.items():
        resource.setrlimit(name, (value, value))


def whole_text(stream, name: str, members: list[str], chars: int, seconds: float) -> str:
    """Text of a seekable binary stream, or of a member of the archive in it (and of a member of that one, and so on)."""
    if len(members) > 3:
        raise ToolError("An archive in an archive in an archive is as deep as it goes.")
    for member in members:
        stream, name = io.BytesIO(_member(stream, name, member)), member
    text, length, until = [], 0, time.monotonic() + 0.7 * seconds
    for piece in READERS[kind_of(stream, name)](stream, chars):
        text.append(piece[: chars - length])
        length += len(text[-1])
        if length >= chars or time.monotonic() > until:
            text.append(f"\n[Cut here, after {length:,} characters: there is more in the file.]")
            break
    return "".join(text).encode("utf-8", "replace").decode() if length else "(an empty file)"


STARTS = [(b"\x89PNG", "image"), (b"\xff\xd8\xff", "image"), (b"GIF8", "image"), (b"BM", "bitmap"), (b"II*\0", "bitmap"),
          (b"MM\0*", "bitmap"), (b"fLaC", "audio"), (b"OggS", "audio"), (b"ID3", "audio"), (b"\xff\xfb", "audio"),
          (b"\xff\xf3", "audio"), (b"\xff\xf2", "audio"), (b"\x1aE\xdf\xa3", "video"), (b"\xd0\xcf\x11\xe0", "old office"),
          (b"\x1f\x8b", "packed"), (b"BZh", "packed"), (b"\xfd7zXZ", "packed"), (b"7z\xbc\xaf", "packed"), (b"Rar!", "packed"),
          (b"\x93NUMPY", "binary"), (b"\x7fELF", "binary"), (b"\x80\x02", "binary"), (b"\x80\x03", "binary"),
          (b"\x80\x04", "binary"), (b"\x80\x05", "binary"), (b"SQLite format 3", "binary"), (b"PK\3\4", "zip"),
          (b"PK\5\6", "zip")]  # fmt: skip
REFUSED = {
    "image": "an image: image2text looks at it",
    "bitmap": "an image of a type that cannot be read (png, jpeg, gif and webp can)",
    "audio": "a recording: audio2text listens to it",
    "video": "a video, which cannot be read",
    "old office": "an old or an encrypted Office file, which cannot be read (xlsx, docx and pptx can)",
    "packed": "an archive that cannot be read (zip can)",
    "binary": f"binary data, which cannot be read ({READABLE} can)",
}


def kind_of(stream, name: str) -> str:
    """The key in READERS for a stream, from its first bytes; its name decides only between kinds of text. ToolError."""
    head = stream.read(1 << 16)
    stream.seek(0)
    kind = next((kind for start, kind in STARTS if head.startswith(start)), "")
    if head[:4] == b"RIFF":
        kind = "image" if head[8:12] == b"WEBP" else "audio"
    elif head[4:8] == b"ftyp":
        kind = "audio" if head[8:11] in (b"M4A", b"M4B") else "video"
    elif b"%PDF-" in head[:1024]:
        kind = "pdf"
    if kind == "zip":
        names = {info.filename for info in _archive(stream).infolist()}
        marks = {"xl/workbook.xml": "xlsx", "word/document.xml": "docx", "ppt/presentation.xml": "pptx"}
        return next((kind for mark, kind in marks.items() if mark in names), "zip")
    wide = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or _wide(head)
    controls = len(head) - len(head.translate(None, bytes([*range(9), 11, *range(14, 27), *range(28, 32), 127])))
    if not kind and not wide and controls > len(head) / 100:
        kind = "binary"
    if kind in REFUSED and not (kind == "bitmap" and controls == 0):  # a text may begin with BM
        raise ToolError(f"The file is {REFUSED[kind]}.")
    if kind == "pdf":
        return kind
    text = head[:4096].decode("utf-16" if wide else "latin-1", "replace").lstrip("\ufeff\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(("<!doctype html", "<html")) or (text.startswith("<") and name.lower().endswith((".html", ".htm"))):
        return "html"
    return "text"


def _wide(head: bytes) -> str:
    """utf-16-le or -be if every other byte is mostly zero, as in western text without a byte order mark; else ""."""
    even, odd = head[0:1000:2], head[1:1000:2]
    if len(even) > 1 and odd.count(0) > 0.4 * len(odd) and even.count(0) < 0.1 * len(even):
        return "utf-16-le"
    return "utf-16-be" if len(even) > 1 and even.count(0) > 0.4 * len(even) and odd.count(0) < 0.1 * len(odd) else ""


def decoded(body: bytes, whole: bool) -> str:
    """Text of bytes: by their mark, as UTF-8, by the encoding they declare, else by a guess. `whole`: nothing was cut off."""
    marks = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be",
             codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}  # fmt: skip
    for mark, name in marks.items():
        if body.startswith(mark):
            return codecs.getincrementaldecoder(name)("replace").decode(body[len(mark) :])
    if name := _wide(body):
        return codecs.getincrementaldecoder(name)("replace").decode(body)
    with contextlib.suppress(UnicodeDecodeError):
        return codecs.getincrementaldecoder("utf-8")().decode(body, final=whole)
    declared = re.search(rb"(?:charset|encoding)\s*=\s*[\"']?([\w.:-]{1,30})", body[:2048])
    if declared:
        with contextlib.suppress(LookupError, UnicodeDecodeError):
            return codecs.getincrementaldecoder(declared[1].decode())().decode(body, final=whole)
    from charset_normalizer import from_bytes

    best = from_bytes(body[: 1 << 16]).best()
    return body.decode(best.encoding if best else "utf-8", "replace")


def _text(stream, chars: int) -> Iterator[str]:
    most = 4 * chars + 4
    body = stream.read(most)
    yield decoded(body, whole=len(body) < most)
    if len(body) == most:
        yield " " * chars  # there is more: the caller cuts


def _html(stream, chars: int) -> Iterator[str]:
    """The page's main text, or all its words where that would leave out more than a fifth."""
    import trafilatura
    from lxml import html

    text = decoded(stream.read(), whole=True)
    tree = html.document_fromstring(text.encode("utf-8", "replace"), parser=html.HTMLParser(encoding="utf-8"))
    for part in tree.xpath("//script | //style | //noscript | //template | //comment()"):
        if part.getparent() is not None:  # a comment beside the page has none
            part.drop_tree()
    for part in tree.iter("p", "div", "br", "li", "tr", "td", "th", "h1", "h2", "h3", "h4", "dt", "dd", "title"):
        part.tail = ("\t" if part.tag in ("td", "th") else "\n") + (part.tail or "")
    lines = (re.sub("[ \r\f\v]+", " ", line).strip() for line in tree.text_content().split("\n"))
    words = "\n".join(line for line in lines if line)
    main = trafilatura.extract(text, include_comments=True, favor_recall=True) or ""
    title = " ".join((tree.findtext(".//title") or "").split())
    yield f"{title}\n{main}" if len(main) > 0.8 * len(words) else words


def _pdf(stream, chars: int) -> Iterator[str]:
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(stream.read())
    except pypdfium2.PdfiumError as error:
        why = "encrypted and needs a password" if "password" in str(error).lower() else "damaged"
        raise ToolError(f"The PDF is {why}.") from error
    for number in range(len(document)):
        try:
            page = document[number]
            text = page.get_textpage().get_text_range().replace("\r\n", "\n").strip()
            page.close()
        except pypdfium2.PdfiumError:
            text = "(a damaged page)"
        yield f"\n\n[page {number + 1} of {len(document)}]\n" + (text or "(no text on this page)")


def _archive(stream) -> zipfile.ZipFile:
    try:
        archive = zipfile.ZipFile(stream)
    except (zipfile.BadZipFile, ValueError, OSError, struct.error) as error:
        raise ToolError(f"The archive is damaged: {str(error)[:200]}.") from error
    if len(archive.infolist()) > MOST_MEMBERS:
        raise ToolError(f"The archive has {len(archive.infolist()):,} members; up to {MOST_MEMBERS:,} can be read.")
    return archive


def _check_size(packed: int, unpacked: int, most: int) -> None:
    if unpacked > most or (unpacked > FREE_BYTES and unpacked > MOST_RATIO * packed):
        raise ToolError(f"It would unpack from {packed:,} to {unpacked:,} bytes, which is too much to read.")


def _member(stream, name: str, member: str) -> bytes:
    """The bytes of an archive's member; nothing is ever written to disk."""
    if not stream.read(4).startswith(b"PK"):
        raise ToolError(f"{name[:200]!r} is not a zip archive: it has no members.")
    archive = _archive(stream)
    try:
        info = archive.getinfo(member)
    except KeyError:
        raise ToolError(f"There is no {member[:200]!r} in {name[:200]!r}; it holds:\n{_listing(archive)}") from None
    if stat.S_ISLNK(info.external_attr >> 16) or info.is_dir():
        raise ToolError(f"{member[:200]!r} is a link or a folder, not a file.")
    if info.flag_bits & 1:
        raise ToolError(f"{member[:200]!r} is encrypted and needs a password.")
    _check_size(info.compress_size, info.file_size, MOST_BYTES)
    with archive.open(info) as packed:
        body = packed.read(MOST_BYTES + 1)
    _check_size(info.compress_size, len(body), MOST_BYTES)
    return body


def _listing(archive: zipfile.ZipFile) -> str:
    infos = archive.infolist()
    lines = [f"{info.filename}\t{info.file_size:,} bytes" for info in infos[:1000] if not info.is_dir()]
    return "\n".join(lines) + (f"\n[{len(infos) - 1000:,} more]" if len(infos) > 1000 else "")


def _zip(stream, chars: int) -> Iterator[str]:
    archive = _archive(stream)
    yield f"An archive with {len(archive.infolist()):,} members. To read one, ask for archive.zip::member.\n"
    yield _listing(archive)


def _office(stream):
    """The same stream, if its members do not unpack to too much."""
    infos = _archive(stream).infolist()
    _check_size(sum(info.compress_size for info in infos), sum(info.file_size for info in infos), MOST_UNPACKED)
    stream.seek(0)
    return stream


def _xlsx(stream, chars: int) -> Iterator[str]:
    """Every sheet as rows of cells between tabs; below it the colours of its coloured cells."""
    import openpyxl

    body = _office(stream).read()
    books = [openpyxl.load_workbook(io.BytesIO(body), read_only=True, data_only=stored, keep_links=False) for stored in (1, 0)]
    for values, formulas in zip(*(book.worksheets for book in books), strict=True):
        yield f"\n[sheet {values.title!r}]\n"
        colours = []
        for sheet in (values, formulas):
            sheet.reset_dimensions()  # what the file claims may be the whole grid
        empty = 0
        for row, other in zip(values.iter_rows(max_row=100_000), formulas.iter_rows(), strict=False):
            cells = [_cell(a, b) for a, b in zip(row[:500], other[:500], strict=False)]
            colours += [f"{cell.coordinate} {colour}" for cell in row[:500] if (colour := _colour(cell))]
            line = "\t".join(cells).rstrip("\t") + (f"\t[{len(row) - 500} more columns]" if len(row) > 500 else "")
            if line:
                yield (f"[{empty} empty rows]\n" if empty else "") + line + "\n"
            empty = 0 if line else empty + 1
        if colours:
            yield f"[colours: {', '.join(colours[:2000])}]\n"


def _cell(stored, written) -> str:
    value = stored.value
    if value is None:
        value = getattr(written.value, "text", written.value)  # an array formula carries its text
    return "" if value is None else re.sub(r"\s", " ", str(value))


def _colour(cell) -> str:
    fill = getattr(cell, "fill", None)
    if fill is None or fill.fill_type != "solid":
        return ""
    colour = fill.fgColor
    return str(colour.rgb)[-6:] if colour.type == "rgb" else f"{colour.type} {colour.value}"


def _docx(stream, chars: int) -> Iterator[str]:
    import docx

    document = docx.Document(_office(stream))
    for section in document.sections:
        for part in (section.header, section.footer):
            if not part.is_linked_to_previous and (text := "".join(_blocks(part)).strip()):
                yield f"[header or footer: {text}]\n"
    yield from _blocks(document)


def _blocks(container, depth: int = 0) -> Iterator[str]:
    """Paragraphs and tables in their order; a table inside a cell becomes part of the cell's text."""
    for block in container.iter_inner_content():
        if hasattr(block, "rows"):
            for row in block.rows:
                cells = {cell._tc: cell for cell in row.cells}.values()  # a merged cell is one cell
                texts = ("".join(_blocks(cell, depth + 1)) if depth < 5 else cell.text for cell in cells)
                yield "\t".join(re.sub(r"\s+", " ", text.strip()) for text in texts) + "\n"
        else:
            yield block.text + "\n"


def _pptx(stream, chars: int) -> Iterator[str]:
    import pptx

    for number, slide in enumerate(pptx.Presentation(_office(stream)).slides, 1):
        yield f"\n[slide {number}]\n"
        yield from _shapes(slide.shapes)
        if slide.has_notes_slide and slide.notes_slide.notes_text_frame is not None:
            notes = slide.notes_slide.notes_text_frame.text.strip()
            yield f"[notes: {notes}]\n" if notes else ""


def _shapes(shapes, depth: int = 0) -> Iterator[str]:
    for shape in shapes:
        if hasattr(shape, "shapes") and depth < 20:
            yield from _shapes(shape.shapes, depth + 1)
        elif getattr(shape, "has_table", False):
            for row in shape.table.rows:
                yield "\t".join(re.sub(r"\s+", " ", cell.text.strip()) for cell in row.cells) + "\n"
        elif getattr(shape, "has_chart", False):
            for series in (series for plot in shape.chart.plots for series in plot.series):
                yield f"[chart: {series.name}: {', '.join(map(str, series.values))}]\n"
        elif shape.has_text_frame:
            yield shape.text_frame.text + "\n" if shape.text_frame.text.strip() else ""
        elif hasattr(shape, "image"):
            yield f"[picture: {shape.name}]\n"


READERS: dict[str, Callable[[io.BufferedIOBase, int], Iterator[str]]] = {
    "text": _text, "html": _html, "pdf": _pdf, "zip": _zip, "xlsx": _xlsx, "docx": _docx, "pptx": _pptx,
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# images and recordings: what their headers say


def image_size(body: bytes) -> tuple[str, int, int]:
    """(type, width, height) of a png, jpeg, gif or webp image by its header, which is all that is looked at; ToolError."""
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
        if marker in (0xFF, 0x00, 0x01, *range(0xD0, 0xD9)):  # fill bytes and markers without a length
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
    """(type, seconds) of a wav, mp3, flac, ogg or m4a recording; None seconds if its header does not say; ToolError."""
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
    packed = int.from_bytes(body[18:26], "big")  # 20 bits of rate, 3 of channels, 5 of depth, 36 of samples
    return (packed & (1 << 36) - 1) / (packed >> 44) or None


def _ogg_seconds(body: bytes) -> float | None:
    last = body.rfind(b"OggS")
    samples = struct.unpack("<q", body[last + 6 : last + 14])[0]
    at = body.find(b"\x01vorbis", 0, 512)
    return samples / (struct.unpack("<I", body[at + 12 : at + 16])[0] if at >= 0 else 48000)  # Opus: always 48 kHz


def _m4a_seconds(body: bytes) -> float | None:
    start, end = 0, len(body)
    while start + 8 <= end:
        size, name = struct.unpack(">I4s", body[start : start + 8])
        head = 16 if size == 1 else 8
        size = struct.unpack(">Q", body[start + 8 : start + 16])[0] if size == 1 else size or end - start
        if name == b"mvhd":
            wide = body[start + 8] == 1
            at = start + (28 if wide else 20)
            rate, length = struct.unpack(">IQ" if wide else ">II", body[at : at + (12 if wide else 8)])
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
        at = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(body[6:10], (21, 14, 7, 0), strict=True))
    while body[at] != 0xFF or body[at + 1] & 0xE6 != 0xE2:  # the first frame of layer III
        at = body.index(b"\xff", at + 1, at + 65536) if b"\xff" in body[at + 1 : at + 65536] else len(body)
    first = body[at + 1] >> 3 & 3 == 3  # MPEG 1; else 2 or 2.5
    rates = (44100, 48000, 32000)
    rate = rates[body[at + 2] >> 2 & 3] / {3: 1, 2: 2, 0: 4}.get(body[at + 1] >> 3 & 3, 0)
    kbits = ((0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320) if first
             else (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160))[body[at + 2] >> 4]  # fmt: skip
    for mark in (b"Xing", b"Info"):  # a header that counts the frames
        found = body.find(mark, at, at + 64)
        if found >= 0 and body[found + 7] & 1:
            return struct.unpack(">I", body[found + 8 : found + 12])[0] * (1152 if first else 576) / rate
    return (len(body) - at) / (kbits * 125)


# ---------------------------------------------------------------------------------------------------------------------
# endpoints


def describe_image(files_dir: str, path: str, question: str, *, seconds: float) -> str:
    """What the vision endpoint answers to `question` about a png, jpeg, gif or webp image in `files_dir`.

    The image goes as it is, in a data URI of its true type. ToolError for a file that is no such image, that has more than
    20 MB or 50 million pixels, or that the endpoint does not take; ToolFault if the endpoint fails or is not set.
    """
    deadline = time.monotonic() + seconds
    body = _whole(files_dir, path, MOST_IMAGE_BYTES)
    kind, width, height = image_size(body)
    if not 0 < width * height <= MOST_PIXELS:
        raise ToolError(f"The image has {width:,} x {height:,} pixels; up to {MOST_PIXELS:,} can be looked at.")
    url = f"data:image/{kind};base64,{base64.b64encode(body).decode()}"
    content = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": url}}]
    with endpoint("VISION") as (client, model):
        create = client.chat.completions.with_streaming_response.create
        reply = asked(
            lambda left: create(model=model, messages=[{"role": "user", "content": content}], timeout=left),
            deadline, "the vision endpoint",
        )  # fmt: skip
    try:
        text = reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise ToolFault(f"the vision endpoint answers without a message: {str(reply)[:200]}") from error
    if not isinstance(text, str) or not text.strip():
        raise ToolFault("the vision endpoint gives an empty answer")
    return text


def transcribe_audio(files_dir: str, path: str, *, seconds: float) -> str:
    """The words of a wav, mp3, flac, ogg or m4a recording in `files_dir`, from the speech endpoint.

    A long one is sent in pieces of up to ten minutes: wav by itself, the others through ffmpeg. ToolError for a file that is
    no such recording, that has more than 100 MB or two hours, or that the endpoint does not take; ToolFault if the endpoint
    fails or is not set, or if a long recording needs an ffmpeg that is not there.
    """
    deadline = time.monotonic() + seconds
    fd = opened(files_dir, _no_member(path), MOST_AUDIO_BYTES)
    with os.fdopen(fd, "rb") as stream, endpoint("SPEECH") as (client, model):
        body = stream.read(MOST_AUDIO_BYTES)
        kind, length = audio_length(body)
        if length and length > MOST_AUDIO_SECONDS:
            raise ToolError(f"The recording lasts {length:,.0f} s; up to {MOST_AUDIO_SECONDS:,} can be listened to.")
        if len(body) <= PIECE_BYTES and (length or 0) <= PIECE_SECONDS:
            pieces = iter([(kind, body)])
        elif kind == "wav" and (sliced := _wav_pieces(body)):
            pieces = sliced
        else:
            pieces = _ffmpeg_pieces(fd, kind, deadline)
        create, texts = client.audio.transcriptions.with_streaming_response.create, []
        for kind, piece in pieces:  # noqa: PLW2901 - of a piece, the type that it has
            # the name on our disk is nobody's business; the endpoint goes by its ending
            file = (f"recording.{kind}", piece, {"mp3": "audio/mpeg", "m4a": "audio/mp4"}.get(kind, f"audio/{kind}"))
            reply = asked(
                lambda left, file=file: create(model=model, file=file, response_format="json", timeout=left),
                deadline, "the speech endpoint",
            )  # fmt: skip
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
    return (("wav", _as_wav(data, *whole.getparams()[:3])) for data in iter(lambda: whole.readframes(frames), b""))


def _as_wav(data: bytes, channels: int, width: int, rate: int) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as piece:
        piece.setnchannels(channels)
        piece.setsampwidth(width)
        piece.setframerate(rate)
        piece.writeframes(data)
    return out.getvalue()


def _ffmpeg_pieces(fd: int, kind: str, deadline: float) -> Iterator[tuple[str, bytes]]:
    """Pieces as 16 kHz mono wav, from a child that runs ffmpeg; its demuxer is set, so no playlist can name other files."""
    ffmpeg = shutil.which("ffmpeg")
    if not ffmpeg:
        raise ToolFault("a recording this long is sent in pieces, which needs ffmpeg: apt-get install ffmpeg")
    command = [ffmpeg, "-nostdin", "-v", "error", "-protocol_whitelist", "file", "-f", "mov" if kind == "m4a" else kind, "-i",
               "/proc/self/fd/0", "-t", str(MOST_AUDIO_SECONDS), "-vn", "-ac", "1", "-ar", "16000", "-f", "s16le",
               "-protocol_whitelist", "pipe", "pipe:1"]  # fmt: skip
    with _running(fd, {"do": "ffmpeg", "command": command}, deadline) as pipe:
        for number in itertools.count():
            data = _read(pipe, PIECE_SECONDS * 32_000, deadline)
            if not data and number == 0:
                raise ToolError("The recording is damaged: ffmpeg finds no sound in it.")
            if not data:
                return
            yield "wav", _as_wav(data, 1, 2, 16_000)


@contextlib.contextmanager
def endpoint(name: str):
    """(client, model) of the endpoint that NAME_URL, NAME_MODEL and NAME_API_KEY set; ToolFault if they do not.

    The client takes no proxy, no organization and no header from the environment, and follows no redirect.
    """
    url, model, key = (os.environ.get(f"{name}_{part}", "") for part in ("URL", "MODEL", "API_KEY"))
    if not url.startswith(("http://", "https://")) or not model:
        raise ToolFault(f"no endpoint for this tool: set {name}_URL and {name}_MODEL (and {name}_API_KEY)")
    import openai

    def only_ours(request):
        kept = ("host", "content-type", "content-length", "accept", "connection", "x-stainless-raw-response")
        for header in [header for header in request.headers if header.lower() not in kept]:
            del request.headers[header]
        if key:
            request.headers["authorization"] = f"Bearer {key}"

    hooks = {"request": [only_ours]}
    http = openai.DefaultHttpxClient(follow_redirects=False, trust_env=False, event_hooks=hooks)
    with openai.OpenAI(base_url=url, api_key=key or "none", max_retries=0, http_client=http) as client:
        yield client, model


def asked(request, deadline: float, what: str, tries: int = 4, most_bytes: int = 4 << 20):
    """The JSON that an endpoint answers to `request(seconds left)`.

    429, 5xx and a broken connection are tried again while there is time, then ToolFault; so are other refusals, but for
    those of the file itself (400, 413, 415, 422), which are a ToolError.
    """
    import openai

    problem = "no time is left"
    for attempt in range(tries):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        pause = 0.3 * 2**attempt
        try:
            body = bytearray()
            with request(left) as response:
                for chunk in response.iter_bytes():
                    body += chunk
                    if len(body) > most_bytes or time.monotonic() > deadline:
                        raise ToolFault(f"{what} answers too much or too slowly")
            return json.loads(body)
        except openai.APIStatusError as error:
            problem = f"{error.status_code} {str(error)[:200]}"
            if error.status_code in (400, 413, 415, 422):
                raise ToolError(f"{what} does not take this file: {problem}") from error
            if error.status_code not in (408, 409, 429) and error.status_code < 500:
                break
            after = error.response.headers.get("retry-after", "")
            pause = max(pause, float(after)) if re.fullmatch(r"\d{1,5}", after) else pause
        except openai.OpenAIError as error:
            problem = f"{type(error).__name__} {str(error)[:200]}"
        except (ValueError, RecursionError):
            problem = "it does not answer with JSON"
        if attempt == tries - 1 or time.monotonic() + pause >= deadline:
            break
        time.sleep(pause)
    raise ToolFault(f"{what} failed: {problem}")


if __name__ == "__main__":
    child(json.loads(sys.argv[2]))
