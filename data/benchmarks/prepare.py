"""The 12 benchmarks of the paper, under the 18 names of its release, as rows for evaluate.py, each
from its publisher by path and revision.

    python data/benchmarks/prepare.py  # all; what needs access is told
    python data/benchmarks/prepare.py --check
        # what would be fetched, licences, logins, revisions; nothing is
    python data/benchmarks/prepare.py --dataset=gaia_text,math500
    python data/benchmarks/prepare.py --dataset=gsm8k --input=test.jsonl
        # a local file, nothing is fetched
    python data/benchmarks/prepare.py --dataset=hle --input=hle.parquet --subset=top.json
        # gaia_text and hle are subsets: a local copy of the list that chooses

Row written to data/benchmarks/NAME.jsonl: {"id", "question", "answer", "kind", "meta", "files"?}.
`answer` is a text or a list of accepted texts; `kind` is math | qa | gaia | choice; `files` are
names under data/benchmarks/files. NAME.meta.json beside it has the revision and the digests of what
the rows were made from; evaluate.py's report names it.

The official xbench file stays encrypted on disk, as its publisher asks: question and answer are the
published base64 texts, meta has "encrypted" and the "canary" that is their key; evaluate.py
decrypts in memory. Rows that come in the clear (ARPO's copy) stay so.

Input layouts: json list, jsonl, parquet, csv, or a zip of json files, with the field names of
FIELDS, in capitals or not.
"""

import argparse
import base64
import binascii
import csv
import hashlib
import itertools
import re
import shutil
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from data.hotpotqa.prepare import (
    SOURCES,
    fetch,
    first_of_each_id,
    gold_answers,
    origin,
    other_names,
    placed,
    print_table,
    read_records,
    write_origin,
    write_rows,
)
from toolkit.text import last_boxed

GITHUB = "https://raw.githubusercontent.com/"
ARPO = GITHUB + "RUC-NLPIR/ARPO/a95cd0894b53e97595845bd680ed7e85524a2244/evaluation/data/"
WEBTHINKER = GITHUB + "RUC-NLPIR/WebThinker/991ff7775231823b2059e2409e2d9ff70c144932/data/"
GAIA = "hf://gaia-benchmark/GAIA@682dd723ee1e1697e00360edccf2366dc8418dd9/2023/validation/"
HLE = "hf://cais/hle@5a81a4c7271a2a2a312b9a690f0c2fde837e4c29/data/test-00000-of-00001.parquet"
WEBWALKER = "hf://callanwu/WebWalkerQA@c7ab3329a2a4a35ca569fdca369b61a3d1787e5b/"


@dataclass(frozen=True)
class Benchmark:
    """One set: where it is, what it is called here, how many rows it must have.

    A sha256 is that of the published file, "" where we could not see it: then it is only recorded.
    """

    kind: str  # math | qa | gaia | choice
    rows: int  # the published size; another count is told in the table
    licence: str
    url: str  # https:// or hf://OWNER/NAME@REVISION/PATH
    sha256: str = ""
    member: str = ""  # of a zip
    subset_url: str = (
        ""  # a list of the rows that count; its ids and questions are all that is read
    )
    subset_sha256: str = ""
    sample: int = 0  # keep the rows whose id has the smallest sha256: a sample of no one's choice
    text_only: bool = False  # leave out rows with an attachment or an image

    @property
    def gated(self) -> bool:
        """Whether the publisher's terms must be accepted in a login."""
        return "gated" in self.licence


def _arpo(folder: str, licence: str, sha256: str, rows: int = 200) -> Benchmark:
    return Benchmark("qa", rows, licence, f"{ARPO}{folder}/test.jsonl", sha256)


