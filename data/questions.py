"""A file of questions and answers as RL rows, by one command.

    python data/questions.py FILE.csv|tsv|jsonl|json --out=data/own/rl_train.jsonl [--held_out=100]

The columns are found by their usual names, or named: --question=COLUMN --answer=COLUMN. Several
accepted answers are a list, or one text with --separator="|". `kind` decides the rule that scores:
a column of that name, --kind=, or by the answer: a letter with options in the question is a choice,
numbers and formulas are maths, the rest is qa. Ends with a table; what is left out is named.
Then: grpo_unified.py --data=data/own/rl_train.jsonl, evaluate.py --dataset=own.
"""

import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from reagent.config import parse_config
from reagent.folder import write_whole
from reagent.rows import check_rl_row, seed_of
from reagent.scorers import rule_reward
from toolkit.text import last_boxed

QUESTION = "question problem query prompt instruction input frage".split()
ANSWER = "answer answers final_answer ground_truth gold golds golden_answers target label".split()
ANSWER += "expected solution output response antwort".split()
KINDS = ("math", "qa", "gaia", "choice")
_NUMBER = re.compile(r"[-+−]?[\d.,\s]*\d\s*%?|.*(?:\\frac|\\sqrt|\\pi|\^|\$.*\\).*", re.S)
_OPTIONS = re.compile(r"^\W*\(?B[).:]", re.M)


@dataclass
class Config:
    out: str = "data/own/rl_train.jsonl"
    held_out: int = 0  # rows, drawn by their ids, that go to rl_test.jsonl beside it
    question: str = ""  # column; "": by its name
    answer: str = ""
    separator: str = ""  # between several accepted answers of one text
    kind: str = ""  # math | qa | gaia | choice; "": by column or answer
    limit: int = 0  # the first so many; 0: all
    seed: int = 0


def records(path: str) -> Iterator[tuple[int, dict | str]]:
    """(line or place, record or why it is none) of a file."""
    if not Path(path).is_file():
        raise SystemExit(f"no file {path}")
    kind = Path(path).suffix.lower()
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SystemExit(f"{path}: not UTF-8 ({error})") from error
    if kind in (".csv", ".tsv", ".txt"):
        yield from csv_records(text)
    elif kind == ".json":
        try:
            whole = json.loads(text)
        except ValueError as error:
            raise SystemExit(f"{path}: not JSON ({error})") from error
        rows = whole if isinstance(whole, list) else next(filter(is_list, whole.values()), [whole])
        for n, row in enumerate(rows, 1):
            yield n, row if isinstance(row, dict) else "not an object"
    else:
        for n, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    row = f"not a JSON line ({error})"
                yield n, row if isinstance(row, (dict, str)) else "not an object"


def is_list(value) -> bool:
    return isinstance(value, list)


def csv_records(text: str) -> Iterator[tuple[int, dict | str]]:
    """Rows of a table with a head; commas, semicolons and tabs are told by the head."""
    head = text.partition("\n")[0]
    mark = max(",;\t", key=head.count)
    csv.field_size_limit(sys.maxsize)
    rows = csv.DictReader(text.splitlines(keepends=True), delimiter=mark, strict=True)
    try:
        for row in rows:
            whole = None not in row and None not in row.values()
            yield (
                rows.line_num,
                row if whole else f"not the {len(rows.fieldnames)} fields of the head",
            )
    except csv.Error as error:
        yield rows.line_num, f"not CSV ({error})"


def column(record: dict, named: str, usual: list[str]) -> str:
    """The key of a record that is named, or has one of the usual names; "": none."""
    if named:
        return named if named in record else ""
    keys = {str(key).strip().casefold().replace(" ", "_"): key for key in record}
    return next((keys[name] for name in usual if name in keys), "")


def answers_of(value, separator: str) -> list[str]:
    """The accepted answers in a field: the end of a solution (GSM8K's ####, \\boxed{}) counts."""
    if isinstance(value, str) and value.lstrip().startswith('["'):
        value = json.loads(value)
    if isinstance(value, str):
        value = last_boxed(value) or value.rpartition("####")[2]
        value = value.split(separator) if separator else [value]
    values = value if isinstance(value, list) else [value]
    texts = (format(v, "g") if isinstance(v, float) else str(v) for v in values if v is not None)
    return [text.strip() for text in texts if text.strip()]


