"""The 12 benchmarks of the paper, under the 18 names of its release, as rows for evaluate.py, each
from its publisher by path and revision.

    python data/benchmarks/prepare.py  # all; what needs access is told
    python data/benchmarks/prepare.py --dataset=gaia_text,math500
    python data/benchmarks/prepare.py --dataset=gsm8k --input=test.jsonl
        # a local file, nothing is fetched
    python data/benchmarks/prepare.py --list                           # sizes, licences, sources

Row written to data/benchmarks/NAME.jsonl: {"id", "question", "answer", "kind", "meta", "files"?}.
`answer` is a text or a list of accepted texts; `kind` is math | qa | gaia | choice; `files` are
names under data/benchmarks/files. xbench stays encrypted on disk, as its publisher asks: question
and answer are the published base64 texts, meta has "encrypted" and the "canary" that is their key;
evaluate.py decrypts in memory.

Input layouts: json list, jsonl, parquet, csv, or a zip of json files, with the field names of
FIELDS.
"""

import argparse
import csv
import hashlib
import itertools
import re
import shutil
import sys
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
    placed,
    print_table,
    read_records,
    write_rows,
)

GITHUB = "https://raw.githubusercontent.com/"
ARPO = GITHUB + "RUC-NLPIR/ARPO/a95cd08/evaluation/data/"
WEBTHINKER = GITHUB + "RUC-NLPIR/WebThinker/991ff7775231823b2059e2409e2d9ff70c144932/data/"
GAIA = "hf://gaia-benchmark/GAIA@682dd723ee1e1697e00360edccf2366dc8418dd9/2023/validation/"
HLE = "hf://cais/hle@5a81a4c7271a2a2a312b9a690f0c2fde837e4c29/data/test-00000-of-00001.parquet"
TWO_WIKI = "hf://xanhho/2WikiMultihopQA@612bc5039a457880d9e7d84c3b0a4cf154b70e4f/dev.parquet"


@dataclass(frozen=True)
class Benchmark:
    """One set: where it is, what it is called here, how many rows it must have."""

    kind: str  # math | qa | gaia | choice
    rows: int  # the published size; another count is told in the table
    licence: str
    url: str  # https:// or hf://OWNER/NAME@REVISION/PATH
    sha256: str = ""
    member: str = ""  # of a zip
    ids_url: str = ""  # a list whose ids choose the subset; only its ids are used
    sample: int = (
        0  # keep the rows whose id has the smallest sha256: a fixed sample of no one's choice
    )
    text_only: bool = False  # leave out rows with an attachment or an image


def _arpo(folder: str, licence: str, rows: int = 200) -> Benchmark:
    return Benchmark("qa", rows, licence, f"{ARPO}{folder}/test.jsonl")


