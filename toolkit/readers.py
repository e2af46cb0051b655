"""What files.py runs in its child: documents, tables, archives and HTML as text. A reader takes
(stream, chars) and yields pieces of text; kind_of chooses it by the first bytes."""

import codecs
import contextlib
import gzip
import io
import json
import os
import re
import resource
import stat
import struct
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urldefrag, urljoin

from toolkit.sandbox import ToolError

MOST_BYTES = 100 << 20  # of a file, or of a member of an archive
MOST_UNPACKED = 200 << 20  # of all members of an office document
MOST_RATIO = 200  # of unpacked to packed bytes, for what is larger than FREE_BYTES
FREE_BYTES = 20 << 20
MOST_MEMBERS = 10_000
MOST_ROWS = 100_000  # of a sheet
MOST_LINKS = 200  # of a page
READABLE = "text, code, json, csv, html, xml, xlsx, docx, pptx, pdf and zip"


def child(given: dict) -> None:
    """Reads descriptor 0; writes "ready" and a JSON object: what was found, or error, or fault."""
    answer = os.dup(1)
    os.dup2(2, 1)  # whatever a parser prints is no part of the answer
    limits = {"AS": given["memory"], "CPU": int(given["seconds"]) + 2, "FSIZE": 0, "CORE": 0}
    for name, value in (limits | {"NOFILE": 64}).items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    os.write(answer, b"ready\n")
    try:
        if given["do"] == "ffmpeg":
            os.dup2(answer, 1)
            os.execv(given["command"][0], given["command"])
        work = {"page": _page, "file": _file, "audio": audio_length}[given["do"]]
        with os.fdopen(0, "rb", closefd=False) as stream:
            reply = work(stream, given)
    except ToolError as error:
        reply = {"error": str(error)}
    except ImportError as error:
        reply = {"fault": f"a reader is not installed: {error}"}
    except MemoryError:
        reply = {"error": f"The file needs more than {given['memory'] >> 20} MB to be read."}
    except Exception as error:  # parsers raise anything on a damaged file
        reply = {"error": f"The file is damaged, or not what it seems: {error!r:.200}"}
    with os.fdopen(answer, "wb") as out:
        out.write(json.dumps(reply).encode())


def _file(stream, given: dict) -> dict:
    """Text of a seekable binary stream, or of a member of the archive in it, or of one in that."""
    name, chars = given["name"], given["chars"]
    if len(given["members"]) > 3:
        raise ToolError("An archive in an archive in an archive is as deep as it goes.")
    for member in given["members"]:
        stream, name = io.BytesIO(_member(stream, name, member)), member
    text, length, until = [], 0, time.monotonic() + 0.7 * given["seconds"]
    for piece in READERS[kind_of(stream, name)](stream, chars):
        text.append(piece[: chars - length])
        length += len(text[-1])
        if len(piece) > len(text[-1]) or time.monotonic() > until:
            text.append(f"\n[Cut here, after {length:,} characters: there is more in the file.]")
            break
    whole = "".join(text).encode("utf-8", "replace").decode() if length else "(an empty file)"
    return {"title": "", "text": whole}


HTML = re.compile(rb"<(!doctype\s+html|html|head|body|div|p|table|title)\b", re.I)


def _page(stream, given: dict) -> dict:
    """Title and text of a page, by what it is and not by what the server claims."""
    body = unpacked(stream.read(), given["packed"], given["most"])
    if not body.strip():
        return {"title": "", "text": "(an empty page)"}
    if codec := charset(given["charset"]):  # what the header says goes before what the page says
        with contextlib.suppress(UnicodeDecodeError):
            body = codecs.BOM_UTF8 + body.decode(codec).encode()
    if HTML.search(body[:4096]) and b"\0" not in body[:4096]:
        title, text = html_text(decoded(body, whole=True), given["url"], given["chars"])
        return {"title": title, "text": text or "(a page without text)"}
    return _file(io.BytesIO(body), given)


AUDIO = {"wav": rb"RIFF....WAVE", "m4a": rb"....ftyp", "flac": rb"fLaC", "ogg": rb"OggS"}
AUDIO["mp3"] = rb"ID3|\xff[\xe2\xe3\xea\xeb\xf2\xf3\xfa\xfb]"  # a frame of layer III


def audio_length(stream, given: dict) -> dict:
    """The kind of a wav, mp3, flac, ogg or m4a, and its seconds or None if it does not say."""
    from tinytag import TinyTag

    head = stream.read(12)
    kind = next((kind for kind, start in AUDIO.items() if re.match(start, head, re.S)), None)
    if not kind:
        raise ToolError("The file is not a wav, mp3, flac, ogg or m4a recording.")
    stream.seek(0)
    seconds = None
    with contextlib.suppress(Exception):  # a damaged header fails in any way
        found = TinyTag.get(file_obj=stream, tags=False)
        seconds = found.duration or None
        if kind == "wav":  # a stream may not know its size
            seconds = min(seconds, found.filesize / (125 * found.bitrate))
    return {"kind": kind, "seconds": seconds}


