"""A file of questions and answers as RL rows, by one command.

    python data/questions.py FILE.csv|tsv|jsonl|json|parquet --out=data/own/rl_train.jsonl \
      [--held_out=100]

The columns are found by their usual names, or named: --question=COLUMN --answer=COLUMN. Several
accepted answers are a list, one text with --separator="|", or an object as SQuAD and TriviaQA have
it; MuSiQue's aliases count. Options in a column of their own go into the question, their answer
(letter, place or text) becomes a letter; a context or paragraphs become the row's pages, GAIA's
file its file. `kind` decides the rule that scores: a column of that name, --kind=, or by the
answer: a letter with options in the question is a choice, numbers and formulas are maths, what has
GAIA's keys is gaia, the rest is qa. Ends with a table; what is left out is named, so what its
publisher encrypts and what has no answer.
Then: grpo_unified.py --data=data/own/rl_train.jsonl, evaluate.py --dataset=own.
"""

import ast
import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from data.benchmarks.prepare import looks_sealed
from data.hotpotqa.prepare import documents, read_parquet, unpacked
from reagent.config import parse_config
from reagent.folder import write_whole
from reagent.rows import check_rl_row, seed_of
from reagent.scorers import rule_reward
from toolkit.text import last_boxed

QUESTION = "question question_stem problem query prompt instruction input frage".split()
ANSWER = "answer answers answerkey answer_key correct_answer possible_answers final_answer".split()
ANSWER += "ground_truth gold golds golden_answers target label expected solution output".split()
ANSWER += "response antwort".split()
CONTEXT = ("context", "passage")
ID = "id _id qid question_id task_id unique_id".split()
KINDS = ("math", "qa", "gaia", "choice")
_NUMBER = re.compile(r"[-+−]?[\d.,\s]*\d\s*%?|.*(?:\\frac|\\sqrt|\\pi|\^|\$.*\\).*", re.S)
_LIST = re.compile(r"\s*\[['\"]")
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
    if kind == ".parquet":
        try:
            yield from enumerate((record for _, record in read_parquet(path)), 1)
        except ValueError as error:
            raise SystemExit(str(error)) from error
        return
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
        held = whole.values() if isinstance(whole, dict) else [whole]
        for n, row in enumerate(next(filter(is_list, held), [whole]), 1):
            yield from ((n, each) for each in unrolled(row))
    else:
        for n, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    row = f"not a JSON line ({error})"
                yield n, row if isinstance(row, (dict, str)) else "not an object"


def unrolled(row) -> list[dict | str]:
    """The questions of an article of SQuAD's own file, else the row alone."""
    if not isinstance(row, dict):
        return ["not an object"]
    pages = row["paragraphs"] if is_list(row.get("paragraphs")) else []
    found = []
    for page in pages:
        for qa in page.get("qas") or [] if isinstance(page, dict) else []:
            found.append(row | {"context": page.get("context"), "paragraphs": None} | qa)
    return found or [row]


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


def listed(text: str) -> list:
    """The list of texts that a table's cell holds, as JSON or Python writes it. ValueError."""
    try:
        found = json.loads(text) if '["' in text else ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        found = None
    if not isinstance(found, list) or re.search(r"['\"]\s+['\"]", text):  # numpy leaves commas out
        raise ValueError("its list cannot be read: neither JSON nor Python's")
    return found


def answers_of(value, separator: str = "") -> list[str]:
    """The accepted answers in a field: the end of a solution (GSM8K's ####, \\boxed{}) counts, and
    all that an object holds (SQuAD's "text", TriviaQA's "value" and "aliases", Search-R1's
    "target")."""
    if isinstance(value, str) and _LIST.match(value):
        value = listed(value)
    if isinstance(value, str):
        value = last_boxed(value) or value.rpartition("####")[2]
        texts = value.split(separator) if separator else [value]
        return [text.strip() for text in texts if text.strip()]
    if isinstance(value, dict):
        own = {str(key).casefold(): told for key, told in value.items()}  # TriviaQA's own: capitals
        found = [own[key] for key in ("value", "text", "aliases", "target") if key in own]
        if not found:
            raise ValueError(f"an answer with the keys {', '.join(map(str, value))}")
        value = found
    if isinstance(value, list):
        return list(dict.fromkeys(text for each in value for text in answers_of(each)))
    if isinstance(value, bool):
        return ["yes", "true"] if value else ["no", "false"]
    if value is None or value != value:  # a table's empty cell is not a number
        return []
    whole = isinstance(value, float) and value.is_integer()
    return [str(int(value) if whole else value)]


