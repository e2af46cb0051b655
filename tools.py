"""The tools of the agent. A tool is a function with type hints and a docstring: its schema comes from them.

    python tools.py search '{"queries": ["capital of Peru"]}' --corpus=corpus.jsonl --block=mirrors.txt
"""

import array
import asyncio
import contextlib
import hashlib
import inspect
import json
import math
import os
import queue
import re
import sys
import threading
import time
import zipfile
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from sandbox import Sandbox, ToolError, ToolFault
from web import Web


@dataclass(frozen=True)
class Observation:
    """What a call returned. status: ok | error (the model's doing) | timeout | fault (ours: left out of training)."""

    text: str
    status: str
    seconds: float


@dataclass
class Context:
    """What a tool may use besides its arguments: the row's documents and files, and what the run has opened."""

    docs: tuple[tuple[str, str], ...] | None = None  # (title, text)
    corpus: "Corpus | None" = None
    sandbox: Sandbox | None = None
    web: Web | None = None
    files_dir: str = ""
    files: tuple[str, ...] | None = None  # those of the row, in files_dir; None: any
    deadline: float = math.inf  # time.monotonic()
    output_chars: int = 10_000

    def left(self) -> float:
        """Seconds that this call still has."""
        return min(max(0.1, self.deadline - time.monotonic()), 3600.0)


# ---------------------------------------------------------------------------------------------------------------------
# local search: BM25 (k1 1.2, b 0.75), titles counted twice

STOP_WORDS = (
    "a an and are as at be been being but by did do does for from had has have he her his how in is it its not of on "
    "or she that the their there these they this those to was were what when where which who whom whose why with"
)
STOP_WORDS = frozenset(STOP_WORDS.split())
CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"  # written without spaces: a character is a word
WORD = re.compile(f"[{CJK}]|[^\\W{CJK}]+")


def words(text: str) -> list[str]:
    """Lower-case words without stop words and plural s; all of them if nothing else is there ("The Who")."""
    found = WORD.findall(text.lower())
    return [_stem(word) for word in found if word not in STOP_WORDS] or found