_HOTPOT_URL, _HOTPOT_SHA256, _ = SOURCES["hotpotqa"]["dev"][0]
_MUSIQUE_URL, _MUSIQUE_SHA256, _MUSIQUE_MEMBER = SOURCES["musique"]["dev"][0]
_TWO_WIKI_URL, _TWO_WIKI_SHA256, _TWO_WIKI_MEMBER = SOURCES["2wiki"]["dev"][0]
BENCHMARKS = {
    "gaia": Benchmark("gaia", 165, "gated, no redistribution", GAIA + "metadata.parquet"),
    "gaia_text": Benchmark(
        "gaia",
        103,
        "gated, no redistribution",
        GAIA + "metadata.parquet",
        subset_url=WEBTHINKER + "GAIA/dev.json",
        subset_sha256="f3b0d1ace4ae6c53ee204c4e18c034a744ac070611c316b10af6e95967b77b09",
        text_only=True,
    ),
    "math500": Benchmark(
        "math",
        500,
        "MIT",
        "hf://HuggingFaceH4/MATH-500@6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be/test.jsonl",
        "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132",
    ),
    "aime24": Benchmark(
        "math",
        30,
        "problems (c) MAA",
        "hf://HuggingFaceH4/aime_2024@2fe88a2f1091d5048c0f36abc874fb997b3dd99a"
        "/data/train-00000-of-00001.parquet",
        "26139847601a5037c237d5928b195e7260ca8074cf4f264b794af42847f79ccf",
    ),
    "aime25": Benchmark(
        "math",
        30,
        "problems (c) MAA",
        "hf://math-ai/aime25@563bb8404243c5f09de6ec262f2db674fe5bce9b/test.jsonl",
        "b4e273c02d3e7fe1b74b59eae768fc8230bfb0f79539890cb56f4361caac0331",
    ),
    "gsm8k": Benchmark(
        "math",
        1319,
        "MIT",
        GITHUB + "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c"
        "/grade_school_math/data/test.jsonl",
        "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
    ),
    "2wiki": Benchmark(
        "qa", 12_576, "Apache-2.0", _TWO_WIKI_URL, _TWO_WIKI_SHA256, _TWO_WIKI_MEMBER
    ),
    "2wiki200": _arpo(
        "2wiki", "Apache-2.0", "f92e028caf038c0fd861111ce811f12a50fc17324933b9b723d169913dfa9884"
    ),
    "hotpotqa": Benchmark("qa", 7405, "CC BY-SA 4.0", _HOTPOT_URL, _HOTPOT_SHA256),
    "hotpotqa200": _arpo(
        "hotpotqa",
        "CC BY-SA 4.0",
        "072c04637a2736f355e92ee77649d1de89112f873b21b97e50171ac33497ad98",
    ),
    "hotpotqa1000": Benchmark("qa", 1000, "CC BY-SA 4.0", _HOTPOT_URL, _HOTPOT_SHA256, sample=1000),
    "musique": Benchmark("qa", 2417, "CC BY 4.0", _MUSIQUE_URL, _MUSIQUE_SHA256, _MUSIQUE_MEMBER),
    "musique200": _arpo(
        "musique", "CC BY 4.0", "d238f3c3b34347019bf84136eaca6fc34882d2263fbcd3dc352ad85eb80cf1dc"
    ),
    "bamboogle": _arpo(
        "bamboogle", "MIT", "e37b9c512f27f76f1bab1922972a0d7d48af8ac08dbdc41de56dcae45e5148c7", 125
    ),
    "webwalker": Benchmark("qa", 680, "Apache-2.0", WEBWALKER + "data/main-00000-of-00001.jsonl"),
    "webwalker200": _arpo(
        "webwalker",
        "Apache-2.0",
        "5aa737b433dfc1cfd882c4857c492490eba0cb7c990ab35c0f322c51c24db678",
    ),
    "hle": Benchmark(
        "qa",
        500,
        "MIT, gated, no redistribution",
        HLE,
        subset_url=ARPO + "hle/top.json",
        subset_sha256="da8a4a88feebeb412a7df2e67c79133c484c47889653c9934743236c42c9ee77",
        text_only=True,
    ),
    "xbench": Benchmark(
        "qa",
        100,
        "MIT, encrypted",
        "hf://xbench/DeepSearch@436bbed79aef5b19c857047650ab528be33c6680/DeepSearch.csv",
        "10bdb81321e3d919c052c2c9a7095868d8bc9036f719fb25d9223043aa28c118",
    ),
}