def options_of(record: dict) -> tuple[list[str], list[str]]:
    """(their own labels, texts) of the options in a column of their own: MMLU's and MMLU-Pro's
    lists (no labels), ARC's {"label", "text"} of lists or list of such, MedQA's {"A": text}; ([],
    []) without one."""
    given = next((record[key] for key in ("choices", "options") if record.get(key)), [])
    given = listed(given) if isinstance(given, str) and _LIST.match(given) else given
    if is_list(given) and given and all(isinstance(option, dict) for option in given):
        given = {key: [option.get(key) for option in given] for key in ("label", "text")}
    if isinstance(given, dict):
        labels, texts = given.get("label", [*given]), given.get("text", [*given.values()])
    else:
        labels, texts = [], given if isinstance(given, list) else []
    return [*map(str, labels)], [str(text).strip() for text in texts]


def choice_of(labels: list[str], texts: list[str], answer) -> str:
    """The letter of the option that an answer means: its label, its place from 0, its text."""
    letters, told = [chr(ord("A") + i) for i in range(len(texts))], str(answer).strip()
    for own in (labels, [] if isinstance(answer, str) else [*map(str, range(len(texts)))], letters):
        if told in own:
            return letters[own.index(told)]
    if texts.count(told) != 1:
        raise ValueError("its answer is none of the options, or several")
    return letters[texts.index(told)]


def kind_of(question: str, answers: list[str]) -> str:
    if all(re.fullmatch(r"\(?[A-J]\)?\.?", answer) for answer in answers):
        return "choice" if _OPTIONS.search(question) else "qa"
    return "math" if all(_NUMBER.fullmatch(answer) for answer in answers) else "qa"


def asked_text(value) -> tuple[str, dict]:
    """(the text of a question, what else its object holds): a text, ARC's own {"stem", "choices"},
    or the one user turn of a prompt. ValueError."""
    if isinstance(value, dict) and isinstance(value.get("stem"), str):
        return value["stem"].strip(), value
    if is_list(value) and all(isinstance(turn, dict) for turn in value):
        users = [turn.get("content") for turn in value if turn.get("role") == "user"]
        value = users[0] if len(users) == 1 else value
    if isinstance(value, (dict, list)):
        raise ValueError("its question is no text")
    return str(value or "").strip(), {}


def docs_of(record: dict) -> list[dict]:
    """The pages of a record: one text, or what HotpotQA, 2Wiki and MuSiQue have. ValueError."""
    read = next((record[key] for key in CONTEXT if record.get(key)), None)
    read = unpacked(read)
    if isinstance(read, str):
        text = read.strip()
        return [{"title": str(record.get("title") or "context"), "text": text}] if text else []
    held = {"context": read, "paragraphs": record.get("paragraphs")}
    try:
        return documents({key: value for key, value in held.items() if value}) or []
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its context cannot be read ({error})") from error


def row_of(record: dict, name: str, cfg: Config) -> dict:
    """The RL row of a record; ValueError says why it is none."""
    if isinstance(record.get("reward_model"), dict):  # verl's
        record = record | record["reward_model"]
    ask, told = column(record, cfg.question, QUESTION), column(record, cfg.answer, ANSWER)
    for what, key, option in (("question", ask, "question"), ("answer", told, "answer")):
        if not key:
            known = ", ".join(map(str, record))
            raise ValueError(f"no column of the {what} (--{option}=COLUMN); there are {known}")
    question, more = asked_text(record[ask])
    labels, options = options_of(record | more)
    if looks_sealed(question) and "canary" in record:  # BrowseComp, xbench
        raise ValueError("its texts are encrypted")
    if record.get("image"):  # HLE
        raise ValueError("its question has an image")
    if record.get("answerable") is False or record.get("is_impossible") is True:
        raise ValueError("not answerable")
    if options and not _OPTIONS.search(question):
        question += "".join(f"\n{chr(ord('A') + i)}) {text}" for i, text in enumerate(options))
    given = choice_of(labels, options, record[told]) if options else record[told]
    aliases = answers_of(record.get("answer_aliases"))
    answers = list(dict.fromkeys(answers_of(given, cfg.separator) + aliases))
    if not question or answers in ([], ["?"]):  # of GAIA's test
        raise ValueError("no question" if not question else "no answer")
    own, gaia = column(record, "", ID), {"Final answer", "Level"} <= set(record)
    kind = cfg.kind or record.get("kind") or ("gaia" if gaia else None)
    row = {"id": str(record.get(own) or name), "question": question}
    row["answer"] = answers if len(answers) > 1 else answers[0]
    row["kind"] = kind if kind in KINDS else kind_of(question, answers)
    if row["kind"] == "qa" and not kind and "\\boxed" in str(record.get("solution")):
        row["kind"] = "math"  # MATH: "p - q" is no number
    row |= {key: record[key] for key in ("docs", "files", "meta") if is_rich(record.get(key))}
    if gaia and record.get("file_name"):
        row["files"] = [record["file_name"]]
    if "docs" not in row and (docs := docs_of(record)):
        row["docs"] = docs
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
                if (ask := asked(row)) in before:
                    raise ValueError("asked before")
            except ValueError as error:
                print(f"{path}:{line}: {error}", file=sys.stderr)
                why[str(error).partition(";")[0].partition(" (")[0]] += 1
                continue
            before.add(ask)
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