@lru_cache(maxsize=1 << 18)
def _stem(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


class Index:
    """BM25 over (title, text, url) pages in memory: an inverted list of (page, weight) for every word."""

    def __init__(self, pages: list[tuple[str, str, str]]):
        self.pages = pages
        counts = [Counter(words(title) * 2 + words(text)) for title, text, _ in pages]
        lengths = [sum(count.values()) for count in counts]
        mean = sum(lengths) / max(len(lengths), 1) or 1.0
        self.postings: dict[str, list[tuple[int, float]]] = {}
        for page, (count, length) in enumerate(zip(counts, lengths)):
            norm = 1.2 * (0.25 + 0.75 * length / mean)
            for word, n in count.items():
                self.postings.setdefault(word, []).append((page, n * 2.2 / (n + norm)))

    def search(self, query: str, top_k: int) -> list[tuple[str, str, str]]:
        scores: dict[int, float] = {}
        for word in set(words(query)):
            hits = self.postings.get(word, ())
            idf = math.log(1 + (len(self.pages) - len(hits) + 0.5) / (len(hits) + 0.5))
            for page, weight in hits:
                scores[page] = scores.get(page, 0.0) + idf * weight
        best = sorted(scores, key=lambda page: (-scores[page], page))[:top_k]
        return [self.pages[page] for page in best]

    def page(self, url: str) -> tuple[str, str] | None:
        """(title, text) of an address; paragraphs under one address are one page."""
        found = [page for page in self.pages if page[2] == url]
        return (found[0][0], "\n\n".join(text for _, text, _ in found)) if found else None


@lru_cache(maxsize=4096)
def docs_index(docs: tuple[tuple[str, str], ...]) -> Index:
    return Index([(title, text, f"doc:{title}") for title, text in docs])


class Corpus:
    """BM25 over a file of `{"id", "title", "text", "url"?}` rows, one a line. The index is kept beside it (`.bm25.npz`)
    and built again when the file has changed; texts are read from the file when they are found."""

    VERSION = 1  # raise it when `words` or the arrays change

    def __init__(self, path: str):
        if not Path(path).is_file():
            raise SystemExit(f"no corpus {path}: --corpus is a file of rows with id, title and text")
        self.path, self.file = path, open(path, "rb")
        about = os.fstat(self.file.fileno())
        key = np.array([self.VERSION, about.st_size, about.st_mtime_ns])
        arrays = self._kept(key)
        if arrays is None:
            arrays = self._build() | {"key": key}
            with contextlib.suppress(OSError):  # a folder that cannot be written: built again the next time
                self._keep(arrays)
        vars(self).update(arrays)  # see the end of _build

    def _kept(self, key: np.ndarray) -> dict[str, np.ndarray] | None:
        try:
            with np.load(self.path + ".bm25.npz", allow_pickle=False) as kept:
                return dict(kept) if np.array_equal(kept["key"], key) else None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # none, or not whole
            return None

    def _keep(self, arrays: dict[str, np.ndarray]) -> None:
        """Written beside and renamed: another process finds the old index or the new one."""
        beside = f"{self.path}.{os.getpid()}.{threading.get_ident()}.npz"
        try:
            np.savez(beside, **arrays)
            os.replace(beside, self.path + ".bm25.npz")
        finally:
            Path(beside).unlink(missing_ok=True)

    def _build(self) -> dict[str, np.ndarray]:
        vocabulary: dict[str, int] = {}
        row_start, row_bytes, urls, lengths, at = [], [], [], [], 0
        page_of, word_of, times = array.array("i"), array.array("i"), array.array("i")
        for number, line in enumerate(self.file, 1):
            if line.strip():
                title, text, url = _corpus_row(self.path, number, line)
                count = Counter(words(title) * 2 + words(text))
                page_of.extend([len(urls)] * len(count))
                word_of.extend([vocabulary.setdefault(word, len(vocabulary)) for word in count])
                times.extend(count.values())
                row_start.append(at), row_bytes.append(len(line)), urls.append(url), lengths.append(count.total())
            at += len(line)
        hashes = np.array([_hash(word) for word in vocabulary], "<u8")
        order = np.argsort(hashes)
        word = np.argsort(order)[np.array(word_of, "<i8")]  # numbered as their hashes are sorted
        page, n, length = np.array(page_of, "<i4"), np.array(times, "<f8"), np.array(lengths, "<f8")
        in_pages = np.bincount(word, minlength=len(order))
        idf = np.log(1 + (len(urls) - in_pages + 0.5) / (in_pages + 0.5))
        norm = 1.2 * (0.25 + 0.75 * length / max(length.mean() if len(length) else 0.0, 1e-9))
        by_word = np.argsort(word, kind="stable")
        url_hash = np.array([_hash(url) for url in urls], "<u8")
        by_url = np.argsort(url_hash, kind="stable")
        weight = idf[word] * n * 2.2 / (n + norm[page])
        # word_hash and url_hash are sorted; word i is in hit_page[word_start[i] : word_start[i + 1]] with hit_weight
        return {"word_hash": hashes[order], "word_start": np.concatenate([[0], np.cumsum(in_pages)]),
                "hit_page": page[by_word], "hit_weight": weight[by_word].astype("<f4"),
                "url_hash": url_hash[by_url], "url_row": by_url,
                "row_start": np.array(row_start, "<i8"), "row_bytes": np.array(row_bytes, "<i8")}  # fmt: skip

    def _row(self, page: int) -> tuple[str, str, str]:
        line = os.pread(self.file.fileno(), int(self.row_bytes[page]), int(self.row_start[page]))
        try:
            return _corpus_row(self.path, page + 1, line)
        except SystemExit as error:
            raise ToolFault(f"the corpus {self.path} was changed while it is in use") from error

    def search(self, query: str, top_k: int) -> list[tuple[str, str, str]]:
        scores = np.zeros(len(self.row_start), "<f4")
        for word in sorted(set(words(query))):
            found = np.searchsorted(self.word_hash, np.uint64(_hash(word)))
            if found < len(self.word_hash) and self.word_hash[found] == _hash(word):
                hits = slice(*self.word_start[found : found + 2])
                scores[self.hit_page[hits]] += self.hit_weight[hits]
        best = np.flatnonzero(scores)
        if len(best) > top_k:  # all that tie with the last one stay: the order does not hang on the partition
            best = best[scores[best] >= np.partition(scores[best], -top_k)[-top_k]]
        return [self._row(page) for page in best[np.lexsort((best, -scores[best]))][:top_k]]

    def page(self, url: str) -> tuple[str, str] | None:
        """(title, text) of an address; paragraphs under one address are one page."""
        ends = [np.searchsorted(self.url_hash, np.uint64(_hash(url)), side) for side in ("left", "right")]
        found = [row for row in map(self._row, self.url_row[slice(*ends)]) if row[2] == url]
        return (found[0][0], "\n\n".join(text for _, text, _ in found)) if found else None


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _corpus_row(path: str, number: int, line: bytes) -> tuple[str, str, str]:
    try:
        row = json.loads(line)
        return row["title"] + "", row["text"] + "", str(row.get("url") or f"doc:{row['id']}")  # texts, or a TypeError
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path}:{number}: not a corpus row (id, title, text): {error!r}") from error