# what the publishers call the same thing, in small letters; the first name found wins
FIELDS = {
    "id": ("task_id", "id", "_id", "unique_id", "problem_idx"),
    "question": ("question", "problem", "prompt"),
    "answer": ("answers", "golden_answers", "answer", "final_answer"),
    "level": ("level",),
    "difficulty_level": ("difficulty_level",),
    "type": ("type", "subject", "category", "answer_type"),
    "hops": ("hops", "hop"),
    "lang": ("lang", "language"),
    "domain": ("domain",),
    "root_url": ("root_url",),
    "solution": ("solution",),
}
IN_META = tuple(FIELDS)[3:]


# ---------------------------------------------------------------- one record -> one row
def lowered(record: dict) -> dict:
    """The record with its keys in small letters ("Final answer" is final_answer), and those of its
    `info` among them.
    """
    keys = {str(key).strip().lower().replace(" ", "_"): value for key, value in record.items()}
    info = keys.get("info")
    return {**(lowered(info) if isinstance(info, dict) else {}), **keys}


def field(record: dict, name: str):
    """The value of the first of FIELDS[name] that the record has, None where it has none."""
    return next((record[key] for key in FIELDS[name] if record.get(key) is not None), None)


def same_question(text: str) -> str:
    """A question without what copies of it differ in: Unicode form and white space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def convert(
    record: dict, place: str, name: str, position: int, names: dict | None = None
) -> tuple[dict | None, str]:
    """One published record -> (row, "") or (None, reason to skip); an unknown layout is an error
    naming the keys found.

    position: where the record stands in its file, from 1; it makes the id of sets that publish
    none, so that the same question twice stays two rows. names: what other_names read.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{place}: expected an object, found {type(record).__name__}")
    bench, found = BENCHMARKS[name], lowered(record)
    question, answers = field(found, "question"), answers_of(found, names)
    if not isinstance(question, str):
        raise ValueError(f"{place}: no question; keys found: {', '.join(map(str, record))}")
    attached = found.get("file_name") or ""
    if bench.text_only and (attached or found.get("image") or found.get("has_image")):
        return None, "has an attachment or an image"
    meta = {"dataset": name}
    for key in IN_META:
        if (value := field(found, key)) not in (None, "", []):
            meta[key] = value
    identity = field(found, "id")
    if name == "gsm8k" and answers and "####" in answers[0]:
        meta["solution"] = answers[0]
        answers = [answers[0].rpartition("####")[2].strip().replace(",", "")]
    if name.startswith("musique") and (hops := re.match(r"(\d)hop", str(identity))):
        meta["hops"] = int(hops[1])
    if not question.strip() or not answers or answers == ["?"]:
        return None, "no question or no answer"
    if name == "xbench" and found.get("canary"):
        meta |= {"encrypted": True, "canary": found["canary"]}
    elif name == "xbench" and looks_sealed(question) and looks_sealed(answers[0]):
        return None, "no canary, so it cannot be decrypted"
    row = {
        "id": str(identity) if identity is not None else f"{name}-{position:05d}",
        "question": question.strip(),
        "answer": answers[0] if len(answers) == 1 else answers,
        "kind": "choice" if found.get("answer_type") == "multipleChoice" else bench.kind,
        "meta": meta,
    }
    if attached:
        if Path(attached).name != attached:
            return None, f"attachment {attached!r} is not a plain file name"
        row["files"] = [attached]
    return row, ""


def answers_of(found: dict, names: dict | None) -> list[str]:
    """The accepted answers of a record with small keys: a text, a number, a list, {"value",
    "aliases"}, or the box at the end of its solution, with the aliases that it or `names` has.
    """
    answer = field(found, "answer")
    if isinstance(answer, dict):
        answer = [answer.get("value"), *(answer.get("aliases") or [])]
    if answer is None and isinstance(found.get("solution"), str):
        answer = last_boxed(found["solution"])
    listed = answer if isinstance(answer, list) else [answer]
    texts = [str(item) for item in listed if item is not None]
    return gold_answers({**found, "answers": texts}, names)


def looks_sealed(text: str) -> bool:
    """Whether a text is base64, as the encrypted texts of xbench are."""
    try:
        return bool(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError):
        return False