def kind_of(question: str, answers: list[str]) -> str:
    if all(re.fullmatch(r"\(?[A-J]\)?\.?", answer) for answer in answers):
        return "choice" if _OPTIONS.search(question) else "qa"
    return "math" if all(_NUMBER.fullmatch(answer) for answer in answers) else "qa"


def row_of(record: dict, name: str, cfg: Config) -> dict:
    """The RL row of a record; ValueError says why it is none."""
    ask, told = column(record, cfg.question, QUESTION), column(record, cfg.answer, ANSWER)
    for what, key, option in (("question", ask, "question"), ("answer", told, "answer")):
        if not key:
            known = ", ".join(map(str, record))
            raise ValueError(f"no column of the {what} (--{option}=COLUMN); there are {known}")
    answers = answers_of(record[told], cfg.separator)
    question = str(record[ask] or "").strip()
    if not question or not answers:
        raise ValueError("no question" if not question else "no answer")
    kind = cfg.kind or record.get("kind")
    row = {"id": str(record.get("id") or name), "question": question}
    row["answer"] = answers if len(answers) > 1 else answers[0]
    row["kind"] = kind if kind in KINDS else kind_of(question, answers)
    row |= {key: record[key] for key in ("docs", "files", "meta") if is_rich(record.get(key))}
    if problem := check_rl_row(row):
        raise ValueError(problem)
    if not all(rule_reward(row, answer)[1] for answer in answers):
        raise ValueError(f"the {row['kind']} rule does not accept its own answer")
    return row


def asked(row: dict) -> str:
    """What two rows share that ask the same of the same pages and files: case, spaces and marks at
    the end of a word tell nothing (2+2 and 2-2 differ)."""
    question = re.sub(r"[.,:;?]+(?=\s|$)", " ", row["question"].casefold())
    return json.dumps([question.split(), row.get("docs"), row.get("files")])


def is_rich(value) -> bool:
    return isinstance(value, (list, dict)) and bool(value)


def main(argv: list[str]) -> None:
    keys = [arg for arg in argv if arg.startswith("-")]
    files = [arg for arg in argv if arg not in keys]
    if {"-h", "--help"} & set(keys):
        print(__doc__)
    cfg = parse_config(Config, keys)
    if not files or cfg.kind not in ("", *KINDS):
        raise SystemExit(f"questions needs files, and --kind= is one of {', '.join(KINDS)}")
    rows, names, before, why, read = [], Counter(), set(), Counter(), 0
    for path in files:
        for line, record in records(path):
            read += 1
            try:
                if isinstance(record, str):
                    raise ValueError(record)
                row = row_of(record, f"{Path(path).stem}-{line}", cfg)
                if asked(row) in before:
                    raise ValueError("asked before")
            except ValueError as error:
                print(f"{path}:{line}: {error}", file=sys.stderr)
                why[str(error).partition(";")[0].partition(" (")[0]] += 1
                continue
            before.add(asked(row))
            names[row["id"]] += 1
            row["id"] += f"#{names[row['id']]}" if names[row["id"]] > 1 else ""
            rows.append(row)
    rows = rows[: cfg.limit or len(rows)]
    if not rows:
        raise SystemExit(f"no row of {read} became an RL row")
    drawn = sorted(rows, key=lambda row: seed_of(cfg.seed, "held out", row["id"]))[: cfg.held_out]
    held = {row["id"] for row in drawn}
    write(Path(cfg.out), [row for row in rows if row["id"] not in held])
    if held:
        write(Path(cfg.out).with_name("rl_test.jsonl"), [row for row in rows if row["id"] in held])
    for what, count in why.most_common():
        print(f"{count:>8,} left out: {what}")
    for kind, count in Counter(row["kind"] for row in rows).most_common():
        print(f"{count:>8,} {kind}")
    print(f"{len(rows):>8,} of {read:,} rows -> {cfg.out}" + f", {len(held)} held out" * bool(held))


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    main(sys.argv[1:])
