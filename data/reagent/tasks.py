"""The rows of stage 3: questions with their answers and the files that belong to them."""

import json
import os
import re
from functools import lru_cache
from pathlib import Path

from data.reagent.conversations import Unfit, content_text, first_of
from reagent.rows import check_rl_row

ENDINGS = "png|jpe?g|gif|webp|bmp|tiff?|wav|mp3|flac|m4a|ogg|pdf|docx?|xlsx?|pptx?|csv|txt|zip"
MEDIA = re.compile(rf"\.({ENDINGS})$", re.I)
NO_MEDIA = "its media file is not under files_dir (--media fetches it)"


def media_paths(value) -> list[str]:
    """Every text inside `value` (nested dicts and lists) that looks like the path of a file."""
    if isinstance(value, str):
        return [value] if MEDIA.search(value) and "://" not in value else []
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [path for item in items for path in media_paths(item)]


def resolve(path: str, files_dir: Path) -> str:
    """`path` as it is found under files_dir, or the one file there that shares most of its end
    (1.jpg of another set is another image); leaving files_dir is refused."""
    base = files_dir.resolve()
    wanted = (base / path.lstrip("/")).resolve()
    if wanted.is_relative_to(base) and wanted.is_file():
        return str(wanted.relative_to(base))
    ends: dict[int, list[Path]] = {}  # {how many parts of the path's end it shares: files}
    for found in names_under(base).get(Path(path).name, []):
        if found.resolve().is_relative_to(base):
            parts = found.parts[::-1], Path(path).parts[::-1]
            ends.setdefault(len(os.path.commonprefix(parts)), []).append(found.relative_to(base))
    if not ends:
        raise Unfit(NO_MEDIA)
    shared, best = max(ends), ends[max(ends)]
    of_another = shared == 1 and len(Path(path).parts) > 1 and len(best[0].parts) > 1
    if len(best) > 1 or of_another:
        raise Unfit("its media file has only namesakes under files_dir")
    return str(best[0])


@lru_cache(maxsize=1)
def names_under(folder: Path) -> dict[str, list[Path]]:
    """{name: paths} of every file under `folder`, walked once."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found.setdefault(path.name, []).append(path)
    return found


def gold_answers(answer) -> list[str]:
    """Accepted answers as texts: of a text, a number, a list (of lists) of them, or {"target": any
    of these}."""
    if isinstance(answer, dict):
        keys = (key for key in ("target", "ground_truth", "value") if key in answer)
        answer = answer.get(next(keys, None), answer)
    listed = answer if isinstance(answer, list) else [answer]
    flat = [item for part in listed for item in (part if isinstance(part, list) else [part])]
    if any(isinstance(item, bool) or not isinstance(item, (str, int, float)) for item in flat):
        raise Unfit("an answer is neither text nor a number")
    return [text for text in dict.fromkeys(str(item).strip() for item in flat) if text]


def media_of(record: dict, files_dir: Path) -> list[str]:
    """The files of a task, relative to files_dir; the fields may be JSON text."""
    paths = []
    for key in ("multimodal_info", "images", "image", "audios", "audio"):
        value = record.get(key)
        is_json = isinstance(value, str) and value[:1] in ("{", "[")
        paths += media_paths(json.loads(value) if is_json else value)
    return list(dict.fromkeys(resolve(path, files_dir) for path in paths))


def rl_row(record: dict, source: str, number: int, files_dir: Path) -> dict:
    """{"id", "question", "answer", "kind", "meta", "files"?}; `source` is the file's stem, `number`
    its line."""
    label = record.get("reward_model") if isinstance(record.get("reward_model"), dict) else {}
    question = first_of(record, "question", "problem", "prompt")
    if isinstance(question, list):
        asked = (turn for turn in reversed(question) if turn["role"] == "user")
        question = next((content_text(turn["content"]) for turn in asked), "")
    given = [record.get("ground_truth"), record.get("answer"), label.get("ground_truth")]
    answer = next((each for each in given if each not in (None, "", [])), None)
    if not isinstance(question, str) or answer is None:
        raise Unfit("no question or no ground truth")
    info = record.get("meta_info") if isinstance(record.get("meta_info"), dict) else {}
    dataset, category = str(info.get("source") or source), str(record.get("category") or "")
    is_math = re.search(r"math|deepscaler|aime|gsm8k", f"{category} {dataset} {source}", re.I)
    files = media_of(record, files_dir)
    question, marks = re.subn(r"<(image|audio|video)>\s*", "", question)
    if marks and not files:
        raise Unfit("a task with an image or a sound names no file")
    identity = record.get("id")
    row = {
        "id": f"{source}-{number:06d}" if identity in (None, "") else str(identity),
        "question": question.strip(),
        "answer": gold_answers(answer),
        "kind": "math" if is_math else "qa",
        "meta": {"dataset": dataset, **({"category": category} if category else {})},
    }
    if files:
        row["files"] = files
    if problem := check_rl_row(row):
        raise Unfit(problem)
    return row