def read(path: Path, member: str = ""):
    """(place, record) of any input file; csv here, everything else as data/hotpotqa/prepare.py
    reads it.
    """
    if path.suffix != ".csv":
        yield from read_records(path, member if path.suffix == ".zip" else "")
        return
    if not path.is_file():
        raise SystemExit(f"no {path}: give an existing file with --input=FILE")
    csv.field_size_limit(1 << 24)
    with open(path, newline="", encoding="utf-8-sig") as file:
        for number, record in enumerate(csv.DictReader(file), 2):
            yield f"{path}:{number}", record


def chosen_by(path: Path) -> set[str]:
    """What the list of a subset chooses by: its ids and, since copies have ids of their own, its
    questions.
    """
    chosen = set()
    for place, record in read(path):
        found = lowered(record) if isinstance(record, dict) else {}
        if not isinstance(question := field(found, "question"), str):
            raise ValueError(f"{place}: no question; keys found: {', '.join(found)}")
        chosen |= {str(field(found, "id")), same_question(question)}
    return chosen


def convert_files(name: str, paths: list[Path], tallies: dict, chosen: set | None = None):
    """Yield the rows of a set; `chosen` = the ids and questions of a subset; tallies gets a Counter
    for each file.
    """
    bench, seen, positions = BENCHMARKS[name], set(), itertools.count(1)

    def converted(path, names):
        for place, record in read(path, bench.member):
            row, reason = placed(convert, record, place, name, next(positions), names)
            if (
                row
                and chosen is not None
                and not {row["id"], same_question(row["question"])} & chosen
            ):
                row, reason = None, "not in the subset"
            yield row, reason

    for path in paths:
        tally = tallies.setdefault(f"{name}: {path.name}", Counter())
        names = other_names(path) if name.startswith("2wiki") else {}
        yield from first_of_each_id(converted(path, names), tally, seen)


def fixed_sample(rows, count: int) -> list[dict]:
    """The `count` rows whose id has the smallest sha256, in the order given; all rows for count
    0.
    """
    rows = list(rows)
    if not count or count >= len(rows):
        return rows
    chosen = sorted(rows, key=lambda row: hashlib.sha256(row["id"].encode()).hexdigest())[:count]
    kept = {row["id"] for row in chosen}
    return [row for row in rows if row["id"] in kept]


# ---------------------------------------------------------------- one set
def raw_folder(out: Path, url: str) -> Path:
    """Where a download is kept: many publishers call their file test.jsonl, so each folder of a
    server has its own.
    """
    return out / "raw" / re.sub(r"\W+", "_", url.rpartition("/")[0])


def prepare(
    name: str,
    inputs: list[Path],
    out: Path,
    tallies: dict,
    get: Callable = fetch,
    subset: Path | None = None,
) -> int:
    """Write out/NAME.jsonl and out/NAME.meta.json from local files, or from the publisher; returns
    the number of rows. `get` fetches a url. `subset`: a local copy of the list that chooses.
    """
    bench, sources = BENCHMARKS[name], [("", path) for path in inputs]
    if not inputs:
        sources = [(bench.url, get(bench.url, raw_folder(out, bench.url), bench.sha256))]
    paths, chosen = [path for _, path in sources], None
    if subset or (bench.subset_url and not inputs):
        folder = raw_folder(out, bench.subset_url)
        listed = subset or get(bench.subset_url, folder, bench.subset_sha256)
        chosen = chosen_by(listed)
        sources.append(("" if subset else bench.subset_url, listed))
    rows = fixed_sample(convert_files(name, paths, tallies, chosen), bench.sample)
    if bench.subset_url and chosen is None and len(rows) > bench.rows:
        raise ValueError(
            f"{len(rows):,} rows, and a list chooses {bench.rows} of them: give --subset=FILE, a "
            f"copy of {bench.subset_url}"
        )
    if not inputs:
        for file in (file for row in rows for file in row.get("files", [])):
            target = out / "files" / file
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                shutil.copyfile(get(GAIA + file, out), target)
    target = out / f"{name}.jsonl"
    if written := write_rows(target, rows):
        origins = [origin(url, path) for url, path in sources]
        write_origin(target, written, origins, dataset=name, licence=bench.licence)
    return written


