"""The tools of the agent. A tool is a function with type hints and a docstring: the schema the model sees comes from them.

    python tools.py search '{"queries": ["capital of Peru"]}' --corpus=corpus.jsonl
"""

import asyncio
import inspect
import json
import math
import re
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from sandbox import Sandbox, ToolError, ToolFault


@dataclass(frozen=True)
class Observation:
    """What a call returned. status: ok | error (the model's doing) | timeout | fault (ours: left out of training)."""

    text: str
    status: str
    seconds: float


@dataclass
class Context:
    """What a tool may use besides its arguments: the row's documents, the local corpus, the sandbox."""

    docs: tuple[tuple[str, str], ...] | None = None  # (title, text)
    corpus: "Index | None" = None
    sandbox: object = None


# ---------------------------------------------------------------------------------------------------------------------
# local search: BM25 (k1 1.2, b 0.75), titles counted twice


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


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
        self.by_url = {url: (title, text) for title, text, url in pages}

    def search(self, query: str, top_k: int) -> list[tuple[str, str, str]]:
        scores: dict[int, float] = {}
        for word in set(words(query)):
            hits = self.postings.get(word, ())
            idf = math.log(1 + (len(self.pages) - len(hits) + 0.5) / (len(hits) + 0.5))
            for page, weight in hits:
                scores[page] = scores.get(page, 0.0) + idf * weight
        best = sorted(scores, key=lambda page: (-scores[page], page))[:top_k]
        return [self.pages[page] for page in best]


@lru_cache(maxsize=4096)
def docs_index(docs: tuple[tuple[str, str], ...]) -> Index:
    return Index([(title, text, f"doc:{title}") for title, text in docs])


def read_corpus(path: str) -> Index:
    """`{"id", "title", "text", "url"?}` rows, one a line."""
    if not Path(path).is_file():
        raise SystemExit(f"no corpus {path}: --corpus is a file of rows with id, title and text")
    pages = []
    for number, line in enumerate(open(path, encoding="utf-8"), 1):
        try:
            row = json.loads(line)
            pages.append((row["title"], row["text"], row.get("url") or f"doc:{row['id']}"))
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{path}:{number}: not a corpus row (id, title, text): {error!r}") from error
    return Index(pages)


# ---------------------------------------------------------------------------------------------------------------------
# the tools


def search(context: Context, queries: list[str], top_k: int = 5) -> str:
    """Searches for pages; each query is answered by a ranked list of titles, addresses and texts.

    queries: one or several search queries
    top_k: how many results for each query, 1 to 20
    """
    index = _pages(context)
    blocks = []
    for query in queries[:10]:
        hits = index.search(query[:1000], max(1, min(top_k, 20)))
        lines = [f"{i}. {title} ({url})\n{text}" for i, (title, text, url) in enumerate(hits, 1)]
        blocks.append("\n".join([f'Results for "{query}":', *lines]) if hits else f'No results for "{query}".')
    return "\n\n".join(blocks)


def browse(context: Context, url: str, query: str = "") -> str:
    """Opens a page by its address and returns its text.

    url: the address of the page, as search gave it
    query: what to look for on the page
    """
    index = _pages(context)
    if url not in index.by_url:
        raise ToolError(f"There is no page {url!r}. Use an address from the search results.")
    title, text = index.by_url[url]
    if query and len(text) > 4000:
        parts = [part for part in re.split(r"\n\s*\n", text) if part.strip()]
        hits = Index([("", part, str(i)) for i, part in enumerate(parts)]).search(query, 5)
        text = "\n\n".join(part for _, part, _ in hits) or text
    return f"{title}\n\n{text}"


def python(context: Context, code: str) -> str:
    """Runs Python code in a fresh sandbox and returns what it prints and the value of its last expression.

    code: the code to run
    """
    result = context.sandbox.run(code)
    if result.status == "fault":
        raise ToolFault(result.text)
    if result.status != "ok":
        raise ToolError(result.text)
    return result.text


TOOLS = {tool.__name__: tool for tool in (search, browse, python)}


def _pages(context: Context) -> Index:
    if context.docs is not None:
        return docs_index(context.docs)
    if context.corpus is None:
        raise ToolFault("Nothing to search: the row has no docs and no --corpus is given.")
    return context.corpus


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
        except ValueError as error:
            raise ToolError(f"The arguments of {tool.__name__} are not a JSON object.") from error
    if not isinstance(arguments, dict):
        raise ToolError(f"The arguments of {tool.__name__} are a JSON object, not {type(arguments).__name__}.")
    known = _parameters(tool)
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        raise ToolError(f"{tool.__name__} does not take {', '.join(unknown)}; it takes {', '.join(known)}.")
    missing = [name for name, p in known.items() if p.default is p.empty and name not in arguments]
    if missing:
        raise ToolError(f"{tool.__name__} needs {', '.join(missing)}.")
    return {name: _typed(tool.__name__, name, value, known[name].annotation) for name, value in arguments.items()}


