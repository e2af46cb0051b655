"""The tools of the agent: a function's type hints and docstring make the schema of its tool.

    python tools.py search '{"queries": ["capital of Peru"]}' --corpus=corpus.jsonl --block=list.txt

Its name is search, browse, python, file_reader, image2text or audio2text.
"""

import asyncio
import contextlib
import inspect
import json
import math
import os
import queue
import re
import sys
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from reagent.config import parse_config
from toolkit.files import FILE_READERS, file_to_text
from toolkit.media import describe_image, transcribe_audio
from toolkit.sandbox import Observation, Sandbox, SandboxUnavailable, ToolError, ToolFault
from toolkit.search import Corpus, Index, docs_index, passages
from toolkit.text import capped, clean
from toolkit.web import KEYS, Web


@dataclass
class Context:
    """What a tool may use besides its arguments: a row's docs and files, what the run opened."""

    docs: tuple[tuple[str, str], ...] | None = None  # (title, text)
    corpus: Index | None = None
    sandbox: Sandbox | None = None
    web: Web | None = None
    files_dir: str = ""
    files: tuple[str, ...] | None = None  # those of the row, in files_dir; None: any
    deadline: float = math.inf  # time.monotonic()
    output_chars: int = 10_000

    def left(self) -> float:
        """Seconds that this call still has."""
        return min(max(0.1, self.deadline - time.monotonic()), 3600.0)


# ---------------------------------------------------------------------------------------- the tools

MOST_QUERIES = 10
PASSAGE_CHARS, SUMMARY_CHARS = 5000, 60_000  # of a longer page: shown for a query, summarised


def search(context: Context, queries: list[str], top_k: int = 5) -> str:
    """Searches for pages; each query is answered by a ranked list of titles, addresses and texts.

    queries: one or several search queries
    top_k: how many results for each query, 1 to 20"""
    local, most, blocks = _local(context), max(1, min(top_k, 20)), []

    def hits_of(query: str) -> list[tuple[str, str, str]]:
        if local is not None:
            hits = local.search(query[:1000], most)
            return [hit for hit in hits if not _blocked(context, hit[2])]
        return context.web.search(query[:1000], most, context.left()) if query.strip() else []

    asked = [re.sub(r"\s", " ", query) for query in queries[:MOST_QUERIES]]  # one line: no result
    with ThreadPoolExecutor(max_workers=5) as pool:  # the web side by side: each query waits for it
        found = list((pool.map if local is None else map)(hits_of, asked))
    for query, hits in zip(asked, found):
        lines = [f"{i}. {title} ({url})\n{text}" for i, (title, text, url) in enumerate(hits, 1)]
        head = f'Results for "{query}":' if hits else f'No results for "{query}".'
        blocks.append("\n".join([head, *lines]))
    if (more := len(queries) - MOST_QUERIES) > 0:
        blocks.append(f"[{more} queries left out: a call takes {MOST_QUERIES}]")
    return "\n\n".join(blocks)


def browse(context: Context, url: str, query: str = "") -> str:
    """Opens a page by its address and returns its text.

    url: the address of the page, as search gave it
    query: what to look for on the page"""
    local = _local(context)
    if local is not None:
        page = None if _blocked(context, url) else local.page(url.strip())
        if page is None:
            where = f"There is no page {url[:300]!r}."
            raise ToolError(f"{where} Use an address from the search results.")
        title, text = page
    else:
        title, text = context.web.page(url.strip(), context.left())
        if query.strip() and context.web.settings["summary"]:
            if len(text) > SUMMARY_CHARS:
                text = passages(text, query, SUMMARY_CHARS) or text[:SUMMARY_CHARS]
            return f"{title}\n\n{context.web.answer(url.strip(), text, query, context.left())}"
    room = max(500, context.output_chars - len(title) - 200)
    if len(text) > PASSAGE_CHARS and query.strip():
        if found := passages(text, query, min(room, PASSAGE_CHARS)):
            what = f"the passages that match the query best, of {len(text):,} characters"
            return f"{title}\n[{what}]\n\n{found}"
    if len(text) > room:
        more = f"{len(text) - room:,} characters left out: a query shows the passages that match it"
        text = f"{text[:room]}\n[… {more}]"
    return f"{title}\n\n{text}"