def unpacked(body: bytes, packed: str, most: int) -> bytes:
    """The body as it was before gzip; ToolError beyond `most` bytes and for any other packing."""
    packed = packed.strip().lower()
    if packed in ("", "identity"):
        return body
    if packed not in ("gzip", "x-gzip"):
        raise ToolError(f"The page is packed as {packed[:40]}, which was not asked for.")
    try:
        text = gzip.GzipFile(fileobj=io.BytesIO(body)).read(most + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ToolError(f"The page is not packed as it says: {error}.") from error
    if len(text) > most:
        raise ToolError(f"The page is larger than {most >> 20} MiB.")
    return text


# ------------------------------------------------------------------ kinds of files and of encodings

OFFICE = {"xlsx": "xl/workbook.xml", "docx": "word/document.xml", "pptx": "ppt/presentation.xml"}
CONTROLS = bytes([*range(9), 11, *range(14, 27), *range(28, 32), 127])
SOUND = "a recording: audio2text listens to it"
BITMAP = "an image of a type that cannot be read (png, jpeg, gif and webp can)"
BINARY = f"binary data, which cannot be read ({READABLE} can)"
OLD = "an old or encrypted Office file, which cannot be read (xlsx, docx and pptx can)"
REFUSED = {  # what a file is, and how it begins
    "an image: image2text looks at it": rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP",
    SOUND: rb"fLaC|OggS|ID3|\xff[\xf2\xf3\xfb]|RIFF|....ftypM4[AB]",
    "a video, which cannot be read": rb"\x1aE\xdf\xa3|....ftyp",
    BITMAP: rb"BM|II\*\0|MM\0\*",
    OLD: rb"\xd0\xcf\x11\xe0",
    "an archive that cannot be read (zip can)": rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!",
    BINARY: rb"\x93NUMPY|\x7fELF|SQLite format 3|\x80[\2-\5]",  # the last one a pickle
}


def kind_of(stream, name: str) -> str:
    """The key in READERS by the first bytes; the name decides only among texts. ToolError."""
    head = stream.read(1 << 16)
    stream.seek(0)
    if head.startswith((b"PK\3\4", b"PK\5\6")):
        names = {info.filename for info in _archive(stream).infolist()}
        return next((kind for kind, mark in OFFICE.items() if mark in names), "zip")
    if b"%PDF-" in head[:1024]:
        return "pdf"
    what = next((what for what, start in REFUSED.items() if re.match(start, head, re.S)), "")
    wide = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or _wide(head)
    controls = len(head) - len(head.translate(None, CONTROLS))
    if not what and not wide and controls > len(head) / 100:
        what = BINARY
    if what and not (what == BITMAP and controls == 0):  # a text may begin with BM
        raise ToolError(f"The file is {what}.")
    text = head[:4096].decode("utf-16" if wide else "latin-1", "replace")
    text = text.lstrip("\ufeff\xef\xbb\xbf \t\r\n").lower()
    named = text.startswith("<") and name.lower().endswith((".html", ".htm"))
    return "html" if named or text.startswith(("<!doctype html", "<html")) else "text"


def _wide(head: bytes) -> str:
    """utf-16-le or -be if every other byte is mostly zero, as in western text without a mark."""
    even, odd = head[0:1000:2], head[1:1000:2]
    for name, zeros, others in (("utf-16-le", odd, even), ("utf-16-be", even, odd)):
        few = others.count(0) < 0.1 * len(others)
        if few and len(even) > 1 and zeros.count(0) > 0.4 * len(zeros):
            return name
    return ""


def decoded(body: bytes, whole: bool) -> str:
    """Text by its mark, as UTF-8, as it declares, else by a guess. `whole`: nothing was cut off."""
    for name in ("utf-8", "utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be"):
        mark = "\ufeff".encode(name)
        if body.startswith(mark):
            return codecs.getincrementaldecoder(name)("replace").decode(body[len(mark) :])
    if name := _wide(body):
        return codecs.getincrementaldecoder(name)("replace").decode(body)
    said = re.search(rb"(?:charset|encoding)\s*=\s*[\"']?([\w.:-]{1,30})", body[:2048])
    for codec in filter(None, ("utf-8", said and charset(said[1].decode()))):
        with contextlib.suppress(UnicodeDecodeError):
            return codecs.getincrementaldecoder(codec)().decode(body, final=whole)
    from charset_normalizer import from_bytes

    best = from_bytes(body[: 1 << 16], cp_isolation=sorted(CHARSETS)).best()
    return body.decode(best and charset(best.encoding) or "utf-8", "replace")


# as browsers read them: a label's codec, or after "=" a wider one that is meant by it. All take
# time in proportion to the text, which Python's punycode and others do not
CHARSETS = (Path(__file__).with_name("charsets.txt").read_text("utf-8")).split()
CHARSETS = {name: wider or name for name, _, wider in (s.partition("=") for s in CHARSETS)}


def charset(label: str) -> str | None:
    """The codec for a label of a page or a file; None if it is unknown or not in CHARSETS."""
    with contextlib.suppress(LookupError, ValueError):
        return CHARSETS[codecs.lookup(label.lower().removeprefix("x-")).name]


def _text(stream, chars: int) -> Iterator[str]:
    body = stream.read(most := 4 * chars + 4)
    yield decoded(body, whole=len(body) < most)
    if len(body) == most:
        yield " " * chars  # there is more: the caller cuts


def _html(stream, chars: int) -> Iterator[str]:
    yield "\n".join(html_text(decoded(stream.read(), whole=True), "", chars))


def html_text(text: str, url: str, chars: int) -> tuple[str, str]:
    """(title, text) of HTML: of a page at `url` main text and links, of a file whatever it says.
    The main text, by trafilatura, gives way to all words of a page where it is short (a list, a
    form), and of a file where it leaves out more than a fifth."""
    import trafilatura

    tree, note = _tree(text)
    title = " ".join((tree.findtext(".//title") or "").split())[:500]
    links = _links(tree, url) if url else ""
    where, main = dict(url=url or None, include_comments=not url), ""
    with contextlib.suppress(RecursionError):  # lists in lists: then all words count
        main = trafilatura.extract(_tree(text)[0], favor_recall=True, **where) or ""
    if not url or len(main) < 400:
        words = _words(tree)
        main = words if len(main) < (1.0 if url else 0.8) * len(words) else main
    if len(main) > chars:
        note = f"\n[Cut here, after {chars:,} characters: there is more on the page.]"
    return title, (main[:chars] + note + links).strip()


def _tree(text: str):
    """(the tree of HTML, a note or ""): libxml2 stops at 2,048 levels and tells its log alone."""
    from lxml import html

    options = dict(huge_tree=True, remove_comments=True, remove_pis=True)
    parser = html.HTMLParser(encoding="utf-8", **options)
    tree = html.document_fromstring(text.encode("utf-8", "replace"), parser=parser)
    fatal = [entry for entry in parser.error_log if entry.level_name == "FATAL"]
    if not fatal:
        return tree, ""
    where = f"line {fatal[0].line}, column {fatal[0].column} of its source"
    return tree, f"\n[Cut here, at {where}: the page is nested too deep to be read further.]"


def _links(tree, url: str) -> str:
    links = {}
    for link in tree.iter("a"):
        name = " ".join(link.text_content().split())[:200]
        with contextlib.suppress(ValueError):
            address = urldefrag(urljoin(url, link.get("href", "").strip()))[0]
            web = address.startswith(("http://", "https://")) and len(address) < 500
            if name and web and address != url:
                links.setdefault(address, name)
    lines = [f"\n- {name}: {to}" for to, name in links.items()]
    if len(lines) > MOST_LINKS:
        lines[MOST_LINKS:] = [f"\n[{len(lines) - MOST_LINKS:,} more links]"]
    return "\n\nLinks on the page:" + "".join(lines) if links else ""


BLOCKS = "p div br li tr td th h1 h2 h3 h4 dt dd section".split()


def _words(tree) -> str:
    """All words below the title: a line a block, a tab between cells; takes the tree apart."""
    for part in tree.xpath("//script | //style | //noscript | //template | //title"):
        part.drop_tree()
    for part in tree.iter(*BLOCKS):
        part.tail = ("\t" if part.tag in ("td", "th") else "\n") + (part.tail or "")
    lines = (re.sub("[ \r\f\v]+", " ", line).strip() for line in tree.text_content().split("\n"))
    return "\n".join(line for line in lines if line)


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
    if (count := len(archive.infolist())) > MOST_MEMBERS:
        raise ToolError(f"The archive has {count:,} members; up to {MOST_MEMBERS:,} can be read.")
    return archive


def _check_size(packed: int, unpacked: int, most: int) -> None:
    if unpacked > most or (unpacked > FREE_BYTES and unpacked > MOST_RATIO * packed):
        raise ToolError(f"It would unpack from {packed:,} to {unpacked:,} bytes: too much to read.")


def _member(stream, name: str, member: str) -> bytes:
    """The bytes of an archive's member; nothing is ever written to disk."""
    if not stream.read(4).startswith(b"PK"):
        raise ToolError(f"{name[:200]!r} is not a zip archive: it has no members.")
    archive = _archive(stream)
    try:
        info = archive.getinfo(member)
    except KeyError:
        known = f"{name[:200]!r}; it holds:\n{_listing(archive)}"
        raise ToolError(f"There is no {member[:200]!r} in {known}") from None
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
    named = [info for info in infos[:1000] if not info.is_dir()]
    lines = [f"{info.filename}\t{info.file_size:,} bytes" for info in named]
    return "\n".join(lines) + (f"\n[{len(infos) - 1000:,} more]" if len(infos) > 1000 else "")


def _zip(stream, chars: int) -> Iterator[str]:
    archive = _archive(stream)
    yield f"An archive with {len(archive.infolist()):,} members. "
    yield "To read one, ask for archive.zip::member.\n" + _listing(archive)


def _office(stream):
    """The same stream, if its members do not unpack to too much."""
    sizes = [(info.compress_size, info.file_size) for info in _archive(stream).infolist()]
    _check_size(*map(sum, zip(*sizes)), MOST_UNPACKED)
    stream.seek(0)
    return stream


def _xlsx(stream, chars: int) -> Iterator[str]:
    """Every sheet as rows of cells between tabs; below it the colours of its coloured cells."""
    import openpyxl

    body, how = _office(stream).read(), dict(read_only=True, keep_links=False)
    books = [openpyxl.load_workbook(io.BytesIO(body), data_only=of, **how) for of in (True, False)]
    if not books[0].sheetnames:
        raise ToolError("The workbook has no sheet, or is in the strict form of Open XML.")
    for values, formulas in zip(*(book.worksheets for book in books), strict=True):
        yield f"\n[sheet {values.title!r}]\n"
        colours, last = [], 0
        for (number, row), (_, other) in zip(_rows(values), _rows(formulas), strict=True):
            if number > MOST_ROWS:
                yield f"[Cut here, after row {MOST_ROWS:,}: the sheet has more rows.]\n"
                break
            colours += [f"{cell.coordinate} {colour}" for cell in row if (colour := _colour(cell))]
            cells: dict[int, list[str]] = {}
            for stored, written in zip(row, other, strict=True):
                cells.setdefault(stored.column, []).append(_cell(stored, written))
            width = max(cells, default=0)
            line = "\t".join(" ".join(cells.get(at, "")) for at in range(1, min(width, 500) + 1))
            more = f"\t[{width - 500} more columns]" if width > 500 else ""
            if line := line.rstrip("\t") + more:
                gap = f"[{number - last - 1} empty rows]" if number > last else f"[row {number}]"
                yield (f"{gap}\n" if number != last + 1 else "") + line + "\n"
                last = number
        if colours:
            more = f", {len(colours) - 2000:,} more" if len(colours) > 2000 else ""
            yield f"[colours: {', '.join(colours[:2000])}{more}]\n"


def _rows(sheet) -> Iterator[tuple[int, list]]:
    """(number, cells) of each row of a file: openpyxl's own iterator drops what does not rise."""
    from openpyxl.cell.read_only import ReadOnlyCell
    from openpyxl.worksheet._reader import WorkSheetParser

    book = sheet.parent
    how = dict(data_only=book.data_only, epoch=book.epoch, date_formats=book._date_formats)
    how["timedelta_formats"] = book._timedelta_formats
    with sheet._get_source() as source:
        for number, cells in WorkSheetParser(source, sheet._shared_strings, **how).parse():
            yield number, [ReadOnlyCell(sheet, **cell) for cell in cells]


def _cell(stored, written) -> str:
    value = stored.value
    if value is None:
        value = getattr(written.value, "text", written.value)  # an array formula carries its text
    return "" if value is None else re.sub(r"\s", " ", str(value))


def _colour(cell) -> str:
    colour = cell.fill.fgColor if cell.fill.fill_type == "solid" else None
    if colour is None:
        return ""
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
    """Paragraphs and tables in their order; a table in a cell becomes part of the cell's text."""
    for block in container.iter_inner_content():
        if not hasattr(block, "rows"):
            yield block.text + "\n"
        elif depth > 5:
            yield "[a table nested too deep to be read]\n"
        else:
            for row in block.rows:
                cells = {cell._tc: cell for cell in row.cells}.values()  # a merged cell is one cell
                texts = ("".join(_blocks(cell, depth + 1)) for cell in cells)
                yield "\t".join(re.sub(r"\s+", " ", text.strip()) for text in texts) + "\n"


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
        if hasattr(shape, "shapes"):
            deep = ["[a group of shapes nested too deep to be read]\n"]
            yield from _shapes(shape.shapes, depth + 1) if depth < 20 else deep
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


READERS = {"text": _text, "html": _html, "pdf": _pdf, "zip": _zip}
READERS |= {"xlsx": _xlsx, "docx": _docx, "pptx": _pptx}