_HOTPOT_URL, _HOTPOT_SHA256, _ = SOURCES["hotpotqa"]["dev"][0]
_MUSIQUE_URL, _, _MUSIQUE_MEMBER = SOURCES["musique"]["dev"][0]
BENCHMARKS = {
    "gaia": Benchmark("gaia", 165, "gated, no redistribution", GAIA + "metadata.parquet"),
    "gaia_text": Benchmark(
        "gaia",
        103,
        "gated, no redistribution",
        GAIA + "metadata.parquet",
        ids_url=WEBTHINKER + "GAIA/dev.json",
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
        GITHUB + "openai/grade-school-math/3101c7d/grade_school_math/data/test.jsonl",
        "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
    ),
    "2wiki": Benchmark(
        "qa",
        12_576,
        "Apache-2.0",
        TWO_WIKI,
        "c0d8b60b9026b728fb07ad74c5252a0f188f6942e8ba5c02df4dfa369502ea8d",
    ),
    "2wiki200": _arpo("2wiki", "Apache-2.0"),
    "hotpotqa": Benchmark("qa", 7405, "CC BY-SA 4.0", _HOTPOT_URL, _HOTPOT_SHA256),
    "hotpotqa200": _arpo("hotpotqa", "CC BY-SA 4.0"),
    "hotpotqa1000": Benchmark("qa", 1000, "CC BY-SA 4.0", _HOTPOT_URL, _HOTPOT_SHA256, sample=1000),
    "musique": Benchmark("qa", 2417, "CC BY 4.0", _MUSIQUE_URL, member=_MUSIQUE_MEMBER),
    "musique200": _arpo("musique", "CC BY 4.0"),
    "bamboogle": _arpo("bamboogle", "MIT", rows=125),
    "webwalker": Benchmark(
        "qa", 680, "Apache-2.0", "hf://callanwu/WebWalkerQA@main/data/main-00000-of-00001.jsonl"
    ),
    "webwalker200": _arpo("webwalker", "Apache-2.0"),
    "hle": Benchmark(
        "qa",
        500,
        "MIT, gated, no redistribution",
        HLE,
        ids_url=WEBTHINKER + "HLE/test.json",
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

# what the publishers call the same thing; the first name found wins
FIELDS = {
    "id": ("id", "_id", "task_id", "unique_id", "ID"),
    "question": ("question", "Question", "problem", "Problem", "prompt"),
    "answer": ("answers", "answer", "Answer", "Final answer", "final_answer"),
    "level": ("level", "Level", "difficulty_level"),
    "type": ("type", "subject", "category", "answer_type"),
    "solution": ("solution", "Solution"),
}


# ---------------------------------------------------------------- one record -> one row
def field(record: dict, name: str):
    """The value of the first of FIELDS[name] that the record has, None where it has none."""
    return next((record[key] for key in FIELDS[name] if record.get(key) is not None), None)


def convert(record: dict, place: str, name: str, position: int) -> tuple[dict | None, str]:
    """One published record -> (row, "") or (None, reason to skip); an unknown layout is an error
    naming the keys found.

    position: where the record stands in its file, from 1; it makes the id of sets that publish
    none, so that the same question twice stays two rows.
    """
    bench = BENCHMARKS[name]
    question, answer = field(record, "question"), field(record, "answer")
    if not isinstance(question, str):
        raise ValueError(f"{place}: no question; keys found: {', '.join(map(str, record))}")
    if isinstance(answer, dict):  # {"value", "aliases"}
        answer = [answer.get("value"), *(answer.get("aliases") or [])]
    attached = record.get("file_name") or ""
    if bench.text_only and (attached or record.get("image")):
        return None, "has an attachment or an image"
    meta = {"dataset": name}
    for key in ("level", "type", "solution"):
        if (value := field(record, key)) not in (None, ""):
            meta[key] = value
    info = record.get("info") if isinstance(record.get("info"), dict) else {}
    for key in ("lang", "domain", "difficulty_level", "type", "hops", "root_url"):
        if (value := record.get(key, info.get(key))) not in (None, "", []):
            meta.setdefault(key, value)
    answers = gold_answers(
        {**record, "answers": answer if isinstance(answer, list) else [_text(answer)]}
    )
    if name == "gsm8k" and answers and "####" in answers[0]:
        meta["solution"] = answers[0]
        answers = [answers[0].rpartition("####")[2].strip().replace(",", "")]
    if not question.strip() or not answers or answers == ["?"]:
        return None, "no question or no answer"
    if name == "xbench":
        if not record.get("canary"):
            return None, "no canary, so it cannot be decrypted"
        meta |= {"encrypted": True, "canary": record["canary"]}
    identity = field(record, "id")
    kind = "choice" if record.get("answer_type") == "multipleChoice" else bench.kind
    row = {
        "id": str(identity) if identity is not None else f"{name}-{position:05d}",
        "question": question.strip(),
        "answer": answers[0] if len(answers) == 1 else answers,
        "kind": kind,
        "meta": meta,
    }
    if attached:
        if Path(attached).name != attached:
            return None, f"attachment {attached!r} is not a plain file name"
        row["files"] = [attached]
    return row, ""


def _text(value) -> str:
    return "" if value is None else str(value)


def read(path: Path, member: str = ""):
    """(place, record) of any input file; csv here, everything else as data/hotpotqa/prepare.py
    reads it.
    """
    if path.suffix != ".csv":
        yield from read_records(path, member)
        return
    if not path.is_file():
        raise SystemExit(f"no {path}: give an existing file with --input=FILE")
    csv.field_size_limit(1 << 24)
    with open(path, newline="", encoding="utf-8-sig") as file:
        for number, record in enumerate(csv.DictReader(file), 2):
            yield f"{path}:{number}", record


def convert_files(name: str, paths: list[tuple[Path, str]], tallies: dict, only: set | None = None):
    """Yield the rows of a set; `only` = the ids of a subset; tallies gets a Counter for each
    file.
    """
    seen: set[str] = set()
    positions = itertools.count(1)

    def converted(path, member):
        for place, record in read(path, member):
            row, reason = placed(convert, record, place, name, next(positions))
            yield (
                (row, reason)
                if not row or only is None or row["id"] in only
                else (None, "not in the subset")
            )

    for path, member in paths:
        tally = tallies.setdefault(f"{name}: {path.name}", Counter())
        yield from first_of_each_id(converted(path, member), tally, seen)


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


def prepare(name: str, inputs: list[Path], out: Path, tallies: dict, get: Callable = fetch) -> int:
    """Write out/NAME.jsonl from local files, or from the publisher; returns the number of rows.
    `get` fetches a url.
    """
    bench, only = BENCHMARKS[name], None
    if inputs:
        paths = [(path, "") for path in inputs]
    else:
        paths = [(get(bench.url, raw_folder(out, bench.url), bench.sha256), bench.member)]
        if bench.ids_url:
            listed = get(bench.ids_url, raw_folder(out, bench.ids_url))
            only = {str(field(record, "id")) for _, record in read_records(listed)}
    rows = fixed_sample(convert_files(name, paths, tallies, only), bench.sample)
    if not inputs:
        for file in (file for row in rows for file in row.get("files", [])):
            target = out / "files" / file
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                shutil.copyfile(get(GAIA + file, out), target)
    return write_rows(out / f"{name}.jsonl", rows)


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
    parser.add_argument("--out", default=str(HERE), help="folder to write NAME.jsonl in")
    parser.add_argument(
        "--list", action="store_true", help="print names, sizes, licences and sources, and stop"
    )
    args = parser.parse_args(argv)
    names = args.dataset.split(",")
    if unknown := [name for name in names if name not in BENCHMARKS]:
        raise SystemExit(f"--dataset: unknown {', '.join(unknown)}; known: {', '.join(BENCHMARKS)}")
    if args.list:
        for name in names:
            bench = BENCHMARKS[name]
            print(f"{name:13} {bench.rows:6,} rows  {bench.licence:30} {bench.url}")
        return
    if args.input and len(names) != 1:
        raise SystemExit("--input needs one --dataset=NAME, the set that the file belongs to")

    tallies, failed = {}, []
    for name in names:
        try:
            written = prepare(name, [Path(path) for path in args.input], Path(args.out), tallies)
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
