"""HotpotQA (distractor), MuSiQue and 2WikiMultihopQA as RL rows that run offline: every question
carries its own paragraphs in `docs`, and the search and browse tools look only there.

    python data/hotpotqa/prepare.py  # HotpotQA train and dev from its publisher
    python data/hotpotqa/prepare.py --set=hotpotqa_hub
        # the same from the Hugging Face hub (needs pyarrow)
    python data/hotpotqa/prepare.py --set=musique          # MuSiQue-Answerable train and dev
    python data/hotpotqa/prepare.py --set=2wiki  # 2WikiMultihopQA, with other names of the answers
    python data/hotpotqa/prepare.py --input=a.json --input=b.jsonl --out=data/hotpotqa/train.jsonl
    python data/hotpotqa/prepare.py --input=musique_v1.0.zip --member=musique_ans_v1.0_train.jsonl

Layouts read (a json list, jsonl, parquet, or a zip of json files):
  HotpotQA / 2Wiki   _id, question, answer, context [[title, [sentence, ...]], ...] (also as JSON
           text); 2Wiki's answer_id is looked up in the id_aliases.json of its archive or folder
  the hub's          id, question, answer, context {"title": [...], "sentences": [[...], ...]}
  MuSiQue  id, question, answer, answer_aliases, answerable,
           paragraphs [{idx, title, paragraph_text}]
  plain              id, question, answers [...], paragraphs [{title, text}]
Row written: {"id", "question", "answer": [str, ...], "kind": "qa", "docs": [{"title", "text"},
...], "meta": {...}}

NAME.meta.json beside it says which files, revisions and digests the rows are from.

Licences: HotpotQA CC BY-SA 4.0 (hotpotqa.github.io), MuSiQue CC BY 4.0
(github.com/StonyBrookNLP/musique), 2WikiMultihopQA Apache-2.0 (github.com/Alab-NII/2wikimultihop).
"""

import argparse
import hashlib
import json
import re
import sys
import urllib.parse
import urllib.request
import zipfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent

# set -> split -> files, each (url, sha256 or "", member of the zip or ""); hf:// is
# OWNER/NAME@REVISION/PATH on the hub
CMU = "http://curtis.ml.cmu.edu/datasets/hotpot/"
HUB = "hf://hotpotqa/hotpot_qa@1908d6afbbead072334abe2965f91bd2709910ab/distractor/"
# what follows "#" is the name of the file, where the path does not end with it
MUSIQUE = (
    "https://drive.usercontent.google.com/download?id=1tGdADlNjWFaHLeZZGShh2IRcpO6Lv24h"
    "&export=download&confirm=t#musique_v1.0.zip"
)
MUSIQUE_SHA256 = "98f839bf2fd5319f5c688aed77901a6d5c30b3b9f9f691ab9a8ecafb045ee0cd"
TWO_WIKI = "https://www.dropbox.com/s/ms2m13252h6xubs/data_ids_april7.zip?dl=1"
TWO_WIKI_SHA256 = "95df2bf56fdabe034e27aebc580e02264232203cf52552f9efe8a919e5529eef"
ALIASES = "id_aliases.json"  # of 2Wiki: {"Q_id", "aliases", "demonyms"} a line
SOURCES = {
    "hotpotqa": {
        "train": [
            (
                CMU + "hotpot_train_v1.1.json",
                "26650cf50234ef5fb2e664ed70bbecdfd87815e6bffc257e068efea5cf7cd316",
                "",
            )
        ],
        "dev": [
            (
                CMU + "hotpot_dev_distractor_v1.json",
                "4e9ecb5c8d3b719f624d66b60f8d56bf227f03914f5f0753d6fa1b359d7104ea",
                "",
            )
        ],
    },
    "hotpotqa_hub": {
        "train": [(HUB + f"train-0000{i}-of-00002.parquet", "", "") for i in range(2)],
        "dev": [(HUB + "validation-00000-of-00001.parquet", "", "")],
    },
    "musique": {
        "train": [(MUSIQUE, MUSIQUE_SHA256, "musique_ans_v1.0_train.jsonl")],
        "dev": [(MUSIQUE, MUSIQUE_SHA256, "musique_ans_v1.0_dev.jsonl")],
    },
    "2wiki": {
        "train": [(TWO_WIKI, TWO_WIKI_SHA256, "train.json")],
        "dev": [(TWO_WIKI, TWO_WIKI_SHA256, "dev.json")],
    },
}


