"""Scores finished answers again: pass@1 of each file, pass@k over a folder.

    python evaluate.py score out/eval/results.jsonl        # by today's rules, beside what it says
    python evaluate.py score runs/ [--judge=http://…/v1]   # each file, then pass@k over all of them
    python evaluate.py score rows.jsonl                    # {"scorer", "pred", "gold"}: a line each

A row of a result has an answer (the last of its `attempts`, or pred, prediction, answer_pred,
response) and a reference (gold, ground_truth, answer); its rule is its `scorer`, that of its
`dataset`, of its `kind`, or --scorer. Sets that a judge scores (--judged=all: every set) are asked
for with --judge, else they keep the verdict that the row holds, as do those of the release whose
rule is not told. Key: JUDGE_API_KEY.
"""

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from data.official import rule_of, unknown
from data.report.markdown import percent, table
from reagent.config import check_values, parse_config
from reagent.rows import JsonlRows
from reagent.scorers import SCORER_OF_KIND, score
from results.benchmarks import DATASETS
from results.journal import opened
from results.statistics import mean_interval, pass_at_k
from results.verdicts import open_judge
from toolkit.text import last_boxed

PRED = "pred prediction answer_pred model_answer final_answer response output".split()
GOLD = "gold golds ground_truth reference answer".split()


@dataclass
class Config:
    scorer: str = ""  # of rows that name no scorer, data set or kind
    judged: str = "table"  # table: the sets that need it | all: every row
    judge: str = ""  # http://…/v1; "": rows that need it keep their verdict
    judge_model: str = ""  # "": the only one that the server lists
    judge_cache: str = "out/judge_cache.sqlite"
    patience_s: float = 600.0


@dataclass
class Answer:
    """A finished chain: what was answered, what is right, and what was said of it before."""

    file: str
    key: tuple  # (data set, id)
    question: str
    pred: str
    golds: list[str]
    scorer: str  # a rule, or judge
    before: bool | None
    secret: bool = False
    correct: bool | None = None


def answer_of(row: dict, file: str, place: int, cfg: Config) -> Answer:
    """The answer in a row of a result; ValueError says what it lacks."""
    row = opened(row)
    attempts = row.get("attempts") or []
    pred = (
        attempts[-1].get("answer") if attempts else next((row[k] for k in PRED if k in row), None)
    )
    if not attempts and not any(key in row for key in PRED):
        raise ValueError(f"no answer ({', '.join(PRED)} or attempts); it has {', '.join(row)}")
    gold = next((row[key] for key in GOLD if row.get(key) not in (None, "", [])), None)
    if gold is None:
        raise ValueError(f"no reference ({', '.join(GOLD)}); it has {', '.join(row)}")
    names = [row.get("dataset"), Path(file).stem, *(part.name for part in Path(file).parents)]
    dataset = next(
        (n for n in names if n in DATASETS), names[0] or Path(file).resolve().parent.name
    )
    said = row["correct"] if "correct" in row else verdict_of_release(row)
    if said is None and row.get("error"):  # the release's "[Failed]"
        pred, said = "", False
    known = DATASETS[dataset].scorer if dataset in DATASETS else SCORER_OF_KIND.get(row.get("kind"))
    scorer = row.get("scorer") or known or cfg.scorer or ("" if said is None else "judge")
    scorer = "judge" if cfg.judged == "all" else scorer
    if scorer != "judge" and (problem := unknown(scorer)):
        raise ValueError(f"data set {dataset!r}: {problem} (--scorer=NAME)")
    text = "" if pred is None else str(pred)
    golds = [str(each) for each in (gold if isinstance(gold, list) else [gold])]
    key = (dataset, str(row.get("id", row.get("question", place))))
    question, pred = str(row.get("question", "")), last_boxed(text) or text
    return Answer(file, key, question, pred, golds, scorer, said, "sealed" in row)


def verdict_of_release(row: dict) -> bool | None:
    """What the release's auto_judge wrote into a row."""
    judged = row.get("auto_judge")
    score = judged.get("score") if isinstance(judged, dict) else row.get("score")
    return None if score is None else score == 1


def read_answers(path: str, cfg: Config) -> list[Answer]:
    def check(row):
        try:
            answer_of(row, path, 0, cfg)
        except (AttributeError, TypeError, ValueError) as error:
            return str(error)

    rows = JsonlRows(path, check, unique=False)
    answers = [(row.get("error"), answer_of(row, path, n, cfg)) for n, row in enumerate(rows)]
    done = {each.key for error, each in answers if not error}
    # the release's next call writes a chain that failed once more, behind its failure
    return [each for error, each in answers if not error or each.key not in done]


