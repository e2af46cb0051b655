"""The 18 evaluation sets of the release (the paper has 12 benchmarks): tools, scorers and rows."""

import dataclasses
import hashlib
import json
import os
import tomllib
from collections import Counter
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

from reagent.config import read_prompt
from reagent.folder import read_json
from reagent.rows import JsonlRows, check_rl_row, shown_question
from results.journal import unsealed
from toolkit.files import FILE_READERS


@dataclass(frozen=True)
class DataSet:
    """How a benchmark is run. scorer "judge": an LLM compares answers; "": by the row's kind."""

    tools: str
    scorer: str
    rollouts: int = 1
    max_turns: int = 30  # turns with tool calls (paper, appendix C.3)
    seconds_per_call: float = 30.0
    prompt_file: str = ""  # its system prompt; "": that of training. --prompt_file goes before it


TABLE = Path(__file__).parents[1] / "config/benchmarks.toml"
DATASETS = {name: DataSet(**row) for name, row in tomllib.loads(TABLE.read_text()).items()}
OWN_ROWS = DataSet("search,browse,python", "")  # --dataset=rows.jsonl
NOT_SHOWN = ("encrypted", "canary", "solution", "dataset")  # keys of meta


@dataclass
class Task:
    """One data set of a run: rows, ids unique, each with a `digest` of its file's; one that was
    encrypted has its key as `canary`."""

    name: str
    spec: DataSet
    rows: list[dict]
    rollouts: int
    longest: list[str]  # its longest questions, with those beyond --limit: the room for prompts
    revision: str = ""  # where the rows are from
    limits: object = None  # rollout.Limits

    @property
    def subset(self) -> str:
        """Names the questions and references that the numbers are about."""
        return hashlib.sha256("".join(row["digest"] for row in self.rows).encode()).hexdigest()[:8]

    def keys(self):
        """(dataset, id, rollout) and the row, in the order of the final file."""
        for row in self.rows:
            for n in range(self.rollouts):
                yield (self.name, row["id"], n), row


def load_tasks(cfg) -> list[Task]:
    """Reads and checks the rows of every data set before anything starts."""
    tasks = [load_task(name, cfg) for name in cfg.dataset]
    twice = [name for name, n in Counter(task.name for task in tasks).items() if n > 1]
    if twice:
        raise SystemExit(f"--dataset: {twice[0]} is given twice")
    known = {row["id"] for task in tasks for row in task.rows}
    if missing := [i for i in cfg.ids if i not in known]:
        raise SystemExit(f"--ids: no question {', '.join(missing[:5])} in {', '.join(cfg.dataset)}")
    return tasks


def load_task(name: str, cfg) -> Task:
    if name.endswith(".jsonl"):
        path, name, hint = name, Path(name).stem, ""
        spec = DATASETS.get(name, OWN_ROWS)
    elif name in DATASETS:
        path, spec = str(Path(cfg.data_dir) / f"{name}.jsonl"), DATASETS[name]
        hint = f"run python data/benchmarks/prepare.py --dataset={name}"
    elif (held_out := Path(cfg.data_dir).parent / name / "rl_test.jsonl").is_file():
        path, spec, hint = str(held_out), OWN_ROWS, ""
    else:
        known = f"{', '.join(DATASETS)}, files of RL rows (*.jsonl) and, once prepared, atlas"
        raise SystemExit(f"--dataset: no {name!r}: there are {known}")
    changes = dict(tools=cfg.tools, max_turns=cfg.max_turns, seconds_per_call=cfg.seconds_per_call)
    changes["scorer"] = "judge" if cfg.judged == "all" else ""
    spec = dataclasses.replace(spec, **{key: value for key, value in changes.items() if value})
    read_prompt(spec.prompt_file, "")  # a missing one is told here
    rows = read_rows(path, hint)
    longest = sorted((shown_question(row) for row in rows), key=len)[-20:]
    if cfg.ids:
        rows = [row for row in rows if row["id"] in cfg.ids]
    rows = rows[: cfg.limit] if cfg.limit else rows
    check_files(rows, spec, path, cfg.files_dir)
    rollouts = cfg.rollouts or spec.rollouts
    return Task(name, spec, rows, rollouts, longest, revision=revision_of(path))


def revision_of(path: str) -> str:
    """The publisher's revision as the preparation wrote it down, else the digest of the file."""
    digest, meta = hashlib.sha256(Path(path).read_bytes()).hexdigest(), Path(path)
    if not (meta := meta.with_suffix(".meta.json")).is_file():
        return f"{path}, sha256 {digest[:12]}"
    told = read_json(meta, "revision", "sha256")
    return told["revision"] + ("" if told["sha256"] == digest else ", changed since")


def read_rows(path: str, hint: str = "") -> list[dict]:
    """The rows, decrypted. A question that stands there twice is two rows: the second of two equal
    ids gets "#2" behind it (or the next number that is free)."""
    rows, seen = list(JsonlRows(path, check_rl_row, hint, unique=False)), set()
    for row in rows:
        names = chain([str(row["id"])], (f"{row['id']}#{copy}" for copy in count(2)))
        row["id"] = next(name for name in names if name not in seen)
        seen.add(row["id"])
        whole = json.dumps([row["question"], row["answer"], row.get("docs"), row.get("files")])
        row["digest"] = hashlib.sha256(whole.encode()).hexdigest()[:12]
        meta = row.get("meta") or {}
        if meta.get("encrypted"):
            try:
                row["canary"] = meta["canary"]
                for key in ("question", "answer"):
                    row[key] = unsealed(row[key], row["canary"])
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                why = f"cannot be decrypted with its canary ({error})"
                raise SystemExit(f"{path}: row {row['id']} {why}") from error
        row["meta"] = {key: value for key, value in meta.items() if key not in NOT_SHOWN}
    return rows


def check_files(rows: list[dict], spec: DataSet, path: str, files_dir: str) -> None:
    """Every attachment must lie inside files_dir, whatever links lead out of it."""
    if not FILE_READERS & set(spec.tools.split(",")):
        return
    base, missing = os.path.realpath(files_dir), []
    for name, row_id in ((name, row["id"]) for row in rows for name in row.get("files") or []):
        real = os.path.realpath(os.path.join(base, name))
        if not (os.path.isfile(real) and os.path.commonpath([base, real]) == base):
            missing.append(f"{name} (row {row_id})")
    if missing:
        names = ", ".join(missing[:5]) + (" …" if len(missing) > 5 else "")
        raise SystemExit(f"{path}: {len(missing)} files are not in {files_dir}: {names}")