# -------------------- fetching and reading (also used by data/benchmarks)
def fetch(url, folder, sha256=""):
    """Path of the file behind `url`, kept in `folder`; downloaded once, beside and renamed, so a
    kill leaves no half file. hf://OWNER/NAME@REVISION/PATH goes through huggingface_hub, with its
    cache, resume and login. A file with another digest than `sha256` is an error."""
    if url.startswith("hf://"):
        path = fetch_hub(url)
    else:
        parts = urllib.parse.urlsplit(url)
        path = Path(folder) / Path(parts.fragment or parts.path).name
        if not path.exists():
            download(url, path)
    if sha256 and (found := digest_of(path)) != sha256:
        raise SystemExit(f"{path}: sha256 is {found}, expected {sha256}: delete it and run again")
    return path


def download(url, path):
    """Writes what `url` answers to `path`, beside and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    print(f"fetching {url}", file=sys.stderr)
    try:
        with urllib.request.urlopen(url, timeout=60) as response, open(part, "wb") as out:
            while block := response.read(1 << 20):
                out.write(block)
    except OSError as error:
        raise SystemExit(
            f"cannot fetch {url}: {error}. Fetch it by hand and give --input=FILE"
        ) from error
    part.replace(path)


def digest_of(path):
    """The sha256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_hub(url):
    """Path of one data-set file of the Hugging Face hub in its local cache; gated sets say how to
    get access.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    owner, name, file = url.removeprefix("hf://").split("/", 2)
    name, _, revision = name.partition("@")
    try:
        return Path(
            hf_hub_download(f"{owner}/{name}", file, repo_type="dataset", revision=revision or None)
        )
    except GatedRepoError as error:
        raise SystemExit(
            f"{owner}/{name} is gated: accept its terms at "
            f"https://huggingface.co/datasets/{owner}/{name} "
            "while logged in, run `hf auth login`, then run this again"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SystemExit(
            f"cannot fetch {url}: {reason}. Fetch it by hand and give --input=FILE"
        ) from error


def parse_records(name, lines, is_list):
    """Yield (line number or list index, value) of one json list or of jsonl lines; broken JSON
    names the place.
    """
    if is_list:
        try:
            rows = json.loads(b"".join(lines))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}: not a JSON list: {error}") from error
        yield from enumerate(rows, 1)
        return
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}:{number}: not JSON: {error}") from error


def read_records(path, member=""):
    """Yield (place, record) from a .json list, a .jsonl or .parquet file, or from the one .json or
    .jsonl file of a .zip: the one named `member`, where it holds several.
    """
    path = Path(path)
    if not path.is_file():
        raise SystemExit(f"no {path}: give an existing file with --input=FILE")
    if path.suffix == ".parquet":
        yield from read_parquet(path)
        return
    archive = open_zip(path) if path.suffix == ".zip" else None
    name = the_member(path, archive, member) if archive else path.name
    label = f"{path}/{name}" if archive else str(path)
    with archive.open(name) if archive else open(path, "rb") as file:
        is_list = first_byte(file) == b"["
        for number, record in parse_records(label, file, is_list):
            yield f"{label}:{number}", record


def open_zip(path):
    if not zipfile.is_zipfile(path):
        raise SystemExit(
            f"{path}: not a zip archive (an error page?): delete it and fetch it by hand"
        )
    return zipfile.ZipFile(path)


def json_members(archive):
    """The paths of the .json and .jsonl files of an archive, without what a Mac adds
    (__MACOSX/._NAME).
    """
    names = [name for name in archive.namelist() if name.endswith((".json", ".jsonl"))]
    return [name for name in names if not Path(name).name.startswith("._")]


def the_member(path, archive, member=""):
    """The path in the archive of the file named `member`, or of the only one."""
    names = json_members(archive)
    found = [name for name in names if not member or Path(name).name == member]
    if not found:
        raise SystemExit(f"{path}: holds no file named {member or '*.json(l)'}")
    if len(found) > 1:
        listed = ", ".join(sorted(Path(name).name for name in found))
        raise SystemExit(
            f"{path}: holds {len(found)} files ({listed}): choose one by --member=NAME"
        )
    return found[0]


def other_names(path):
    """{Wikidata id: the other names of it} from the id_aliases.json in the archive `path` or beside
    the file `path`; {} where there is none. 2Wiki's official scorer takes the best over them.
    """
    path = Path(path)
    inside = path.suffix == ".zip" and any(
        Path(name).name == ALIASES for name in json_members(open_zip(path))
    )
    if not inside and not (path.parent / ALIASES).is_file():
        return {}
    records = read_records(path, ALIASES) if inside else read_records(path.parent / ALIASES)
    names = {}
    for place, record in records:
        if not isinstance(record, dict) or "Q_id" not in record:
            raise ValueError(f"{place}: not a line of {ALIASES}: no Q_id")
        names[record["Q_id"]] = [*(record.get("aliases") or []), *(record.get("demonyms") or [])]
    return names


def read_parquet(path):
    """Yield (place, record) of a parquet file, a thousand rows at a time."""
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise SystemExit(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from error
    number = 0
    try:
        file = parquet.ParquetFile(path)
    except (ValueError, OSError) as error:  # pyarrow's own errors are of these kinds
        raise ValueError(f"{path}: not a parquet file: {error}") from error
    for batch in file.iter_batches(batch_size=1000):
        for record in batch.to_pylist():
            number += 1
            yield f"{path}:{number}", record


def first_byte(file):
    """The first byte that is not white space (a byte order mark is skipped); the file is rewound to
    the start of it.
    """
    while (byte := file.read(1)) in (b" ", b"\n", b"\r", b"\t", b"\xef", b"\xbb", b"\xbf"):
        continue
    file.seek(max(0, file.tell() - 1) if byte else 0)
    return byte


def write_rows(path, rows):
    """Write `rows` as jsonl, beside and renamed; returns how many. No row at all, or an error among
    them, leaves no file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    count = 0
    try:
        # a lone surrogate becomes "?"
        with open(part, "w", encoding="utf-8", errors="replace") as out:
            for count, row in enumerate(rows, 1):
                out.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        if count:
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return count