def _typed(tool: str, name: str, value, kind):
    if kind is str and isinstance(value, str):
        return value
    if kind is int and not isinstance(value, bool):
        if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
            return int(value)
        if isinstance(value, str) and re.fullmatch(r"\s*-?\d{1,9}\s*", value):
            return int(value)
    if kind == list[str]:
        value = [value] if isinstance(value, str) else value
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            return value
    wanted = "a list of texts" if kind == list[str] else {str: "a text", int: "a whole number"}[kind]
    raise ToolError(f"{tool}: {name} must be {wanted}.")


# ---------------------------------------------------------------------------------------------------------------------
# the toolbox


class Toolbox:
    """The tools of a run, for async callers: a deadline a call, a limit on calls in flight, every result capped."""

    def __init__(self, names, *, corpus: str = "", seconds_per_call: float = 30.0, calls_in_flight: int = 16,
                 output_chars: int = 10_000, unsafe_python: bool = False):
        unknown = [name for name in names if name not in TOOLS]
        if unknown:
            raise SystemExit(f"no tool named {', '.join(unknown)}: there are {', '.join(TOOLS)}")
        self.names, self.seconds, self.output_chars = list(names), seconds_per_call, output_chars
        self.schemas = [schema_of(TOOLS[name]) for name in self.names]
        self.corpus = read_corpus(corpus) if corpus else None
        self.sandbox = None
        if "python" in self.names:
            self.sandbox = Sandbox(seconds=seconds_per_call, output_chars=output_chars, unsafe=unsafe_python)
        self.pool = ThreadPoolExecutor(max_workers=calls_in_flight * max(len(self.names), 1))
        self.calls_in_flight, self.gates, self.loop = calls_in_flight, {}, None

    async def call(self, name: str, arguments, docs=None) -> Observation:
        """Runs one call; never raises for what the model wrote. `docs` = [{"title", "text"}]: search only there."""
        began = time.perf_counter()
        if name not in self.names:
            text = f"There is no tool {name[:100]!r}. The tools are {', '.join(self.names)}."
            return Observation(text, "error", 0.0)
        context = Context(None, self.corpus, self.sandbox)
        if docs is not None:
            context.docs = tuple((d["title"], d["text"]) for d in docs)
        try:
            if context.docs is not None and name in ("search", "browse"):  # microseconds: not worth a thread
                text, status = self._run(name, arguments, context), "ok"
            else:
                async with self._gate(name):
                    job = asyncio.get_running_loop().run_in_executor(self.pool, self._run, name, arguments, context)
                    text, status = await asyncio.wait_for(job, self.seconds + 5), "ok"
        except ToolError as error:
            text, status = str(error), "error"
        except ToolFault as error:
            text, status = str(error), "fault"
        except TimeoutError:
            text, status = f"{name} took longer than {self.seconds:.0f} s and was given up.", "timeout"
        except Exception as error:  # noqa: BLE001 - a tool that raises is an observation, the episode goes on
            text, status = f"{name} failed: {type(error).__name__}: {str(error)[:500]}", "error"
        return Observation(capped(text, self.output_chars), status, time.perf_counter() - began)

    def _run(self, name, arguments, context) -> str:
        return TOOLS[name](context, **repaired(TOOLS[name], arguments))

    def _gate(self, name) -> asyncio.Semaphore:
        loop = asyncio.get_running_loop()
        if loop is not self.loop:
            self.loop, self.gates = loop, {n: asyncio.Semaphore(self.calls_in_flight) for n in self.names}
        return self.gates[name]

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)
        if self.sandbox:
            self.sandbox.close()


def capped(text: str, most: int) -> str:
    """The text with its middle left out where it is longer than `most` characters, and a note of how much."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}\n[… {len(text) - most:,} characters left out …]\n{text[len(text) - (most - most // 2):]}"


def main(argv: list[str]) -> int:
    options = dict(arg[2:].split("=", 1) for arg in argv if arg.startswith("--") and "=" in arg)
    plain = [arg for arg in argv if not arg.startswith("--")]
    if len(plain) != 2:
        raise SystemExit("usage: python tools.py NAME '{\"json\": \"arguments\"}' [--corpus=FILE]")
    toolbox = Toolbox([plain[0]], **options)
    seen = asyncio.run(toolbox.call(plain[0], plain[1]))
    toolbox.close()
    print(seen.text)
    print(f"[{seen.status}, {seen.seconds:.3f} s]", file=sys.stderr)
    return seen.status != "ok"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
