"""The files of the 18 evaluation sets as their publishers lay them out, fields and nesting theirs,
content ours. `publish(name, folder)` writes them; {address: file} is what comes back.
"""

import base64
import csv
import importlib
import json
import zipfile
from itertools import cycle
from pathlib import Path

import pyarrow
from pyarrow import parquet

from tests.helpers.rows import jsonl

benchmarks = importlib.import_module("data.benchmarks.prepare")

ANNOTATOR = {
    "Steps": "1. Count the lamps.",
    "Number of steps": "1",
    "How long did this take?": "2 minutes",
    "Tools": "1. A lamp list",
    "Number of tools": "1",
}


def gaia(task: str, level: str, answer: str, file: str = "") -> dict:
    return {
        "task_id": task,
        "Question": f"How many lamps has {task}?",
        "Level": level,
        "Final answer": answer,
        "file_name": file,
        "file_path": f"2023/validation/{file}" if file else "",
        "Annotator Metadata": ANNOTATOR,
    }


GAIA = [gaia("t-1", "1", "1,000"), gaia("t-2", "2", "lamp.xlsx", "t-2.xlsx"), gaia("t-3", "3", "7")]
# WebThinker's list: ids of its own beside the hub's task_id
GAIA_LIST = [
    {
        "id": i,
        "task_id": row["task_id"],
        "Question": row["Question"],
        "answer": row["Final answer"],
        "Level": int(row["Level"]),
        "Annotator_Metadata": ANNOTATOR,
    }
    for i, row in enumerate([GAIA[2]], 1)
]


def hle(identity: str, question: str, image: str = "", kind: str = "exactMatch") -> dict:
    return {
        "id": identity,
        "question": question,
        "image": image,
        "image_preview": {"bytes": b"x", "path": None} if image else None,
        "answer": "B",
        "answer_type": kind,
        "author_name": "A. Author",
        "rationale": "Because.",
        "rationale_image": None,
        "raw_subject": "Lamps",
        "category": "Other",
        "canary": "BENCHMARK DATA SHOULD NEVER APPEAR",
    }


HLE = [
    hle("668", "Which lamp\nis \u00e9teinte?", kind="multipleChoice"),
    hle("669", "Which lamp is new, as corrected later?"),
    hle("670", "Which lamp is on the picture?", image="data:image/png;base64,AA=="),
    hle("671", "Which lamp is not in the list?"),
]


def hle_list_row(identity, question: str) -> dict:
    left_out = ("image", "image_preview", "rationale_image")
    row = {k: v for k, v in hle(identity, question).items() if k not in left_out}
    return row | {"has_image": False, "has_image_preview": False, "has_rationale_image": False}


# ARPO's list: the hub's ids; a copy may have ids of its own, other white space, decomposed letters
HLE_LIST = [
    hle_list_row("own-7", "Which lamp is e\u0301teinte?"),
    hle_list_row("669", "Which lamp is new?"),
    hle_list_row("670", HLE[2]["question"]),
]

HOTPOT = {
    "_id": "5a8b57f2",
    "answer": "Lumen",
    "question": "Which street has the lamp?",
    "supporting_facts": [["Lamp", 0], ["Street", 1]],
    "context": [["Lamp", ["It stands.", " It shines."]], ["Street", ["Long.", " Dark."]]],
    "type": "bridge",
    "level": "hard",
}

TWO_WIKI = {
    "_id": "13f5ad2c",
    "type": "compositional",
    "question": "Of which country is the maker of the lamp?",
    "context": [["Lamp", ["It was made by Ada."]], ["Ada", ["She is from Lampland."]]],
    "entity_ids": "Q1_Q2",
    "supporting_facts": [["Lamp", 0], ["Ada", 0]],
    "evidences": [["Lamp", "maker", "Ada"], ["Ada", "country of citizenship", "Lampland"]],
    "evidences_id": [["Q1", "maker", "Q2"], ["Q2", "country of citizenship", "Q3"]],
    "answer": "Lampland",
    "answer_id": "Q3",
}
ALIASES = [
    {"Q_id": "Q3", "aliases": ["Republic of Lampland"], "demonyms": ["Lamplander"]},
    {"Q_id": "Q2", "aliases": ["Ada the Elder"], "demonyms": []},
]

MUSIQUE = {
    "id": "2hop__12_34",
    "paragraphs": [
        {"idx": 0, "title": "A", "paragraph_text": "a lamp", "is_supporting": True},
        {"idx": 1, "title": "B", "paragraph_text": "a wick", "is_supporting": False},
    ],
    "question": "Where is the lamp?",
    "question_decomposition": [
        {"id": 12, "question": "lamp >> place", "answer": "NY", "paragraph_support_idx": 0}
    ],
    "answer": "NY",
    "answer_aliases": ["New York", "NY"],
    "answerable": True,
}