def checked(name: str) -> str:
    """What preparing a set would fetch and under which terms, as lines of text. Asks nobody."""
    bench = BENCHMARKS[name]
    lines = [f"{name}: {bench.rows:,} rows, {bench.licence}"]
    files = [("rows", bench.url, bench.sha256, bench.member)]
    files += [("list", bench.subset_url, bench.subset_sha256, "")] * bool(bench.subset_url)
    for what, url, sha256, member in files:
        inside = f", {member} of the archive" if member else ""
        digest = f"sha256 {sha256}" if sha256 else "digest recorded at download"
        lines += [
            f"  {what:9} {web_address(url)}{inside}",
            f"            {revision_of(url)}{digest}",
        ]
    if bench.gated:
        repo = bench.url.removeprefix("hf://").partition("@")[0]
        terms = f"https://huggingface.co/datasets/{repo}"
        lines.append(f"  login     yes: accept the terms at {terms}, then `hf auth login`")
    else:
        lines.append("  login     no")
    notes = ["a sample of our own: the release's is not public"] * bool(bench.sample)
    notes += ["attachments are fetched too, into files/"] * (name == "gaia")
    notes += ["id_aliases.json of the archive adds names"] * (name == "2wiki")
    return "\n".join(lines + [f"  note      {note}" for note in notes])


def web_address(url: str) -> str:
    """The address a browser opens: hf://OWNER/NAME@REVISION/PATH is the hub's resolve page."""
    if not url.startswith("hf://"):
        return url
    owner, name, file = url.removeprefix("hf://").split("/", 2)
    name, _, revision = name.partition("@")
    return f"https://huggingface.co/datasets/{owner}/{name}/resolve/{revision}/{file}"


def revision_of(url: str) -> str:
    """The commit that an address pins, as the words that begin a line of --check."""
    commit = re.search(r"[@/]([0-9a-f]{40})/", url)
    return f"revision {commit[1]}, " if commit else "the address has no revisions, "


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dataset", default=",".join(BENCHMARKS), help="names, with commas between (default: all)"
    )
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        help="a local file instead of a download; repeatable",
    )
    parser.add_argument(
        "--subset", default="", help="with --input: the list that chooses the rows of a subset"
    )
    parser.add_argument("--out", default=str(HERE), help="folder to write NAME.jsonl in")
    parser.add_argument(
        "--check",
        action="store_true",
        help="print what would be fetched, licences, logins and revisions, and stop",
    )
    args = parser.parse_args(argv)
    names = args.dataset.split(",")
    if unknown := [name for name in names if name not in BENCHMARKS]:
        raise SystemExit(f"--dataset: unknown {', '.join(unknown)}; known: {', '.join(BENCHMARKS)}")
    if args.check:
        print("\n".join(map(checked, names)))
        return
    if args.input and len(names) != 1:
        raise SystemExit("--input needs one --dataset=NAME, the set that the file belongs to")
    if args.subset and not args.input:
        raise SystemExit("--subset is the list for the rows of --input")

    inputs, subset = [Path(path) for path in args.input], Path(args.subset) if args.subset else None
    tallies, failed = {}, []
    for name in names:
        try:
            written = prepare(name, inputs, Path(args.out), tallies, subset=subset)
        except (ValueError, SystemExit) as error:
            failed.append(f"{name}: {error}")
            continue
        if not written:
            failed.append(f"{name}: no row could be converted")
            continue
        expected = BENCHMARKS[name].rows
        note = "" if written == expected else f"  (the published set has {expected:,})"
        print(f"wrote {written:,} rows to {Path(args.out) / (name + '.jsonl')}{note}")
    print_table(tallies)
    if failed:
        raise SystemExit("\n".join(["not made:", *failed]))


if __name__ == "__main__":
    main()

# --dataset=gsm8k --input=test.jsonl prints:
#
# wrote 1,319 rows to data/benchmarks/gsm8k.jsonl
# file                    read converted  skipped
# gsm8k: test.jsonl      1,319     1,319        0