def origin(url, path):
    """{"source", "revision", "sha256"} of a file that was fetched from `url`, or given by hand
    where `url` is "". The revision is the publisher's commit, "" where it has none: then the digest
    tells versions apart.
    """
    source, revision = Path(path).name if not url else url, ""
    if url.startswith("hf://"):
        owner, name, _ = url.removeprefix("hf://").split("/", 2)
        name, _, asked = name.partition("@")
        snapshot = re.search(r"/snapshots/([0-9a-f]{40})/", Path(path).as_posix())
        source, revision = f"{owner}/{name}", snapshot[1] if snapshot else asked
    elif match := re.match(r"https://raw\.githubusercontent\.com/([^/]+/[^/]+)/([^/]+)/", url):
        source, revision = match.groups()
    return {"source": source, "revision": revision, "sha256": digest_of(path)}


def write_origin(path, rows, origins, **more):
    """NAME.meta.json beside the rows NAME.jsonl: "revision", one line for a report, and what it
    stands on. "sha256" is of the rows: with another one they were changed since.
    """
    told = [
        f"{o['source']} @ {o['revision'][:12] or 'sha256 ' + o['sha256'][:12]}" for o in origins
    ]
    path = Path(path)
    meta = {
        "revision": ", ".join(told),
        "rows": rows,
        "sha256": digest_of(path),
        "sources": origins,
        **more,
    }
    text = json.dumps(meta, indent=1, ensure_ascii=False)
    path.with_suffix(".meta.json").write_text(text + "\n", encoding="utf-8")