WEBWALKER = {
    "question": "When does the lamp fair close?",
    "answer": "The fair closes on March 21.",
    "root_url": "https://fair.example/",
    "info": {
        "domain": "conference",
        "source_website": ["https://fair.example/hours"],
        "golden_path": ["root->visit->hours"],
        "type": "single_source",
        "difficulty_level": "easy",
        "lang": "en",
    },
}

CANARY = "BENCHMARK DATA SHOULD NEVER APPEAR AS PLAIN TEXT"


def sealed(text: str) -> str:
    return base64.b64encode(
        bytes(a ^ b for a, b in zip(text.encode(), cycle(CANARY.encode())))
    ).decode()


XBENCH = {
    "id": "1",
    "prompt": sealed("这盏灯有多少流明？"),
    "answer": sealed("384流明"),
    "reference_steps": sealed("看灯。"),
    "canary": CANARY,
}

GSM8K_ANSWER = "She has 2/2=<<2/2=1>>1 lamp.\n#### 1,000"

ROWS = {
    "math500": {
        "problem": "What is $1+1$?",
        "solution": r"It is $\boxed{2}$.",
        "answer": "2",
        "subject": "Algebra",
        "level": 1,
        "unique_id": "test/algebra/1.json",
    },
    "aime24": {
        "id": 60,
        "problem": "How many lamps?",
        "solution": r"So $\boxed{025}$.",
        "answer": "025",
        "url": "https://example.org/1",
        "year": "2024",
    },
    "aime25": {"problem": "How many wicks?", "answer": 70, "id": "0"},
    "gsm8k": {"question": "How much is it?", "answer": GSM8K_ANSWER},
    "webwalker": WEBWALKER,
    "webwalker200": {"question": "When?", "answer": "In March."},
    "2wiki200": {"question": "Where?", "answer": ["NY", "New York"]},
    "hotpotqa200": {"question": "Who?", "answer": ["Ada"]},
    "musique200": {"question": "Whose?", "answer": ["Ada", "Ada the Elder"]},
    "bamboogle": {"question": "Who was it?", "answer": ["Ada"]},
}


def table(path: Path, rows: list[dict]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def archive(path: Path, members: dict[str, str | bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, text in members.items():
            file.writestr(name, text)
    return path


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def musique_archive(path: Path) -> Path:
    """As it is handed out: train, dev and test, answerable and full, and what a Mac adds."""
    members = {
        f"data/musique_{kind}_v1.0_{split}.jsonl": lines(
            [{**MUSIQUE, "id": f"2hop__{kind}_{split}", "question": f"Not this: {kind} {split}?"}]
        )
        for kind in ("ans", "full")
        for split in ("train", "dev", "test")
    }
    members["data/musique_ans_v1.0_dev.jsonl"] = lines([MUSIQUE])
    members["data/dev_test_singlehop_questions_v1.0.json"] = json.dumps({"squad": {}})
    members["__MACOSX/data/._musique_ans_v1.0_dev.jsonl"] = b"\x00\x05\x16\x07\x00"
    return archive(path, members)


def two_wiki_archive(path: Path) -> Path:
    other = {**TWO_WIKI, "_id": "other", "question": "Not this?"}
    members = {f"{split}.json": json.dumps([other]) for split in ("train", "test")}
    members |= {"dev.json": json.dumps([TWO_WIKI]), "id_aliases.json": lines(ALIASES)}
    return archive(path, members)


def xbench_table(path: Path) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(XBENCH))
        writer.writeheader()
        writer.writerow(XBENCH)
    return path


def publish(name: str, folder: Path) -> dict[str, Path]:
    """Writes the published files of a set into `folder`: {address: file}."""
    bench = benchmarks.BENCHMARKS[name]
    path = folder / Path(bench.url.partition("?")[0]).name
    if name.startswith("gaia"):
        (folder / "t-2.xlsx").write_bytes(b"a table")
        found = {bench.url: table(path, GAIA), benchmarks.GAIA + "t-2.xlsx": folder / "t-2.xlsx"}
        return found | {bench.subset_url: list_of(GAIA_LIST, folder / "dev.json")}
    if name == "hle":
        return {bench.url: table(path, HLE), bench.subset_url: jsonl(folder / "top.json", HLE_LIST)}
    if name in ("hotpotqa", "hotpotqa1000"):
        return {bench.url: list_of([HOTPOT], path)}
    if name == "2wiki":
        return {bench.url: two_wiki_archive(path)}
    if name == "musique":
        return {bench.url: musique_archive(folder / "musique_v1.0.zip")}
    if name == "xbench":
        return {bench.url: xbench_table(path)}
    return {bench.url: (table if name == "aime24" else jsonl)(path, [ROWS[name]])}


def list_of(rows: list[dict], path: Path) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path