def passages(text: str, query: str, chars: int) -> str:
    """The parts of a text that match a query best, in the order of the text, `chars` at most; "" if none matches."""
    parts = [""]
    for line in text.splitlines():
        for piece in (line[i : i + 800] for i in range(0, len(line), 800)):
            if len(parts[-1]) + len(piece) > 800:
                parts.append("")
            parts[-1] += piece + "\n"
    chosen = []
    for _, part, number in Index([("", part, i) for i, part in enumerate(parts)]).search(query, len(parts)):
        chars -= len(part) + 4
        if chars < 0:
            break
        chosen.append(number)
    chosen.sort()
    shown = [parts[i] if i == before + 1 else f"[…]\n{parts[i]}" for before, i in zip([-1, *chosen], chosen)]
    return "".join(shown).rstrip()


# ---------------------------------------------------------------------------------------------------------------------
# the tools

MOST_QUERIES = 10
PASSAGE_CHARS, SUMMARY_CHARS = 5000, 60_000  # of a longer page that are shown for a query, or go to the summariser


def search(context: Context, queries: list[str], top_k: int = 5) -> str:
    """Searches for pages; each query is answered by a ranked list of titles, addresses and texts.

    queries: one or several search queries
    top_k: how many results for each query, 1 to 20
    """
    local, most = _local(context), max(1, min(top_k, 20))

    def hits_of(query: str) -> list[tuple[str, str, str]]:
        if local is not None:
            return [hit for hit in local.search(query[:1000], most) if not _blocked(context, hit[2])]
        return context.web.search(query[:1000], most, context.left()) if query.strip() else []

    asked, blocks = queries[:MOST_QUERIES], []
    if local is not None:
        found = [hits_of(query) for query in asked]
    else:
        with ThreadPoolExecutor(max_workers=5) as pool:  # side by side: each waits for the network
            found = list(pool.map(hits_of, asked))
    for query, hits in zip(asked, found):
        lines = [f"{i}. {title} ({url})\n{text}" for i, (title, text, url) in enumerate(hits, 1)]
        blocks.append("\n".join([f'Results for "{query}":', *lines]) if hits else f'No results for "{query}".')
    if len(queries) > MOST_QUERIES:
        blocks.append(f"[{len(queries) - MOST_QUERIES} queries left out: a call takes {MOST_QUERIES}]")
    return "\n\n".join(blocks)


def browse(context: Context, url: str, query: str = "") -> str:
    """Opens a page by its address and returns its text.

    url: the address of the page, as search gave it
    query: what to look for on the page
    """
    local = _local(context)
    if local is not None:
        page = None if _blocked(context, url) else local.page(url.strip())
        if page is None:
            raise ToolError(f"There is no page {url[:300]!r}. Use an address from the search results.")
        title, text = page
    else:
        title, text = context.web.page(url.strip(), context.left())
        if query.strip() and context.web.settings["summary"]:
            if len(text) > SUMMARY_CHARS:
                text = passages(text, query, SUMMARY_CHARS) or text[:SUMMARY_CHARS]
            return f"{title}\n\n{context.web.answer(url.strip(), text, query, context.left())}"
    room = max(500, context.output_chars - len(title) - 200)
    if len(text) > PASSAGE_CHARS and query.strip() and (found := passages(text, query, min(room, PASSAGE_CHARS))):
        return f"{title}\n[the passages that match the query best, of {len(text):,} characters]\n\n{found}"
    if len(text) > room:
        text = f"{text[:room]}\n[… {len(text) - room:,} characters left out: a query shows the passages that match it]"
    return f"{title}\n\n{text}"


def python(context: Context, code: str) -> str:
    """Runs Python code in a fresh sandbox and returns what it prints and the value of its last expression.

    code: the code to run
    """
    result = context.sandbox.run(code)
    if result.status == "fault":
        raise ToolFault(result.text)
    if result.status != "ok":
        raise (TimeoutError if result.status == "timeout" else ToolError)(result.text)
    return result.text