def print_table(tallies):
    """Print one line per file: tallies = {name: Counter(read=, converted=, and one key per reason
    to skip)}.
    """
    width = max(len(name) for name in [*tallies, "file"])
    print(f"{'file':{width}} {'read':>8} {'converted':>9} {'skipped':>8}")
    for name, tally in tallies.items():
        print(
            f"{name:{width}} {tally['read']:8,} {tally['converted']:9,} "
            f"{tally['read'] - tally['converted']:8,}"
        )
    for name, tally in tallies.items():
        for reason, count in sorted(tally.items()):
            if reason not in ("read", "converted"):
                print(f"  {name}: {count:,} skipped, {reason}")


# ---------------------------------------------------------------- one record -> one RL row
def documents(record):
    """The paragraphs of a record as [{"title", "text"}], None when the record has no paragraphs at
    all.
    """
    record = {**record, "context": unpacked(record.get("context"))}
    if "paragraphs" in record:
        docs = [
            {"title": str(p.get("title", "")), "text": p.get("paragraph_text", p.get("text")) or ""}
            for p in record["paragraphs"]
        ]
    elif isinstance(record.get("context"), dict):
        pairs = zip(record["context"]["title"], record["context"]["sentences"])
        docs = [{"title": title, "text": "".join(sentences)} for title, sentences in pairs]
    elif isinstance(record.get("context"), list):
        docs = [
            {"title": title, "text": "".join(sentences)} for title, sentences in record["context"]
        ]
    else:
        return None
    return [doc for doc in docs if doc["text"].strip()]


def unpacked(value):
    """A value that some parquet files hold as its JSON text."""
    return json.loads(value) if isinstance(value, str) and value[:1] in ("[", "{") else value


def gold_answers(record, names=None):
    """All accepted answers, without repeats and in the publisher's order; [] when the record has
    none. `names`: what other_names read.
    """
    given = record.get("answers", record.get("answer"))
    answers = [
        *(given if isinstance(given, list) else [given]),
        *(record.get("answer_aliases") or []),
    ]
    if any(answers):
        answers += (names or {}).get(record.get("answer_id"), [])
    return list(dict.fromkeys(a.strip() for a in answers if isinstance(a, str) and a.strip()))


def supporting_titles(record):
    """Titles of the paragraphs that the publisher marks as needed (for analysis, never shown to the
    agent).
    """
    if "paragraphs" in record:
        titles = [p.get("title", "") for p in record["paragraphs"] if p.get("is_supporting")]
    else:
        facts = unpacked(record.get("supporting_facts")) or []
        titles = facts["title"] if isinstance(facts, dict) else [fact[0] for fact in facts]
    return list(dict.fromkeys(titles))


def dataset_name(record):
    """Which of the three sets a record is from, told by the marks that only that set has."""
    if re.match(r"\dhop\d?_", str(record.get("id", ""))) or "question_decomposition" in record:
        return "musique"
    return "2wiki" if "evidences" in record else "hotpotqa"