def python(context: Context, code: str) -> str:
    """Runs Python code in a fresh sandbox and returns what it prints and the value of its last
    expression.

    code: the code to run"""
    result = context.sandbox.run(code)
    raised = {"fault": ToolFault, "timeout": TimeoutError, "error": ToolError}.get(result.status)
    if raised:
        raise raised(result.text)
    return result.text


def file_reader(context: Context, file_path: str) -> str:
    """Reads a file that came with the question (text, code, table, document, PDF, archive) and
    returns its text.

    file_path: the file; a member of an archive as archive.zip::member"""
    return file_to_text(*_file(context, file_path), seconds=context.left())


def image2text(context: Context, image_path: str, query: str = "Describe the image.") -> str:
    """Looks at an image that came with the question and answers what is asked about it.

    image_path: the image file
    query: what to find out about the image"""
    return describe_image(*_file(context, image_path), query, seconds=context.left())


def audio2text(context: Context, audio_path: str) -> str:
    """Writes down what is said in a recording that came with the question.

    audio_path: the audio file"""
    return transcribe_audio(*_file(context, audio_path), seconds=context.left())


TOOLS = [search, browse, python, file_reader, image2text, audio2text]
TOOLS = {tool.__name__: tool for tool in TOOLS}


def _local(context: Context) -> Index | None:
    """Where search and browse look: the row's docs, else the corpus, else None: the web."""
    return docs_index(context.docs) if context.docs is not None else context.corpus


def _blocked(context: Context, url: str) -> bool:
    return context.docs is None and context.web is not None and context.web.blocklist.blocks(url)


def _file(context: Context, path: str) -> tuple[str, str]:
    """(files_dir, path); a row's own files alone can be read, also by their bare names."""
    if not context.files_dir:
        raise ToolFault("No files to read: --files_dir is not given.")
    if context.files is None:
        return context.files_dir, path
    outer, mark, member = path.strip().partition("::")
    bare = [name for name in context.files if Path(name).name == Path(outer).name]
    known = [outer] if outer in context.files else bare
    if len(known) != 1:
        names = ", ".join(context.files) or "none"
        raise ToolError(f"The question has no file {outer[:200]!r}; its files: {names}")
    return context.files_dir, known[0] + mark + member


# ---------------------------------------------------------------------------- schemas and arguments


def schema_of(tool) -> dict:
    """The OpenAI function schema from type hints and docstring (its `name: meaning` lines)."""
    names = {str: "string", int: "integer", float: "number", bool: "boolean"}
    kinds = {kind: {"type": name} for kind, name in names.items()}
    kinds[list[str]] = {"type": "array", "items": kinds[str]}
    first = next(iter(inspect.signature(tool).parameters.values()), None)
    if not first or first.annotation in kinds:
        raise SystemExit(f"the tool {tool.__name__}: its first parameter is the Context")
    text = inspect.getdoc(tool) or ""
    about = dict(re.findall(r"^(\w+): (.+)$", text, re.M))
    properties, required = {}, []
    for name, parameter in _parameters(tool).items():
        if parameter.annotation not in kinds or name not in about:
            need = "a hint of str, int, float, bool or list[str] and a docstring line"
            raise SystemExit(f"the tool {tool.__name__}: {name} needs {need} '{name}: meaning'")
        properties[name] = kinds[parameter.annotation] | {"description": about[name]}
        if parameter.default is parameter.empty:
            required.append(name)
    function = {"name": tool.__name__, "description": text.partition("\n\n")[0]}
    function["parameters"] = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": function}


def _parameters(tool) -> dict[str, inspect.Parameter]:
    return dict(list(inspect.signature(tool).parameters.items())[1:])