def file_reader(context: Context, file_path: str) -> str:
    """Reads a file that came with the question (text, code, table, document, PDF, archive) and returns its text.

    file_path: the file; a member of an archive as archive.zip::member
    """
    from attachments import file_to_text

    return file_to_text(*_file(context, file_path), seconds=context.left())


def image2text(context: Context, image_path: str, query: str = "Describe the image.") -> str:
    """Looks at an image that came with the question and answers what is asked about it.

    image_path: the image file
    query: what to find out about the image
    """
    from media import describe_image

    return describe_image(*_file(context, image_path), query, seconds=context.left())


def audio2text(context: Context, audio_path: str) -> str:
    """Writes down what is said in a recording that came with the question.

    audio_path: the audio file
    """
    from media import transcribe_audio

    return transcribe_audio(*_file(context, audio_path), seconds=context.left())


TOOLS = {tool.__name__: tool for tool in (search, browse, python, file_reader, image2text, audio2text)}


def _local(context: Context) -> "Index | Corpus | None":
    """Where search and browse look: the row's docs, else the corpus, else None: the web."""
    return docs_index(context.docs) if context.docs is not None else context.corpus


def _blocked(context: Context, url: str) -> bool:
    return context.docs is None and context.web is not None and context.web.blocklist.blocks(url)


def _file(context: Context, path: str) -> tuple[str, str]:
    """(files_dir, path); of a row that names its files only those can be read, also by their bare name."""
    if not context.files_dir:
        raise ToolFault("No files to read: --files_dir is not given.")
    if context.files is None:
        return context.files_dir, path
    outer, mark, member = path.strip().partition("::")
    bare = [name for name in context.files if Path(name).name == Path(outer).name]
    known = [outer] if outer in context.files else bare
    if len(known) != 1:
        raise ToolError(f"The question has no file {outer[:200]!r}; its files: {', '.join(context.files) or 'none'}")
    return context.files_dir, known[0] + mark + member


# ---------------------------------------------------------------------------------------------------------------------
# schemas and arguments


def schema_of(tool) -> dict:
    """The OpenAI function schema from type hints and docstring (`name: meaning` lines describe the parameters)."""
    kinds = {str: {"type": "string"}, int: {"type": "integer"}, float: {"type": "number"}, bool: {"type": "boolean"}}
    kinds[list[str]] = {"type": "array", "items": {"type": "string"}}
    text = inspect.getdoc(tool)
    about = dict(re.findall(r"^(\w+): (.+)$", text, re.M))
    properties, required = {}, []
    for name, parameter in _parameters(tool).items():
        properties[name] = kinds[parameter.annotation] | {"description": about[name]}
        if parameter.default is parameter.empty:
            required.append(name)
    parameters = {"type": "object", "properties": properties, "required": required}
    function = {"name": tool.__name__, "description": text.partition("\n\n")[0], "parameters": parameters}
    return {"type": "function", "function": function}


def _parameters(tool) -> dict[str, inspect.Parameter]:
    return dict(list(inspect.signature(tool).parameters.items())[1:])


