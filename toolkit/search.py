"""Local search: BM25 over documents in memory, or over a file of pages with its index beside it."""

import array
import contextlib
import hashlib
import json
import os
import re
import threading
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from toolkit.sandbox import ToolFault

STOP_WORDS = frozenset(
    """a an and are as at be been being but by did do does for from had has have he her his how in
    is it its not of on or she that the their there these they this those to was were what when
    where which who whom whose why with""".split()
)
CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"  # no spaces: a character is a word
WORD = re.compile(f"[{CJK}]|[^\\W{CJK}]+")


def words(text: str) -> list[str]:
    """Lower-case words without stop words and plural s; all if none is left ("The Who")."""
    found = WORD.findall(text.lower())
    return [_stem(word) for word in found if word not in STOP_WORDS] or found


@lru_cache(maxsize=1 << 18)
def _stem(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    plural = len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is"))
    return word[:-1] if plural else word


def postings(texts: Iterable[tuple[str, str]]) -> dict[str, np.ndarray]:
    """BM25 of (title, text) pages: word i, in the order of their hashes, is in the pages
    hit_page[word_start[i] : word_start[i + 1]] with the weights hit_weight there."""
    vocabulary: dict[str, int] = {}
    page_of, word_of, times, lengths = (array.array("i") for _ in range(4))
    for title, text in texts:
        count = Counter(words(title) * 2 + words(text))
        page_of.extend([len(lengths)] * len(count))
        word_of.extend([vocabulary.setdefault(word, len(vocabulary)) for word in count])
        times.extend(count.values())
        lengths.append(count.total())
    hashes = np.array([_hash(word) for word in vocabulary], "<u8")
    order = np.argsort(hashes)
    word = np.argsort(order)[np.array(word_of, "<i8")]  # numbered as their hashes are sorted
    page, n, length = np.array(page_of, "<i4"), np.array(times, "<f8"), np.array(lengths, "<f8")
    in_pages = np.bincount(word, minlength=len(order))
    idf = np.log(1 + (len(length) - in_pages + 0.5) / (in_pages + 0.5))
    norm = 1.2 * (0.25 + 0.75 * length / max(length.mean() if len(length) else 0.0, 1e-9))
    by_word = np.argsort(word, kind="stable")
    weight = idf[word] * (n * 2.2 / (n + norm[page]))
    word_start = np.concatenate([[0], np.cumsum(in_pages)])
    hits = {"hit_page": page[by_word], "hit_weight": weight[by_word]}
    return {"word_hash": hashes[order], "word_start": word_start, **hits}


class Index:
    """BM25 over (title, text, url) pages in memory."""

    def __init__(self, pages: list[tuple[str, str, str]]):
        self.pages, self.count = pages, len(pages)
        vars(self).update(postings((title, text) for title, text, _ in pages))

    def row(self, page: int) -> tuple[str, str, str]:
        return self.pages[page]

    def rows_at(self, url: str) -> Iterable[int]:
        return range(len(self.pages))

    def search(self, query: str, top_k: int) -> list[tuple[str, str, str]]:
        scores = np.zeros(self.count, self.hit_weight.dtype)
        for word in sorted(set(words(query))):
            found = np.searchsorted(self.word_hash, np.uint64(_hash(word)))
            if found < len(self.word_hash) and self.word_hash[found] == _hash(word):
                hits = slice(*self.word_start[found : found + 2])
                scores[self.hit_page[hits]] += self.hit_weight[hits]
        best = np.flatnonzero(scores)
        if len(best) > top_k:  # all that tie with the last one stay: no order of a partition
            best = best[scores[best] >= np.partition(scores[best], -top_k)[-top_k]]
        return [self.row(page) for page in best[np.lexsort((best, -scores[best]))][:top_k]]

    def page(self, url: str) -> tuple[str, str] | None:
        """(title, text) of an address; paragraphs under one address are one page."""
        found = [row for row in map(self.row, self.rows_at(url)) if row[2] == url]
        return (found[0][0], "\n\n".join(text for _, text, _ in found)) if found else None


@lru_cache(maxsize=4096)
def docs_index(docs: tuple[tuple[str, str], ...]) -> Index:
    return Index([(title, text, f"doc:{title}") for title, text in docs])


class Corpus(Index):
    """BM25 over a file of `{"id", "title", "text", "url"?}` rows, one a line, which are read when
    they are found. The index is kept beside it (`.bm25.npz`) until the file has changed."""

    VERSION = 1  # raise it when `words` or the arrays change

    def __init__(self, path: str):
        if not Path(path).is_file():
            raise SystemExit(f"no corpus {path}: --corpus is a file of rows: id, title, text")
        self.path, self.file = path, open(path, "rb")
        about = os.fstat(self.file.fileno())
        key = np.array([self.VERSION, about.st_size, about.st_mtime_ns])
        arrays = self._kept(key) or self._built(key)
        vars(self).update(arrays, count=len(arrays["row_start"]))

    def _kept(self, key: np.ndarray) -> dict[str, np.ndarray]:
        # none, or not whole
        with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            with np.load(self.path + ".bm25.npz", allow_pickle=False) as kept:
                return dict(kept) if np.array_equal(kept["key"], key) else {}
        return {}

    def _built(self, key: np.ndarray) -> dict[str, np.ndarray]:
        """The postings; where each row begins, its bytes, and rows by the hashes of their URLs.
        Written beside, then renamed: another process finds the old index or the new one."""
        starts, sizes, urls = array.array("q"), array.array("q"), []

        def texts() -> Iterator[tuple[str, str]]:
            at = 0
            for number, line in enumerate(self.file, 1):
                if line.strip():
                    title, text, url = _corpus_row(self.path, number, line)
                    yield title, text
                    starts.append(at)
                    sizes.append(len(line))
                    urls.append(_hash(url))
                at += len(line)

        arrays, url_hash = postings(texts()), np.array(urls, "<u8")
        arrays["hit_weight"] = arrays["hit_weight"].astype("<f4")
        by_url = np.argsort(url_hash, kind="stable")
        arrays |= {"url_hash": url_hash[by_url], "url_row": by_url, "key": key}
        arrays |= {"row_start": np.array(starts), "row_bytes": np.array(sizes)}
        beside = f"{self.path}.{os.getpid()}.{threading.get_ident()}.npz"
        with contextlib.suppress(OSError):  # where we may not write it is built again the next time
            try:
                np.savez(beside, **arrays)
                os.replace(beside, self.path + ".bm25.npz")
            finally:
                Path(beside).unlink(missing_ok=True)
        return arrays

    def row(self, page: int) -> tuple[str, str, str]:
        line = os.pread(self.file.fileno(), int(self.row_bytes[page]), int(self.row_start[page]))
        try:
            return _corpus_row(self.path, page + 1, line)
        except SystemExit as error:
            raise ToolFault(f"the corpus {self.path} was changed while it is in use") from error

    def rows_at(self, url: str) -> np.ndarray:
        key = np.uint64(_hash(url))
        ends = [np.searchsorted(self.url_hash, key, side) for side in ("left", "right")]
        return self.url_row[slice(*ends)]


def _hash(text: str) -> int:
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _corpus_row(path: str, number: int, line: bytes) -> tuple[str, str, str]:
    try:
        row = json.loads(line)
        title, text = row["title"] + "", row["text"] + ""  # texts, or a TypeError
        return title, text, str(row.get("url") or f"doc:{row['id']}")
    except (ValueError, KeyError, TypeError) as error:
        where = f"{path}:{number}"
        raise SystemExit(f"{where}: not a corpus row (id, title, text): {error!r}") from error


def passages(text: str, query: str, chars: int) -> str:
    """The parts of a text that match a query best, in its order, `chars` at most; "" if none."""
    parts = [""]
    for line in text.splitlines():
        for piece in (line[i : i + 800] for i in range(0, len(line), 800)):
            if len(parts[-1]) + len(piece) > 800:
                parts.append("")
            parts[-1] += piece + "\n"
    chosen, index = [], Index([("", part, i) for i, part in enumerate(parts)])
    for _, part, number in index.search(query, len(parts)):
        chars -= len(part) + 4
        if chars < 0:
            break
        chosen.append(number)
    chosen.sort()
    gaps = ["" if i == before + 1 else "[…]\n" for before, i in zip([-1, *chosen], chosen)]
    return "".join(gap + parts[i] for gap, i in zip(gaps, chosen)).rstrip()