def convert(record, place, names=None):
    """One record -> (row, "") or (None, reason to skip). An unknown layout is a ValueError naming
    place and keys. `names`: what other_names read.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{place}: expected an object, found {type(record).__name__}")
    identity = record.get("_id", record.get("id"))
    question = record.get("question")
    answers, docs = gold_answers(record, names), documents(record)
    if not isinstance(question, str) or (docs is not None and identity is None):
        raise ValueError(f"{place}: no question or no id; keys found: {', '.join(record)}")
    if record.get("answerable") is False:
        return None, "not answerable from its paragraphs"
    if not question.strip():
        return None, "empty question"
    if not answers:
        return None, "no answer (a test split?)"
    if docs is None:
        return None, "no paragraphs (data/benchmarks/prepare.py takes such rows)"
    if not docs:
        return None, "all paragraphs empty"
    name = dataset_name(record)
    meta = {"dataset": name, "supporting": supporting_titles(record)}
    meta.update({key: record[key] for key in ("type", "level", "hops") if key in record})
    if name == "musique":
        meta.setdefault("hops", int(str(identity)[0]))
    return {
        "id": str(identity),
        "question": question.strip(),
        "answer": answers,
        "kind": "qa",
        "docs": docs,
        "meta": meta,
    }, ""


def placed(convert, record, place, *rest):
    """convert(record, place, *rest); what is broken inside the record is a ValueError that names
    the place.
    """
    try:
        return convert(record, place, *rest)
    except (KeyError, TypeError, AttributeError, IndexError, json.JSONDecodeError) as error:
        raise ValueError(f"{place}: broken inside ({type(error).__name__}: {error})") from error


def convert_file(path, tally, seen, member=""):
    """Yield the RL rows of one file; `tally` counts read, converted and each reason to skip; `seen`
    holds the ids.
    """
    names = other_names(path)
    records = read_records(path, member)
    results = (placed(convert, record, place, names) for place, record in records)
    yield from first_of_each_id(results, tally, seen)


def first_of_each_id(results, tally, seen):
    """Yield the rows of (row or None, reason) pairs whose id is new; `tally` and `seen` as in
    convert_file.
    """
    for row, reason in results:
        tally["read"] += 1
        if row and row["id"] in seen:
            row, reason = None, "id seen before"
        if row is None:
            tally[reason] += 1
            continue
        seen.add(row["id"])
        tally["converted"] += 1
        yield row


# ---------------------------------------------------------------- main
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        help="a local file instead of a download; repeatable",
    )
    parser.add_argument(
        "--out",
        default="",
        help="with --input: the file to write (default train.jsonl beside this "
        "script); without: the folder to write in",
    )
    parser.add_argument(
        "--set", choices=list(SOURCES), default="hotpotqa", help="which set to download"
    )
    parser.add_argument("--member", default="", help="the file to read of an --input that is a zip")
    args = parser.parse_args(argv)

    # output file -> [(url, input file, member of a zip)]
    if args.input:
        files = [("", Path(name), args.member) for name in args.input]
        jobs = {Path(args.out or HERE / "train.jsonl"): files}
    else:
        prefix = "" if args.set.startswith("hotpotqa") else args.set + "_"
        jobs = {
            Path(args.out or HERE) / f"{prefix}{split}.jsonl": [
                (url, fetch(url, HERE / "raw", sha256), member) for url, sha256, member in files
            ]
            for split, files in SOURCES[args.set].items()
        }

    tallies = {}
    for out, files in jobs.items():
        seen, counters = set(), [Counter() for _ in files]
        for (_, path, member), counter in zip(files, counters):
            tallies[f"{path}/{member}" if member else str(path)] = counter
        rows = (
            row
            for (_, path, member), tally in zip(files, counters)
            for row in convert_file(path, tally, seen, member)
        )
        try:
            written = write_rows(out, rows)
        except ValueError as error:
            raise SystemExit(str(error)) from error
        if not written:
            print_table(tallies)
            raise SystemExit(f"{out}: not written, no row could be converted")
        write_origin(out, written, [origin(url, path) for url, path, _ in files])
        print(f"wrote {written:,} rows to {out}")
    print_table(tallies)


if __name__ == "__main__":
    main()

# The publishers' sizes: HotpotQA train 90,447 and dev 7,405; MuSiQue-Answerable train 19,938 and
# dev 2,417; 2Wiki dev 12,576. Two files of 100 rows,
# --input=train100_distractor.jsonl --input=train100.jsonl --out=train.jsonl, print:
#
# wrote 200 rows to train.jsonl
# file                           read converted  skipped
# train100_distractor.jsonl       100       100        0
# train100.jsonl                  100       100        0