def repaired(tool, arguments) -> dict:
    """Arguments as the tool takes them; harmless slips are mended ("5" for 5), others are a ToolError."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise ToolError(f"The arguments of {tool.__name__} are not a JSON object.") from error
    if not isinstance(arguments, dict):
        raise ToolError(f"The arguments of {tool.__name__} are a JSON object, not {type(arguments).__name__}.")
    known = _parameters(tool)
    unknown = sorted(str(name)[:50] for name in set(arguments) - set(known))
    if unknown:
        raise ToolError(f"{tool.__name__} does not take {', '.join(unknown[:5])}; it takes {', '.join(known)}.")
    given = {name: value for name, value in arguments.items() if value is not None}
    missing = [name for name, p in known.items() if p.default is p.empty and name not in given]
    if missing:
        raise ToolError(f"{tool.__name__} needs {', '.join(missing)}.")
    return {name: _typed(tool.__name__, name, value, known[name].annotation) for name, value in given.items()}


def _typed(tool: str, name: str, value, kind):
    """The value as `kind`: "5" or 5.0 for 5, 5 for "5", a text for a list of one, a list of one for a text."""
    if kind == list[str]:
        if isinstance(value, str) and re.match(r'\s*\[\s*"', value):  # a list that was quoted once too often
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(value)
        value = value if isinstance(value, list) else [value]
        if value and all(isinstance(item, str) for item in value):
            return value
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if kind is str and (isinstance(value, str) or _is_number(value)):
        return str(value)
    if kind is bool and (isinstance(value, bool) or str(value).lower() in ("true", "false")):
        return str(value).lower() == "true"
    if kind in (int, float):
        if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d{1,15}(\.\d{0,15})?\s*", value):
            value = float(value)
        if _is_number(value) and (kind is float or value == int(value)):
            return kind(value)
    wanted = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
    raise ToolError(f"{tool}: {name} must be {wanted.get(kind, 'a list of texts')}.")


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e308  # not NaN, and fits a float


# ---------------------------------------------------------------------------------------------------------------------
# the toolbox


class Toolbox:
    """The tools of a run, for async callers: a deadline a call, a limit on calls in flight, every result capped.

    corpus: rows with id, title and text; files_dir: where rows' files lie; block: a file of addresses that search and
    browse leave out (`blocked` counts them); cache: a sqlite file of web answers, from which alone `replay` answers;
    allow: host:port pairs beyond the public web, separated by commas. web.py says which keys the environment may hold.
    """

    def __init__(self, names, *, corpus: str = "", seconds_per_call: float = 30.0, calls_in_flight: int = 16,
                 output_chars: int = 10_000, unsafe_python: bool = False, files_dir: str = "", block: str = "",
                 cache: str = "", replay: bool = False, allow: str = ""):
        unknown = [name for name in names if name not in TOOLS]
        if unknown:
            raise SystemExit(f"no tool named {', '.join(unknown)}: there are {', '.join(TOOLS)}")
        if files_dir and not Path(files_dir).is_dir():
            raise SystemExit(f"no folder {files_dir}: --files_dir is where the files of the rows lie")
        self.names, self.files_dir = list(names), files_dir
        self.seconds, self.output_chars, self.calls_in_flight = seconds_per_call, output_chars, calls_in_flight
        self.schemas = [schema_of(TOOLS[name]) for name in self.names]
        self.corpus = Corpus(corpus) if corpus else None
        self.web = Web(allow=allow, block=block, cache=cache, replay=replay)
        self.sandbox = None
        if "python" in self.names:
            self.sandbox = Sandbox(seconds=seconds_per_call, output_chars=output_chars, unsafe=unsafe_python)
        self.lock, self.gates, self.loop = threading.Lock(), {}, None
        self.running, self.spare, self.closed = Counter(), [], False  # calls by tool, queues of threads without a job

    @property
    def blocked(self) -> int:
        """Results and pages that the block list has hidden so far."""
        return self.web.blocklist.count

    async def call(self, name: str, arguments, docs=None, files=None) -> Observation:
        """Runs one call; never raises for what the model wrote. `docs` = [{"title", "text"}]: search only there;
        `files` = [path in files_dir]: read only those."""
        began = time.perf_counter()
        if name not in self.names:
            text = f"There is no tool {str(name)[:100]!r}. The tools are {', '.join(self.names)}."
            return Observation(clean(text), "error", 0.0)
        context = Context(None, self.corpus, self.sandbox, self.web, self.files_dir, output_chars=self.output_chars)
        if docs is not None:
            context.docs = tuple((d["title"], d["text"]) for d in docs)
        context.files = None if files is None else tuple(files)
        try:
            if context.docs is not None and name in ("search", "browse"):  # microseconds: not worth a thread
                text, status = self._run(name, arguments, context), "ok"
            else:
                async with self._gate(name):
                    text, status = await self._in_thread(name, arguments, context), "ok"
        except (ToolError, ToolFault) as error:
            text, status = str(error), "error" if isinstance(error, ToolError) else "fault"
        except TimeoutError as error:
            text, status = str(error) or f"{name} took longer than {self.seconds:g} s and was given up.", "timeout"
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a tool that raises is an observation
            text, status = f"{name} failed: {type(error).__name__}: {str(error)[:500]}", "error"
        return Observation(clean(capped(text, self.output_chars)), status, time.perf_counter() - began)

    def _run(self, name, arguments, context) -> str:
        return TOOLS[name](context, **repaired(TOOLS[name], arguments))

    async def _in_thread(self, name, arguments, context) -> str:
        """Runs the call in a spare thread. One that hangs is written off: no pool shrinks, no exit waits for it."""
        with self.lock:
            if self.running[name] >= 4 * self.calls_in_flight:
                raise ToolFault(f"{self.running[name]} calls of {name} have never come back")
            self.running[name] += 1
        context.deadline, outcome = time.monotonic() + self.seconds, Future()
        outcome.set_running_or_notify_cancel()  # giving it up must not cancel what the thread will set

        def job():
            try:
                found = self._run(name, arguments, context), None
            except BaseException as error:  # noqa: BLE001 - it is raised again in the caller
                found = None, error
            with self.lock:
                self.running[name] -= 1
            outcome.set_result(found)

        try:
            jobs = self.spare.pop()
        except IndexError:  # starting a thread waits until it runs, which takes milliseconds when the cores are busy
            jobs = queue.SimpleQueue()
            threading.Thread(target=self._work, args=(jobs,), daemon=True).start()
        jobs.put(job)
        grace = 60.0 if name == "python" else 0.5  # tools keep their deadlines; a cold sandbox's time is not the code's
        text, error = await asyncio.wait_for(asyncio.wrap_future(outcome), self.seconds + grace)
        if error is not None:
            raise error
        return text

    def _work(self, jobs: queue.SimpleQueue) -> None:
        while not self.closed and (job := jobs.get()):
            job()
            self.spare.append(jobs)

    def _gate(self, name) -> asyncio.Semaphore:
        """Calls of one tool at a time; of python as many as the sandbox runs: none waits in it with its clock on."""
        loop = asyncio.get_running_loop()
        if loop is not self.loop:
            rooms = dict.fromkeys(self.names, self.calls_in_flight)
            rooms["python"] = min(self.calls_in_flight, max(2, os.cpu_count() or 2))
            self.loop, self.gates = loop, {n: asyncio.Semaphore(room) for n, room in rooms.items()}
        return self.gates[name]

    def check_rows(self, rows, what: str) -> None:
        """SystemExit, before work starts, where a row needs a search or files that these tools cannot reach."""
        found = self.corpus or self.web.settings["search"] or "search" not in self.names
        readers = self.files_dir and {"file_reader", "image2text", "audio2text"} & set(self.names)
        for row in rows:
            if not found and "docs" not in row:
                raise SystemExit(f"{what}: nothing to search: give --corpus=FILE or a search provider (see web.py)")
            if row.get("files") and not readers:
                raise SystemExit(f"{what}: row {row.get('id')} has files: give --files_dir=FOLDER and a tool that reads them")

    def close(self) -> None:
        self.closed = True
        for jobs in self.spare:
            jobs.put(None)
        if self.sandbox:
            self.sandbox.close()


def capped(text: str, most: int) -> str:
    """The text with its middle left out where it is longer than `most` characters, and a note of how much."""
    if len(text) <= most:
        return text
    half, rest = text[: most // 2], text[len(text) - (most - most // 2) :]
    return f"{half}\n[… {len(text) - most:,} characters left out …]\n{rest}"


COMBINING = "\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f"
UNSEEN = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b."  # terminal sequences
    r"|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f]"  # controls, tags
    f"|(?<=[{COMBINING}]{{8}})[{COMBINING}]+"
)


def clean(text: str) -> str:
    """Text that a terminal, a page and a JSON file can show: no control codes, no lone surrogates, \\n at line ends."""
    text = UNSEEN.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return text.encode("utf-8", "replace").decode("utf-8") if re.search("[\ud800-\udfff]", text) else text


def main(argv: list[str]) -> int:
    options, plain = {}, [arg for arg in argv if not arg.startswith("--")]
    known = {name: type(p.default) for name, p in _parameters(Toolbox).items()}
    for name, equals, value in (arg[2:].partition("=") for arg in argv if arg.startswith("--")):
        if name not in known:
            raise SystemExit(f"no option --{name}: there are {', '.join('--' + name for name in known)}")
        try:
            options[name] = _typed("tools.py", f"--{name}", value if equals else True, known[name])
        except ToolError as error:
            raise SystemExit(str(error)) from error
    if len(plain) != 2:
        raise SystemExit("usage: python tools.py NAME '{\"json\": \"arguments\"}' [--corpus=FILE] [--option=value ...]")
    toolbox = Toolbox([plain[0]], **options)
    seen = asyncio.run(toolbox.call(plain[0], plain[1]))
    toolbox.close()
    print(seen.text)
    print(f"[{seen.status}, {seen.seconds:.3f} s, {toolbox.blocked} blocked]", file=sys.stderr)
    return seen.status != "ok"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