def repaired(tool, arguments) -> dict:
    """Arguments as the tool takes them; harmless slips are mended ("5" for 5), else ToolError."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise ToolError(f"The arguments of {tool.__name__} are not a JSON object.") from error
    if not isinstance(arguments, dict):
        kind = type(arguments).__name__
        raise ToolError(f"The arguments of {tool.__name__} are a JSON object, not {kind}.")
    known = _parameters(tool)
    if unknown := sorted(str(name)[:50] for name in set(arguments) - set(known)):
        names = f"{', '.join(unknown[:5])}; it takes {', '.join(known)}"
        raise ToolError(f"{tool.__name__} does not take {names}.")
    given = {name: value for name, value in arguments.items() if value is not None}
    if missing := [p.name for p in known.values() if p.default is p.empty and p.name not in given]:
        raise ToolError(f"{tool.__name__} needs {', '.join(missing)}.")
    kinds = {name: known[name].annotation for name in given}
    return {name: _typed(tool.__name__, name, given[name], kind) for name, kind in kinds.items()}


def _typed(tool: str, name: str, value, kind):
    """The value as `kind`: "5" or 5.0 for 5, 5 for "5", a text for a list of one, or back."""
    if kind == list[str]:
        if isinstance(value, str) and re.match(r'\s*\[\s*"', value):  # quoted once too often
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
    return type(value) in (int, float) and abs(value) < 1e308  # not NaN, and fits a float


# -------------------------------------------------------------------------------------- the toolbox


@dataclass
class Config:
    corpus: str = ""  # rows with id, title and text: search and browse stay there
    seconds_per_call: float = 30.0
    calls_in_flight: int = 16  # of each tool
    output_chars: int = 10_000
    unsafe_python: bool = False  # run code without a sandbox where this machine has none
    files_dir: str = ""  # where the files of rows lie
    block: str = ""  # a file of addresses that search and browse leave out
    cache: str = ""  # a sqlite file of web answers
    replay: bool = False  # answer web calls from the cache alone
    allow: str = ""  # host:port pairs beyond the public web, separated by commas


class Toolbox:
    """The tools of a run, for async callers: deadlines, a limit on calls in flight, capped results.
    options: fields of Config. toolkit/web.py says which keys the environment may hold."""

    def __init__(self, names, **options):
        self.names, self.cfg = list(names), (cfg := Config(**options))
        if unknown := [name for name in names if name not in TOOLS]:
            raise SystemExit(f"no tool named {', '.join(unknown)}: there are {', '.join(TOOLS)}")
        if cfg.files_dir and not Path(cfg.files_dir).is_dir():
            raise SystemExit(f"no folder {cfg.files_dir}: --files_dir is where the rows' files lie")
        self.schemas = [schema_of(TOOLS[name]) for name in self.names]
        self.corpus = Corpus(cfg.corpus) if cfg.corpus else None
        self.web = Web(allow=cfg.allow, block=cfg.block, cache=cfg.cache, replay=cfg.replay)
        self.sandbox = None
        if "python" in self.names:
            limits = dict(seconds=cfg.seconds_per_call, output_chars=cfg.output_chars)
            try:
                self.sandbox = Sandbox(**limits, unsafe=cfg.unsafe_python)
            except SandboxUnavailable as error:
                raise SystemExit(str(error)) from error
        self.lock, self.gates, self.loop = threading.Lock(), {}, None
        self.running, self.closed = Counter(), False  # calls by tool
        self.spare: list[queue.SimpleQueue] = []  # of threads without a job

    async def call(self, name: str, arguments, docs=None, files=None) -> Observation:
        """Runs one call; never raises for what the model wrote. `docs` = [{"title", "text"}]:
        search only there; `files` = [path in files_dir]: read only those."""
        began = time.perf_counter()
        if name not in self.names:
            known = f"The tools are {', '.join(self.names)}." if self.names else "There are none."
            text = f"There is no tool {str(name)[:100]!r}. {known}"
            return Observation(clean(text), "error", 0.0)
        shared = dict(corpus=self.corpus, sandbox=self.sandbox, web=self.web)
        shared |= dict(files_dir=self.cfg.files_dir, output_chars=self.cfg.output_chars)
        context = Context(**shared, files=None if files is None else tuple(files))
        if docs is not None:
            context.docs = tuple((d["title"], d["text"]) for d in docs)
        try:
            if name in ("search", "browse") and docs is not None:  # too quick for a thread
                text = self._run(name, arguments, context)
            else:
                async with self._gate(name):
                    text = await self._in_thread(name, arguments, context)
            status = "ok"
        except (ToolError, ToolFault) as error:
            text, status = str(error), "error" if isinstance(error, ToolError) else "fault"
        except TimeoutError as error:
            given_up = f"{name} took longer than {self.cfg.seconds_per_call:g} s and was given up."
            text, status = str(error) or given_up, "timeout"
        except (Exception, SystemExit) as error:  # a tool that raises is an observation
            told = traceback.format_exception_only(error)[-1].strip()  # also where str() fails
            text, status = f"{name} failed: {told[:500]}", "error"
        seconds = time.perf_counter() - began
        return Observation(clean(capped(text, self.cfg.output_chars)), status, seconds)

    def _run(self, name, arguments, context) -> str:
        return str(TOOLS[name](context, **repaired(TOOLS[name], arguments)))

    async def _in_thread(self, name, arguments, context) -> str:
        """Runs the call in a spare thread; one that hangs is written off, and no exit waits."""
        with self.lock:
            if self.running[name] >= 4 * self.cfg.calls_in_flight:
                raise ToolFault(f"{self.running[name]} calls of {name} have never come back")
            self.running[name] += 1
        context.deadline, outcome = time.monotonic() + self.cfg.seconds_per_call, Future()
        outcome.set_running_or_notify_cancel()  # giving it up must not cancel what is set later

        def job():
            try:
                found = self._run(name, arguments, context), None
            except BaseException as error:  # raised in the caller: what would end it as another
                mild = isinstance(error, Exception | SystemExit)
                found = None, error if mild else RuntimeError(type(error).__name__)
            with self.lock:
                self.running[name] -= 1
            outcome.set_result(found)

        try:
            jobs = self.spare.pop()
        except IndexError:
            # starting a thread waits until it runs: milliseconds when the cores are busy
            jobs = queue.SimpleQueue()
            threading.Thread(target=self._work, args=(jobs,), daemon=True).start()
        jobs.put(job)
        # tools keep their deadlines; a cold sandbox's time is not the code's
        seconds = self.cfg.seconds_per_call + (60.0 if name == "python" else 0.5)
        text, error = await asyncio.wait_for(asyncio.wrap_future(outcome), seconds)
        if error is not None:
            raise error
        return text

    def _work(self, jobs: queue.SimpleQueue) -> None:
        while not self.closed and (job := jobs.get()):
            job()
            self.spare.append(jobs)

    def _gate(self, name) -> asyncio.Semaphore:
        """Calls of one tool at a time; of python as many as run: none waits with its clock on."""
        loop = asyncio.get_running_loop()
        if loop is not self.loop:
            rooms = dict.fromkeys(self.names, self.cfg.calls_in_flight)
            rooms["python"] = min(self.cfg.calls_in_flight, max(2, os.cpu_count() or 2))
            self.loop, self.gates = loop, {n: asyncio.Semaphore(room) for n, room in rooms.items()}
        return self.gates[name]

    def check_rows(self, rows, what: str) -> None:
        """SystemExit where a row needs a search or files that these tools cannot reach."""
        found = self.corpus or self.web.settings["search"] or "search" not in self.names
        readers = self.cfg.files_dir and FILE_READERS & set(self.names)
        for row in rows:
            if not found and row.get("docs") is None:
                missing = "nothing to search: give --corpus=FILE or a search provider"
                raise SystemExit(f"{what}: {missing}; {KEYS}")
            if row.get("files") and not readers:
                missing = "give --files_dir=FOLDER and a tool that reads them"
                raise SystemExit(f"{what}: row {row.get('id')} has files: {missing}")

    def close(self) -> None:
        self.closed = True
        for jobs in self.spare:
            jobs.put(None)
        if self.sandbox:
            self.sandbox.close()


def main(argv: list[str]) -> int:
    plain = [arg for arg in argv if not arg.startswith("--")]
    cfg = parse_config(Config, [arg for arg in argv if arg.startswith("-")])
    if len(plain) != 2:
        raise SystemExit('usage: python tools.py NAME \'{"json": "arguments"}\' [--option=value …]')
    toolbox = Toolbox([plain[0]], **vars(cfg))
    seen = asyncio.run(toolbox.call(plain[0], plain[1]))
    toolbox.close()
    print(seen.text)
    hidden = f"{toolbox.web.blocklist.count} blocked"  # results and pages
    print(f"[{seen.status}, {seen.seconds:.3f} s, {hidden}]", file=sys.stderr)
    return seen.status != "ok"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