def set_correct(answers: list[Answer], cfg: Config) -> str:
    """Scores every answer; -> the judge's name, or why its rows keep their verdicts."""
    asked = [each for each in answers if each.scorer == "judge" and each.pred.strip()]
    for each in answers:
        empty = not each.pred.strip()
        rule = each.scorer != "judge" and not empty
        each.correct = False if empty else each.before
        if rule:
            each.correct = score(rule_of(each.scorer), each.pred, each.golds)["correct"]
    if not asked or not cfg.judge:
        return "verdicts of the rows" if asked else "rule"
    with asyncio.Runner() as runner:
        judge = open_judge(cfg, runner)
        if judge is None:
            raise SystemExit(f"--judge={cfg.judge} cannot be asked")

        async def one(each):
            each.correct = await judge(each.question, each.golds, each.pred, secret=each.secret)

        async def every():
            await asyncio.gather(*map(one, asked))

        runner.run(every())
    return judge.name


def figures(name: str, answers: list[Answer], judge: str) -> dict:
    """A line of the table; chains of one question count as one question."""
    questions: dict[tuple, list[bool]] = {}
    for each in answers:
        questions.setdefault(each.key, []).append(each.correct is True)
    told = [each for each in answers if each.before is not None]
    changed = sum(bool(each.before) != bool(each.correct) for each in told)
    judged = any(each.scorer == "judge" for each in answers)
    line = {"data set": name, "judge": judge if judged else "rule", "questions": len(questions)}
    line["chains"] = len(answers)
    line["pass@1"] = percent(mean_interval(sum(r) / len(r) for r in questions.values()))
    line["unscored"] = sum(each.correct is None for each in answers)
    return line | {"changed": changed if told else "–"}


def pass_table(answers: list[Answer]) -> Iterator[dict]:
    """pass@k over all files, for the k that every question of a set has."""
    for dataset in dict.fromkeys(each.key[0] for each in answers):
        questions: dict[tuple, list[bool]] = {}
        for each in answers:
            if each.key[0] == dataset:
                questions.setdefault(each.key, []).append(each.correct is True)
        most = min(map(len, questions.values()))
        line = {"data set": dataset, "questions": len(questions), "k": most}
        for k in sorted({1, *(2**i for i in range(1, most.bit_length())), most}):
            shares = (pass_at_k(len(r), sum(r), k) for r in questions.values())
            line[f"pass@{k}"] = percent(mean_interval(shares))
        yield line


def result_files(path: str) -> list[str]:
    """A file, or the results.jsonl of a folder, else all its JSONL files but journals."""
    if not Path(path).is_dir():
        return [path]
    found = sorted(map(str, Path(path).rglob("results.jsonl")))
    others = (p for p in sorted(Path(path).rglob("*.jsonl")) if not p.name.startswith("journal-"))
    if not (found := found or list(map(str, others))):
        raise SystemExit(f"{path}: no *.jsonl in it or below")
    return found


def is_plain(path: str) -> bool:
    """Whether a file has rows of {"scorer", "pred", "gold"} alone."""
    with open(path, encoding="utf-8") as file:
        first = next((line for line in file if line.strip()), "{}")
    try:
        return set(json.loads(first)) == {"scorer", "pred", "gold"}
    except ValueError:
        return False


def score_rows(path: str) -> None:
    """One JSON line for each row of {"scorer", "pred", "gold"}."""

    def check(row):
        if not {"scorer", "pred", "gold"} <= set(row) or row["gold"] == []:
            return "needs scorer, pred and at least one gold"
        return unknown(row["scorer"])

    for row in JsonlRows(path, check, "score takes rows with scorer, pred and gold, or results"):
        print(json.dumps(score(rule_of(row["scorer"]), row["pred"], row["gold"])))


def main(argv: list[str]) -> None:
    keys = [arg for arg in argv if arg.startswith("-")]
    paths = [arg for arg in argv if arg not in keys]
    if {"-h", "--help"} & set(keys) or not paths:
        print(__doc__)
    cfg = parse_config(Config, keys)
    check_values(cfg, "judged=table|all")
    if not paths:
        raise SystemExit("score needs files or folders of results")
    if len(paths) == 1 and Path(paths[0]).is_file() and is_plain(paths[0]):
        return score_rows(paths[0])
    answers = [
        each for path in paths for file in result_files(path) for each in read_answers(file, cfg)
    ]
    judge, lines = set_correct(answers, cfg), []
    for file, dataset in Counter((each.file, each.key[0]) for each in answers):
        those = [each for each in answers if (each.file, each.key[0]) == (file, dataset)]
        lines.append({"file": file} | figures(dataset, those, judge))
    print("\n".join(table(lines)).strip())
    print("\nPass@k over all files, unbiased, with 95 % intervals over questions:")
    print("\n".join(table_of(list(pass_table(answers)))).strip())


def table_of(lines: list[dict]) -> list[str]:
    """A table of lines whose columns differ."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    return table([{name: line.get(name, "–") for name in names} for line in lines])


if __name__ == "__main__":
    main(sys.argv[1:])
